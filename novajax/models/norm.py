"""RMS normalisation (arXiv 1910.07467), computed in float32 whatever the dtype around it."""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale) over the last axis."""

    def __init__(self, size: int, axis: str | None, *, eps: float, offset: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.full((size,), 1.0 - offset, dtype), axes=(axis,))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * (self.offset + self.scale.get_value().astype(jnp.float32))).astype(x.dtype)
