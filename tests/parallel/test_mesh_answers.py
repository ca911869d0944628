"""Engines on 8 virtual devices give the tokens of an engine on one: a covering part of the matrix, the rest is one command:

python tests/parallel/mesh_answers.py --models DIR ... --meshes tensor=2 stage=2,context=2,tensor=2 ...
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NANO = ROOT / "tests" / "data" / "nano"


def run(model: Path, *meshes: str, how: tuple[str, ...] = ()) -> list[str]:
    command = [sys.executable, str(Path(__file__).parent / "mesh_answers.py"), *how, "--models", str(model), "--meshes", *meshes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith(f"{model.name} | ")]
    assert done.returncode == 0, (lines, done.stderr[-3000:])
    assert len(lines) == len(meshes)
    return lines


def test_every_axis_of_a_dense_model():
    lines = run(NANO / "llama3", "data=2,stage=2,tensor=2", "stage=2,context=2,tensor=2", "tensor=8")
    assert all("| same" in line for line in lines[:2])
    assert "refused: " in lines[2]
    assert "does not divide by 8" in lines[2]


@pytest.mark.parametrize(
    ("name", "mesh"), [("mixtral", "data=2,tensor=4"), pytest.param("gemma3", "stage=2,context=2", marks=pytest.mark.slow)]
)
def test_experts_and_windows(name: str, mesh: str):
    assert all("| same" in line for line in run(NANO / name, mesh))


def test_eight_ways_with_two_kv_heads():
    """Tensor 2 x query 4."""
    assert all("| same" in line for line in run(ROOT / "checkpoints" / "nova-small", "tensor=8"))


@pytest.mark.slow
def test_alternating_windows_over_stages():
    """Four layers of two kinds: each stage holds a whole period."""
    assert all("| same" in line for line in run(NANO / "gemma2", "stage=2,tensor=2", how=("--repeat=2",)))


def test_quantized_weights_and_pages_on_every_axis():
    """Weight-only: the scales of a shard are those of the whole, and sums are float32. In pages each token and head has its own scale."""
    how = ("--quantization=int8", "--kv_cache_dtype=int8-int4")
    assert all("| same" in line for line in run(NANO / "llama3", "stage=2,tensor=2,context=2", how=how))
