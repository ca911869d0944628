"""Tiny checkpoints for the tests of this room, and what they must become."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from novajax.models.decoder import abstract_model
from novajax.models.families import keys
from novajax.models.families.registry import key_map, read_config

NANO = Path(__file__).parents[1] / "data" / "nano"


def copy_nano(name: str, directory: Path) -> Path:
    """A copy of a nano checkpoint's config and weights that a test may damage."""
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(NANO / name / file, directory / file)
    return directory


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


def split(directory: Path, shards: int) -> Path:
    """Turns model.safetensors into `shards` files with an index."""
    tensors = tensors_of(directory)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        names = sorted(tensors)[number::shards]
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def write_raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> None:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def expected_state(directory: Path) -> dict[str, np.ndarray]:
    """Every parameter of a one-file checkpoint in its stored dtype, by whole tensors: the plain form of an import."""
    config = json.loads((directory / "config.json").read_text())
    cfg = read_config(config)
    _, state = nnx.split(abstract_model(cfg))
    shapes = {path: tuple(variable.shape) for path, variable in nnx.to_flat_state(state)}
    values: dict[tuple, np.ndarray] = {}
    for name, tensor in tensors_of(directory).items():
        found = keys.match(key_map(config, cfg), name)
        if found is None:
            continue
        shape = shapes[found.path]
        right = found.axes.split("->")[1].split()
        index = tuple(slice(found.stacked[one], found.stacked[one] + 1) if one in found.stacked else slice(None) for one in right)
        whole = values.setdefault(found.path, np.zeros(shape, tensor.dtype))
        whole[index] = keys.place(found.axes, shape, index, tensor)
    assert values.keys() == shapes.keys()
    return {".".join(map(str, path)): value for path, value in values.items()}


def state_arrays(state: nnx.State) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(state)}


def assert_same(ours: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].shape == value.shape, name
        assert ours[name].tobytes() == value.tobytes(), name
