"""What XLA says of the partitioned step, as a value: bytes on a device and collectives, extrapolated to the full depth."""

import msgspec


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of collective in a compiled step."""

    kind: str
    group: int
    """Devices that take part in each."""
    bytes: int
    """The result on one device."""
    per_layer: float
    """How many each layer of a stage adds."""
    once: float
    """How many there are besides."""


class Compiled(msgspec.Struct, frozen=True, kw_only=True):
    """One bucket of the engine's forward, compiled for the layout."""

    target: str
    """What it was compiled for."""
    bucket: str
    layers_compiled: tuple[int, ...]
    """Layers of a stage, of each compile."""
    layers: int
    """Of a stage, at the full depth."""
    argument_bytes: int
    temp_bytes: int
    output_bytes: int
    alias_bytes: int
    """All four on one device, extrapolated to the full depth."""
    collectives: tuple[Counted, ...]
    seconds: float
    """Time that compiling took."""
