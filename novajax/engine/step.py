"""The one step program: S decode rows and R x C prefill tokens on one token axis, through the decoder, to logits.

Prefill, chunked prefill, mixed batches and decode are this function with other integers. Only attention sees that there
are two blocks. Padding has position -1: its KV is dropped and nothing reads its result.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from novajax.engine.buckets import Bucket
from novajax.engine.inputs import unpack
from novajax.kernels.attention import paged_attention, write_pages
from novajax.kv.pool import KVPool
from novajax.models.attention import Attend
from novajax.models.config import ModelConfig


def forward(
    graphdef: Any, weights: Any, pool: KVPool, last_tokens: jax.Array, packed: jax.Array, *, bucket: Bucket, rows: int
) -> tuple[KVPool, jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """One step. Donates: pool.

    `last_tokens` is i32[slots], the newest token of every slot; `packed` is the upload of `inputs.pack`.
    Returns (pool, logits f32[rows, V] at the rows that may draw and zeros behind, draws i32[rows, columns], scored), where
    `scored` is None or (logits f32[R * C, V], the tokens i32[R * C] to score).
    """
    model = nnx.merge(graphdef, weights)
    x = unpack(packed, bucket)
    s, r, c = bucket.decode_rows, bucket.prefill_rows, bucket.chunk_tokens
    held = last_tokens.at[x["decode_slot"]].get(mode="clip")
    tokens = jnp.where(x["decode_token"] < 0, held, x["decode_token"])
    positions = x["decode_position"]
    if r:
        steps_RC = jnp.arange(c)[None, :]
        there_RC = steps_RC < x["prefill_length"][:, None]
        positions_RC = jnp.where(there_RC, x["prefill_start"][:, None] + steps_RC, -1)
        tokens = jnp.concatenate([tokens, x["prefill_tokens"].reshape(-1)])
        positions = jnp.concatenate([positions, positions_RC.reshape(-1)])
    attend = paged_attend(model.cfg, x, positions, bucket)
    hidden_TD, pool = model(tokens, jnp.maximum(positions, 0), attend, pool)
    drawing_XD = hidden_TD[:s]
    if r:
        last_R = s + jnp.arange(r) * c + jnp.maximum(x["prefill_length"] - 1, 0)
        drawing_XD = jnp.concatenate([drawing_XD, hidden_TD[last_R]])
    scored = (model.logits(hidden_TD[s:]), x["targets"]) if bucket.score else None
    padding = ((0, rows - bucket.rows), (0, 0))
    draws = jnp.pad(x["draws"], padding, constant_values=last_tokens.shape[0])  # the slot past the end: draws into nothing
    return pool, jnp.pad(model.logits(drawing_XD), padding), draws, scored


def paged_attend(cfg: ModelConfig, x: dict[str, jax.Array], positions_T: jax.Array, bucket: Bucket) -> Attend:
    """The `attend` of a serving step: stores the step's keys and values in their pages, then attends over pages."""
    s, r, c = bucket.decode_rows, bucket.prefill_rows, bucket.chunk_tokens

    def attend(layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, pool: KVPool) -> tuple[jax.Array, KVPool]:
        pages_T, offsets_T = _places(x, positions_T, bucket, pool)
        pool = KVPool(
            write_pages(pool.keys, layer, k_TKH, pages_T, offsets_T),
            write_pages(pool.values, layer, v_TKH, pages_T, offsets_T),
        )
        how = {"scale": cfg.attention_scale, "window": cfg.layers[layer].window, "softcap": cfg.attention_softcap}
        n, h = q_TNH.shape[1:]
        q, at = q_TNH[:s, None], positions_T[:s, None]
        out = paged_attention(q, pool.keys, pool.values, layer, x["decode_table"], at, **how).reshape(s, n, h)
        if r:
            q, at = q_TNH[s:].reshape(r, c, n, h), positions_T[s:].reshape(r, c)
            rest = paged_attention(q, pool.keys, pool.values, layer, x["prefill_table"], at, **how)
            out = jnp.concatenate([out, rest.reshape(r * c, n, h)])
        return out, pool

    return attend


def _places(x: dict[str, jax.Array], positions_T: jax.Array, bucket: Bucket, pool: KVPool) -> tuple[jax.Array, jax.Array]:
    """(page, offset) of each token's KV; padding gets a page past the end, where writes are dropped."""
    pages, page_tokens = pool.keys.shape[1], pool.keys.shape[3]
    columns_T = jnp.maximum(positions_T, 0) // page_tokens
    s, r, c = bucket.decode_rows, bucket.prefill_rows, bucket.chunk_tokens
    pages_T = jnp.take_along_axis(x["decode_table"], columns_T[:s, None], axis=1)[:, 0]
    if r:
        rest = jnp.take_along_axis(x["prefill_table"], columns_T[s:].reshape(r, c), axis=1)
        pages_T = jnp.concatenate([pages_T, rest.reshape(-1)])
    return jnp.where(positions_T < 0, pages, pages_T), jnp.maximum(positions_T, 0) % page_tokens
