"""A matrix as a CPU's native kernels read it: in panels, at the bits it is stored in.

It stands where the array or QTensor stood. Invariants: the numbers are those of the weight it was made from; what has no native form
(fp8, int4 with groups that end inside a dimension, experts) is left as it was.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from novajax.kernels.native import matmul
from novajax.quant.qtensor import QTensor

_MOST_SUMMED = 65_000
"""int8 products, 255 x 127 each at most, that an int32 holds."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Arrays, or what stands for them."""

    panels: Any
    scale: Any  # as `kernels.native.matmul.products` takes it
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    summed: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """Dimensions that the product sums over."""
    group: int = dataclasses.field(metadata={"static": True})
    """Summed elements that share a scale; 0: all."""
    activations: str = dataclasses.field(metadata={"static": True})
    """`int8`: rounded to it, with a scale for each row; else as they come."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def packed(weight: Any, summed: tuple[int, ...]) -> Any:
    """The weight as a Packed, or itself where there is no native form. An array or QTensor."""
    if not has_native_form(weight, summed):
        return weight
    return _packed(weight, summed)


def has_native_form(weight: Any, summed: tuple[int, ...]) -> bool:
    """Whether `packed` changes the weight."""
    if not isinstance(weight, QTensor):
        return str(weight.dtype) in ("float32", "bfloat16")
    if weight.format.kind == "fp8":
        return False
    if weight.format.kind == "int8":
        return math.prod(weight.shape[i] for i in summed) <= _MOST_SUMMED
    return _groups_are_even(weight, summed)


def products(equations: Sequence[str], x: jax.Array, weights: Sequence[Packed]) -> list[jax.Array]:
    """float32 of einsum(equation, x, weight) for each weight, in one call where they are alike. x has one letter that a weight lacks, the
    rows, and the same letters in every equation."""
    if len({(w.panels.dtype, w.panels.shape[1], w.group, w.activations, w.summed) for w in weights}) > 1:
        return [out for equation, weight in zip(equations, weights, strict=True) for out in products([equation], x, [weight])]
    left, right, _ = _letters(equations[0])
    (row,) = (letter for letter in left if letter not in right)
    flat = x.transpose([left.index(letter) for letter in (row, *(right[i] for i in weights[0].summed))])
    sizes = [[size for i, size in enumerate(w.shape) if i not in w.summed] for w in weights]
    outs = matmul.products(
        flat.reshape(flat.shape[0], -1),
        [(w.panels, w.scale) for w in weights],
        list(map(math.prod, sizes)),
        group=weights[0].group,
        rounded=weights[0].activations == "int8",
    )
    shaped = []
    for equation, weight, size, out in zip(equations, weights, sizes, outs, strict=True):
        _, right, result = _letters(equation)
        found = [row, *(letter for i, letter in enumerate(right) if i not in weight.summed)]
        shaped.append(jnp.transpose(out.reshape(-1, *size), [found.index(letter) for letter in result]))
    return shaped


def rows(weight: Packed, index: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[*index.shape, D] of `dtype`: rows of an embedding [V, D] whose product sums over D."""
    found = matmul.unpack_rows(weight.panels, index)
    if weight.scale is not None:
        scale = weight.scale[:, index]
        by = jnp.repeat(jnp.moveaxis(scale, 0, -1), weight.group, axis=-1) if weight.group else scale[0, ..., None]
        found = found.astype(jnp.float32) * by
    return found[..., : weight.shape[1]].astype(dtype)


def halved(weight: Any) -> Any:
    """A float32 array whose numbers are all bfloat16 as that; anything else as it is."""
    if isinstance(weight, QTensor) or weight.dtype != jnp.float32 or not _is_bfloat16(weight):
        return weight
    return weight.astype(jnp.bfloat16)


@jax.jit
def _is_bfloat16(weight: jax.Array) -> jax.Array:
    return jnp.all(jax.lax.reduce_precision(weight, exponent_bits=8, mantissa_bits=7) == weight)


@partial(jax.jit, static_argnames="summed")
def _packed(weight: Any, summed: tuple[int, ...]) -> Packed:
    order = [*summed, *(i for i in range(len(weight.shape)) if i not in summed)]
    k = math.prod(weight.shape[i] for i in summed)

    def flat(array: jax.Array, count: int) -> jax.Array:
        return array.transpose(order).reshape(count, -1)

    static: Any = {"shape": tuple(weight.shape), "summed": summed}
    if not isinstance(weight, QTensor):
        return Packed(matmul.pack(flat(weight, k)), None, **static, group=0, activations="float")
    groups = math.prod(weight.scale.shape[i] for i in summed)
    numbers, scale, group = flat(weight.values, k), flat(weight.scale, groups), 0
    if weight.format.kind == "int8":
        sums = jnp.sum(numbers, axis=0, dtype=jnp.int32)  # below 2^24: a float32 holds them exactly
        scale = jnp.stack([scale[0], sums.astype(jnp.float32)])
    else:
        group = -(-k // 8) * 8 if groups == 1 else math.prod(weight.block[i] for i in summed)
    scale = jnp.pad(scale, [(0, 0), (0, -scale.shape[1] % matmul.PANEL)])
    return Packed(matmul.pack(numbers, max(1, group)), scale, **static, group=group, activations=weight.format.activations)


def _letters(equation: str) -> tuple[str, str, str]:
    operands, _, result = equation.partition("->")
    left, right = operands.split(",")
    return left, right, result


def _groups_are_even(weight: QTensor, summed: tuple[int, ...]) -> bool:
    """Whether the groups are equal runs of the summed elements laid side by side, but for a shorter last one."""
    if all(weight.scale.shape[i] == 1 for i in summed):
        return True
    if math.prod(weight.block[i] for i in summed) % 8:
        return False
    outer = [i for i in summed if weight.shape[i] > 1]
    return all(weight.shape[i] % weight.block[i] == 0 for i in outer[1:]) and (
        len(outer) == 1 or weight.shape[outer[0]] % weight.block[outer[0]] == 0
    )
