"""`python -m novajax.plan`: the published models and the reference document, JSON, chart, refusals, time."""

import json
import subprocess
import sys
import time

import msgspec
import pytest
from planner_world import ROOT, architecture

from novajax.core.errors import CapacityError, ConfigError
from novajax.core.plan import PlanConfig
from novajax.models.sizes import model_sizes
from novajax.planner.plan import Plan, make_plan, scaling
from novajax.planner.report import report


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "novajax.plan", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def sizes():
    return model_sizes(architecture("405b"))


def test_405b_on_sixteen_hosts(tmp_path):
    chart, began = tmp_path / "bounds.png", time.monotonic()
    done = run("--config=configs/llama-3.1-405b.yaml", "--nodes=16", f"--png={chart}")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 60
    assert "405,853,388,800 parameters, 811,706,777,600 bytes in bf16, 516,096 bytes of KV per token in bf16" in done.stdout
    assert "2 masked layers of zeros" in done.stdout
    assert "TensorRT-LLM" in done.stdout
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_the_reference_document_is_planned_with_its_warnings():
    done = run("--config=configs/llama-405b-reference.yaml", "--json")
    assert done.returncode == 0, done.stderr
    plan = msgspec.json.decode(done.stdout, type=Plan)
    assert plan.mesh == {"data": 1, "stage": 8, "context": 2, "tensor_parallel": 8}
    assert (plan.chosen.profile, plan.chosen.layout.group_devices) == ("int8", 128)
    crossing = next(line for line in plan.warnings if "crosses hosts" in line)
    assert "spans 4 hosts of 2 GPUs" in crossing
    assert "nearest better layout: tensor 2 x stage 8 x context 2" in crossing
    assert any("first token in 200 ms" in line for line in plan.warnings)
    assert "not honoured here: performance.cache_size" in done.stderr
    assert "model.quantization" not in done.stderr


def test_json_round_trip(sizes):
    plan = make_plan("m", sizes, PlanConfig(nodes=16))
    plan = msgspec.structs.replace(plan, scaling=scaling(sizes, PlanConfig(nodes=16)))
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan
    assert report(plan)


def test_what_cannot_fit_is_refused_with_numbers(sizes):
    with pytest.raises(CapacityError, match=r"no layout of these devices fits: tensor 8 bf16: does not fit: weights 94\.50 GiB"):
        make_plan("m", sizes, PlanConfig(nodes=1))
    done = run("--config=configs/llama-3.1-405b.yaml", "--nodes=1")
    assert done.returncode == 3
    assert "exceed it by" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "tensor=256"}, "needs 256 devices; the booking has 128"),
        ({"layout": "tensor=6"}, "one must divide the other"),
        ({"layout": "tensor=8,stage=16,context=3"}, "needs 384 devices"),
        ({"chip": "abacus"}, "chip 'abacus' is not known"),
        ({"profile": "best"}, "profile 'best' is not known"),
        ({"context_tokens": 1 << 20}, "exceeds the model's 131072"),
        ({"prompt_tokens": 9000}, "do not fit in context_tokens=8192"),
        ({"layout": "tensor=8"}, "exceed it by"),
    ],
)
def test_refusals_name_what_is_wrong(sizes, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_plan("m", sizes, msgspec.structs.replace(PlanConfig(nodes=16), **changes))


def test_profile_auto_takes_the_most_exact_that_fits(sizes):
    plan = make_plan("m", sizes, PlanConfig(nodes=1, profile="auto"))
    assert plan.chosen.profile == "balanced"
    assert any("bf16 do not" in line for line in plan.why)
    assert make_plan("m", sizes, PlanConfig(nodes=2, profile="auto")).chosen.profile == "bf16"


def test_wanted_latencies_move_the_choice(sizes):
    free = make_plan("m", sizes, PlanConfig(nodes=16)).chosen
    fast = make_plan("m", sizes, PlanConfig(nodes=16, token_time="20ms")).chosen
    assert fast.fitted()[1].token_s <= 0.02 < free.fitted()[1].token_s
    hopeless = make_plan("m", sizes, PlanConfig(nodes=16, token_time="1ms"))
    assert any("cannot be met: token in 1 ms" in line for line in hopeless.warnings)


def test_a_small_model_gets_replicas_rather_than_a_pipeline():
    plan = make_plan("m", model_sizes(architecture("8b")), PlanConfig(nodes=1))
    assert plan.mesh == {"data": 1, "stage": 1, "context": 1, "tensor_parallel": 1}
    assert plan.chosen.layout.replicas == 8
    assert "the smallest group nearly as fast" in plan.why[0]


def test_more_nodes_never_give_less(sizes):
    shown = [one for one in scaling(sizes, PlanConfig()) if not one.refused]
    assert [one.nodes for one in shown] == [2, 4, 8, 16, 32, 64]
    rates = [one.total_serial_tokens_per_s for one in shown]
    assert rates == sorted(rates)


def test_compile_adds_what_xla_says():
    """On virtual CPU devices, or virtual GPUs where the CUDA plugin is installed."""
    sizes = ("--context_tokens=256", "--prompt_tokens=64", "--output_tokens=64", "--chunk_tokens=64", "--rows=8")
    done = run("--model=checkpoints/nova-small", "--nodes=1", "--layout=tensor=2", *sizes, "--compile", "--json")
    assert done.returncode == 0, done.stderr
    decode, mixed = msgspec.json.decode(done.stdout, type=Plan).compiled
    assert decode.bucket == "8 decode rows"
    assert mixed.bucket == "8 decode rows and a chunk of 64"
    for one in (decode, mixed):
        assert sum(said.per_layer for said in one.collectives if said.kind == "all-reduce") == 2
        assert not [said for said in one.collectives if said.kind != "all-reduce" and said.per_layer]
        assert one.alias_bytes > 0


def test_a_directory_can_be_planned_and_nonsense_is_refused(tmp_path):
    done = run("--model=checkpoints/nova-small", "--nodes=1", "--context_tokens=256", "--prompt_tokens=64", "--output_tokens=64", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["comparisons"] == []
    assert run().returncode == 1
    (tmp_path / "bad.yaml").write_text("speed: 9\n")
    refused = run(f"--config={tmp_path / 'bad.yaml'}")
    assert refused.returncode == 1
    assert "unknown section 'speed'" in refused.stderr
