"""Mistral (a sliding window on every layer, or none) and Mixtral (the same with experts)."""

from typing import Any

from novajax.models.config import Dense, Experts, LayerKind, ModelConfig
from novajax.models.families.keys import Mapping
from novajax.models.families.llama import ATTENTION, ENDS, LAYER, MLP, NORMS
from novajax.models.families.reader import Reader
from novajax.models.families.shared import make_config, read_rope, read_shape, read_windows

EXPERT = LAYER + r"block_sparse_moe\.experts\.(?P<e>\d+)\."
EXPERTS = (
    Mapping(LAYER + r"block_sparse_moe\.gate\.weight", "layers/{layer}/mlp/router", "e d -> d e"),
    Mapping(EXPERT + r"w1\.weight", "layers/{layer}/mlp/gate", "f d -> e d f"),
    Mapping(EXPERT + r"w3\.weight", "layers/{layer}/mlp/up", "f d -> e d f"),
    Mapping(EXPERT + r"w2\.weight", "layers/{layer}/mlp/down", "d f -> e f d"),
)
KEY_MAP = ATTENTION + MLP + NORMS + ENDS
MOE_KEY_MAP = ATTENTION + EXPERTS + NORMS + ENDS


def read_mistral(config: dict[str, Any]) -> ModelConfig:
    """model_type "mistral". Raises ConfigError naming the key."""
    reader = Reader(config)
    mlp = Dense(reader.size("intermediate_size"))
    return _windowed(reader, "mistral", mlp, reader.optional_size("sliding_window", absent=4096), default_theta=10000.0, norm_eps=1e-6)


def read_mixtral(config: dict[str, Any]) -> ModelConfig:
    """model_type "mixtral". Raises ConfigError naming the key."""
    reader = Reader(config)
    experts = Experts(
        mlp=reader.size("intermediate_size"),
        experts=reader.size("num_local_experts", 8),
        per_token=reader.size("num_experts_per_tok", 2),
        renormalize=True,
    )
    if experts.per_token > experts.experts:
        reader.refuse("num_experts_per_tok", f"must not exceed num_local_experts={experts.experts}")
    return _windowed(reader, "mixtral", experts, reader.optional_size("sliding_window", absent=None), default_theta=1e6, norm_eps=1e-5)


def _windowed(
    reader: Reader, family: str, mlp: Dense | Experts, window: int | None, *, default_theta: float, norm_eps: float
) -> ModelConfig:
    shape = read_shape(reader, norm_eps=norm_eps)
    rope = read_rope(reader, default_theta=default_theta)
    windows = read_windows(reader, shape.count, window, lambda layer: True)
    return make_config(reader, family, shape, tuple(LayerKind(rope, mlp, one) for one in windows))
