"""Attention over a paged KV cache: the plain definition, which every faster form must equal.

A pool holds pages of `page` tokens, head-major inside a page so that one (page, head) is one contiguous block. A row's
table lists its pages in order, so the key at table column w, offset i has position w * page + i. Nothing here knows of
requests or schedulers: pages are integers, and an id past the pool's end means "nothing" (writes are dropped).
"""

import jax
import jax.numpy as jnp
from jax import lax

from novajax.kernels.nibbles import unpacked
from novajax.kv.pool import Paged

MASKED = -1e30
"""Score of a hidden position: finite, so that a row with nothing to see yields zeros instead of NaN."""


def write_pages(
    held: Paged,
    layer: int,
    numbers_TKH: jax.Array,
    scale_TK: jax.Array | None,
    pages_T: jax.Array,  # i32[T], P or more: dropped
    offsets_T: jax.Array,  # i32[T] in [0, page)
) -> Paged:
    """The pages with each token's row, as they hold it, stored at its page and offset. In place when they are donated."""

    def put(array: jax.Array, rows: jax.Array) -> jax.Array:
        return array.at[layer, pages_T, :, offsets_T].set(rows.astype(array.dtype), mode="drop", unique_indices=True)

    return Paged(put(held.numbers, numbers_TKH), None if scale_TK is None else put(held.scale, scale_TK))


def gather_pages(array: jax.Array, layer: int, tables_XW: jax.Array) -> jax.Array:
    """[X, K, W * page, ...]: each row's pages of an array [L, P, K, page, ...] side by side, in one gather (an index per page and head, so
    no transpose follows)."""
    heads_1K1 = jnp.arange(array.shape[2])[None, :, None]
    blocks_XKWp = array.at[layer, tables_XW[:, None, :], heads_1K1].get(mode="clip")
    return blocks_XKWp.reshape(*blocks_XKWp.shape[:2], -1, *array.shape[4:])


def read_pages(held: Paged, layer: int, tables_XW: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """(numbers_XKSH, scales f32[X, K, S] or None) of each row's pages; rounded numbers, which are exact in bfloat16 too, as `dtype`."""
    numbers = gather_pages(held.numbers, layer, tables_XW)
    if held.scale is None:
        return numbers, None
    wide = unpacked(numbers) if held.kind == "int4" else numbers
    return wide.astype(dtype), gather_pages(held.scale, layer, tables_XW)


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
) -> tuple[jax.Array, jax.Array]:
    """Causal softmax attention of each query over its row's pages, queries already written to them.

    A query at position p sees keys at positions [max(0, p - window + 1), p]. Scores and sums are float32; `softcap` is
    cap * tanh(score / cap) before the mask (Gemma 2, arXiv 2408.00118). Where a page's tokens are spread over `shards`
    pools, this one holds part `shard` of each page, and results are to be joined by `merge`. Where keys are rounded their scales
    multiply the scores; those of values multiply the weights.

    Returns (out f32[X, Y, N, H], log of the sum of exponentials f32[X, Y, N]).
    """
    rows, queries, heads, head_dim = q_XYNH.shape
    kv_heads, page = keys.numbers.shape[2:4]
    k_XKSH, k_scale_XKS = read_pages(keys, layer, tables_XW, q_XYNH.dtype)
    v_XKSH, v_scale_XKS = read_pages(values, layer, tables_XW, q_XYNH.dtype)
    groups = heads // kv_heads
    # Queries of one KV head are rows of one matrix: [X, K, G * Y, H] x [X, K, S, H].
    q_XKGYH = (q_XYNH * scale).reshape(rows, queries, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    q_XKMH = q_XKGYH.reshape(rows, kv_heads, groups * queries, head_dim).astype(k_XKSH.dtype)
    scores = jnp.einsum("xkmh,xksh->xkms", q_XKMH, k_XKSH, preferred_element_type=jnp.float32)
    if k_scale_XKS is not None:
        scores = scores * k_scale_XKS[:, :, None, :]
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen_XYS = _visible(positions_XY, _key_positions(k_XKSH.shape[2], page, shards, shard), window)
    scores = scores.reshape(rows, kv_heads, groups, queries, -1)
    scores = jnp.where(seen_XYS[:, None, None, :, :], scores, MASKED)
    best = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - best)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / total).reshape(rows, kv_heads, groups * queries, -1)
    if v_scale_XKS is not None:
        weights = weights * v_scale_XKS[:, :, None, :]
    out_XKMH = jnp.einsum("xkms,xksh->xkmh", weights.astype(v_XKSH.dtype), v_XKSH, preferred_element_type=jnp.float32)
    out_XYKGH = out_XKMH.reshape(rows, kv_heads, groups, queries, head_dim).transpose(0, 3, 1, 2, 4)
    lse_XYKG = (best + jnp.log(total))[..., 0].transpose(0, 3, 1, 2)
    return out_XYKGH.reshape(rows, queries, heads, head_dim), lse_XYKG.reshape(rows, queries, heads)


def merge(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The attention over two disjoint sets of keys, from the attention over each: (out [..., H], lse [...]) as `paged_attention` gives."""
    (out_a, lse_a), (out_b, lse_b) = one, other
    lse = jnp.logaddexp(lse_a, lse_b)
    return out_a * jnp.exp(lse_a - lse)[..., None] + out_b * jnp.exp(lse_b - lse)[..., None], lse


def _key_positions(keys: int, page: int, shards: int, shard: jax.Array | int) -> jax.Array:
    """i32[keys]: the positions of one shard's keys, in the order of its table."""
    key_S = lax.iota(jnp.int32, keys)
    return key_S if shards == 1 else (key_S // page * shards + shard) * page + key_S % page


def _visible(positions_XY: jax.Array, keys_S: jax.Array, window: int | None) -> jax.Array:
    """bool[X, Y, S]: which key positions each query may see."""
    seen = keys_S <= positions_XY[..., None]
    if window is not None:
        seen &= keys_S > positions_XY[..., None] - window
    return seen
