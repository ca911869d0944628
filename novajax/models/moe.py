"""The mixture-of-experts MLP. Dropless: every token visits all its chosen experts, whatever the others chose.

Two formulations of one function. `by_blocks` touches only the experts that were chosen, and is what a CPU reads well.
`by_all` multiplies by every expert and weighs the unchosen with zero: on an accelerator reading every expert once costs
less than many small launches, until a batch is so large that arithmetic binds.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from novajax.models.config import Activation, Experts, ModelConfig
from novajax.models.mlp import activate
from novajax.models.weight import weight
from novajax.parallel.island import island, joined
from novajax.quant.matmul import Weight, einsum, pick, value_of
from novajax.quant.spread import axes_of

MAX_BLOCK_ROWS = 64
_IN = ("experts", "embed", "mlp")
_OUT = ("experts", "mlp", "embed")


class MoE(nnx.Module):
    """A router and its experts, [E, D, F] and [E, F, D]."""

    def __init__(self, cfg: ModelConfig, kind: Experts, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.activation: Activation = cfg.activation
        self.per_token = kind.per_token
        self.renormalize = kind.renormalize
        e, d, f = kind.experts, cfg.embed, kind.mlp
        self.router = weight(rngs, (d, e), ("embed", None), dtype, inputs=d)
        self.gate = weight(rngs, (e, d, f), _IN, dtype, inputs=d)
        self.up = weight(rngs, (e, d, f), _IN, dtype, inputs=d)
        self.down = weight(rngs, (e, f, d), _OUT, dtype, inputs=f * 2 * len(cfg.layers))

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        """An island: each device has a part of every expert's width, and one sum joins the parts."""

        def local(x_TD: jax.Array, shares_TA: jax.Array, chosen_TA: jax.Array, *weights: Weight) -> jax.Array:
            arguments = (x_TD, shares_TA, chosen_TA, *weights)
            return joined(jax.lax.platform_dependent(*arguments, cpu=self.by_blocks, default=self.by_all))

        weights = [value_of(one) for one in (self.gate, self.up, self.down)]
        mesh = jax.sharding.get_abstract_mesh().shape
        axes = [axes_of(one, names, mesh) for one, names in zip(weights, (_IN, _IN, _OUT), strict=True)]
        return island(local, ((), (), (), *axes), ())(x_TD, *self.route(x_TD), *weights)

    def route(self, x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(float32 shares_TA, int32 chosen_TA): each token's A best experts and what each contributes."""
        scores_TE = jax.nn.softmax(einsum("td,de->te", x_TD, self.router, dtype=jnp.float32), axis=-1)
        shares_TA, chosen_TA = jax.lax.top_k(scores_TE, self.per_token)
        if self.renormalize:
            shares_TA = shares_TA / jnp.sum(shares_TA, axis=-1, keepdims=True)
        return shares_TA, chosen_TA

    def by_all(self, x_TD: jax.Array, shares_TA: jax.Array, chosen_TA: jax.Array, gate: Weight, up: Weight, down: Weight) -> jax.Array:
        """Every token through every expert."""
        tokens, experts = x_TD.shape[0], gate.shape[0]
        shares_TE = jnp.zeros((tokens, experts), jnp.float32).at[jnp.arange(tokens)[:, None], chosen_TA].set(shares_TA)
        gate_ETF, up_ETF = einsum("td,edf->etf", x_TD, gate), einsum("td,edf->etf", x_TD, up)
        hidden_ETF = activate(self.activation, gate_ETF) * up_ETF * shares_TE.T[:, :, None]
        return einsum("etf,efd->td", hidden_ETF.astype(x_TD.dtype), down)

    def by_blocks(self, x_TD: jax.Array, shares_TA: jax.Array, chosen_TA: jax.Array, gate: Weight, up: Weight, down: Weight) -> jax.Array:
        """Visits sorted by expert, each expert's run padded to whole blocks of rows, one block at a time."""
        experts, visits = gate.shape[0], chosen_TA.size
        rows = min(MAX_BLOCK_ROWS, max(2, 1 << math.ceil(math.log2(visits / experts)))) if visits > experts else 2
        blocks = min(experts, visits) + visits // rows  # the most that padding can make
        expert_X = chosen_TA.reshape(-1)
        order_X = jnp.argsort(expert_X, stable=True)
        visits_E = jnp.bincount(expert_X, length=experts)
        blocks_E = (visits_E + rows - 1) // rows
        shift_E = (jnp.cumsum(blocks_E) - blocks_E) * rows - (jnp.cumsum(visits_E) - visits_E)
        slot_X = jnp.arange(visits) + shift_E[expert_X[order_X]]  # where each sorted visit lies among the padded rows
        padded = jnp.zeros((blocks * rows, x_TD.shape[1]), x_TD.dtype).at[slot_X].set(x_TD[order_X // self.per_token], unique_indices=True)
        owner = jnp.searchsorted(jnp.cumsum(blocks_E), jnp.arange(blocks), side="right")  # `experts`: an unused block

        def one_expert(x_BD: jax.Array, expert: jax.Array) -> jax.Array:
            gate_BF, up_BF = (einsum("bd,df->bf", x_BD, pick(matrix, expert)) for matrix in (gate, up))
            return einsum("bf,fd->bd", activate(self.activation, gate_BF) * up_BF, pick(down, expert))

        def block(carry: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
            x_BD, expert = inputs
            return carry, jax.lax.cond(expert < experts, one_expert, lambda x, _: jnp.zeros_like(x), x_BD, expert)

        _, out = jax.lax.scan(block, None, (padded.reshape(blocks, rows, -1), owner))
        out_TAD = out.reshape(padded.shape)[slot_X[jnp.argsort(order_X)]].reshape(*chosen_TA.shape, -1)
        return jnp.einsum("tad,ta->td", out_TAD.astype(jnp.float32), shares_TA, precision="highest").astype(x_TD.dtype)
