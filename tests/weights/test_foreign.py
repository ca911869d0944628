"""Checkpoints that others quantized load as the float weights they stand for; what is cut, odd or unknown is refused by name.

The packers here follow the formats' own definitions, word by word, and share nothing with the readers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import deserialize
from safetensors.numpy import _TYPES as TYPES
from safetensors.numpy import load_file, save_file
from weight_files import copy_nano

from novajax.core.errors import ConfigError, WeightsError
from novajax.parallel.mesh import make_mesh
from novajax.quant.qtensor import QTensor, dequantized
from novajax.telemetry.progress import Silent
from novajax.weights.foreign import PackedDirectory, read_scheme
from novajax.weights.load import load_model

GROUP = 16
Parts = tuple[dict[str, np.ndarray], np.ndarray]
"""The tensors of one linear by their last name, and the exact weight that they stand for."""
RNG = np.random.default_rng(0)
STORED = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "BF16": ml_dtypes.bfloat16}
"""What numpy has no name for."""


def words(values: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """int32 words of unsigned numbers, the first in the low bits, or as `order` says."""
    each = 32 // bits
    values = np.moveaxis(values, axis, 0)
    padded = np.concatenate([values, np.zeros((-len(values) % each, *values.shape[1:]), values.dtype)])
    out = np.zeros((len(padded) // each, *values.shape[1:]), np.uint64)
    for word in range(len(out)):
        for place in range(each):
            out[word] |= padded[word * each + (order[place] if order else place)].astype(np.uint64) << np.uint64(bits * place)
    return np.moveaxis(out.astype(np.uint32).view(np.int32), 0, axis).copy()


def spread(scales: np.ndarray, inputs: int) -> np.ndarray:
    return np.repeat(scales, inputs // scales.shape[1], axis=1)


def draw(shape: tuple[int, ...]) -> np.ndarray:
    return RNG.uniform(0.004, 0.02, shape).astype(np.float16)


def int8(w: np.ndarray) -> Parts:
    q, s = RNG.integers(-127, 128, w.shape, np.int8), draw((len(w), 1))
    return {"weight": q, "weight_scale": s}, q * s.astype(np.float32)


def int8_zeros(w: np.ndarray) -> Parts:
    q, s, z = RNG.integers(-127, 128, w.shape, np.int8), draw((len(w), 1)), RNG.integers(-9, 9, (len(w), 1), np.int8)
    return {"weight": q, "weight_scale": s, "weight_zero_point": z}, (q.astype(np.float32) - z) * s.astype(np.float32)


def packed(w: np.ndarray, *, bits: int = 4, groups: bool = True, zeros: bool = False, shuffled: bool = False) -> Parts:
    out, inputs = w.shape
    half = 1 << bits - 1
    q, s = RNG.integers(-half, half, w.shape), draw((out, inputs // GROUP if groups else 1))
    parts = {"weight_packed": words(q + half, bits, 1), "weight_scale": s, "weight_shape": np.array([out, inputs], np.int64)}
    at = np.arange(inputs) // (inputs // s.shape[1])
    if shuffled:
        at = parts["weight_g_idx"] = RNG.permutation(at).astype(np.int32)
    z = RNG.integers(-half, half, s.shape) if zeros else np.zeros(s.shape, np.int64)
    if zeros:
        parts["weight_zero_point"] = words(z + half, bits, 0)
    return parts, ((q - z[:, at]) * s[:, at].astype(np.float32)).astype(np.float32)


def fp8(w: np.ndarray, shape: Callable[[int], tuple[int, ...]]) -> Parts:
    q, s = RNG.normal(0, 40, w.shape).astype(ml_dtypes.float8_e4m3fn), draw(shape(len(w))).astype(np.float32)
    return {"weight": q, "weight_scale": s, "input_scale": np.ones(1, np.float32)}, q.astype(np.float32) * s.reshape(-1, 1)


def blocks(w: np.ndarray, name: str = "weight_scale_inv", side: int = 32) -> Parts:
    q = RNG.normal(0, 40, w.shape).astype(ml_dtypes.float8_e4m3fn)
    s = draw(tuple(-(-size // side) for size in w.shape)).astype(np.float32)
    whole = np.repeat(np.repeat(s, side, 0), side, 1)[: w.shape[0], : w.shape[1]]
    return {"weight": q, name: s}, q.astype(np.float32) * whole


def gptq(w: np.ndarray, *, bits: int = 4, shuffled: bool = False, less_one: bool = True) -> Parts:
    out, inputs = w.shape
    q, s = RNG.integers(0, 1 << bits, (inputs, out)), draw((inputs // GROUP, out))
    z = RNG.integers(1, 1 << bits, s.shape)
    at = np.arange(inputs) // GROUP
    at = RNG.permutation(at) if shuffled else at
    parts = {"qweight": words(q, bits, 0), "qzeros": words(z - less_one, bits, 1), "scales": s, "g_idx": at.astype(np.int32)}
    return parts, ((q - z[at]) * s[at].astype(np.float32)).T.astype(np.float32)


def awq(w: np.ndarray) -> Parts:
    out, inputs = w.shape
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    q, s, z = RNG.integers(0, 16, (inputs, out)), draw((inputs // GROUP, out)), RNG.integers(0, 16, (inputs // GROUP, out))
    at = np.arange(inputs) // GROUP
    parts = {"qweight": words(q, 4, 1, order), "qzeros": words(z, 4, 1, order), "scales": s}
    return parts, ((q - z[at]) * s[at].astype(np.float32)).T.astype(np.float32)


def compressed(layout: str, bits: int, kind: str = "int", **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "group", "group_size": GROUP} | more
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


def gptq_config(bits: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, "sym": False} | more


CASES: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], Parts]]] = {
    "int8 by channel": (compressed("int-quantized", 8), int8),
    "int8 with zero points": (compressed("int-quantized", 8), int8_zeros),
    "int4 in groups": (compressed("pack-quantized", 4), packed),
    "int4 by channel": (compressed("pack-quantized", 4, strategy="channel", group_size=None), lambda w: packed(w, groups=False)),
    "int4 with zero points": (compressed("pack-quantized", 4, symmetric=False), lambda w: packed(w, zeros=True)),
    "int4 in another order": (compressed("pack-quantized", 4), lambda w: packed(w, zeros=True, shuffled=True)),
    "int8 in words": (compressed("pack-quantized", 8), lambda w: packed(w, bits=8)),
    "fp8 by channel": (compressed("float-quantized", 8, "float"), lambda w: fp8(w, lambda out: (out, 1))),
    "fp8 by tensor": (compressed("float-quantized", 8, "float"), lambda w: fp8(w, lambda out: (1,))),
    "fp8 in blocks": ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32]}, blocks),
    "fp8 in blocks, compressed": (compressed("float-quantized", 8, "float", block_structure=[32, 32]), lambda w: blocks(w, "weight_scale")),
    "gptq": (gptq_config(4), gptq),
    "gptq in another order": (gptq_config(4, desc_act=True), lambda w: gptq(w, shuffled=True)),
    "gptq of 8 bits": (gptq_config(8), lambda w: gptq(w, bits=8)),
    "gptq v2": (gptq_config(4, checkpoint_format="gptq_v2"), lambda w: gptq(w, less_one=False)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq),
}


def write(folder: Path, name: str) -> tuple[Path, Path]:
    """(the quantized checkpoint, the same in float32)."""
    config, pack = CASES[name]
    for side in ("small", "wide"):
        (folder / side).mkdir(parents=True)
    small, wide = (copy_nano("llama2", folder / side) for side in ("small", "wide"))
    tensors: dict[str, np.ndarray] = {}
    exact: dict[str, np.ndarray] = {}
    for tensor, value in load_file(wide / "model.safetensors").items():
        if tensor.endswith("_proj.weight"):
            parts, weight = pack(value)
            tensors |= {tensor.removesuffix("weight") + part: array for part, array in parts.items()}
            exact[tensor] = np.ascontiguousarray(weight)  # safetensors writes the buffer as it lies
        else:
            tensors[tensor] = exact[tensor] = value
    save_file(tensors, small / "model.safetensors")
    save_file(exact, wide / "model.safetensors")
    change_config(small, quantization_config=config)
    return small, wide


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(directory: Path, ends: str, edit: Callable[[np.ndarray], np.ndarray] | None) -> None:
    """Edits, or drops, the first tensor whose name ends so."""
    tensors = {
        name: np.frombuffer(part["data"], STORED.get(part["dtype"]) or TYPES[part["dtype"]]).reshape(part["shape"])
        for name, part in deserialize((directory / "model.safetensors").read_bytes())
    }
    name = next(name for name in sorted(tensors) if name.endswith(ends))
    value = tensors.pop(name)
    if edit is not None:
        tensors[name] = edit(value)
    save_file(tensors, directory / "model.safetensors")


def load(directory: Path, quantization: str = ""):
    return load_model(directory, make_mesh(devices=jax.devices()[:1]), "float32", quantization=quantization, progress=Silent)


@pytest.mark.parametrize("name", CASES)
def test_a_scheme_stands_for_its_weights(tmp_path: Path, name: str):
    small, wide = write(tmp_path / "case", name)
    found, wanted = load(small, "quality_critical"), load(wide)
    for one, other in zip(jax.tree.leaves(found.state), jax.tree.leaves(wanted.state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
    rounded = load(small)
    profile = rounded.description.profile
    assert profile == ("fp8" if "fp8" in name else "int4-channel" if name == "int4 by channel" else "int8")
    kept = name in ("int8 by channel", "int4 by channel", "fp8 by channel", "fp8 by tensor")
    for (path, one), (_, other) in zip(nnx.to_flat_state(rounded.state), nnx.to_flat_state(wanted.state), strict=True):
        if isinstance(held := one.get_value(), QTensor):
            exact = np.asarray(other.get_value())
            error = np.abs(np.asarray(dequantized(held)) - exact).max() / np.abs(exact).max()
            assert error < (1e-6 if kept else 0.07 if profile == "fp8" else 0.006), path
    lost = rounded.requantized
    assert found.requantized is None
    assert lost is not None
    if kept:
        assert (lost.kept, lost.error, lost.worst) == (1.0, 0.0, "")
    else:
        assert lost.kept < 1
        assert 0 < lost.error <= lost.worst_error < (0.04 if profile == "fp8" else 0.01)
        assert lost.worst in str(lost)


@pytest.mark.parametrize("name", CASES)
def test_any_slice_is_that_of_the_whole(tmp_path: Path, name: str):
    small, wide = write(tmp_path / "case", name)
    exact = load_file(wide / "model.safetensors")
    with PackedDirectory(small, read_scheme(CASES[name][0], small)) as directory:
        assert directory.tensors.keys() == exact.keys()
        for tensor in [key for key in exact if key.endswith("_proj.weight")]:
            for _ in range(4):
                index = tuple(slice(*sorted(RNG.choice(size + 1, 2, replace=False))) for size in exact[tensor].shape)
                np.testing.assert_allclose(directory.read(tensor, index), exact[tensor][index], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "ends", "edit", "message"),
    [
        ("int4 in groups", "weight_packed", lambda a: a[:, :-1].copy(), "weight_packed' has shape"),
        ("int4 in groups", "weight_shape", None, "lacks weight_shape"),
        ("int4 in groups", "weight_scale", lambda a: a * 0, "scales that are zero or not finite"),
        ("int8 by channel", "weight_scale", None, "lacks weight_scale"),
        ("int8 by channel", "weight_scale", lambda a: a * np.float16("nan"), "scales that are zero or not finite"),
        ("int8 by channel", "weight_scale", lambda a: a[:-1].copy(), "weight_scale' has shape"),
        ("fp8 by channel", "weight_scale", lambda a: a * 0, "scales that are zero or not finite"),
        ("fp8 in blocks", "weight_scale_inv", lambda a: a * np.float32("inf"), "scales that are zero or not finite"),
        ("gptq", "scales", lambda a: a * 0, "scales that are zero or not finite"),
        ("gptq", "qzeros", lambda a: a[:, :-1].copy(), "qzeros' has shape"),
        ("gptq", "scales", lambda a: a[:-1].copy(), "has shape|groups"),
        ("gptq", "g_idx", lambda a: a + 99, "names groups beyond"),
        ("awq", "scales", lambda a: a * np.float16("nan"), "scales that are zero or not finite"),
        ("awq", "qweight", lambda a: a[:, :-1].copy(), "qweight' has shape"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path: Path, name: str, ends: str, edit, message: str):
    small, _ = write(tmp_path / "case", name)
    change(small, ends, edit)
    with pytest.raises(WeightsError, match=message):
        load(small)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes' is not supported"),
        ({"bits": 4}, "lacks 'quant_method'"),
        (compressed("nvfp4-pack-quantized", 4, "float"), "format='nvfp4-pack-quantized'"),
        (compressed("pack-quantized", 3), "num_bits=3"),
        (gptq_config(3), "bits=3"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size=\[128\]"),
        ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemv"}, "version='gemv'"),
        ({"quant_method": "awq", "bits": 4}, "lacks 'group_size'"),
    ],
)
def test_an_unknown_scheme_is_refused(tmp_path: Path, config: dict[str, Any], message: str):
    directory = copy_nano("llama2", tmp_path)
    change_config(directory, quantization_config=config)
    with pytest.raises(ConfigError, match=message):
        load(directory)
