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

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

PANEL = 64
INPUTS = {"float32": 1, "bfloat16": 2, "int8": 4, "uint8": 8}
"""k in a step, by the type that the panels have."""
_NO_SCALE = np.zeros(0, np.float32)


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


def products(
    x_TK: jax.Array, weights: Sequence[tuple[jax.Array, jax.Array | None]], outputs: Sequence[int], *, group: int = 0, rounded: bool = False
) -> list[jax.Array]:
    """float32 [T, outputs] for each weight (panels, scale); all have one K, type and group. x is float32 or bfloat16.

    `scale`: float32 [groups, N] where `group` k share one (a multiple of 8, for int4); for int8 [2, N]: the scales, and the sums of the
    weight over k; None: the numbers are the weight. N is filled up to whole panels. `rounded`: x goes in as int8, each row with a scale
    of its own, as `quant.aqt.quantize` rounds it; a row that is not finite gives NaN.
    """
    shapes = [jax.ShapeDtypeStruct((x_TK.shape[0], n), jnp.float32) for n in outputs]
    arrays = [array for panels, scale in weights for array in (panels, _NO_SCALE if scale is None else scale)]
    return list(jax.ffi.ffi_call("novajax_matmul", shapes)(x_TK, *arrays, group=np.int64(group), rounded=rounded))
