"""What config readers share: sizes, windows per layer, and RoPE in its old spelling (rope_theta + rope_scaling) and its
new one (rope_parameters, whole or by layer kind)."""

import math
from collections.abc import Callable
from typing import Any

import msgspec

from novajax.core.errors import ConfigError
from novajax.models.config import LayerKind, LinearScaling, Llama3Scaling, ModelConfig, Rope, YarnScaling
from novajax.models.families.reader import MAX_CONTEXT_TOKENS, MAX_LAYERS, MAX_VOCAB, Reader

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
FULL, SLIDING = "full_attention", "sliding_attention"


class Shape(msgspec.Struct, frozen=True):
    """The number of layers, and the fields of ModelConfig that every family reads alike."""

    count: int
    fields: dict[str, Any]


def read_shape(
    reader: Reader,
    *,
    head_dim: int | None = None,
    kv_heads_default: bool = False,
    tied: bool = False,
    norm_eps: float = 1e-6,
    activation: tuple[str, str | None] = ("hidden_act", None),
) -> Shape:
    """Sizes and the like. The keywords are the family's defaults for absent keys; `activation` is (key, default)."""
    embed, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    kv_heads = reader.size("num_key_value_heads", heads if kv_heads_default else None)
    if heads % kv_heads:
        reader.refuse("num_key_value_heads", f"must divide num_attention_heads={heads}")
    if head_dim is None and not reader.has("head_dim"):
        if embed % heads:
            reader.refuse("num_attention_heads", f"must divide hidden_size={embed} when head_dim is absent")
        head_dim = embed // heads
    width = reader.size("head_dim", head_dim, least=2)
    if width % 2:
        reader.refuse("head_dim", "must be even")
    fields = dict(
        vocab=reader.size("vocab_size", most=MAX_VOCAB),
        embed=embed,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        norm_eps=reader.number("rms_norm_eps", norm_eps),
        activation=reader.choice(activation[0], ACTIVATIONS, activation[1]),
        attention_scale=width**-0.5,
        tied_embedding=reader.flag("tie_word_embeddings", tied),
    )
    return Shape(reader.size("num_hidden_layers", most=MAX_LAYERS), fields)


def make_config(reader: Reader, family: str, shape: Shape, layers: tuple[LayerKind, ...], **structure: Any) -> ModelConfig:
    """The config, once everything in the file is understood."""
    context = read_context(reader)
    reader.finish()
    for kind in layers:
        if isinstance(kind.rope.scaling, YarnScaling):  # files that ask for YaRN often keep the length before it
            context = max(context, int(kind.rope.scaling.factor * kind.rope.scaling.original_max_tokens))
    return ModelConfig(**{**shape.fields, "family": family, "layers": layers, "max_context_tokens": context, **structure})


def read_context(reader: Reader) -> int:
    """max_position_embeddings."""
    return reader.size("max_position_embeddings", most=MAX_CONTEXT_TOKENS)


def read_windows(reader: Reader, count: int, window: int | None, slides: Callable[[int], bool]) -> list[int | None]:
    """Each layer's window, from layer_types, or from the family's own rule when the file has none."""
    types = reader.raw("layer_types")
    if types is None:
        return [window if slides(layer) else None for layer in range(count)]
    if not isinstance(types, list) or len(types) != count or any(one not in (FULL, SLIDING) for one in types):
        reader.refuse("layer_types", f"must list {FULL} or {SLIDING} for each of the {count} layers")
    if window is None and SLIDING in types:
        reader.refuse("sliding_window", f"must be a number of tokens, as layer_types has {SLIDING}")
    return [window if one == SLIDING else None for one in types]


def read_rope(reader: Reader, *, default_theta: float = 10000.0) -> Rope:
    """The one RoPE of a model whose layers share it."""
    key = "rope_parameters" if reader.has("rope_parameters") else "rope_scaling"
    scaling, parameters = _object(reader, "rope_scaling"), _object(reader, "rope_parameters")
    theta = reader.number("rope_theta", default_theta)
    return parse_rope({"rope_theta": theta, **scaling, **parameters}, key, read_context(reader))


