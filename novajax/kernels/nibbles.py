"""Two int4 in a byte: the first half of the last axis in the low bits, the second half in the high ones.

Ours instead of jnp.int4, because scatters, permutes and kernels treat a byte alike on every device.
"""

import jax
import jax.numpy as jnp


def packed(x: jax.Array) -> jax.Array:
    """uint8[..., H / 2] of whole numbers from -8 to 7, [..., H] of any integer type; H is even."""
    low, high = jnp.split(x.astype(jnp.uint8) & 0xF, 2, axis=-1)
    return low | (high << 4)


def unpacked(pairs: jax.Array) -> jax.Array:
    """int8[..., H] of what `packed` made."""
    halves = jnp.concatenate([pairs & 0xF, pairs >> 4], axis=-1).astype(jnp.int8)
    return (halves ^ 8) - 8
