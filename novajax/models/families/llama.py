"""Llama 2 and 3.x: the plainest structure; other families start from its key map."""

from typing import Any

from novajax.models.config import Dense, LayerKind, ModelConfig
from novajax.models.families.keys import Mapping
from novajax.models.families.reader import MAX_LAYERS, Reader
from novajax.models.families.ropes import context, read_rope

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}

LAYER = r"model\.layers\.(?P<layer>\d+)\."

ATTENTION = (
    Mapping(LAYER + r"self_attn\.q_proj\.weight", "layers/{layer}/attention/q", "(n h) d -> d n h"),
    Mapping(LAYER + r"self_attn\.k_proj\.weight", "layers/{layer}/attention/k", "(k h) d -> d k h"),
    Mapping(LAYER + r"self_attn\.v_proj\.weight", "layers/{layer}/attention/v", "(k h) d -> d k h"),
    Mapping(LAYER + r"self_attn\.o_proj\.weight", "layers/{layer}/attention/o", "d (n h) -> n h d"),
    Mapping(LAYER + r"self_attn\.q_proj\.bias", "layers/{layer}/attention/q_bias", "(n h) -> n h"),
    Mapping(LAYER + r"self_attn\.k_proj\.bias", "layers/{layer}/attention/k_bias", "(k h) -> k h"),
    Mapping(LAYER + r"self_attn\.v_proj\.bias", "layers/{layer}/attention/v_bias", "(k h) -> k h"),
    Mapping(LAYER + r"self_attn\.o_proj\.bias", "layers/{layer}/attention/o_bias", "d -> d"),
    Mapping(LAYER + r"self_attn\.q_norm\.weight", "layers/{layer}/attention/q_norm/scale", "h -> h"),
    Mapping(LAYER + r"self_attn\.k_norm\.weight", "layers/{layer}/attention/k_norm/scale", "h -> h"),
    Mapping(LAYER + r"self_attn\.rotary_emb\.inv_freq", ""),
)
MLP = (
    Mapping(LAYER + r"mlp\.gate_proj\.weight", "layers/{layer}/mlp/gate", "f d -> d f"),
    Mapping(LAYER + r"mlp\.up_proj\.weight", "layers/{layer}/mlp/up", "f d -> d f"),
    Mapping(LAYER + r"mlp\.down_proj\.weight", "layers/{layer}/mlp/down", "d f -> f d"),
    Mapping(LAYER + r"mlp\.gate_proj\.bias", "layers/{layer}/mlp/gate_bias", "f -> f"),
    Mapping(LAYER + r"mlp\.up_proj\.bias", "layers/{layer}/mlp/up_bias", "f -> f"),
    Mapping(LAYER + r"mlp\.down_proj\.bias", "layers/{layer}/mlp/down_bias", "d -> d"),
)
NORMS = (
    Mapping(LAYER + r"input_layernorm\.weight", "layers/{layer}/attention_norm/scale", "d -> d"),
    Mapping(LAYER + r"post_attention_layernorm\.weight", "layers/{layer}/mlp_norm/scale", "d -> d"),
)
ENDS = (
    Mapping(r"model\.embed_tokens\.weight", "embed", "v d -> v d"),
    Mapping(r"model\.norm\.weight", "final_norm/scale", "d -> d"),
    Mapping(r"lm_head\.weight", "head", "v d -> d v"),
)
KEY_MAP = ATTENTION + MLP + NORMS + ENDS


def read_config(config: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json with model_type "llama". Raises ConfigError naming the key."""
    reader = Reader(config)
    bias = reader.flag("attention_bias", False)
    shape = read_shape(reader)
    rope = read_rope(reader, default_theta=10000.0)
    kind = LayerKind(rope, Dense(reader.size("intermediate_size")))
    mlp_bias = reader.flag("mlp_bias", False)
    reader.finish()
    return ModelConfig(family="llama", layers=(kind,) * shape.pop("layers"), qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias, **shape)


def read_shape(reader: Reader, *, tied: bool = False, activation_key: str = "hidden_act") -> dict[str, Any]:
    """The fields every family of this kind shares; `tied` is the family's own default of tie_word_embeddings."""
    embed, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    kv_heads = reader.size("num_key_value_heads", heads)
    if heads % kv_heads:
        reader.refuse("num_key_value_heads", f"must divide num_attention_heads={heads}")
    if not reader.has("head_dim") and embed % heads:
        reader.refuse("num_attention_heads", f"must divide hidden_size={embed} when head_dim is absent")
    head_dim = reader.size("head_dim", embed // heads, least=2)
    if head_dim % 2:
        reader.refuse("head_dim", "must be even")
    return dict(
        layers=reader.size("num_hidden_layers", most=MAX_LAYERS),
        vocab=reader.size("vocab_size", most=1 << 24),
        embed=embed,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_context_tokens=context(reader),
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        activation=reader.choice(activation_key, ACTIVATIONS),
        attention_scale=head_dim**-0.5,
        tied_embedding=reader.flag("tie_word_embeddings", tied),
    )
