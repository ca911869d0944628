"""Products with weights packed for a CPU: how numbers lie in panels, and the call.

A weight [K, N] (K is summed) lies in panels of 64 outputs, [panels, K / inputs, 64, inputs], so that a thread reads a panel once, in
order; `inputs` consecutive k fill 32 bits of a lane. K and N are filled up with zeros. int4 lies in pairs in uint8, plus 8: the low
halves of a step's four bytes are its first four k.

| activations | weights | sum |
|---|---|---|
| float32 | float32, bfloat16, int8, int4 | float32, of exact products of float32 numbers |
| bfloat16 | bfloat16 | float32 |
| int8 | int8, int4 | int32, inside a group |
"""

import jax
import jax.numpy as jnp
import numpy as np

PANEL = 64
INPUTS = {"float32": 1, "bfloat16": 2, "int8": 4, "uint8": 8}
"""k in a step, by the type that the panels have."""
_NOTHING = {dtype: np.zeros(0, dtype) for dtype in (np.float32, np.int32)}


def pack(weight_KN: jax.Array, multiple: int = 1) -> jax.Array:
    """Panels of float32, bfloat16, int8, or uint8 for jnp.int4; K filled up to a multiple of `multiple` and of the step."""
    pairs = weight_KN.dtype == jnp.int4
    dtype = "uint8" if pairs else str(weight_KN.dtype)
    k, n = weight_KN.shape
    whole = np.lcm(multiple, INPUTS[dtype])
    padded = jnp.pad(
        weight_KN.astype(jnp.int8) + 8 if pairs else weight_KN, [(0, -k % whole), (0, -n % PANEL)], constant_values=8 if pairs else 0
    )
    columns = padded.shape[1] // PANEL
    if not pairs:
        return padded.reshape(-1, INPUTS[dtype], columns, PANEL).transpose(2, 0, 3, 1)
    halves = padded.astype(jnp.uint8).reshape(-1, 2, 4, columns, PANEL)
    return (halves[:, 0] | (halves[:, 1] << 4)).transpose(2, 0, 3, 1)


def unpack_rows(panels: jax.Array, index: jax.Array) -> jax.Array:
    """[*index.shape, K filled up]: the weights of some outputs, int4 as int8."""
    found = panels[index // PANEL, :, index % PANEL]
    if panels.dtype == jnp.uint8:
        halves = jnp.stack([found & 0xF, found >> 4], axis=-2)
        found = halves.astype(jnp.int8) - 8
    return found.reshape(*index.shape, -1)


def product(
    x_TK: jax.Array,
    row_scale_T: jax.Array | None,
    panels: jax.Array,
    scale_GN: jax.Array | None,
    sums_N: jax.Array | None,
    outputs: int,
    group: int = 0,
) -> jax.Array:
    """float32 [T, outputs]. K as filled up; scales and sums are filled up to whole panels.

    `group`: k that share a scale, a multiple of 8 (int4); 0: a scale for each output, or none. `sums_N`: of int8 weights over k, for int8
    activations.
    """
    call = jax.ffi.ffi_call("novajax_matmul", jax.ShapeDtypeStruct((x_TK.shape[0], outputs), jnp.float32))
    nothing, no_sums = _NOTHING[np.float32], _NOTHING[np.int32]
    return call(
        x_TK,
        nothing if row_scale_T is None else row_scale_T,
        panels,
        nothing if scale_GN is None else scale_GN,
        no_sums if sums_N is None else sums_N,
        group=np.int64(group),
    )
