"""The only place where a model multiplies by a weight, so that a weight's representation is decided here and nowhere else.

Invariants: products accumulate in float32; float32 operands are multiplied as float32 on every device (accelerators
would otherwise round them to TF32). It does not know layers, meshes or files.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


def einsum(equation: str, x: jax.Array, weight: nnx.Param | jax.Array, *, dtype: jnp.dtype | None = None) -> jax.Array:
    """`x` times `weight` by `equation`; the result has `dtype`, or x's own."""
    values = weight.get_value() if isinstance(weight, nnx.Variable) else weight
    out = jnp.einsum(equation, x, values, precision=_precision(x), preferred_element_type=jnp.float32)
    return out.astype(x.dtype if dtype is None else dtype)


def ragged(x_XA: jax.Array, weight_EAB: nnx.Param | jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Rows of `x`, sorted by expert, times their expert's matrix: the first sizes[0] rows use weight[0], and so on."""
    values = weight_EAB.get_value() if isinstance(weight_EAB, nnx.Variable) else weight_EAB
    out = lax.ragged_dot(x_XA, values, sizes_E, precision=_precision(x_XA), preferred_element_type=jnp.float32)
    return out.astype(x_XA.dtype)


def _precision(x: jax.Array) -> lax.Precision:
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
