"""Which tensors of a foreign checkpoint make which parameter of ours, decided before a byte of data is read.

Invariants: every parameter is filled exactly once, every tensor is used or known not to matter, shapes and dtypes are what
the model says; anything else is refused by name. It reads names and shapes, never values.
"""

import math
from typing import Any

import msgspec
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from novajax.core.errors import WeightsError
from novajax.models.families.keys import Mapping, Match, match, source_shape
from novajax.models.stages import Path
from novajax.quant.qtensor import QTensor
from novajax.weights.foreign import Tensors
from novajax.weights.manifest import array_name

Bounds = tuple[tuple[int, int], ...]
"""(start, stop) of each dimension."""
Index = tuple[slice, ...]
STAGE = "stage"
"""The letter of the axis on which layers of different pipeline stages are stacked."""


class Leaf(msgspec.Struct, frozen=True):
    """One parameter, and the tensors that it is made of."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sharding: NamedSharding
    axes: str
    tensors: dict[tuple[int, ...], str]
    """Tensor name by its index on the stacked axes; {(): name} where nothing is stacked."""
    quantized: QTensor | None = None
    """What is made of it, abstract; its dtype is float32 then, and its sharding that of the values."""
    scale_sharding: NamedSharding | None = None

    @property
    def name(self) -> str:
        return array_name(self.path)

    def local_slices(self) -> set[Bounds]:
        """The different slices that this process's devices hold."""
        return {
            bounds_of(index, self.shape)
            for index in self.sharding.addressable_devices_indices_map(self.shape).values()
            if index is not None
        }

    def host_bytes(self) -> int:
        return sum(math.prod(stop - start for start, stop in bounds) for bounds in self.local_slices()) * self.dtype.itemsize


def plan_leaves(
    directory: Tensors,
    key_map: tuple[Mapping, ...],
    state: nnx.State,
    shardings: nnx.State,
    places: dict[Path, tuple[Path, int]] | None = None,
) -> tuple[Leaf, ...]:
    """Which tensors make which parameter, in the order they lie in the files. `places`: `models.stages.stage_places`, where
    layers are stacked over pipeline stages; a stage that lacks a layer has zeros there.

    Raises WeightsError naming the tensor and its file, or the parameter: nothing is unmapped, unfilled, filled twice, or
    of another shape or dtype.
    """
    wanted = {path: variable for path, variable in nnx.to_flat_state(state)}
    tensors_of: dict[Path, dict[tuple[int, ...], str]] = {}
    axes: dict[Path, str] = {}
    for name, tensor in directory.tensors.items():
        file = directory.directory / tensor.file
        try:
            found = match(key_map, name)
        except WeightsError as error:
            raise WeightsError(f"{file}: {error.message}") from None
        if found is None:
            continue
        found = _placed(found, places or {})
        if found.path not in wanted:
            raise WeightsError(f"{file}: {name!r} would be {array_name(found.path)}, which this model does not have")
        shape = tuple(wanted[found.path].shape)
        expected = source_shape(found.axes, shape)
        if tensor.shape != expected:
            raise WeightsError(f"{file}: {name!r} has shape {list(tensor.shape)}; config.json makes it {list(expected)}")
        directory.dtype(name)
        right = letters(found.axes)[1]
        index = tuple(found.stacked[letter] for letter in right if letter in found.stacked)
        if any(found.stacked[letter] >= size for letter, size in zip(right, shape, strict=True) if letter in found.stacked):
            raise WeightsError(f"{file}: {name!r} is beyond the {list(shape)} of {array_name(found.path)}")
        tensors = tensors_of.setdefault(found.path, {})
        if index in tensors or axes.setdefault(found.path, found.axes) != found.axes:
            raise WeightsError(f"{file}: {name!r} and {next(iter(tensors.values()))!r} are both for {array_name(found.path)}")
        tensors[index] = name
    leaves = []
    targets = dict(nnx.to_flat_state(shardings))
    for path, variable in wanted.items():
        shape, tensors = tuple(variable.shape), tensors_of.get(path, {})
        left, right = letters(axes.get(path, "->"))
        needed = math.prod(size for letter, size in zip(right, shape, strict=False) if letter not in (*left, STAGE))
        if STAGE in right:
            needed *= sum(place == path[:2] for place, _ in (places or {}).values())
        if len(tensors) != needed:
            missing = f"{len(tensors)} of its {needed} tensors are there" if tensors else "no tensor is for it"
            raise WeightsError(f"{directory.directory}: the parameter {array_name(path)} cannot be filled: {missing}")
        held, target = variable.get_value(), targets[path].get_value()
        if isinstance(held, QTensor):
            leaves.append(Leaf(path, shape, np.dtype(np.float32), target.values, axes[path], tensors, held, target.scale))
        else:
            leaves.append(Leaf(path, shape, np.dtype(variable.dtype), target, axes[path], tensors))
    files = {file: number for number, file in enumerate(directory.files)}
    order = {name: (files[tensor.file], tensor.start) for name, tensor in directory.tensors.items()}
    return tuple(sorted(leaves, key=lambda leaf: min(order[name] for name in leaf.tensors.values())))


def _placed(found: Match, places: dict[Path, tuple[Path, int]]) -> Match:
    """The same tensor's place in the run tree. A layer beyond the model's keeps its path, which no parameter has."""
    if found.path[0] != "layers" or not places:
        return found
    if found.path[:2] not in places:
        return Match(("layers", f"{found.path[1]} (no such layer)", *found.path[2:]), found.axes, found.stacked)
    place, stage = places[found.path[:2]]
    left, _, right = found.axes.partition("->")
    return Match((*place, *found.path[2:]), f"{left}-> {STAGE} {right}", {STAGE: stage} | found.stacked)


def letters(axes: str) -> tuple[list[str], list[str]]:
    """The letters of a key map's `axes`: the foreign tensor's in its order, and ours."""
    left, _, right = axes.partition("->")
    return left.replace("(", " ").replace(")", " ").split(), right.split()


def bounds_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    """Slices of unit step as (start, stop); missing trailing ones are whole."""
    whole = index + (slice(None),) * (len(shape) - len(index))
    return tuple(part.indices(size)[:2] for part, size in zip(whole, shape, strict=True))
