"""Names of quantized weight formats and what they say. The bytes and the blocks that share a scale are the planner's.

A name is `int8`, `fp8` (e4m3, both with one scale for each output channel), or `int4`, `int4-32`, `int4-64`, `int4-128` (one
for each group of that many summed elements; 128 where no number is given), `int4-channel`. Behind an integer format
`-a8` multiplies it by activations rounded to int8, with a scale for each token; `-w` leaves activations alone; without
either the machine decides (`settled`).
"""

import re
from typing import Literal

import msgspec

from novajax.core.errors import ConfigError
from novajax.planner.formats import GROUP

Kind = Literal["int8", "int4", "fp8"]
Activations = Literal["auto", "int8", "float"]
_NAME = re.compile(r"(int8|fp8|int4(?:-(?P<group>32|64|128|channel))?)(?:-(?P<activations>a8|w))?")


class Format(msgspec.Struct, frozen=True):
    """How a weight is stored and multiplied."""

    kind: Kind
    group: int | None = None
    """Summed elements that share a scale; None: all of an output channel."""
    activations: Activations = "auto"

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        if self.kind == "fp8":
            return "fp8"
        group = "" if self.kind == "int8" else f"-{self.group or 'channel'}"
        return self.kind + group + {"auto": "", "int8": "-a8", "float": "-w"}[self.activations]


def parse(name: str) -> Format:
    """The format of that name. Raises ConfigError for what is not one."""
    found = _NAME.fullmatch(name)
    if found is None or (found[1] == "fp8" and found["activations"]):
        raise ConfigError(
            f"quantization format {name!r} is not known; known: fp8, int8, int4, int4-32, int4-64, int4-128, int4-channel, "
            "each integer one also with -a8 or -w behind it",
            param="quantization",
        )
    how = found["activations"]
    activations: Activations = "int8" if how == "a8" else "float" if how == "w" else "auto"
    if found[1].startswith("int4"):
        return Format("int4", None if found["group"] == "channel" else int(found["group"] or GROUP), activations)
    return Format("fp8", None, "float") if found[1] == "fp8" else Format("int8", None, activations)


def settled(form: Format, *, on_cpu: bool) -> Format:
    """With `auto` decided: a CPU has a fast product of int8 with int8 and would write out a float copy of the weight for any other;
    an accelerator reads integer weights straight into a float product."""
    if form.activations != "auto":
        return form
    return msgspec.structs.replace(form, activations="int8" if on_cpu else "float")