def read_ropes_by_kind(reader: Reader, bases: dict[str, tuple[str, float]]) -> dict[str, Rope]:
    """A RoPE for each layer kind; `bases` gives each kind's old-style theta key and default. Old-style scaling is for full layers."""
    context, scaling, parameters = read_context(reader), _object(reader, "rope_scaling"), _object(reader, "rope_parameters")
    for name in parameters:
        if name not in bases:
            raise ConfigError(
                f"config.json: rope_parameters: {name!r} is not a layer kind; kinds: {', '.join(bases)}", param="rope_parameters"
            )
    ropes = {}
    for kind, (theta_key, default) in bases.items():
        own = parameters.get(kind) or {}
        if not isinstance(own, dict):
            raise ConfigError(f"config.json: rope_parameters: {kind}={own!r:.200} must be an object", param="rope_parameters")
        theta = reader.number(theta_key, default)
        old = scaling if kind == FULL else {}
        ropes[kind] = parse_rope({"rope_theta": theta, **old, **own}, "rope_parameters" if own else "rope_scaling", context)
    return ropes


def parse_rope(values: dict[str, Any], key: str, context_tokens: int) -> Rope:
    """A Rope from one RoPE object, every member of which must be understood. `key` names it in errors."""
    inner = Reader({name: value for name, value in values.items() if name not in ("rope_type", "type")})
    kind = values.get("rope_type", values.get("type", "default"))
    try:
        theta = inner.number("rope_theta", above=1.0)
        inner.must_be("partial_rotary_factor", 1.0, 1)
        match kind:
            case "default":
                scaling = None
            case "linear":
                scaling = LinearScaling(inner.number("factor"))
            case "llama3":
                scaling = _llama3(inner, context_tokens)
            case "yarn":
                scaling = _yarn(inner, context_tokens)
            case _:
                raise ConfigError(f"rope_type={kind!r} is not supported; supported: default, linear, llama3, yarn")
        inner.finish()
    except ConfigError as error:
        raise ConfigError(f"config.json: {key}: {error.message.removeprefix('config.json: ')}", param=error.param or key) from None
    return Rope(theta, scaling)


def _object(reader: Reader, key: str) -> dict[str, Any]:
    value = reader.raw(key, {})
    if not isinstance(value, dict):
        reader.refuse(key, "must be an object")
    return value


def _llama3(inner: Reader, context_tokens: int) -> Llama3Scaling:
    low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    if high <= low:
        inner.refuse("high_freq_factor", f"must be above low_freq_factor={low:g}")
    original = inner.size("original_max_position_embeddings", context_tokens, most=MAX_CONTEXT_TOKENS)
    return Llama3Scaling(inner.number("factor"), low, high, original)


def _yarn(inner: Reader, context_tokens: int) -> YarnScaling:
    original = inner.size("original_max_position_embeddings", context_tokens, most=MAX_CONTEXT_TOKENS)
    factor = inner.number("factor", context_tokens / original)
    fast, slow = inner.number("beta_fast", 32.0), inner.number("beta_slow", 1.0)
    if fast <= slow:
        inner.refuse("beta_fast", f"must be above beta_slow={slow:g}")
    scales = [inner.number(key) if inner.raw(key) else None for key in ("mscale", "mscale_all_dim")]
    if inner.has("attention_factor"):
        attention = inner.number("attention_factor")
    elif scales[0] is not None and scales[1] is not None:
        attention = _magnitude(factor, scales[0]) / _magnitude(factor, scales[1])
    else:
        attention = _magnitude(factor, 1.0)
    inner.raw("attention_factor")
    inner.raw("finetuned")  # a note by the authors
    return YarnScaling(factor, original, fast, slow, attention, inner.flag("truncate", True))


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
