"""How a parameter is declared: its shape, dtype, logical axis names and random start. Every other reader (sharding,
loading, planning) gets these from the abstract module, so nothing about a parameter is written twice.

The names are in the metadata field `axes`, one per dimension: embed mlp heads kv_heads head_dim vocab experts, or None.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

Axes = tuple[str | None, ...]


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype, *, inputs: int) -> nnx.Param:
    """A matrix drawn from a normal distribution of standard deviation 1/sqrt(inputs)."""
    values = jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(inputs)
    return nnx.Param(values.astype(dtype), axes=axes)


def bias(shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype) -> nnx.Param:
    """Zeros."""
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)
