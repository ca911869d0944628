import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from weight_files import NANO, copy_nano, split, write_raw

from novajax.core.errors import WeightsError
from novajax.weights.safetensors import INDEX, SINGLE, SafetensorsDirectory


def f32(start: int, stop: int, shape: list[int]) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


CORRUPT = {
    "header of 2^63 bytes": ({}, b"", 2**63),
    "header of 200 MB": ({}, b"", 200_000_000),
    "header longer than the file": ({}, b"", 100),
    "header is no JSON": (b"{nonsense", b"", None),
    "header is no UTF-8": (b'{"\xff": 1}', b"", None),
    "shape overflows": ({"a": f32(0, 8, [2**62, 2**62])}, b"\0" * 8, None),
    "shape and bytes differ": ({"a": f32(0, 8, [3])}, b"\0" * 8, None),
    "offset past the end": ({"a": f32(0, 16, [4])}, b"\0" * 8, None),
    "offsets reversed": ({"a": f32(8, 0, [2])}, b"\0" * 8, None),
    "overlap": ({"a": f32(0, 8, [2]), "b": f32(4, 12, [2])}, b"\0" * 12, None),
    "hole": ({"a": f32(0, 8, [2]), "b": f32(12, 20, [2])}, b"\0" * 20, None),
    "trailing junk": ({"a": f32(0, 8, [2])}, b"\0" * 9, None),
    "unknown dtype": ({"a": {"dtype": "Q9", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8, None),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_header_is_refused_by_file(tmp_path: Path, case: str):
    header, data, length = CORRUPT[case]
    write_raw(tmp_path / SINGLE, header, data, length=length)
    with pytest.raises(WeightsError, match=f"{SINGLE}: cut or corrupt"):
        SafetensorsDirectory(tmp_path)


@pytest.mark.parametrize("size_bytes", [0, 7, 8, 100, 5000, -1])
def test_a_cut_file_is_refused_by_name(tmp_path: Path, size_bytes: int):
    copy_nano("llama3", tmp_path)
    os.truncate(tmp_path / SINGLE, size_bytes if size_bytes >= 0 else (tmp_path / SINGLE).stat().st_size - 1)
    with pytest.raises(WeightsError, match=f"{SINGLE}: cut or corrupt"):
        SafetensorsDirectory(tmp_path)


def test_every_slice_equals_numpys(tmp_path: Path):
    rng = np.random.default_rng(0)
    tensors = {
        "f": rng.standard_normal((7, 5, 6)).astype(np.float32),
        "h": rng.standard_normal((9, 4)).astype(np.float16),
        "b": rng.standard_normal((3, 8)).astype(ml_dtypes.bfloat16),
        "v": rng.standard_normal(11).astype(np.float32),
        "s": np.array(3.5, np.float32),
        "none": np.zeros((0, 4), np.float32),
    }
    save_file(tensors, tmp_path / SINGLE)
    with SafetensorsDirectory(tmp_path) as directory:
        assert directory.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert directory.read(name, (slice(None),) * tensor.ndim).tobytes() == tensor.tobytes()
            for _ in range(30):
                cuts = [sorted(rng.integers(0, size + 1, 2)) for size in tensor.shape]
                index = tuple(slice(int(low), int(high)) for low, high in cuts)
                read = directory.read(name, index)
                assert read.shape == tensor[index].shape
                assert read.tobytes() == tensor[index].tobytes()


def test_a_file_cut_after_it_was_opened(tmp_path: Path):
    copy_nano("llama3", tmp_path)
    with SafetensorsDirectory(tmp_path) as directory:
        last = max(directory.tensors.values(), key=lambda tensor: tensor.stop)
        os.truncate(tmp_path / SINGLE, last.stop - 4)
        with pytest.raises(WeightsError, match=f"{SINGLE}: ends at byte {last.stop - 4}, inside '{last.name}'"):
            directory.read(last.name, (slice(None),) * len(last.shape))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return split(copy_nano("llama3", tmp_path), 3)


SECOND, THIRD = "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"


def rewrite_index(directory: Path, change) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def test_sharded_reads_equal_single(sharded: Path):
    whole = load_file(NANO / "llama3" / SINGLE)
    with SafetensorsDirectory(sharded) as directory:
        assert len(directory.files) == 3
        for name, tensor in whole.items():
            assert directory.read(name, (slice(None),) * tensor.ndim).tobytes() == tensor.tobytes()


def test_a_missing_shard_is_named(sharded: Path):
    (sharded / SECOND).unlink()
    with pytest.raises(WeightsError, match=f"{SECOND}: no such file; {INDEX} names it"):
        SafetensorsDirectory(sharded)


def test_a_cut_shard_is_named(sharded: Path):
    os.truncate(sharded / SECOND, (sharded / SECOND).stat().st_size // 2)
    with pytest.raises(WeightsError, match=f"{SECOND}: cut or corrupt"):
        SafetensorsDirectory(sharded)


def test_an_index_that_names_what_is_not_there(sharded: Path):
    rewrite_index(sharded, lambda names: names.update(ghost=SECOND))
    with pytest.raises(WeightsError, match=f"{SECOND}: the tensor 'ghost'"):
        SafetensorsDirectory(sharded)


def test_a_tensor_that_the_index_does_not_name(sharded: Path):
    rewrite_index(sharded, lambda names: names.pop("model.norm.weight"))
    with pytest.raises(WeightsError, match=r"holds the tensor 'model.norm.weight', which model.safetensors.index.json does not name"):
        SafetensorsDirectory(sharded)


def test_a_tensor_in_two_shards(sharded: Path):
    twice = next(iter(load_file(sharded / THIRD)))
    save_file(load_file(sharded / SECOND) | {twice: np.ones(4, np.float32)}, sharded / SECOND)
    with pytest.raises(WeightsError, match=f"{SECOND}: holds the tensor '{twice}', which {INDEX} places in {THIRD}"):
        SafetensorsDirectory(sharded)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "evil.bin"])
def test_an_index_cannot_lead_out_of_the_directory(sharded: Path, file: str):
    rewrite_index(sharded, lambda names: names.update({"model.norm.weight": file}))
    with pytest.raises(WeightsError, match="not the plain name of a safetensors file"):
        SafetensorsDirectory(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\xff"])
def test_a_bad_index(sharded: Path, text: str):
    (sharded / INDEX).write_text(text, "latin-1")
    with pytest.raises(WeightsError, match=INDEX):
        SafetensorsDirectory(sharded)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ((), "holds no model.safetensors"),
        (("pytorch_model.bin", "training_args.bin"), "pytorch_model.bin, a pickle, which is never loaded"),
        (("model.gguf",), "GGUF"),
        (("model-00001-of-00002.safetensors",), "neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_no_weights(tmp_path: Path, files: tuple[str, ...], why: str):
    for file in files:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(WeightsError, match=why):
        SafetensorsDirectory(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "why"), [("F8_E4M3", "quantized, and config.json has no quantization_config"), ("I32", "not a weight's dtype")]
)
def test_a_dtype_that_weights_may_not_have(tmp_path: Path, dtype: str, why: str):
    size_bytes = 1 if dtype.startswith("F8") else 4
    write_raw(tmp_path / SINGLE, {"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * size_bytes]}}, b"\0" * 2 * size_bytes)
    with SafetensorsDirectory(tmp_path) as directory, pytest.raises(WeightsError, match=f"'a' is {dtype}: {why}"):
        directory.read("a", (slice(None),))


def test_files_are_closed(tmp_path: Path):
    copy_nano("llama3", tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    SafetensorsDirectory(tmp_path).close()
    os.truncate(tmp_path / SINGLE, 100)
    with pytest.raises(WeightsError):
        SafetensorsDirectory(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
