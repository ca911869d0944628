"""What a model is, before its weights are read: structure, end tokens, sampling defaults, and where its files lie.

Invariants: costs no device memory and reads small files only; what it refuses is refused before anything is loaded. Side
files of a sealed checkpoint are checked against its manifest here, its arrays when they are loaded.
"""

from pathlib import Path
from typing import Any

import msgspec

from novajax.core.errors import ConfigError
from novajax.models.config import ModelConfig
from novajax.models.families.registry import read_config
from novajax.quant.profile_file import Rules
from novajax.quant.profiles import rules_of
from novajax.weights.foreign import Scheme, read_scheme
from novajax.weights.manifest import Manifest, check_hashes, check_sizes, is_array, read_manifest
from novajax.weights.source import Source, resolve
from novajax.weights.tokens import read_generation, read_json


class Description(msgspec.Struct, frozen=True):
    """A model that can be loaded."""

    source: Source
    config: ModelConfig
    foreign: dict[str, Any]
    """config.json as it is."""
    manifest: Manifest | None
    """Of a sealed checkpoint; None: a Hugging Face directory."""
    packed: Scheme | None
    """How a Hugging Face directory's weights are quantized; None: they are not."""
    default_sampling: dict[str, float | int]
    end_token_ids: tuple[int, ...]

    @property
    def rules(self) -> Rules:
        """The precision profile of a quantized checkpoint, as which it is loaded if nobody says otherwise; empty: nothing is rounded."""
        if self.manifest is not None:
            return self.manifest.rules
        return () if self.packed is None else rules_of(self.packed.profile, tied=self.config.tied_embedding)

    @property
    def profile(self) -> str:
        """The name of `rules`."""
        return (self.packed.profile if self.packed else "") if self.manifest is None else self.manifest.profile

    @property
    def directory(self) -> Path:
        return self.source.directory


def describe(spec: str | Path) -> Description:
    """The model behind a directory or hub id (which is fetched first).

    Raises WeightsError or ConfigError naming the file and key.
    """
    source = resolve(str(spec))
    directory = source.directory
    manifest = read_manifest(directory)
    if manifest is not None:
        check_sizes(directory, manifest)
        check_hashes(directory, (entry for entry in manifest.files if not is_array(entry.path)))
    foreign = read_json(directory / "config.json")
    if manifest is None and not foreign:
        raise ConfigError(f"{directory / 'config.json'}: missing or empty: not a Hugging Face model directory", param="model")
    packed = None
    if manifest is None and (quantized := foreign.get("quantization_config")) is not None:
        packed = read_scheme(quantized, directory / "config.json")
    plain = {key: value for key, value in foreign.items() if key != "quantization_config"}
    config = read_config(plain) if manifest is None else manifest.model
    generation = read_generation(directory, foreign, config.vocab)
    return Description(source, config, plain, manifest, packed, generation.default_sampling, generation.end_token_ids)
