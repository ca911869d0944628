"""The only place where a model multiplies by a weight, so that a weight's representation is decided here and nowhere else.

Invariants: products accumulate in float32 (quantized ones may in int32); float32 operands are multiplied as float32 on every
device (accelerators would otherwise round them to TF32). It does not know layers, meshes or files.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from novajax.quant import packed
from novajax.quant.dot import dot
from novajax.quant.packed import Packed
from novajax.quant.qtensor import QTensor, dequantized
from novajax.quant.watched import Watched

Weight = nnx.Param | jax.Array | QTensor | Packed


def einsum(equation: str, x: jax.Array, weight: Weight, *, dtype: jnp.dtype | None = None) -> jax.Array:
    """`x` times `weight` by an equation like "tnh,nhd->td"; the result has `dtype`, or x's own.

    Letters of both sides that the result lacks are summed; there are no batch letters. The sum runs in the weight's own order of
    dimensions: jnp.einsum may choose another, and XLA would then transpose the whole weight in every step.
    """
    operands, _, result = equation.partition("->")
    left, right = operands.split(",")
    held = value_of(weight)
    if isinstance(held, Watched):
        held = held.met(left, right, x)
    if isinstance(held, Packed):
        (out,) = packed.products([equation], x, [held])
    elif isinstance(held, QTensor):
        out = dot(left, right, result, x, held)
    else:
        summed = [letter for letter in right if letter in left]
        dimensions = ((tuple(map(left.index, summed)), tuple(map(right.index, summed))), ((), ()))
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
        out = lax.dot_general(x, held, dimensions, precision=precision, preferred_element_type=jnp.float32)
        found = [letter for letter in left + right if letter not in summed]
        out = jnp.transpose(out, [found.index(letter) for letter in result])
    return out.astype(x.dtype if dtype is None else dtype)


def einsums(equations: Sequence[str], x: jax.Array, weights: Sequence[Weight]) -> list[jax.Array]:
    """`einsum` of one x by several weights, all in x's dtype: one pass over x where their form has that."""
    held = [value_of(weight) for weight in weights]
    if all(isinstance(one, Packed) for one in held):
        return [out.astype(x.dtype) for out in packed.products(equations, x, held)]
    return [einsum(equation, x, weight) for equation, weight in zip(equations, weights, strict=True)]


def pick(weight: Weight, index: jax.Array) -> jax.Array | QTensor:
    """The weight's entry `index` on its first axis (one expert's matrix), in the weight's own representation."""
    held = value_of(weight)
    if isinstance(held, QTensor):
        values, scale = (lax.dynamic_index_in_dim(part, index, 0, keepdims=False) for part in (held.values, held.scale))
        return QTensor(values, scale, held.block[1:], held.format)
    return lax.dynamic_index_in_dim(held, index, 0, keepdims=False)


def rows(weight: Weight, index: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[*index.shape, D] of `dtype`: rows of an embedding [V, D]."""
    held = value_of(weight)
    if isinstance(held, Packed):
        return packed.rows(held, index, dtype)
    if isinstance(held, QTensor):
        block = (1,) * index.ndim + held.block[1:]
        return dequantized(QTensor(held.values[index], held.scale[index], block, held.format)).astype(dtype)
    return held[index].astype(dtype)


def value_of(weight: Weight) -> Any:
    """What the parameter holds."""
    return weight.get_value() if isinstance(weight, nnx.Variable) else weight
