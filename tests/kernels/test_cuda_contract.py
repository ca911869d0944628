"""What the serving step becomes on an H200, read from the compiled program. Needs the CUDA compiler (`pip install .[plan]`) and no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("cuda_programs.py")
CASES = ("bfloat16", "int8", "int8-a8", "fp8", "int4-128", "KV int8", "tensor=2", "chunk")
LAYERS, ROWS, EMBED, VOCAB = 2, 16, 4096, 128256
Q_PROJ = EMBED * EMBED
"""Numbers of the smallest large matrix."""


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, env=environment, timeout=600)
    if done.returncode == 3:
        pytest.skip("the CUDA compiler is not installed: pip install .[plan]")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_nothing_as_large_as_a_matrix_is_written_and_pages_stay_where_they_are(programs, case: str):
    found = programs[case]
    kind, numbers = found["largest"]
    assert numbers < Q_PROJ, kind
    assert found["alias_bytes"] == found["pool_bytes"] // (2 if case == "tensor=2" else 1)
    assert found["temp_bytes"] < (128 << 20 if case == "chunk" else 2 * Q_PROJ)


@pytest.mark.parametrize("case", CASES)
def test_attention_is_one_kernel_a_layer_and_a_block(programs, case: str):
    assert programs[case]["kernels"] == LAYERS * (2 if case == "chunk" else 1)
    assert programs[case]["sorts"] == 0


def test_two_devices_add_twice_a_layer(programs):
    sums = {(kind, group, size): times for kind, group, size, times in programs["tensor=2"]["collectives"]}
    assert sums["all-reduce", 2, ROWS * EMBED * 4] == 2 * LAYERS
    assert sum(times for (kind, _, _), times in sums.items() if kind == "all-reduce") == 2 * LAYERS + 1  # and the embedding's rows
    assert [key for key in sums if key[0] not in ("all-reduce", "all-gather")] == []
    assert programs["bfloat16"]["collectives"] == []
