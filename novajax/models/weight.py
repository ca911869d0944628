"""How a parameter is declared: its shape, dtype, logical axis names and random start. Every other reader (sharding,
loading, planning) gets these from the abstract module, so nothing about a parameter is written twice.

The names are in the metadata field `axes`, one per dimension: embed mlp heads kv_heads head_dim vocab experts, or None.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

Axes = tuple[str | None, ...]


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype, *, inputs: int) -> nnx.Param:
    """A matrix drawn from a normal distribution of standard deviation 1/sqrt(inputs)."""
    return nnx.Param(_normal(rngs.params(), 1 / math.sqrt(inputs), shape, dtype), axes=axes)


def bias(shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype) -> nnx.Param:
    """Zeros."""
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, deviation: float, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * deviation).astype(dtype)
