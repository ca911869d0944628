"""A precision profile as a file: JSON of ordered rules, (pattern of a parameter's path, format), as `novajax.quantize` writes it.

Invariant: what was read is understood whole: every pattern is a regular expression, every format is known. Whether the rules fit a
model is for `unused` and `profiles.format_of` to say, which see its parameters.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from novajax.core.errors import ConfigError
from novajax.quant.formats import parse

SUFFIX = ".json"
FLOAT = "float"
VERSION = 1
Rules = tuple[tuple[str, str], ...]


class ProfileFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file holds."""

    version: int = VERSION
    model: str
    """The model it was made for; for people only."""
    rules: Rules


def read_profile(path: Path) -> ProfileFile:
    """The file at `path`. Raises ConfigError naming it, and the rule at fault."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=ProfileFile)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"precision profile {path}: {error}", param="quantization") from None
    if found.version != VERSION:
        raise ConfigError(f"precision profile {path}: version {found.version}, known: {VERSION}", param="quantization")
    for pattern, name in found.rules:
        try:
            re.compile(pattern)
            if name != FLOAT:
                parse(name)
        except (re.error, ConfigError) as error:
            why = error.message if isinstance(error, ConfigError) else f"no regular expression: {error}"
            raise ConfigError(f"precision profile {path}: rule {pattern!r}: {why}", param="quantization") from None
    return found


def write_profile(path: Path, profile: ProfileFile) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")


def unused(rules: Rules, paths: Iterable[str]) -> tuple[str, ...]:
    """The patterns that match none of the parameters `paths`: of a profile for another model."""
    paths = tuple(paths)
    return tuple(pattern for pattern, _ in rules if not any(re.fullmatch(pattern, path) for path in paths))
