"""The model families, by Hugging Face model_type: each is a config reader and a key map, nothing else."""

from collections.abc import Callable
from typing import Any

import msgspec

from novajax.core.errors import ConfigError
from novajax.models.config import ModelConfig
from novajax.models.families import llama
from novajax.models.families.keys import Mapping


class Family(msgspec.Struct, frozen=True):
    """What makes a Hugging Face directory ours."""

    read_config: Callable[[dict[str, Any]], ModelConfig]
    key_map: tuple[Mapping, ...]


def family(config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises ConfigError for an unknown model_type."""
    known = {"llama": Family(llama.read_config, llama.KEY_MAP)}
    name = config.get("model_type")
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"config.json: model_type={name!r} is not supported; supported: {', '.join(sorted(known))}", param="model_type")
    return known[name]


def read_config(config: dict[str, Any]) -> ModelConfig:
    """ModelConfig of any supported config.json. Raises ConfigError naming the key at fault."""
    return family(config).read_config(config)


def key_map(config: dict[str, Any], cfg: ModelConfig) -> tuple[Mapping, ...]:
    """The family's rules for this model: a tied model's spare copy of the embedding is known and not needed."""
    spare = (Mapping(r"lm_head\.weight", ""),) if cfg.tied_embedding else ()
    return spare + family(config).key_map
