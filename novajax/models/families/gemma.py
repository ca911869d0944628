"""Gemma 2 and Gemma 3 (text): local and global layers, norms after as well as before, (1 + w) norms, scaled embeddings."""

import math
from typing import Any

from novajax.models.config import Dense, LayerKind, ModelConfig, Rope
from novajax.models.families.keys import Mapping
from novajax.models.families.llama import ATTENTION, ENDS, LAYER, MLP
from novajax.models.families.reader import Reader
from novajax.models.families.shared import FULL, SLIDING, Shape, make_config, read_rope, read_ropes_by_kind, read_shape, read_windows

NORMS = (
    Mapping(LAYER + r"input_layernorm\.weight", "layers/{layer}/attention_norm/scale", "d -> d"),
    Mapping(LAYER + r"post_attention_layernorm\.weight", "layers/{layer}/post_attention_norm/scale", "d -> d"),
    Mapping(LAYER + r"pre_feedforward_layernorm\.weight", "layers/{layer}/mlp_norm/scale", "d -> d"),
    Mapping(LAYER + r"post_feedforward_layernorm\.weight", "layers/{layer}/post_mlp_norm/scale", "d -> d"),
)
KEY_MAP = ATTENTION + MLP + NORMS + ENDS


def read_gemma2(config: dict[str, Any]) -> ModelConfig:
    """model_type "gemma2". Raises ConfigError naming the key."""
    reader = Reader(config)
    shape = _shape(reader)
    windows = read_windows(reader, shape.count, _window(reader), lambda layer: layer % 2 == 0)
    rope = read_rope(reader)
    return _finish(
        reader,
        "gemma2",
        shape,
        windows,
        {FULL: rope, SLIDING: rope},
        attention_softcap=reader.optional_number("attn_logit_softcapping", absent=50.0),
        final_softcap=reader.optional_number("final_logit_softcapping", absent=30.0),
    )


def read_gemma3(config: dict[str, Any]) -> ModelConfig:
    """model_type "gemma3_text". Raises ConfigError naming the key."""
    reader = Reader(config)
    shape = _shape(reader)
    spelled = "sliding_window_pattern" if reader.has("sliding_window_pattern") else "_sliding_window_pattern"
    pattern = reader.size(spelled, 6)
    windows = read_windows(reader, shape.count, _window(reader), lambda layer: (layer + 1) % pattern != 0)
    reader.must_be("attn_logit_softcapping")  # stored by this architecture but never applied
    ropes = read_ropes_by_kind(reader, {FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)})
    cap = reader.optional_number("final_logit_softcapping", absent=None)
    return _finish(reader, "gemma3_text", shape, windows, ropes, final_softcap=cap, qk_norm=True)


def _shape(reader: Reader) -> Shape:
    reader.must_be("hidden_act", reader.raw("hidden_activation", "gelu_pytorch_tanh"))  # read by nobody when both are there
    return read_shape(reader, head_dim=256, tied=True, activation=("hidden_activation", "gelu_pytorch_tanh"))


def _window(reader: Reader) -> int | None:
    window = reader.optional_size("sliding_window", absent=4096)
    reader.must_be("sliding_window_size", window)
    return window


def _finish(reader: Reader, family: str, shape: Shape, windows: list[int | None], ropes: dict[str, Rope], **structure: Any) -> ModelConfig:
    mlp = Dense(reader.size("intermediate_size"))
    bias = reader.flag("attention_bias", False)
    kinds = tuple(LayerKind(ropes[FULL if window is None else SLIDING], mlp, window) for window in windows)
    return make_config(
        reader,
        family,
        shape,
        kinds,
        attention_scale=reader.number("query_pre_attn_scalar", 256.0) ** -0.5,
        embedding_scale=math.sqrt(shape.fields["embed"]),
        norm_offset=1.0,
        post_norms=True,
        qkv_bias=bias,
        o_bias=bias,
        **structure,
    )
