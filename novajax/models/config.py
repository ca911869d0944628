"""What a decoder looks like, as data: every difference between model families is a field here, never a name to branch on.

Invariants: frozen, hashable, free of jax. `layers` has one entry per layer, in order; equal entries may be shared. The
values are already checked by the family reader that made them (`novajax.models.families`). It does not know files,
tensor names, precision or devices.
"""

from typing import Literal

import msgspec

Activation = Literal["silu", "gelu", "gelu_tanh"]


class LinearScaling(msgspec.Struct, frozen=True, tag="linear"):
    """Position interpolation (arXiv 2306.15595): every frequency divided by `factor`."""

    factor: float


class Llama3Scaling(msgspec.Struct, frozen=True, tag="llama3"):
    """Llama 3.1's: wavelengths above original/low are divided by `factor`, below original/high kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_tokens: int


class YarnScaling(msgspec.Struct, frozen=True, tag="yarn"):
    """YaRN (arXiv 2309.00071): a ramp over dimensions from kept to divided frequencies, and a factor on cos and sin."""

    factor: float
    original_max_tokens: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    """Round the ramp's ends to whole dimensions."""


class Rope(msgspec.Struct, frozen=True):
    """Rotary position embedding over the whole head, first half paired with second half."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None


class Dense(msgspec.Struct, frozen=True, tag="dense"):
    """A gated MLP: down(activation(gate(x)) * up(x))."""

    mlp: int


class Experts(msgspec.Struct, frozen=True, tag="experts"):
    """A mixture of gated MLPs without drops: each token visits its `per_token` best experts, all of them."""

    mlp: int
    """Width of one expert."""
    experts: int
    per_token: int
    renormalize: bool
    """Divide the chosen router probabilities by their sum."""


class LayerKind(msgspec.Struct, frozen=True):
    """One layer's structure."""

    rope: Rope
    mlp: Dense | Experts
    window: int | None = None
    """Tokens a query sees, itself included; None: all before it."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder-only transformer, whole. Sizes are counts, `max_context_tokens` is what positions were trained for."""

    family: str
    """For people and manifests only; nothing branches on it."""
    layers: tuple[LayerKind, ...]
    vocab: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    max_context_tokens: int
    norm_eps: float
    activation: Activation
    attention_scale: float
    """Multiplies q.k before the soft cap."""
    norm_offset: float = 0.0
    """Norms multiply by (norm_offset + weight)."""
    embedding_scale: float = 1.0
    """Multiplies the embedding rows, rounded to the activations' dtype first."""
    logit_scale: float = 1.0
    attention_softcap: float | None = None
    """c * tanh(score / c)."""
    final_softcap: float | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm over head_dim on q and k, before RoPE."""
    post_norms: bool = False
    """A second norm on the output of attention and of the MLP, before the residual add."""
    tied_embedding: bool = False

    @property
    def query_groups(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads
