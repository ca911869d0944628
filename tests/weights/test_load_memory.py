"""What a load costs in anonymous memory beyond the arrays it makes: bounded, however large the checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).parents[2]
BOUND_BYTES = 128 << 20
"""The checkpoint is 269 MB in five files and becomes arrays of 538 MB: a second copy of either would be seen."""


class Loaded(msgspec.Struct):
    seconds: float
    array_bytes: int
    before_anonymous_bytes: int
    peak_anonymous_bytes: int


def run(*arguments: str) -> bytes:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, timeout=280, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="anonymous memory is read from Linux's /proc")
def test_memory_beyond_the_arrays_is_bounded(tmp_path: Path):
    made = run("bench.shapes", "--shape=135m", "--weights_dtype=bfloat16", "--shard_mib=64", f"--cache_dir={tmp_path}")
    directory = Path(made.decode().strip())
    stored_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert len(list(directory.glob("*.safetensors"))) == 5
    loaded = msgspec.json.decode(run("bench.load", f"--child={directory}", "--dtype=float32"), type=Loaded)
    assert loaded.array_bytes == pytest.approx(2 * stored_bytes, rel=0.001)
    over_bytes = loaded.peak_anonymous_bytes - loaded.before_anonymous_bytes - loaded.array_bytes
    assert loaded.peak_anonymous_bytes > loaded.array_bytes, "the meter saw the arrays"
    assert over_bytes < BOUND_BYTES
