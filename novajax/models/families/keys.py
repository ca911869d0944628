"""How tensors of a foreign checkpoint become ours: a family's key map is a tuple of `Mapping`, pure data.

A `Mapping` matches a tensor's name by a whole regular expression and says where it goes and how its dimensions become
ours, in the manner of einops: `"(n h) d -> d n h"` reads a [N*H, D] matrix as our [D, N, H]. A letter on the right that
is missing on the left is an axis we stack many tensors on; its index is the regex group of that name. Only
permutation, splitting and merging of dimensions, and stacking, can be said, so a slice of our array is always a slice of
the foreign one (`source_slice`). It does not know files or devices.
"""

import re

import msgspec
import numpy as np

from novajax.core.errors import WeightsError


class Mapping(msgspec.Struct, frozen=True):
    """One rule. `path` is ours with regex groups filled in, e.g. "layers/{layer}/attention/q" -> the nnx path
    ("layers", 3, "attention", "q"). A rule with path "" names tensors that are known and not needed."""

    pattern: str
    path: str
    axes: str = ""


class Match(msgspec.Struct, frozen=True):
    """A foreign tensor's place: our path, and its index on each stacked axis (by the axis's letter)."""

    path: tuple[str | int, ...]
    axes: str
    stacked: dict[str, int]


def match(key_map: tuple[Mapping, ...], name: str) -> Match | None:
    """Where the tensor `name` goes; None when it is known and not needed.

    Raises WeightsError when no rule matches.
    """
    for rule in key_map:
        if found := re.fullmatch(rule.pattern, name):
            if not rule.path:
                return None
            groups = found.groupdict()
            path = rule.path.format(**groups)
            stacked = {letter: int(groups[letter]) for letter in _stacked_letters(rule.axes)}
            return Match(tuple(int(part) if part.isdigit() else part for part in path.split("/")), rule.axes, stacked)
    raise WeightsError(f"the tensor {name!r} belongs to no parameter of this model")


def source_shape(axes: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The foreign tensor's shape, given the shape of our (whole) array."""
    left, right = _parse(axes)
    sizes = dict(zip(right, shape, strict=True))
    return tuple(int(np.prod([sizes[letter] for letter in group])) for group in left)


def source_slice(axes: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[slice, ...]:
    """What to read of the foreign tensor for `index` (unit steps) of our array of `shape`.

    The read is exact unless an inner letter of a merged dimension is cut while an outer one is not; then it is the
    smallest run of whole inner rows around it, which `place` cuts.
    """
    left, right = _parse(axes)
    bounds = _bounds(right, shape, index)
    sizes = dict(zip(right, shape, strict=True))
    reads = []
    for group in left:
        outer, inner = group[0], int(np.prod([sizes[letter] for letter in group[1:]]))
        start, stop = bounds[outer]
        if stop - start == 1 and len(group) == 2:
            low, high = bounds[group[1]]
            reads.append(slice(start * inner + low, start * inner + high))
        else:
            reads.append(slice(start * inner, stop * inner))
    return tuple(reads)


def place(axes: str, shape: tuple[int, ...], index: tuple[slice, ...], read: np.ndarray) -> np.ndarray:
    """Our array's `index` from the foreign slice that `source_slice` named. A view where numpy can; stacked axes have size 1."""
    left, right = _parse(axes)
    bounds = _bounds(right, shape, index)
    sizes = dict(zip(right, shape, strict=True))
    split, cut = [], []
    for group in left:
        start, stop = bounds[group[0]]
        exact = stop - start == 1 and len(group) == 2
        for position, letter in enumerate(group):
            low, high = bounds[letter]
            whole = position > 0 and not exact
            split.append(sizes[letter] if whole else high - low)
            cut.append(slice(low, high) if whole else slice(None))
    letters = [letter for group in left for letter in group]
    values = read.reshape(split)[tuple(cut)]
    kept = [letter for letter in right if letter in letters]
    values = values.transpose([letters.index(letter) for letter in kept])
    return values.reshape([1 if letter not in letters else values.shape[kept.index(letter)] for letter in right])


def _parse(axes: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    left, right = axes.split("->")
    groups = re.findall(r"\(([^)]*)\)|(\S+)", left)
    return tuple(tuple((merged or single).split()) for merged, single in groups), tuple(right.split())


def _stacked_letters(axes: str) -> tuple[str, ...]:
    left, right = _parse(axes)
    return tuple(letter for letter in right if not any(letter in group for group in left))


def _bounds(right: tuple[str, ...], shape: tuple[int, ...], index: tuple[slice, ...]) -> dict[str, tuple[int, int]]:
    return {letter: part.indices(size)[:2] for letter, size, part in zip(right, shape, index, strict=True)}
