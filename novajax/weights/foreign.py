"""Checkpoints that others quantized, read as the float weights they stand for: compressed-tensors (int8, int4 in words, fp8), GPTQ, AWQ
(gemm order), and fp8 in blocks.

A `PackedDirectory` has the tensors of a plain one: each quantized linear shows as its `weight` [out, in] in float32, and any slice of it
is made from the packed slice, scales and zero points that it needs. Nothing else of the import changes, so what becomes of the
weights (`quant.profiles`) is decided as for any model. Tensors for activations and for KV scales do not matter here.

Sources: the formats' own libraries define them (compressed-tensors `pack_to_int32`; AutoGPTQ's and GPTQModel's qlinear, whose first
version stores zero points less one; AutoAWQ's gemm packing, order 0 2 4 6 1 3 5 7; DeepSeek-V3's `weight_scale_inv`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import msgspec
import numpy as np

from novajax.core.errors import ConfigError, WeightsError
from novajax.weights.safetensors import DTYPES, Allocate, SafetensorsDirectory, Tensor, fresh

PACKED = DTYPES | {
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
DROPPED = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale", ".input_zero_point", ".input_global_scale", ".bias_scale")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which column of eight lies in each four bits of a word, the low ones first."""
WORD = 32
GROUPS = (32, 64, 128)

Method = Literal["compressed-tensors", "gptq", "awq", "fp8"]


class Scheme(msgspec.Struct, frozen=True):
    """What `quantization_config` says."""

    method: Method
    bits: int
    floating: bool
    group: int | None = None
    """Inputs that share a scale where no index of groups is stored; None: by the shape of the scales."""
    block: tuple[int, int] | None = None
    """Outputs and inputs that share a scale, where scales are those of blocks."""
    symmetric: bool = False
    """Has no zero points."""
    less_one: bool = False
    """Zero points are stored less one."""

    @property
    def profile(self) -> str:
        """What the weights are held as if nobody says otherwise: as they are where that is one of our formats; eight bits for
        four with zero points or in other groups."""
        if self.bits == 4 and self.symmetric and self.group in (None, *GROUPS):
            return f"int4-{self.group or 'channel'}"
        return "fp8" if self.floating else "int8"


def read_scheme(config: dict[str, Any], path: Path) -> Scheme:
    """Of a config.json's `quantization_config`. Raises ConfigError naming the key and what is known."""

    def refuse(key: str, value: Any, known: str) -> ConfigError:
        return ConfigError(f"{path}: quantization_config.{key}={value!r} is not supported; known: {known}", param="quantization_config")

    def wanted(of: dict[str, Any], key: str, where: str = "") -> Any:
        if key not in of:
            raise ConfigError(f"{path}: quantization_config{where} lacks {key!r}", param="quantization_config")
        return of[key]

    method = wanted(config, "quant_method")
    if method == "compressed-tensors":
        return _compressed(config, wanted, refuse)
    if method in ("gptq", "awq"):
        bits = wanted(config, "bits")
        if bits not in ((4, 8) if method == "gptq" else (4,)):
            raise refuse("bits", bits, "4, 8" if method == "gptq" else "4")
        group = wanted(config, "group_size")
        if method == "awq" and config.get("version", "gemm") != "gemm":
            raise refuse("version", config["version"], "gemm")
        layout = config.get("checkpoint_format", "gptq")
        if method == "gptq" and layout not in ("gptq", "gptq_v2"):
            raise refuse("checkpoint_format", layout, "gptq, gptq_v2")
        return Scheme(method, bits, False, None if group == -1 else group, less_one=method == "gptq" and layout == "gptq")
    if method == "fp8":
        if config.get("fmt", "e4m3") != "e4m3":
            raise refuse("fmt", config["fmt"], "e4m3")
        return Scheme(
            "fp8", 8, True, block=_sides(config.get("weight_block_size"), lambda value: refuse("weight_block_size", value, _SIDES))
        )
    raise refuse("quant_method", method, "compressed-tensors, gptq, awq, fp8")


