"""How one program is cut over devices: the five axes, what each cuts, and which links a group of devices talks over.

Devices are numbered with `query` innermost, then
tensor, context, stage, data; hosts are filled in that order.
"""

import math
from functools import lru_cache
from itertools import product

import msgspec

from novajax.core.config import MeshConfig
from novajax.core.errors import CapacityError, ConfigError
from novajax.parallel.axes import AXES, DEFAULT_RULES, slots_per_stage, split_tensor_parallel
from novajax.planner.sizes import Array, ModelSizes

VOCAB = DEFAULT_RULES["vocab"]


class Layout(msgspec.Struct, frozen=True, order=True):
    """Sizes of the five axes, and how many such groups stand side by side."""

    data: int = 1
    stage: int = 1
    context: int = 1
    tensor: int = 1
    query: int = 1
    replicas: int = 1
    """Programs of their own: each a unit of failure, none talks to another."""

    @property
    def group_devices(self) -> int:
        """Devices of one program."""
        return self.data * self.stage * self.context * self.tensor * self.query

    @property
    def tensor_parallel(self) -> int:
        return self.tensor * self.query

    def size(self, axes: tuple[str, ...]) -> int:
        return math.prod(getattr(self, axis) for axis in axes)

    def name(self) -> str:
        """'tensor 8 x stage 2, 8 replicas'; axes of one are left out."""
        tensor = f"tensor {self.tensor_parallel}" + (f" ({self.tensor} x query {self.query})" if self.query > 1 else "")
        parts = [tensor] if self.tensor_parallel > 1 else []
        parts += [f"{axis} {getattr(self, axis)}" for axis in ("stage", "context", "data") if getattr(self, axis) > 1]
        replicas = f", {self.replicas} replicas" if self.replicas > 1 else ""
        return (" x ".join(parts) or "one device") + replicas

    def mesh(self) -> MeshConfig:
        """One replica as the engine is told it."""
        return MeshConfig(data=self.data, stage=self.stage, context=self.context, tensor_parallel=self.tensor_parallel)


def make_layout(mesh: MeshConfig, kv_heads: int, devices: int) -> Layout:
    """As many replicas of `mesh` as fill the devices. Raises ConfigError or CapacityError with the numbers."""
    tensor, query = split_tensor_parallel(mesh.tensor_parallel, kv_heads)
    if mesh.devices > devices:
        raise CapacityError(f"the layout needs {mesh.devices} devices; the booking has {devices}", param="layout")
    return Layout(mesh.data, mesh.stage, mesh.context, tensor, query, devices // mesh.devices)


def local_shape(array: Array, layout: Layout) -> tuple[int, ...]:
    """One device's piece. Raises ConfigError for a dimension that does not divide."""
    local = []
    for name, size in zip(array.axes, array.shape, strict=True):
        axes = DEFAULT_RULES.get(name or "", ())
        parts = layout.size(axes)
        if size % parts:
            cuts = " x ".join(f"{axis} {getattr(layout, axis)}" for axis in axes if getattr(layout, axis) > 1)
            raise ConfigError(f"{array.name}: {name}={size} does not divide by {parts} ({cuts})", param=name)
        local.append(size // parts)
    return tuple(local)


def stage_kinds(sizes: ModelSizes, stages: int) -> list[int]:
    """How many layers of each kind one stage holds, by index of kind, masked layers included."""
    counts = [0] * len(sizes.kinds)
    if stages == 1:
        for kind in sizes.layers:
            counts[kind] += 1
        return counts
    slots = slots_per_stage(sizes.layers, stages)
    for kind in sizes.layers[: sizes.period]:
        counts[kind] += slots // sizes.period
    return counts


class Span(msgspec.Struct, frozen=True):
    """Where one group of devices lies: how many they are, over how many hosts, how many of them at least on one host."""

    members: int
    hosts: int
    per_host: int


@lru_cache(maxsize=65_536)
def span(layout: Layout, axes: tuple[str, ...], gpus_per_host: int) -> Span:
    """The widest group over `axes` of any group in the booking."""
    strides, stride = {}, 1
    for axis in reversed(AXES):
        strides[axis], stride = stride, stride * getattr(layout, axis)
    inside = [sum(p) for p in product(*(range(0, getattr(layout, a) * strides[a], strides[a]) for a in axes))]
    others = [a for a in AXES if a not in axes]
    starts = {sum(p) % gpus_per_host for p in product(*(range(0, getattr(layout, a) * strides[a], strides[a]) for a in others))}
    starts |= {
        (start + replica * layout.group_devices) % gpus_per_host
        for start in starts
        for replica in range(min(layout.replicas, gpus_per_host))
    }
    spans = []
    for start in starts:
        counts: dict[int, int] = {}
        for device in inside:
            host = (start + device) // gpus_per_host
            counts[host] = counts.get(host, 0) + 1
        spans.append(Span(len(inside), len(counts), min(counts.values())))
    return max(spans, key=lambda s: (s.hosts, -s.per_host))
