"""Serving attention: a step's keys and values go into their pages, then queries attend over pages.

An island: every device has the heads it computed and the KV heads of its pool.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from novajax.engine.buckets import Bucket
from novajax.engine.layout import Kernels, Layout
from novajax.kernels import attention, context
from novajax.kernels.gpu import attention as gpu
from novajax.kernels.native import attention as native
from novajax.kv.pool import Kind, KVPool
from novajax.models.attention import Attend
from novajax.models.config import ModelConfig
from novajax.parallel.island import island
from novajax.quant.cache import rounded

Rounded = tuple[jax.Array, jax.Array | None]
"""Keys or values of some tokens as their pages hold them: numbers, and scales where there are any."""
_FORMS: dict[Kernels, Any] = {"plain": attention, "native": native, "gpu": gpu}
_HEADS = (None, "heads", None)
_KV_HEADS = (None, "kv_heads", None)
_PAGED = (None, None, "kv_heads", None, None)


def paged_attend(cfg: ModelConfig, x: dict[str, jax.Array], positions_T: jax.Array, bucket: Bucket, layout: Layout) -> Attend:
    """The `attend` of a serving step. `x` is the unpacked plan."""
    shards, kernels = layout.context, _FORMS[layout.kernels]
    s, y, r, part = bucket.decode_tokens, 1 + bucket.drafts, bucket.prefill_rows, bucket.chunk_tokens // shards

    def attend(layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, pool: KVPool) -> tuple[jax.Array, KVPool]:
        window = cfg.layers[layer].window
        how = {"scale": cfg.attention_scale, "window": window, "softcap": cfg.attention_softcap, "shards": shards}

        def local(q: jax.Array, k: jax.Array, v: jax.Array, pool: KVPool, x: dict[str, jax.Array], positions_T: jax.Array) -> Any:
            shard = lax.axis_index(context.AXIS) if shards > 1 else jnp.int32(0)

            def store(held: KVPool, k: Rounded, v: Rounded, at_XY: jax.Array, tables_XW: jax.Array) -> KVPool:
                pages, page = held.keys.pages, held.keys.page_tokens
                where = [a.reshape(-1) for a in context.places(at_XY, tables_XW, page, pages, shards, shard)]
                return KVPool(kernels.write_pages(held.keys, layer, *k, *where), kernels.write_pages(held.values, layer, *v, *where))

            def store_chunk(part_of: tuple[Rounded, Rounded], source: jax.Array, held: KVPool) -> KVPool:
                return store(held, *part_of, chunk_positions(x, part, source), x["prefill_table"])

            def look(q_XYNH: jax.Array, tables_XW: jax.Array, at_XY: jax.Array) -> tuple[jax.Array, jax.Array]:
                return kernels.paged_attention(q_XYNH, held.keys, held.values, layer, tables_XW, at_XY, shard=shard, **how)

            # All writes come before all reads, or XLA would have to keep a copy of the pool for the reads between.
            at_SY = positions_T[:s].reshape(-1, y)
            k_T, v_T = (as_held(x, side.kind, layout.kernels) for x, side in ((k, pool.keys), (v, pool.values)))

            def of(run: slice) -> tuple[Rounded, Rounded]:
                return jax.tree.map(lambda array: array[run], (k_T, v_T))

            held = store(pool, *of(slice(s)), at_SY, x["decode_table"])
            if r:
                held = context.share(of(slice(s, None)), store_chunk, held, shards)
            out = context.split(look(q[:s].reshape(-1, y, *q.shape[1:]), x["decode_table"], at_SY), shards).reshape(s, *q.shape[1:])
            if r:
                chunks = context.ring(
                    q[s:].reshape(r, part, *q.shape[1:]),
                    lambda q, source: look(q, x["prefill_table"], chunk_positions(x, part, source)),
                    shards,
                )
                out = jnp.concatenate([out, chunks.reshape(r * part, *q.shape[1:])])
            return out.astype(q.dtype), held

        pools = jax.tree.map(lambda array: _PAGED[: array.ndim], pool)
        cut = island(local, (_HEADS, _KV_HEADS, _KV_HEADS, pools, (), ()), (_HEADS, pools))
        return cut(q_TNH, k_TKH, v_TKH, pool, x, positions_T)

    return attend


def as_held(x_TKH: jax.Array, kind: Kind | None, kernels: Kernels) -> Rounded:
    """Keys or values as pages of that kind hold them."""
    return native.round_rows(x_TKH) if kernels == "native" and kind == "int8" else rounded(x_TKH, kind)


def chunk_positions(x: dict[str, jax.Array], part: int, shard: jax.Array | int) -> jax.Array:
    """i32[R, part]: the positions of one context shard's part of each chunk, -1 for padding."""
    steps = shard * part + jnp.arange(part)[None, :]
    return jnp.where(steps < x["prefill_length"][:, None], x["prefill_start"][:, None] + steps, -1)
