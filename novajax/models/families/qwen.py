"""Qwen 2 and 2.5 (bias on q, k, v), Qwen 3 (norms on q and k), Qwen 3 MoE."""

from typing import Any

from novajax.models.config import Dense, Experts, LayerKind, ModelConfig
from novajax.models.families.keys import Mapping
from novajax.models.families.llama import ATTENTION, ENDS, LAYER, MLP, NORMS
from novajax.models.families.reader import MAX_SIZE, Reader
from novajax.models.families.shared import make_config, read_rope, read_shape, read_windows

EXPERT = LAYER + r"mlp\.experts\.(?P<e>\d+)\."
EXPERTS = (
    Mapping(LAYER + r"mlp\.gate\.weight", "layers/{layer}/mlp/router", "e d -> d e"),
    Mapping(EXPERT + r"gate_proj\.weight", "layers/{layer}/mlp/gate", "f d -> e d f"),
    Mapping(EXPERT + r"up_proj\.weight", "layers/{layer}/mlp/up", "f d -> e d f"),
    Mapping(EXPERT + r"down_proj\.weight", "layers/{layer}/mlp/down", "d f -> e f d"),
)
KEY_MAP = ATTENTION + MLP + NORMS + ENDS
MOE_KEY_MAP = ATTENTION + EXPERTS + MLP + NORMS + ENDS


def read_qwen2(config: dict[str, Any]) -> ModelConfig:
    """model_type "qwen2". Raises ConfigError naming the key."""
    reader = Reader(config)
    reader.must_be("attention_bias", True)
    reader.must_be("use_mrope", False)
    return _dense(reader, "qwen2", read_shape(reader), qkv_bias=True)


def read_qwen3(config: dict[str, Any]) -> ModelConfig:
    """model_type "qwen3". Raises ConfigError naming the key."""
    reader = Reader(config)
    bias = reader.flag("attention_bias", False)
    return _dense(reader, "qwen3", read_shape(reader, head_dim=128), qkv_bias=bias, o_bias=bias, qk_norm=True)


def read_qwen3_moe(config: dict[str, Any]) -> ModelConfig:
    """model_type "qwen3_moe". Raises ConfigError naming the key."""
    reader = Reader(config)
    shape = read_shape(reader)
    reader.raw("max_window_layers")  # without effect in this architecture
    windows = read_windows(reader, shape.count, _window(reader), lambda layer: True)
    rope = read_rope(reader)
    key = "num_local_experts" if reader.has("num_local_experts") else "num_experts"
    experts = Experts(
        mlp=reader.size("moe_intermediate_size"),
        experts=reader.size(key),
        per_token=reader.size("num_experts_per_tok"),
        renormalize=reader.flag("norm_topk_prob", False),
    )
    if experts.per_token > experts.experts:
        reader.refuse("num_experts_per_tok", f"must not exceed {key}={experts.experts}")
    step = reader.size("decoder_sparse_step", 1)
    plain = reader.raw("mlp_only_layers", [])
    if not isinstance(plain, list) or any(type(layer) is not int for layer in plain):
        reader.refuse("mlp_only_layers", "must be a list of layer numbers")
    dense = Dense(reader.size("intermediate_size"))
    mlps = [dense if layer in plain or (layer + 1) % step else experts for layer in range(shape.count)]
    kinds = tuple(LayerKind(rope, mlp, window) for mlp, window in zip(mlps, windows, strict=True))
    bias = reader.flag("attention_bias", False)
    return make_config(reader, "qwen3_moe", shape, kinds, qkv_bias=bias, o_bias=bias, qk_norm=True)


def _dense(reader: Reader, family: str, shape: Any, **structure: Any) -> ModelConfig:
    first = reader.size("max_window_layers", shape.count, most=MAX_SIZE, least=0)
    windows = read_windows(reader, shape.count, _window(reader), lambda layer: layer >= first)
    rope, mlp = read_rope(reader), Dense(reader.size("intermediate_size"))
    return make_config(reader, family, shape, tuple(LayerKind(rope, mlp, window) for window in windows), **structure)


def _window(reader: Reader) -> int | None:
    window = reader.optional_size("sliding_window", absent=4096)
    return window if reader.flag("use_sliding_window", False) else None
