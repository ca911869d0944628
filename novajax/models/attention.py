"""The attention layer's projections, and the dense causal `attend` for training and tests.

The module projects, normalises and rotates; how queries meet keys is injected (`attend`), so that one model serves
dense training rows and paged serving steps. It does not know batches, pages or caches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from novajax.models.config import ModelConfig
from novajax.models.norm import RMSNorm
from novajax.models.rope import rotate
from novajax.models.weight import bias, weight
from novajax.quant.matmul import einsum, einsums

Attend = Callable[[int, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""(layer, q_TNH, k_TKH, v_TKH, cache) -> (out_TNH, cache). q and k come rotated and normalised; the function applies the
scale, the layer's window and the soft cap of the config itself."""


class Attention(nnx.Module):
    """Grouped-query attention; heads are an axis of the weights, never a reshape."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype):
        d, n, k, h = cfg.embed, cfg.heads, cfg.kv_heads, cfg.head_dim
        self.q = weight(rngs, (d, n, h), ("embed", "heads", "head_dim"), dtype, inputs=d)
        self.k = weight(rngs, (d, k, h), ("embed", "kv_heads", "head_dim"), dtype, inputs=d)
        self.v = weight(rngs, (d, k, h), ("embed", "kv_heads", "head_dim"), dtype, inputs=d)
        self.o = weight(rngs, (n, h, d), ("heads", "head_dim", "embed"), dtype, inputs=n * h * 2 * len(cfg.layers))
        self.q_bias = bias((n, h), ("heads", "head_dim"), dtype) if cfg.qkv_bias else None
        self.k_bias = bias((k, h), ("kv_heads", "head_dim"), dtype) if cfg.qkv_bias else None
        self.v_bias = bias((k, h), ("kv_heads", "head_dim"), dtype) if cfg.qkv_bias else None
        self.o_bias = bias((d,), ("embed",), dtype) if cfg.o_bias else None
        norms = [RMSNorm(h, "head_dim", eps=cfg.norm_eps, offset=cfg.norm_offset, dtype=dtype) for _ in range(2 if cfg.qk_norm else 0)]
        self.q_norm, self.k_norm = norms if norms else (None, None)

    def __call__(self, layer: int, x_TD: jax.Array, turn: tuple[jax.Array, jax.Array], attend: Attend, cache: Any) -> tuple[jax.Array, Any]:
        """One layer's attention over x; `turn` is the (cos, sin) of these positions."""
        q_TNH, k_TKH, v_TKH = einsums(("td,dnh->tnh", "td,dkh->tkh", "td,dkh->tkh"), x_TD, (self.q, self.k, self.v))
        if self.q_bias is not None and self.k_bias is not None and self.v_bias is not None:
            q_TNH, k_TKH, v_TKH = q_TNH + self.q_bias.get_value(), k_TKH + self.k_bias.get_value(), v_TKH + self.v_bias.get_value()
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        out_TNH, cache = attend(layer, rotate(q_TNH, *turn), rotate(k_TKH, *turn), v_TKH, cache)
        out_TD = einsum("tnh,nhd->td", out_TNH, self.o)
        return (out_TD if self.o_bias is None else out_TD + self.o_bias.get_value()), cache


def dense_causal(cfg: ModelConfig, batch_B: int) -> Attend:
    """Causal attention inside each of `batch_B` rows of equal length packed on the token axis, T = B * S, no cache.

    Scores and softmax are float32. Row padding belongs at the end, where causality keeps it from being seen.
    """

    def attend(layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        n, kv_heads, h = q_TNH.shape[1], k_TKH.shape[1], q_TNH.shape[2]
        q = q_TNH.reshape(batch_B, -1, kv_heads, n // kv_heads, h)  # [B, S, K, G, H]
        k, v = (x.reshape(batch_B, -1, kv_heads, h) for x in (k_TKH, v_TKH))  # [B, S, K, H]
        exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        scores = jnp.einsum("bqkgh,bskh->bkgqs", q, k, precision=exact, preferred_element_type=jnp.float32) * cfg.attention_scale
        if cfg.attention_softcap is not None:
            scores = cfg.attention_softcap * jnp.tanh(scores / cfg.attention_softcap)
        here = jnp.arange(q.shape[1])
        distance = here[:, None] - here[None, :]  # [S query, S key]
        window = cfg.layers[layer].window
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(v.dtype)
        out = jnp.einsum("bkgqs,bskh->bqkgh", shares, v, precision=exact, preferred_element_type=jnp.float32)
        return out.astype(q.dtype).reshape(q_TNH.shape), cache

    return attend
