"""Attention of one sequence over several devices: the tokens inside each page are spread over the mesh axis `context`.

Logical page i of a sequence holds c x page tokens, shard j the j-th part of them, so every shard has the same page tables
and its share of every sequence. Inside a shard_map over `context`; with one shard it is plain paged attention.

- `share` (prefill): a chunk's keys and values, of which each shard computed a part, go round the ring; each shard stores
  what lies in its pages. c - 1 permutes.
- `ring` (prefill): the queries go round with their partial results; every shard adds what its pages say (pass-Q of
  arXiv 2411.01783, which is right for earlier chunks and shared prefixes as well). c permutes.
- `split` (decode): all shards hold the query; partial results are joined by their log-sum-exp. Two all-reduces.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from novajax.kernels.attention import merge

AXIS = "context"


def places(
    positions_XY: jax.Array,  # i32, negative: padding
    tables_XW: jax.Array,
    page: int,
    pages: int,
    shards: int,
    shard: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """(page, offset), i32[X, Y] each, of every token's KV in this shard's pool; `pages` where it belongs elsewhere or nowhere."""
    held = jnp.maximum(positions_XY, 0)
    columns = held // (page * shards)
    here = jnp.take_along_axis(tables_XW, columns, axis=1, mode="clip")
    mine = (positions_XY >= 0) if shards == 1 else (positions_XY >= 0) & (held // page % shards == shard)
    return jnp.where(mine, here, pages), held % page


def share(values: Any, store: Callable[[Any, jax.Array, Any], Any], held: Any, shards: int) -> Any:
    """`held = store(values of source, source, held)` for every source shard, the values passed round the ring."""
    shard = lax.axis_index(AXIS) if shards > 1 else jnp.int32(0)
    for turn in range(shards):
        held = store(values, (shard - turn) % shards, held)
        if turn + 1 < shards:
            values = _pass_on(values, shards)
    return held


def ring(q: jax.Array, attend: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]], shards: int) -> jax.Array:
    """The result for this shard's queries over all shards' pages. `attend(q, source)` is the partial result here of another
    shard's queries, as `paged_attention` returns it."""
    shard = lax.axis_index(AXIS) if shards > 1 else jnp.int32(0)
    so_far = attend(q, shard)
    for turn in range(1, shards):
        q, so_far = _pass_on((q, so_far), shards)
        so_far = merge(so_far, attend(q, (shard - turn) % shards))
    return so_far[0] if shards == 1 else _pass_on(so_far[0], shards)


def split(part: tuple[jax.Array, jax.Array], shards: int) -> jax.Array:
    """The whole result of queries that all shards hold, from each one's partial result."""
    out, lse = part
    if shards == 1:
        return out
    weight = jnp.exp(lse - lax.pmax(lse, AXIS))
    whole, total = lax.psum((out * weight[..., None], weight), AXIS)
    return whole / total[..., None]


def _pass_on(values: Any, shards: int) -> Any:
    """To the next shard of the ring."""
    return lax.ppermute(values, AXIS, [(shard, (shard + 1) % shards) for shard in range(shards)])
