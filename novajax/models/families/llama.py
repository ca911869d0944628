"""Llama 2 and 3.x: the plainest structure; other families start from its key map."""

from typing import Any

from novajax.models.config import Dense, LayerKind, ModelConfig
from novajax.models.families.keys import Mapping
from novajax.models.families.reader import Reader
from novajax.models.families.shared import make_config, read_rope, read_shape

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


def read_llama(config: dict[str, Any]) -> ModelConfig:
    """model_type "llama". Raises ConfigError naming the key."""
    reader = Reader(config)
    shape = read_shape(reader, kv_heads_default=True)
    kind = LayerKind(read_rope(reader), Dense(reader.size("intermediate_size")))
    bias, mlp_bias = reader.flag("attention_bias", False), reader.flag("mlp_bias", False)
    return make_config(reader, "llama", shape, (kind,) * shape.count, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)
