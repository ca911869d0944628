"""The planner against the compiled program: the same collectives with the same bytes, the same arguments, and a straight line in depth."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from planner_world import ROOT, tiny, toy_cluster

from novajax.core.config import parse_mesh
from novajax.parallel.axes import slots_per_stage
from novajax.planner.formats import profile
from novajax.planner.layout import make_layout
from novajax.planner.links import Tokens, collectives
from novajax.planner.memory import device_kv_token_bytes, weights_bytes

ROWS, CHUNK, PAGES, PAGE_TOKENS = 4, 16, 32, 8
LAYOUTS = ("tensor=2", "tensor=4", "stage=4,tensor=2", "context=4,tensor=2", "stage=2,context=2,tensor=2", "data=2,tensor=4")


def run(what: str) -> dict:
    script = Path(__file__).with_name("step_programs.py")
    done = subprocess.run([sys.executable, str(script), what], cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled() -> dict:
    return run("layouts")


@pytest.mark.parametrize("chunk", [0, CHUNK])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_step_says_what_the_planner_expects(compiled, name, chunk):
    """Kind, devices in a group, bytes and number, all of them."""
    sizes, booking = tiny(8), toy_cluster(8, 1)
    layout = make_layout(parse_mesh(name), sizes.kv_heads, 8)
    layers = slots_per_stage(sizes.layers, layout.stage)
    expected: Counter = Counter()
    drawing = ROWS + (1 if chunk else 0)
    # Without stages XLA gathers the logits behind their padding to the sampler's rows.
    tokens = Tokens(ROWS, chunk, 2 * ROWS if layout.stage == 1 else drawing)
    for one in collectives(sizes, layout, booking, layers, tokens, 4):
        expected[one.kind, layout.size(one.axes), one.bytes] += one.count
    found: Counter = Counter()
    for one in compiled[f"{name} {chunk}"]["collectives"]:
        found[one["kind"], one["group"], one["bytes"]] += one["per_layer"] * layers + one["once"]
    assert found == expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_step_s_arguments_are_the_planner_s_bytes(compiled, name):
    """Weights and pool exactly; beside them only the upload, last tokens and what travels between stages."""
    sizes, form = tiny(8), profile("float32")
    layout = make_layout(parse_mesh(name), sizes.kv_heads, 8)
    weights = sum(weights_bytes(sizes, form, layout).values())
    pool = PAGES * PAGE_TOKENS * device_kv_token_bytes(sizes, form, layout)
    rest = compiled[f"{name} 0"]["argument_bytes"] - weights - pool
    assert 0 < rest < 4 * (layout.stage * 256 + (ROWS + CHUNK) * sizes.embed + 64)
    assert compiled[f"{name} 0"]["alias_bytes"] >= pool


@pytest.mark.slow
def test_the_extrapolation_equals_a_full_compile_of_8b():
    found = run("depth")
    for chunk in (0, 64):
        short, whole = found[f"short {chunk}"], found[f"whole {chunk}"]
        assert short["layers"] == whole["layers"] == 16
        for kind in ("argument_bytes", "output_bytes", "alias_bytes"):
            assert short[kind] == whole[kind]
        line = {(one["kind"], one["group"], one["bytes"]): one["per_layer"] * 16 + one["once"] for one in short["collectives"]}
        assert line == {(kind, group, size): times for kind, group, size, times in whole["collectives"]}
        assert short["temp_bytes"] == pytest.approx(whole["temp_bytes"], rel=0.25)  # its line is an estimate