def _compressed(config: dict[str, Any], wanted: Callable[..., Any], refuse: Callable[..., ConfigError]) -> Scheme:
    known = ("int-quantized", "pack-quantized", "float-quantized", "naive-quantized")
    if (layout := wanted(config, "format")) not in known:
        raise refuse("format", layout, ", ".join(known))
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise refuse("sparsity_config.format", config["sparsity_config"]["format"], "dense")
    forms, blocks, groups = set(), None, set()
    for name, group in wanted(config, "config_groups").items():
        weights = wanted(group, "weights", f".config_groups.{name}")
        blocks = blocks or weights.get("block_structure")
        groups.add((weights.get("group_size"), weights.get("symmetric", True) and not weights.get("actorder")))
        forms.add((wanted(weights, "num_bits", f".config_groups.{name}.weights"), weights.get("type", "int") == "float"))
    if len(forms) != 1:
        raise refuse("config_groups", sorted(forms), "one type of weights for all groups")
    ((bits, floating),) = forms
    if bits not in ((8,) if floating else (4, 8)):
        raise refuse("config_groups weights.num_bits", bits, "4 and 8 of int, 8 of float")
    block = _sides(blocks, lambda value: refuse("config_groups weights.block_structure", value, _SIDES))
    size, symmetric = next(iter(groups))
    return Scheme("compressed-tensors", bits, floating, None if size == -1 else size, block, symmetric and len(groups) == 1)


_SIDES = "two numbers from 1"


def _sides(value: Any, refuse: Callable[[Any], ConfigError]) -> tuple[int, int] | None:
    """Of a block; older files write them as text, 128x128."""
    if value is None:
        return None
    sides = value.split("x") if isinstance(value, str) else value
    if not isinstance(sides, list) or len(sides) != 2 or not all(str(side).isdecimal() and int(side) for side in sides):
        raise refuse(value)
    return (int(sides[0]), int(sides[1]))


