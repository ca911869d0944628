"""Rotary position embedding (arXiv 2104.09864): frequencies of each variant, and the rotation.

Invariants: frequencies are computed once per trace, on the host in float64, and kept as float32 constants; angles are
float32. Dimension i is paired with i + H/2, the layout of Hugging Face checkpoints.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from novajax.models.config import LinearScaling, Llama3Scaling, Rope, YarnScaling


def frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """(radians per position [H/2] float32, the factor on cos and sin)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain = rope.theta**-exponents
    match rope.scaling:
        case None:
            scaled, factor = plain, 1.0
        case LinearScaling(factor=divisor):
            scaled, factor = plain / divisor, 1.0
        case Llama3Scaling() as scaling:
            scaled, factor = _llama3(plain, scaling), 1.0
        case YarnScaling() as scaling:
            scaled, factor = _yarn(plain, scaling, rope.theta, head_dim), scaling.attention_factor
    return scaled.astype(np.float32), factor


def angles(rope: Rope, head_dim: int, positions_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), float32 [T, 1, H/2], ready to meet [T, heads, H/2]."""
    per_position, factor = frequencies(rope, head_dim)
    turns = positions_T.astype(jnp.float32)[:, None, None] * per_position
    return jnp.cos(turns) * factor, jnp.sin(turns) * factor


def rotate(x_TNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Each pair (i, i + H/2) of every head turned by its angle, in float32; the dtype is kept."""
    first, second = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_TNH.dtype)


def _llama3(plain: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    turns = scaling.original_max_tokens * plain / (2 * math.pi)  # full turns within the original context
    keep = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / scaling.factor


def _yarn(plain: np.ndarray, scaling: YarnScaling, theta: float, head_dim: int) -> np.ndarray:
    def dimension(turns: float) -> float:  # the pair that makes `turns` full turns within the original context
        return head_dim * math.log(scaling.original_max_tokens / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low or 1e-3), 0.0, 1.0)
    return plain * (1 - ramp) + plain / scaling.factor * ramp
