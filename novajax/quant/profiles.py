"""Precision profiles as ordered rules: (pattern of a parameter's path, format); the first that matches a whole path decides.

The named ones are rows of the planner's table (API.md section 4), so that what is planned is what is loaded. `float` leaves
a parameter in the model's own dtype: the table's 16-bit rows are held in the engine's dtype, which on a CPU is float32.
Rules settle weights; the table's formats of the KV cache are not rules.
"""

import re
from pathlib import Path

from novajax.core.errors import ConfigError
from novajax.planner.formats import Profile, profiles
from novajax.quant.formats import Format, parse, settled
from novajax.quant.profile_file import FLOAT, SUFFIX, Rules, read_profile

UNROUNDED = r".*norm/scale|.*_bias|.*/router"
"""What is no matrix, or (a router) too small and too dear to round."""
_PATTERNS = {
    "embedding": r"embed",
    "attention_qkv": r"layers/\d+/attention/[qkv]",
    "attention_out": r"layers/\d+/attention/o",
    "mlp": r"layers/\d+/mlp/(gate|up|down)",
    "norm": UNROUNDED,
    "head": r"head",
}
"""By the component of the table."""


def profile_rules(form: Profile, *, tied: bool) -> Rules:
    """A row of the table as rules. With a tied embedding the output head's format wins."""
    rules = []
    for component, pattern in _PATTERNS.items():
        name = getattr(form, "head" if tied and component == "embedding" else component)
        quantized = name not in ("float32", "bfloat16")
        suffix = "-a8" if form.activations == "int8" and name.startswith("int") else ""
        rules.append((pattern, name + suffix if quantized else FLOAT))
    return tuple(rules)


def rules_of(name: str, *, tied: bool) -> Rules:
    """The rules of a profile, by name or as a file (`PATH.json`), or of a format, which is for the layers' matrices.

    Raises ConfigError for none of them.
    """
    if name.endswith(SUFFIX):
        return read_profile(Path(name)).rules
    if name in profiles():
        return profile_rules(profiles()[name], tied=tied)
    try:
        parse(name)
    except ConfigError as error:
        raise ConfigError(f"{error.message}; profiles: {', '.join(profiles())}, or a file PATH{SUFFIX}", param="quantization") from None
    layers = ("attention_qkv", "attention_out", "mlp")
    return tuple((pattern, name if component in layers else FLOAT) for component, pattern in _PATTERNS.items())


def format_of(rules: Rules, path: str, *, on_cpu: bool) -> Format | None:
    """The settled format of the parameter "layers/3/attention/q"; None: not quantized. Raises ConfigError when no rule matches."""
    for pattern, name in rules:
        if re.fullmatch(pattern, path):
            return None if name == FLOAT else settled(parse(name), on_cpu=on_cpu)
    raise ConfigError(f"no rule of the precision profile matches the parameter {path}", param="quantization")
