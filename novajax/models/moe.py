"""The mixture-of-experts MLP. Dropless: every token visits all its chosen experts, whatever the others chose."""

import jax
import jax.numpy as jnp
from flax import nnx

from novajax.models.config import Activation, Experts, ModelConfig
from novajax.models.mlp import activate
from novajax.models.weight import weight
from novajax.quant.matmul import einsum, ragged


class MoE(nnx.Module):
    """Token rows are sorted by expert, each expert multiplies its own run of rows, and the results return to their tokens."""

    def __init__(self, cfg: ModelConfig, kind: Experts, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.activation: Activation = cfg.activation
        self.per_token = kind.per_token
        self.renormalize = kind.renormalize
        e, d, f = kind.experts, cfg.embed, kind.mlp
        self.router = weight(rngs, (d, e), ("embed", None), dtype, inputs=d)
        self.gate = weight(rngs, (e, d, f), ("experts", "embed", "mlp"), dtype, inputs=d)
        self.up = weight(rngs, (e, d, f), ("experts", "embed", "mlp"), dtype, inputs=d)
        self.down = weight(rngs, (e, f, d), ("experts", "mlp", "embed"), dtype, inputs=f * 2 * len(cfg.layers))

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        scores_TE = jax.nn.softmax(einsum("td,de->te", x_TD, self.router, dtype=jnp.float32), axis=-1)
        shares_TA, chosen_TA = jax.lax.top_k(scores_TE, self.per_token)
        if self.renormalize:
            shares_TA = shares_TA / jnp.sum(shares_TA, axis=-1, keepdims=True)
        expert_X = chosen_TA.reshape(-1)  # X = T * per_token visits
        order_X = jnp.argsort(expert_X, stable=True)
        sizes_E = jnp.bincount(expert_X, length=scores_TE.shape[1]).astype(jnp.int32)
        rows_XD = x_TD[order_X // self.per_token]
        hidden_XF = activate(self.activation, ragged(rows_XD, self.gate, sizes_E)) * ragged(rows_XD, self.up, sizes_E)
        out_XD = ragged(hidden_XF, self.down, sizes_E)
        back_X = jnp.argsort(order_X)
        out_TAD = out_XD[back_X].reshape(*chosen_TA.shape, -1)
        return jnp.einsum("tad,ta->td", out_TAD.astype(jnp.float32), shares_TA, precision="highest").astype(x_TD.dtype)