class PackedDirectory:
    """See the module docstring. Has what importing asks of a `SafetensorsDirectory`; threads may share it."""

    def __init__(self, directory: Path, scheme: Scheme):
        """Raises WeightsError for a linear that lacks a part or whose parts do not fit each other."""
        self._plain = SafetensorsDirectory(directory, PACKED)
        self._scheme = scheme
        self.directory, self.files = directory, self._plain.files
        self.tensors: dict[str, Tensor] = {}
        self._linears: dict[str, str] = {}
        try:
            for name, tensor in self._plain.tensors.items():
                self._take(name, tensor)
        except BaseException:
            self.close()
            raise

    def dtype(self, name: str) -> np.dtype[Any]:
        """float32 for what was quantized, else as it is stored. Raises WeightsError for a dtype that weights may not have."""
        if name in self._linears:
            return np.dtype(np.float32)
        if self.tensors[name].dtype not in DTYPES:
            raise self._wrong(name, f"is {self.tensors[name].dtype} and has no scales")
        return self._plain.dtype(name)

    def read(self, name: str, index: tuple[slice, ...], allocate: Allocate = fresh) -> np.ndarray:
        """`tensor[index]` (unit steps). Raises WeightsError for scales that are zero or not finite numbers."""
        if name not in self._linears:
            return self._plain.read(name, index, allocate)
        numbers, steps = self._parts_of(name, index)
        return np.ascontiguousarray(numbers * steps, np.float32)

    def steps(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """float32 of the slice's shape: what each number of it is a multiple of; zeros where it was not quantized."""
        if name not in self._linears:
            bounds = [part.indices(size) for part, size in zip(index, self.tensors[name].shape, strict=True)]
            return np.zeros([stop - start for start, stop, _ in bounds], np.float32)
        numbers, steps = self._parts_of(name, index)
        return np.ascontiguousarray(np.broadcast_to(steps, numbers.shape), np.float32)

    def _parts_of(self, name: str, index: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = (slice(*part.indices(size)[:2]) for part, size in zip(index, self.tensors[name].shape, strict=True))
        return _KINDS[self._linears[name]][1](self, name.removesuffix(".weight"), rows, columns)

    def close(self) -> None:
        self._plain.close()

    def __enter__(self) -> "PackedDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, name: str, tensor: Tensor) -> None:
        """Shows a tensor as it is, or the linear that it is the main part of; its other parts are not shown."""
        linear, _, part = name.rpartition(".")
        kind = next((kind for kind, (main, _) in _KINDS.items() if main == part and self._is(kind, linear, tensor)), None)
        if kind is not None:
            shape = self._shape(kind, linear, tensor)
            self.tensors[f"{linear}.weight"] = Tensor(f"{linear}.weight", tensor.file, "F32", shape, tensor.start, tensor.stop)
            self._linears[f"{linear}.weight"] = kind
        elif not name.endswith(DROPPED) and not (part in _PARTS and self._has_main(linear)):
            self.tensors[name] = tensor

    def _is(self, kind: str, linear: str, tensor: Tensor) -> bool:
        if kind == "plain":
            return tensor.dtype in ("I8", "F8_E4M3")
        return kind not in ("gptq", "awq") or kind == self._scheme.method

    def _has_main(self, linear: str) -> bool:
        return any(f"{linear}.{main}" in self._plain.tensors for main, _ in _KINDS.values())

    def _shape(self, kind: str, linear: str, main: Tensor) -> tuple[int, int]:
        """[out, in] of a linear whose parts are all there and fit."""
        each = WORD // self._scheme.bits
        if kind == "plain":
            if len(main.shape) != 2:
                raise self._wrong(main.name, f"has shape {list(main.shape)}, not [out, in]")
            out, inputs = main.shape
            scale = self._part(linear, "weight_scale", "weight_scale_inv")
            block = self._scheme.block
            fits = () if block is None else ((-(-out // block[0]), -(-inputs // block[1])),)
            if scale.shape not in fits and scale.shape not in ((), (1,), (out,), (out, 1), (1, 1)):
                raise self._wrong(scale.name, f"has shape {list(scale.shape)}, for a weight {list(main.shape)}")
            return (out, inputs)
        if kind == "words":
            shape = self._plain.read(self._part(linear, "weight_shape").name, (slice(None),))
            out, inputs = (int(size) for size in shape)
            if main.shape != (out, -(-inputs // each)):
                raise self._wrong(main.name, f"has shape {list(main.shape)}, for a weight {[out, inputs]} of {self._scheme.bits} bits")
            scale = self._part(linear, "weight_scale")
            if len(scale.shape) != 2 or scale.shape[0] != out or inputs % scale.shape[1]:
                raise self._wrong(scale.name, f"has shape {list(scale.shape)}, for a weight {[out, inputs]}")
            return (out, inputs)
        scales, zeros = self._part(linear, "scales"), self._part(linear, "qzeros")
        groups, out = scales.shape
        inputs = main.shape[0] * (each if kind == "gptq" else 1)
        if main.shape[1] * (1 if kind == "gptq" else each) != out:
            raise self._wrong(main.name, f"has shape {list(main.shape)}, for scales {list(scales.shape)}")
        if zeros.shape != (groups, out // each):
            raise self._wrong(zeros.name, f"has shape {list(zeros.shape)}, for scales {list(scales.shape)}")
        if groups != -(-inputs // (self._scheme.group or inputs)):
            raise self._wrong(scales.name, f"has {groups} groups, for {inputs} inputs in groups of {self._scheme.group or inputs}")
        return (out, inputs)

    def _part(self, linear: str, *names: str) -> Tensor:
        for name in names:
            if (found := self._plain.tensors.get(f"{linear}.{name}")) is not None:
                return found
        raise WeightsError(f"{self.directory}: {linear!r} is quantized and lacks {' or '.join(names)}")

    def _has(self, linear: str, name: str) -> bool:
        return f"{linear}.{name}" in self._plain.tensors

    def _raw(self, linear: str, name: str, *index: slice) -> np.ndarray:
        tensor = self._part(linear, name)
        return self._plain.read(tensor.name, index or (slice(None),) * len(tensor.shape))

    def _scales(self, linear: str, name: str, *index: slice) -> np.ndarray:
        scales = self._raw(linear, name, *index).astype(np.float32)
        if not np.isfinite(scales).all() or not scales.all():
            raise self._wrong(f"{linear}.{name}", "holds scales that are zero or not finite numbers")
        return scales

    def _groups(self, linear: str, name: str, columns: slice, inputs: int, groups: int) -> np.ndarray:
        """Of each column, the group of its scale."""
        if self._has(linear, name):
            found = self._raw(linear, name, columns)
            if found.size and (found.min() < 0 or found.max() >= groups):
                raise self._wrong(f"{linear}.{name}", f"names groups beyond the {groups} that have scales")
            return found
        return np.arange(columns.start, columns.stop) // -(-inputs // groups)

    def _wrong(self, name: str, what: str) -> WeightsError:
        return WeightsError(f"{self.directory / self._plain.tensors[name].file}: {name!r} {what}")

    # --- slices of each kind, [rows, columns]: numbers without their zero points, and what they are multiplied by

    def _read_plain(self, linear: str, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        values = self._raw(linear, "weight", rows, columns).astype(np.float32)
        name = "weight_scale" if self._has(linear, "weight_scale") else "weight_scale_inv"
        shape = self._part(linear, name).shape
        if self._has(linear, "weight_zero_point"):
            values -= self._raw(linear, "weight_zero_point").astype(np.float32).reshape(-1, 1)[rows if shape[0] > 1 else slice(None)]
        if self._scheme.block is not None and len(shape) == 2:
            at = [np.arange(part.start, part.stop) // side for part, side in zip((rows, columns), self._scheme.block, strict=True)]
            return values, self._scales(linear, name)[np.ix_(*at)]
        scales = self._scales(linear, name).reshape(-1, 1)
        return values, scales if len(scales) == 1 else scales[rows]

    def _read_words(self, linear: str, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        bits, each = self._scheme.bits, WORD // self._scheme.bits
        first = columns.start // each
        words = self._raw(linear, "weight_packed", rows, slice(first, -(-columns.stop // each)))
        values = unpacked(words, bits, axis=1)[:, columns.start - first * each : columns.stop - first * each].astype(np.float32)
        scales = self._scales(linear, "weight_scale", rows, slice(None))
        inputs = self.tensors[f"{linear}.weight"].shape[1]
        at = self._groups(linear, "weight_g_idx", columns, inputs, scales.shape[1])
        zero: Any = float(1 << bits - 1)
        if self._has(linear, "weight_zero_point"):
            zero = unpacked(self._raw(linear, "weight_zero_point"), bits, axis=0)[rows][:, at].astype(np.float32)
        return values - zero, scales[:, at]

    def _read_gptq(self, linear: str, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        bits, each = self._scheme.bits, WORD // self._scheme.bits
        first = columns.start // each
        words = self._raw(linear, "qweight", slice(first, -(-columns.stop // each)), rows)
        values = unpacked(words, bits, axis=0)[columns.start - first * each : columns.stop - first * each].astype(np.float32)
        scales = self._scales(linear, "scales", slice(None), rows)
        zeros = unpacked(self._raw(linear, "qzeros"), bits, axis=1)[:, rows].astype(np.float32) + self._scheme.less_one
        at = self._groups(linear, "g_idx", columns, self.tensors[f"{linear}.weight"].shape[1], len(scales))
        return (values - zeros[at]).T, scales[at].T

    def _read_awq(self, linear: str, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        first, last = rows.start // 8, -(-rows.stop // 8)
        here = slice(rows.start - first * 8, rows.stop - first * 8)
        values = in_order(self._raw(linear, "qweight", columns, slice(first, last)))[:, here].astype(np.float32)
        zeros = in_order(self._raw(linear, "qzeros", slice(None), slice(first, last)))[:, here].astype(np.float32)
        scales = self._scales(linear, "scales", slice(None), rows)
        at = self._groups(linear, "g_idx", columns, self.tensors[f"{linear}.weight"].shape[1], len(scales))
        return (values - zeros[at]).T, scales[at].T


_KINDS: dict[str, tuple[str, Callable[[PackedDirectory, str, slice, slice], tuple[np.ndarray, np.ndarray]]]] = {
    "plain": ("weight", PackedDirectory._read_plain),
    "words": ("weight_packed", PackedDirectory._read_words),
    "gptq": ("qweight", PackedDirectory._read_gptq),
    "awq": ("qweight", PackedDirectory._read_awq),
}
"""How a linear is stored -> its main part, and what makes a slice of it."""
_PARTS = ("weight_scale", "weight_scale_inv", "weight_shape", "weight_zero_point", "weight_g_idx", "scales", "qzeros", "g_idx")


def unpacked(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """uint8 of unsigned numbers in int32 words, the first in the low bits; `axis` becomes as many times longer."""
    shifts = np.arange(0, WORD, bits, dtype=np.uint32)
    parts = (words.view(np.uint32)[..., None] >> shifts & (1 << bits) - 1).astype(np.uint8)  # [..., each]
    moved = np.moveaxis(parts, -1, axis + 1)
    return moved.reshape(*words.shape[:axis], -1, *words.shape[axis + 1 :])


def in_order(words: np.ndarray) -> np.ndarray:
    """uint8[R, 8 C] of AWQ's words [R, C]: columns in their own order."""
    held = unpacked(words, 4, axis=1).reshape(len(words), -1, 8)
    return held[:, :, np.argsort(AWQ_ORDER)].reshape(len(words), -1)


Tensors = SafetensorsDirectory | PackedDirectory
"""Where a model's weights are read from."""
