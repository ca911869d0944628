"""A quantized weight: small values and the float32 scales they are multiplied by.

Invariants: `scale` has as many dimensions as `values`, each `ceil(size / block)` long, so that a rule for an axis of the
values is a rule for that axis of the scales; the weight is `values * scale` with every scale repeated over its block. A
QTensor is a pytree of its two arrays and stands where the array stood, also inside an nnx.Variable.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from novajax.planner.formats import BITS, blocks, scale_shape
from novajax.quant.formats import Format, Kind

DTYPES: dict[Kind, Any] = {"int8": jnp.int8, "int4": jnp.int4, "fp8": jnp.float8_e4m3fn}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """Arrays, or anything that stands for arrays: shapes, shardings, axis names."""

    values: Any  # int8, int4 or float8_e4m3fn, the weight's own shape
    scale: Any  # float32
    block: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """Neighbours that share a scale, for each dimension (`planner.formats.blocks`). A piece of a weight keeps the whole's."""
    format: Format = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def __getitem__(self, index: int) -> "QTensor":
        """One entry of the first dimension, which has a scale for each (a stage's layer)."""
        return QTensor(self.values[index], self.scale[index], self.block[1:], self.format)


def abstract(shape: tuple[int, ...], contracted: tuple[int, ...], form: Format) -> QTensor:
    """Shapes and dtypes of a weight of `shape` whose product sums over the dimensions `contracted`."""
    block = blocks(shape, contracted, form.group)
    scale = jax.ShapeDtypeStruct(scale_shape(shape, block), jnp.float32)
    return QTensor(jax.ShapeDtypeStruct(shape, DTYPES[form.kind]), scale, block, form)


def dequantized(weight: QTensor) -> jax.Array:
    """float32 of the weight's shape. For tests and small weights: it is as large as the unquantized weight."""
    values, scale = weight.values.astype(jnp.float32), weight.scale
    for axis, (size, by) in enumerate(zip(values.shape, weight.block, strict=True)):
        if by > 1 and scale.shape[axis] > 1:
            scale = jax.lax.slice_in_dim(jnp.repeat(scale, by, axis), 0, size, axis=axis)
    return values * scale


def stored_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array on a device. `nbytes` and `itemsize` say 1 byte for an int4, which takes half of one."""
    bits = BITS["int4"] if dtype == jnp.int4 else 8 * jnp.dtype(dtype).itemsize
    return -(-math.prod(shape) * bits // 8)
