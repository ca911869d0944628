"""Reading rotary embeddings from config.json, in the old spelling (rope_theta + rope_scaling) and the new (rope_parameters)."""

import math
from typing import Any

from novajax.core.errors import ConfigError
from novajax.models.config import LinearScaling, Llama3Scaling, Rope, YarnScaling
from novajax.models.families.reader import MAX_CONTEXT_TOKENS, Reader


def read_rope(reader: Reader, *, default_theta: float) -> Rope:
    """The one RoPE of a model whose layers share it."""
    parameters = reader.raw("rope_parameters", {})
    scaling = reader.raw("rope_scaling", {})
    for key, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if not isinstance(value, dict):
            raise ConfigError(f"config.json: {key}={value!r} must be an object", param=key)
    theta = reader.number("rope_theta", default_theta)
    return parse_rope({"rope_theta": theta, **scaling, **parameters}, "rope_parameters" if parameters else "rope_scaling", context(reader))


def context(reader: Reader) -> int:
    """max_position_embeddings."""
    return reader.size("max_position_embeddings", most=MAX_CONTEXT_TOKENS)


def parse_rope(values: dict[str, Any], key: str, context_tokens: int) -> Rope:
    """A Rope from one RoPE object; every member must be understood. `key` names it in errors."""
    inner = Reader({name: value for name, value in values.items() if name not in ("rope_type", "type")})
    kind = values.get("rope_type", values.get("type", "default"))
    theta = inner.number("rope_theta")
    inner.must_be("partial_rotary_factor", 1.0, 1)
    try:
        match kind:
            case "default":
                scaling = None
            case "linear":
                scaling = LinearScaling(inner.number("factor"))
            case "llama3":
                scaling = _llama3(inner)
            case "yarn":
                scaling = _yarn(inner, context_tokens)
            case _:
                raise ConfigError(f"rope_type={kind!r} is not supported; supported: default, linear, llama3, yarn")
        inner.finish()
    except ConfigError as error:
        raise ConfigError(f"{key}: {error.message}", param=key) from None
    return Rope(theta, scaling)


def _llama3(inner: Reader) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=inner.number("factor"),
        low_freq_factor=inner.number("low_freq_factor"),
        high_freq_factor=inner.number("high_freq_factor"),
        original_max_tokens=inner.size("original_max_position_embeddings", most=MAX_CONTEXT_TOKENS),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ConfigError(f"high_freq_factor={scaling.high_freq_factor:g} must be above low_freq_factor={scaling.low_freq_factor:g}")
    return scaling


def _yarn(inner: Reader, context_tokens: int) -> YarnScaling:
    original = inner.size("original_max_position_embeddings", context_tokens, most=MAX_CONTEXT_TOKENS)
    factor = inner.number("factor", context_tokens / original)
    mscale, mscale_all = inner.raw("mscale"), inner.raw("mscale_all_dim")
    if inner.has("attention_factor"):
        attention = inner.number("attention_factor")
    elif mscale and mscale_all:
        attention = _magnitude(factor, inner.number("mscale")) / _magnitude(factor, inner.number("mscale_all_dim"))
    else:
        attention = _magnitude(factor, 1.0)
    return YarnScaling(
        factor=factor,
        original_max_tokens=original,
        beta_fast=inner.number("beta_fast", 32.0),
        beta_slow=inner.number("beta_slow", 1.0),
        attention_factor=attention,
        truncate=inner.flag("truncate", True),
    )


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
