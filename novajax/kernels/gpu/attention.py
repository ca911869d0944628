"""`kernels.attention` on a GPU: attention over pages read in place, as one kernel (Pallas, lowered by Triton).

A program takes one KV head of one row, a tile of the row's queries with all heads that share the KV head, and a share of the
visible keys. Keys and values are loaded from their pages a block at a time, as they are stored, and never written out; scores,
sums and results are float32 (online softmax, arXiv 2205.14135). Where there are too few programs to fill the device the keys are
split among more of them and the parts joined by their log-sum-exp (arXiv 2311.01282). Cost follows what a row's queries may see
(its length, or the window), not the width of its table.

int4 lies in pairs, the first half of a vector in the low bits (`kernels.nibbles`): its halves are two matrices here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from novajax.core.errors import ConfigError
from novajax.kernels import attention
from novajax.kernels.attention import MASKED
from novajax.kv.pool import Paged

NAME = "paged_attention"
"""Of the kernel in a compiled program."""
_KEYS = 64
"""Keys of one turn of the loop."""
_PROGRAMS = 1024
"""Programs that keep a large GPU (132 processors) busy: about two of them for each of four slots."""
_FEWEST_KEYS = 256
"""A split of fewer keys costs more to join than it saves."""
_LONGEST_INT32 = 2**31


def write_pages(
    held: Paged, layer: int, numbers_TKH: jax.Array, scale_TK: jax.Array | None, pages_T: jax.Array, offsets_T: jax.Array
) -> Paged:
    """The plain definition, which XLA makes a scatter in place."""
    return attention.write_pages(held, layer, numbers_TKH, scale_TK, pages_T, offsets_T)


def paged_attention(
    q_XYNH: jax.Array,  # Y queries in each of X rows
    keys: Paged,
    values: Paged,
    layer: int,
    tables_XW: jax.Array,  # i32[X, W]
    positions_XY: jax.Array,  # i32[X, Y], negative: a padding query, its result is unspecified but finite
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    shards: int = 1,
    shard: jax.Array | int = 0,
    splits: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As the plain definition: (out f32[X, Y, N, H], log of the sum of exponentials f32[X, Y, N]). Where there is no GPU the kernel is
    interpreted, slowly.

    `splits`: parts that each row's keys are cut into. If not given: as many as make `_PROGRAMS` programs of the rows, KV heads and
    tiles of queries, but none of fewer than `_FEWEST_KEYS` keys where the table is full. Raises ConfigError for one-byte numbers of 2 to
    4 GiB, whose offsets Triton would compute in 32 bits with a sign.
    """
    for paged in (keys, values):
        if _LONGEST_INT32 < paged.numbers.size * paged.numbers.dtype.itemsize <= 2 * _LONGEST_INT32 and paged.numbers.dtype.itemsize == 1:
            raise ConfigError(
                f"an array of {paged.numbers.size} one-byte numbers cannot be addressed by the GPU kernel: use fewer or more pages"
            )
    place = jnp.stack([jnp.asarray(layer, jnp.int32), jnp.asarray(shard, jnp.int32)])
    return _flash(q_XYNH, keys, values, tables_XW, positions_XY, place, scale, window, softcap, shards, splits)


