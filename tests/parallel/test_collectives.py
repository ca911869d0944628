"""What a step may move between devices, and what a device holds: the written table against the compiled program.

For L layers, with c context shards. A kind that is not listed must not occur: it would be a resharding that crept in.
tensor x query   2L + 1 all-reduces (attention out, MLP down; embedding), 1 all-gather (logits)
stage            1 permute, 2 all-reduces (embedding in, last activations out), 1 all-gather (logits)
context, decode  2L all-reduces (best score; sums)
context, prefill also L x (2 (c - 1) for keys and values + 3 (c - 1) + 1 for queries with results) permutes, 1 all-reduce (drawing row)
data             nothing
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NANO = Path(__file__).parents[1] / "data" / "nano"
MESHES = [
    {},
    {"tensor_parallel": 2},
    {"tensor_parallel": 4},
    {"stage": 2},
    {"context": 2},
    {"data": 2},
    {"data": 2, "stage": 2, "tensor_parallel": 2},
]


@pytest.fixture(scope="module", params=["llama3", "mixtral"])
def looks(request) -> dict[str, dict]:
    """By mesh, as text."""
    command = [sys.executable, str(Path(__file__).parent / "step_collectives.py"), str(NANO / request.param), json.dumps(MESHES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {" ".join(f"{axis}={size}" for axis, size in one["mesh"].items()): one for one in found}


def test_collectives_are_those_of_the_table(looks):
    layers = looks[""]["layers"]
    assert looks[""]["decode"] == looks[""]["prefill"] == {}
    assert looks["data=2"]["decode"] == looks["data=2"]["prefill"] == {}
    for mesh in ("tensor_parallel=2", "tensor_parallel=4"):
        assert looks[mesh]["decode"] == looks[mesh]["prefill"] == {"all-gather": 1, "all-reduce": 2 * layers + 1}
    assert looks["stage=2"]["decode"] == looks["stage=2"]["prefill"] == {"all-gather": 1, "all-reduce": 2, "collective-permute": 1}
    assert set(looks["context=2"]["decode"]) == {"all-reduce"}
    assert looks["context=2"]["decode"]["all-reduce"] in (2 * layers, 3 * layers)  # the two sums travel together or apart
    assert looks["context=2"]["prefill"]["collective-permute"] == layers * (2 + 3 + 1)
    both = looks["data=2 stage=2 tensor_parallel=2"]
    assert both["decode"]["collective-permute"] == 1
    assert both["decode"]["all-reduce"] == 2 * both["slots"] + 1 + 2


def test_a_device_holds_its_share(looks):
    whole = looks[""]
    norms = 0.05 * whole["weights_bytes"]  # replicated: small
    for mesh, weights, kv in (
        ("tensor_parallel=2", 2, 2),
        ("tensor_parallel=4", 4, 2),  # 2 KV heads
        ("stage=2", 2, 2),
        ("context=2", 1, 2),
        ("data=2", 1, 1),
        ("data=2 stage=2 tensor_parallel=2", 4, 4),
    ):
        assert abs(looks[mesh]["weights_bytes"] - whole["weights_bytes"] / weights) < norms, mesh
        assert looks[mesh]["kv_bytes_per_token"] == whole["kv_bytes_per_token"] / kv, mesh
