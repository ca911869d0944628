"""The training objective: weighted cross-entropy of the next token inside each packed document.

Master weights are float32; matrices meet activations in `compute` (bfloat16 multiplies faster on processors that have
it), sums and the softmax are float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from novajax.models.attention import Attend
from novajax.models.config import ModelConfig
from novajax.models.decoder import Decoder


def packed_causal(cfg: ModelConfig, segments_BS: jax.Array) -> Attend:
    """Causal attention inside each document of each row; `segments_BS` numbers the documents of a row.

    One (row, KV head) at a time, scores recomputed on the way back: what lives at once fits a processor's cache (measured: 4 times the
    speed of the batched form at rows of 256 tokens).
    """
    rows, length = segments_BS.shape
    here = jnp.arange(length)
    distance_SS = here[:, None] - here[None, :]  # query - key

    def attend(layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        n, kv_heads, h = q_TNH.shape[1], k_TKH.shape[1], q_TNH.shape[2]
        groups, window = n // kv_heads, cfg.layers[layer].window
        seen_SS = distance_SS >= 0 if window is None else (distance_SS >= 0) & (distance_SS < window)

        @jax.checkpoint
        def one(piece: tuple[jax.Array, ...]) -> jax.Array:
            q, k, v, segments_S = piece  # [G*S, H], [S, H], [S, H], [S]
            scores = jnp.einsum("qh,sh->qs", q, k, preferred_element_type=jnp.float32) * cfg.attention_scale
            if cfg.attention_softcap is not None:
                scores = cfg.attention_softcap * jnp.tanh(scores / cfg.attention_softcap)
            seen = seen_SS & (segments_S[:, None] == segments_S[None, :])
            scores = jnp.where(jnp.tile(seen, (groups, 1)), scores, -1e30)
            shares = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
            out = jnp.einsum("qs,sh->qh", shares.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return (out / shares.sum(-1, keepdims=True)).astype(q.dtype)

        q = q_TNH.reshape(rows, length, kv_heads, groups, h).transpose(0, 2, 3, 1, 4).reshape(rows * kv_heads, groups * length, h)
        k, v = (x.reshape(rows, length, kv_heads, h).transpose(0, 2, 1, 3).reshape(rows * kv_heads, length, h) for x in (k_TKH, v_TKH))
        out = jax.lax.map(one, (q, k, v, jnp.repeat(segments_BS, kv_heads, axis=0)))
        return out.reshape(rows, kv_heads, groups, length, h).transpose(0, 3, 1, 2, 4).reshape(q_TNH.shape), cache

    return attend


def weighted_loss(
    graph: nnx.GraphDef[Decoder], params: nnx.State, batch: dict[str, jax.Array], compute: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """(mean loss in nats per unit of weight, total weight) of one batch from `data.batches`."""
    tokens_BS, segments_BS = batch["tokens"], batch["segments"]
    model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(compute), params))
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
    hidden_TD, _ = model(tokens_BS.reshape(-1), positions_BS.reshape(-1), packed_causal(model.cfg, segments_BS), None)
    logits_TV = model.logits(hidden_TD)
    targets_BS = jnp.roll(tokens_BS, -1, axis=1)
    same_BS = (segments_BS == jnp.roll(segments_BS, -1, axis=1)) & (segments_BS > 0)
    inside_BS = same_BS.at[:, -1].set(False)  # the roll wraps round: the last token of a row has no target
    weights_BS = jnp.where(inside_BS, jnp.roll(batch["weights"], -1, axis=1), 0.0)
    losses_T = optax.softmax_cross_entropy_with_integer_labels(logits_TV, targets_BS.reshape(-1))
    total = weights_BS.sum()
    return (losses_T * weights_BS.reshape(-1)).sum() / jnp.maximum(total, 1.0), total