@partial(jax.jit, static_argnums=(6, 7, 8, 9, 10))
def _flash(
    q_XYNH: jax.Array,
    keys: Paged,
    values: Paged,
    tables_XW: jax.Array,
    positions_XY: jax.Array,
    place: jax.Array,  # i32: layer, shard
    scale: float,
    window: int | None,
    softcap: float | None,
    shards: int,
    splits: int | None,
) -> tuple[jax.Array, jax.Array]:
    """`paged_attention`; the layer is no constant, so that all layers share one kernel."""
    rows, queries, heads = q_XYNH.shape[:3]
    kv_heads = keys.numbers.shape[2]
    groups = heads // kv_heads
    tile = max(16, min(128, pl.next_power_of_2(queries * groups)), pl.next_power_of_2(groups))
    tiles = pl.cdiv(queries, tile // groups)
    if splits is None:
        longest = max(1, tables_XW.shape[1] * keys.page_tokens // _FEWEST_KEYS)
        splits = min(longest, pl.cdiv(_PROGRAMS, rows * kv_heads * tiles))
    arguments = (q_XYNH, keys, values, tables_XW, positions_XY, place)
    program = partial(_program, tile=tile, splits=splits, scale=scale, window=window, softcap=softcap, shards=shards)

    def call(*, interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            program,
            grid=(tiles * splits, kv_heads, rows),
            in_specs=jax.tree.map(lambda _: pl.no_block_spec, arguments),
            out_specs=(pl.no_block_spec, pl.no_block_spec),
            out_shape=(
                jax.ShapeDtypeStruct((splits, *q_XYNH.shape), jnp.float32),
                jax.ShapeDtypeStruct((splits, rows, queries, heads), jnp.float32),
            ),
            compiler_params=triton.CompilerParams(num_warps=4 if tile < 128 else 8, num_stages=3 if tile < 128 else 2),
            interpret=interpret,
            name=NAME,
        )

    out_PXYNH, lse_PXYN = lax.platform_dependent(*arguments, cuda=call(interpret=False), default=call(interpret=True))
    if splits == 1:
        return out_PXYNH[0], lse_PXYN[0]
    best_XYN = jnp.max(lse_PXYN, axis=0)
    weights_PXYN = jnp.exp(lse_PXYN - best_XYN)
    total_XYN = jnp.sum(weights_PXYN, axis=0)
    return jnp.sum(out_PXYNH * weights_PXYN[..., None], axis=0) / total_XYN[..., None], best_XYN + jnp.log(total_XYN)


def _program(
    q_ref: Any,
    keys: Paged,
    values: Paged,
    tables_ref: Any,
    positions_ref: Any,
    place_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    tile: int,
    splits: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    shards: int,
) -> None:
    """One program: the grid is (tiles x splits, KV heads, rows). Vectors over the tile's queries have the letter M, over keys B."""
    split, head, row = pl.program_id(0) % splits, pl.program_id(1), pl.program_id(2)
    queries, heads, head_dim = q_ref.shape[1:]
    pages, kv_heads, page = keys.numbers.shape[1:4]
    groups = heads // kv_heads
    lane_M = jnp.arange(tile)
    query_M = pl.program_id(0) // splits * (tile // groups) + lane_M // groups
    head_M = head * groups + lane_M % groups
    real_M = (lane_M < tile // groups * groups) & (query_M < queries)
    at_M = triton.load(positions_ref.at[row, query_M], mask=real_M, other=-1)
    layer, shard, span = place_ref[0], place_ref[1], page * shards
    last = jnp.max(at_M)
    first, start = jnp.int32(0), jnp.int32(0)
    if window is not None:
        first = jnp.maximum(jnp.min(jnp.where(at_M < 0, last, at_M)) - window + 1, 0)
        start = first // span * page
    end = jnp.where(last < 0, 0, last // span * page + page)

    def lanes(paged: Paged) -> jax.Array:
        """Elements of a vector of its matrix, of which int4 has two; a power of two, as Triton wants it."""
        return jnp.arange(pl.next_power_of_2(paged.numbers.shape[4]))

    def halves(paged: Paged) -> range:
        """Where in the head each matrix begins."""
        return range(0, head_dim, paged.numbers.shape[4])

    def inside(paged: Paged, real: jax.Array) -> jax.Array:
        """Where a matrix with these rows has numbers."""
        return real[:, None] & (lanes(paged) < paged.numbers.shape[4])[None, :]

    def load(paged: Paged, here_B: jax.Array, page_B: jax.Array, offset_B: jax.Array) -> tuple[list[jax.Array], jax.Array | None]:
        """([B, width] of each matrix, scales_B)."""
        real = inside(paged, here_B)
        place = paged.numbers.at[layer, page_B[:, None], head, offset_B[:, None], lanes(paged)[None, :]]
        numbers = triton.load(place, mask=real)  # no `other`: Triton makes no float8 of an integer
        pairs = numbers.astype(jnp.int32) if paged.kind == "int4" else None
        parts = [numbers] if pairs is None else [((half & 0xF) ^ 8) - 8 for half in (pairs, pairs >> 4)]
        parts = [jnp.where(real, part.astype(q_ref.dtype), 0) for part in parts]
        if paged.scale is None:
            return parts, None
        return parts, triton.load(paged.scale.at[layer, page_B, head, offset_B], mask=here_B, other=0.0)

    q_parts = [
        triton.load(q_ref.at[row, query_M[:, None], head_M[:, None], half + lanes(keys)[None, :]], mask=inside(keys, real_M), other=0)
        for half in halves(keys)
    ]
    exact = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None

    def turn(block: jax.Array, so_far: Any) -> Any:
        best_M, total_M, out_parts = so_far
        key_B = start + block * _KEYS + jnp.arange(_KEYS)
        offset_B = key_B % page
        position_B = (key_B // page * shards + shard) * page + offset_B
        here_B = (position_B >= first) & (position_B <= last)
        page_B = jnp.minimum(triton.load(tables_ref.at[row, key_B // page], mask=here_B, other=0), pages - 1)
        k_parts, k_scale_B = load(keys, here_B, page_B, offset_B)
        scores = sum(triton.dot(q, k, trans_b=True, precision=exact) for q, k in zip(q_parts, k_parts, strict=True)) * scale
        if k_scale_B is not None:
            scores = scores * k_scale_B[None, :]
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        seen = position_B[None, :] <= at_M[:, None]
        if window is not None:
            seen &= position_B[None, :] > at_M[:, None] - window
        scores = jnp.where(seen, scores, MASKED)
        new_M = jnp.maximum(best_M, jnp.max(scores, axis=1))
        weights = jnp.where(seen, jnp.exp(scores - new_M[:, None]), 0.0)
        fade_M = jnp.exp(best_M - new_M)
        total_M = total_M * fade_M + jnp.sum(weights, axis=1)
        v_parts, v_scale_B = load(values, here_B, page_B, offset_B)
        if v_scale_B is not None:
            weights = weights * v_scale_B[None, :]
        weights = weights.astype(q_ref.dtype)
        out_parts = [out * fade_M[:, None] + triton.dot(weights, v, precision=exact) for out, v in zip(out_parts, v_parts, strict=True)]
        return new_M, total_M, out_parts

    blocks = pl.cdiv(end - start, _KEYS)
    each = pl.cdiv(blocks, splits)
    nothing = [jnp.zeros((tile, lanes(values).size), jnp.float32) for _ in halves(values)]
    so_far = (jnp.full((tile,), MASKED, jnp.float32), jnp.zeros((tile,), jnp.float32), nothing)
    best_M, total_M, out_parts = lax.fori_loop(split * each, jnp.minimum(blocks, (split + 1) * each), turn, so_far)
    filled_M = jnp.where(total_M > 0, total_M, 1.0)
    triton.store(lse_ref.at[split, row, query_M, head_M], jnp.where(total_M > 0, best_M + jnp.log(filled_M), MASKED), mask=real_M)
    for half, out in zip(halves(values), out_parts, strict=True):
        place = out_ref.at[split, row, query_M[:, None], head_M[:, None], half + lanes(values)[None, :]]
        triton.store(place, out / filled_M[:, None], mask=inside(values, real_M))
