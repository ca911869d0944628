"""The model families, by Hugging Face model_type: each is a config reader and a key map, nothing else."""

from collections.abc import Callable
from typing import Any

import msgspec

from novajax.core.errors import ConfigError
from novajax.models.config import ModelConfig
from novajax.models.families import gemma, llama, mistral, qwen
from novajax.models.families.keys import Mapping


class Family(msgspec.Struct, frozen=True):
    """What makes a Hugging Face directory ours."""

    read_config: Callable[[dict[str, Any]], ModelConfig]
    key_map: tuple[Mapping, ...]


def family(config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises ConfigError for a model_type that is not ours."""
    known = {
        "llama": Family(llama.read_llama, llama.KEY_MAP),
        "qwen2": Family(qwen.read_qwen2, qwen.KEY_MAP),
        "qwen3": Family(qwen.read_qwen3, qwen.KEY_MAP),
        "qwen3_moe": Family(qwen.read_qwen3_moe, qwen.MOE_KEY_MAP),
        "mistral": Family(mistral.read_mistral, mistral.KEY_MAP),
        "mixtral": Family(mistral.read_mixtral, mistral.MOE_KEY_MAP),
        "gemma2": Family(gemma.read_gemma2, gemma.KEY_MAP),
        "gemma3_text": Family(gemma.read_gemma3, gemma.KEY_MAP),
    }
    name = config.get("model_type")
    if isinstance(name, str) and name in known:
        return known[name]
    hint = "; text_config says that it wraps a text model, and only text models are supported" if "text_config" in config else ""
    raise ConfigError(
        f"config.json: model_type={name!r:.200} is not supported{hint}; supported: {', '.join(sorted(known))}", param="model_type"
    )


def read_config(config: dict[str, Any]) -> ModelConfig:
    """ModelConfig of any supported config.json. Raises ConfigError naming the key at fault."""
    if "auto_map" in config:
        raise ConfigError("config.json: auto_map asks to run code from the repository; this is never done", param="auto_map")
    found = family(config)
    for name in config.get("architectures") or []:
        if not isinstance(name, str) or not name.endswith("ForCausalLM"):
            raise ConfigError(f"config.json: architectures names {name!r:.200}; only ...ForCausalLM is supported", param="architectures")
    return found.read_config(config)


def stated_dtype(config: dict[str, Any]) -> str:
    """The precision the file says its weights have ("float32" when it is silent): float32, bfloat16 or float16."""
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    value = config.get(key)
    name = "float32" if value is None else str(value).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"config.json: {key}={value!r:.200} is not supported; supported: float32, bfloat16, float16", param=key)
    return name


def key_map(config: dict[str, Any], cfg: ModelConfig) -> tuple[Mapping, ...]:
    """The family's rules for this model: a tied model's spare copy of the embedding is known and not needed."""
    spare = (Mapping(r"lm_head\.weight", ""),) if cfg.tied_embedding else ()
    return spare + family(config).key_map
