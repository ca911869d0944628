"""The one decoder: embedding, layers, final norm, head. All tokens of a step lie on one axis T; there is no batch here.

Invariants: activations have the parameters' dtype, logits are float32. Layers are unrolled, each with its own arrays.
The module tree, read abstractly (`abstract_model`), is the single declaration of every parameter's path, shape, dtype
and logical axes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from novajax.models.attention import Attend, Attention
from novajax.models.config import Dense, LayerKind, ModelConfig
from novajax.models.mlp import MLP
from novajax.models.moe import MoE
from novajax.models.norm import RMSNorm
from novajax.models.rope import angles
from novajax.models.weight import weight
from novajax.quant.matmul import einsum, rows


class Layer(nnx.Module):
    """Attention and MLP, each between a norm and a residual add."""

    def __init__(self, cfg: ModelConfig, kind: LayerKind, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.attention_norm = _norm(cfg, dtype)
        self.attention = Attention(cfg, rngs, dtype)
        self.post_attention_norm = _norm(cfg, dtype) if cfg.post_norms else None
        self.mlp_norm = _norm(cfg, dtype)
        self.mlp = MLP(cfg, kind.mlp, rngs, dtype) if isinstance(kind.mlp, Dense) else MoE(cfg, kind.mlp, rngs, dtype)
        self.post_mlp_norm = _norm(cfg, dtype) if cfg.post_norms else None

    def __call__(self, index: int, x_TD: jax.Array, turn: tuple[jax.Array, jax.Array], attend: Attend, cache: Any) -> tuple[jax.Array, Any]:
        out_TD, cache = self.attention(index, self.attention_norm(x_TD), turn, attend, cache)
        x_TD = x_TD + (out_TD if self.post_attention_norm is None else self.post_attention_norm(out_TD))
        out_TD = self.mlp(self.mlp_norm(x_TD))
        return x_TD + (out_TD if self.post_mlp_norm is None else self.post_mlp_norm(out_TD)), cache


class Decoder(nnx.Module):
    """tokens -> hidden -> logits for any `ModelConfig`."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.cfg = cfg
        self.embed = weight(rngs, (cfg.vocab, cfg.embed), ("vocab", "embed"), dtype, inputs=cfg.embed)
        self.layers = nnx.List([Layer(cfg, kind, rngs, dtype) for kind in cfg.layers])
        self.final_norm = _norm(cfg, dtype)
        head = None if cfg.tied_embedding else weight(rngs, (cfg.embed, cfg.vocab), ("embed", "vocab"), dtype, inputs=cfg.embed)
        self.head = head

    def __call__(self, tokens_T: jax.Array, positions_T: jax.Array, attend: Attend, cache: Any) -> tuple[jax.Array, Any]:
        """(hidden_TD after the final norm, cache). `tokens` and `positions` are int32."""
        x_TD, cache = self.run(self.scale(self.rows(tokens_T)), positions_T, attend, cache)
        return self.final_norm(x_TD), cache

    def rows(self, index: jax.Array) -> jax.Array:
        """Rows of the embedding, or of the part of it that is here, in the activations' dtype."""
        return rows(self.embed, index, self.final_norm.scale.get_value().dtype)

    def scale(self, x_TD: jax.Array) -> jax.Array:
        """Rows of the embedding as the first layer's input."""
        return x_TD if self.cfg.embedding_scale == 1.0 else x_TD * jnp.asarray(self.cfg.embedding_scale, x_TD.dtype)

    def run(
        self, x_TD: jax.Array, positions_T: jax.Array, attend: Attend, cache: Any, layers_here: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """(x_TD behind the layers, cache). With `layers_here` only that many of the first layers count, the others are padding."""
        turns = {rope: angles(rope, self.cfg.head_dim, positions_T) for rope in {kind.rope: None for kind in self.cfg.layers}}
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"layer{index}"):
                out_TD, cache = layer(index, x_TD, turns[self.cfg.layers[index].rope], attend, cache)
                x_TD = out_TD if layers_here is None else jnp.where(index < layers_here, out_TD, x_TD)
        return x_TD, cache

    def logits(self, hidden_XD: jax.Array) -> jax.Array:
        """float32 logits_XV of any rows of `hidden`, scaled and soft-capped as the config says."""
        if self.head is None:
            logits_XV = einsum("xd,vd->xv", hidden_XD, self.embed, dtype=jnp.float32)
        else:
            logits_XV = einsum("xd,dv->xv", hidden_XD, self.head, dtype=jnp.float32)
        if self.cfg.logit_scale != 1.0:
            logits_XV = logits_XV * self.cfg.logit_scale
        cap = self.cfg.final_softcap
        return logits_XV if cap is None else cap * jnp.tanh(logits_XV / cap)


def abstract_model(cfg: ModelConfig, dtype: jnp.dtype = jnp.float32) -> Decoder:
    """The decoder with `jax.ShapeDtypeStruct` in place of arrays: the spec tree. Costs no memory."""
    return nnx.eval_shape(lambda: Decoder(cfg, nnx.Rngs(0), dtype))


def init_model(cfg: ModelConfig, seed: int, dtype: jnp.dtype = jnp.float32) -> Decoder:
    """A decoder with random weights."""
    return Decoder(cfg, nnx.Rngs(seed), dtype)


def parameter_count(cfg: ModelConfig) -> int:
    """How many numbers the weights hold; a tied embedding counts once."""
    leaves = jax.tree.leaves(nnx.state(abstract_model(cfg), nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def _norm(cfg: ModelConfig, dtype: jnp.dtype) -> RMSNorm:
    return RMSNorm(cfg.embed, "embed", eps=cfg.norm_eps, offset=cfg.norm_offset, dtype=dtype)
