"""An engine on native kernels: the plain engine's answers, also from kept programs."""

import shutil
from pathlib import Path

import pytest

from novajax import LLM, SamplingParams
from novajax.core.errors import ConfigError
from novajax.kernels.native import library

MODEL = str(Path(__file__).parents[2] / "checkpoints" / "nova-small")
PROMPTS = ["Once upon a time", "The cat and the dog", "What is 12 + 30?"]
SHAPE = {"max_rows": 2, "max_context_tokens": 128, "chunk_tokens": 32, "deterministic": True}
PRECISION = {"quantization": "int8", "kv_cache_dtype": "int8"}


def answers(**options) -> list[tuple[int, ...]]:
    with LLM(MODEL, **SHAPE, **PRECISION, **options) as llm:
        return [tuple(output.tokens) for output in llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=24))]


def test_native_answers_are_the_plain_ones_also_from_kept_programs(tmp_path: Path):
    if not any(map(shutil.which, library.COMPILERS)):
        pytest.skip("no C++ compiler: the native kernels are not built")
    cache = tmp_path / "cache"
    plain = answers(native_kernels="off")
    assert answers(native_kernels="on", compile_cache=str(cache)) == plain
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert answers(native_kernels="on", compile_cache=str(cache)) == plain
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == kept


def test_native_kernels_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="compile_cache"):
        LLM(MODEL, native_kernels="on")
    with pytest.raises(ConfigError, match="native"):
        LLM(MODEL, dtype="bfloat16")
