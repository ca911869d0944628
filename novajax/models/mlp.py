"""The gated MLP of a dense layer."""

import jax
import jax.numpy as jnp
from flax import nnx

from novajax.models.config import Activation, Dense, ModelConfig
from novajax.models.weight import bias, weight
from novajax.quant.matmul import einsum, einsums


def activate(kind: Activation, x: jax.Array) -> jax.Array:
    """The activation, in x's dtype."""
    match kind:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, cfg: ModelConfig, kind: Dense, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.activation: Activation = cfg.activation
        self.gate = weight(rngs, (cfg.embed, kind.mlp), ("embed", "mlp"), dtype, inputs=cfg.embed)
        self.up = weight(rngs, (cfg.embed, kind.mlp), ("embed", "mlp"), dtype, inputs=cfg.embed)
        self.down = weight(rngs, (kind.mlp, cfg.embed), ("mlp", "embed"), dtype, inputs=kind.mlp * 2 * len(cfg.layers))
        self.gate_bias = bias((kind.mlp,), ("mlp",), dtype) if cfg.mlp_bias else None
        self.up_bias = bias((kind.mlp,), ("mlp",), dtype) if cfg.mlp_bias else None
        self.down_bias = bias((cfg.embed,), ("embed",), dtype) if cfg.mlp_bias else None

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        gate, up = einsums(("td,df->tf", "td,df->tf"), x_TD, (self.gate, self.up))
        if self.gate_bias is not None and self.up_bias is not None:
            gate, up = gate + self.gate_bias.get_value(), up + self.up_bias.get_value()
        down = einsum("tf,fd->td", activate(self.activation, gate) * up, self.down)
        return down if self.down_bias is None else down + self.down_bias.get_value()
