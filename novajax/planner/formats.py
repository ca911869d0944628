"""How numbers are stored: bytes of each format with its scales, and precision profiles (component -> format) as data."""

import math
from typing import Literal

import msgspec

from novajax.core.errors import ConfigError
from novajax.planner.hardware import Arithmetic
from novajax.planner.sizes import Array, Component

FormatName = Literal["float32", "bfloat16", "int8", "fp8", "int4"]
SCALE_BYTES = 4
"""Quantization scales are float32: one an output channel (int8, fp8), one a group and output channel (int4)."""
GROUP = 128
"""Contracted elements that share a scale in int4."""
BITS: dict[FormatName, int] = {"float32": 32, "bfloat16": 16, "int8": 8, "fp8": 8, "int4": 4}


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A format for each component, the KV cache and the activations."""

    name: str
    embedding: FormatName = "bfloat16"
    attention_qkv: FormatName = "bfloat16"
    attention_out: FormatName = "bfloat16"
    mlp: FormatName = "bfloat16"
    norm: FormatName = "bfloat16"
    head: FormatName = "bfloat16"
    keys: FormatName = "bfloat16"
    values: FormatName = "bfloat16"
    activations: FormatName = "bfloat16"
    """int8 and fp8: matrices are multiplied at the rate of that type; else at bfloat16's whatever the weights' format."""

    def weight_format(self, component: Component) -> FormatName:
        return getattr(self, component)

    def arithmetic(self, weight: FormatName) -> Arithmetic:
        """What a multiplication by weights of that format runs as."""
        if self.activations in ("int8", "fp8") and BITS[weight] <= 8:
            return self.activations
        return "float32" if "float32" in (self.activations, weight) else "bfloat16"

    @property
    def attention_arithmetic(self) -> Arithmetic:
        """What queries meet keys in."""
        return "fp8" if self.keys == self.values == "fp8" else "float32" if self.activations == "float32" else "bfloat16"


def profiles() -> dict[str, Profile]:
    """By name. The three with words for names are API.md's table; weights of the others are one format throughout the
    layers, with embedding, norms and head left alone."""
    layers8 = {"attention_qkv": "int8", "attention_out": "int8", "mlp": "int8"}
    layers4 = {"attention_qkv": "int4", "attention_out": "int4", "mlp": "int4"}
    layers_fp8 = {"attention_qkv": "fp8", "attention_out": "fp8", "mlp": "fp8"}
    all32 = {name: "float32" for name in Profile.__struct_fields__ if name != "name"}
    rows: dict[str, dict[str, str]] = {
        "float32": all32,
        "bf16": {},
        "int8": layers8,
        "int4": layers4,
        "fp8": layers_fp8 | {"keys": "fp8", "values": "fp8", "activations": "fp8"},
        "quality_critical": {"embedding": "float32", "norm": "float32", "head": "float32"},
        "balanced": {"attention_qkv": "int8", "mlp": "int8", "values": "int8"},
        "memory_critical": {
            "embedding": "int8",
            "attention_qkv": "int4",
            "attention_out": "int8",
            "mlp": "int4",
            "keys": "int8",
            "values": "int4",
            "activations": "int8",
        },
    }
    return {name: msgspec.convert({"name": name} | row, Profile) for name, row in rows.items()}


def profile(name: str) -> Profile:
    """By name. Raises ConfigError for one that is not in the table."""
    known = profiles()
    if name not in known:
        raise ConfigError(f"profile {name!r} is not known; known: {', '.join(known)}", param="profile")
    return known[name]


def blocks(shape: tuple[int, ...], contracted: tuple[int, ...], group: int | None) -> tuple[int, ...]:
    """For each dimension, how many neighbours share a scale: 1 where nothing is summed; of the `contracted` dimensions all, or with a
    `group` as many as make it up, the innermost first. The last group of a dimension may be short."""
    found, left = [1] * len(shape), group
    for index in sorted(contracted, reverse=True):
        found[index] = shape[index] if left is None else min(shape[index], left)
        left = None if left is None else left // found[index]
    return tuple(found)


def scale_shape(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of an array of `shape` in `block`s: as many dimensions, a scale for each block."""
    return tuple(-(-size // by) for size, by in zip(shape, block, strict=True))


def array_bytes(array: Array, local_shape: tuple[int, ...], form: FormatName) -> int:
    """Bytes of one device's piece of an array, scales included. int4 groups lie along the contracted elements."""
    data = -(-math.prod(local_shape) * BITS[form] // 8)
    if form in ("float32", "bfloat16"):
        return data
    by = blocks(local_shape, array.contracted, GROUP if form == "int4" else None)
    return data + math.prod(scale_shape(local_shape, by)) * SCALE_BYTES


def kv_bytes(form: FormatName, heads: int, head_dim: int) -> float:
    """Bytes of one token's keys (or values) in one layer. Rounded ones have a scale for each head."""
    scales = 0 if form in ("float32", "bfloat16") else SCALE_BYTES * heads
    return heads * head_dim * BITS[form] / 8 + scales


def item_bytes(form: FormatName) -> int:
    """Bytes of one number of an activation; int8 and fp8 activations still move between devices as bfloat16."""
    return 4 if form == "float32" else 2
