"""`kernels.attention` on a CPU, over pages where they lie: no gather, no loop over written rows, nothing read behind what queries see."""

import jax
import jax.numpy as jnp
import numpy as np

from novajax.kv.pool import Paged

_NO_SCALE = np.zeros(0, np.float32)


def write_pages(
    held: Paged, layer: int, numbers_TKH: jax.Array, scale_TK: jax.Array | None, pages_T: jax.Array, offsets_T: jax.Array
) -> Paged:
    """As the plain definition; in place: the pages must not be needed as they were."""

    def put(array: jax.Array, rows: jax.Array) -> jax.Array:
        call = jax.ffi.ffi_call("novajax_write_pages", jax.ShapeDtypeStruct(array.shape, array.dtype), input_output_aliases={0: 0})
        return call(array, rows.astype(array.dtype), pages_T.astype(jnp.int32), offsets_T.astype(jnp.int32), layer=np.int64(layer))

    return Paged(put(held.numbers, numbers_TKH), None if scale_TK is None else put(held.scale, scale_TK))


def round_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8 [..., H], float32 scales [...]) as `quant.aqt.quantize` rounds rows; NaN for the scale of a row that is not finite."""
    shapes = (jax.ShapeDtypeStruct(x.shape, jnp.int8), jax.ShapeDtypeStruct(x.shape[:-1], jnp.float32))
    numbers, scale = jax.ffi.ffi_call("novajax_round_rows", shapes)(x)
    return numbers, scale


def paged_attention(
    q_XYNH: jax.Array,  # float32 or bfloat16
    keys: Paged,
    values: Paged,
    layer: int,
    tables_XW: jax.Array,
    positions_XY: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    shards: int = 1,
    shard: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
    """(out f32[X, Y, N, H], log of the sum of exponentials f32[X, Y, N]) as the plain definition has them, for any pages; `shards` is 1."""
    if shards != 1:
        raise ValueError("native attention sees whole pages")
    shape = q_XYNH.shape
    call = jax.ffi.ffi_call(
        "novajax_paged_attention", (jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:3], jnp.float32))
    )
    found = call(
        q_XYNH,
        keys.numbers,
        _NO_SCALE if keys.scale is None else keys.scale,
        values.numbers,
        _NO_SCALE if values.scale is None else values.scale,
        tables_XW.astype(jnp.int32),
        positions_XY.astype(jnp.int32),
        layer=np.int64(layer),
        scale=np.float32(scale),
        window=np.int64(window or 0),
        softcap=np.float32(softcap or 0.0),
    )
    return found[0], found[1]
