"""Quantizes a parameter while it is read: whole groups at a time, so that a float form of it never exists in one piece.

Invariants: values and scales are the same on any mesh, because a group that devices share is quantized whole by each
process that holds a part of it; what is on the host is the quantized leaf and one float piece. A weight that is not a
finite number is refused by the parameter's name.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding

from novajax.core.errors import WeightsError
from novajax.quant.aqt import quantize
from novajax.quant.qtensor import QTensor
from novajax.weights.leaves import Bounds, Index, Leaf, bounds_of
from novajax.weights.rounding import Rounding

PIECE_BYTES = 32 << 20
"""Of float32 that are quantized at a time."""

_quantize = partial(jax.jit, static_argnames=("block", "kind"))(quantize)


def quantized_leaf(
    leaf: Leaf,
    spec: QTensor,
    read: Callable[[Bounds], np.ndarray],
    steps: Callable[[Bounds], np.ndarray] | None = None,
    rounding: Rounding | None = None,
) -> QTensor:
    """The leaf's values and scales on their devices; `read` gives float32 of any slice. Raises WeightsError.

    steps: what each number of a slice is a multiple of, of a checkpoint that was quantized already: where that is one for each block of
    `spec` and its format holds the multiples, they are kept as they are. `rounding` is told what became of them.
    """
    made: dict[Bounds, tuple[np.ndarray, np.ndarray]] = {}

    def whole(bounds: Bounds) -> Bounds:
        grown = zip(bounds, spec.block, leaf.shape, strict=True)
        return tuple((start // by * by, min(-(-stop // by) * by, size)) for (start, stop), by, size in grown)

    def groups(bounds: Bounds) -> tuple[np.ndarray, np.ndarray]:
        if bounds not in made:
            made[bounds] = _quantized(leaf, spec, bounds, read, steps, rounding)
        return made[bounds]

    def values(index: Index | None) -> np.ndarray:
        bounds = bounds_of(index or (), leaf.shape)
        grown = whole(bounds)
        return groups(grown)[0][_within(bounds, grown)]

    def scale(index: Index | None) -> np.ndarray:
        counts = bounds_of(index or (), tuple(spec.scale.shape))
        spans = zip(counts, spec.block, leaf.shape, strict=True)
        return groups(tuple((start * by, min(stop * by, size)) for (start, stop), by, size in spans))[1]

    def array(part: jax.ShapeDtypeStruct, sharding: NamedSharding | None, slices: Callable[[Index | None], np.ndarray]) -> jax.Array:
        if sharding is None:
            raise TypeError(f"{leaf.name}: a quantized leaf needs a sharding for its scales")
        return jax.block_until_ready(jax.make_array_from_callback(tuple(part.shape), sharding, slices, dtype=part.dtype))

    made_values, made_scale = array(spec.values, leaf.sharding, values), array(spec.scale, leaf.scale_sharding, scale)
    return QTensor(made_values, made_scale, spec.block, spec.format)


def _quantized(
    leaf: Leaf,
    spec: QTensor,
    bounds: Bounds,
    read: Callable[[Bounds], np.ndarray],
    steps: Callable[[Bounds], np.ndarray] | None,
    rounding: Rounding | None,
) -> tuple[np.ndarray, np.ndarray]:
    values = np.empty([stop - start for start, stop in bounds], spec.values.dtype)
    scale = np.empty([-(-(stop - start) // by) for (start, stop), by in zip(bounds, spec.block, strict=True)], np.float32)
    for piece in _pieces(bounds, spec.block):
        x = read(piece)
        block = tuple(min(by, size) for by, size in zip(spec.block, x.shape, strict=True))
        kept = None if steps is None else _kept(x, steps(piece), block, values.dtype)
        if kept is not None:
            small, scales = kept
        else:
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                small, scales = (np.asarray(part) for part in _quantize(x, block=block, kind=spec.format.kind))
        if not np.isfinite(scales).all():
            raise WeightsError(f"{leaf.name}: holds values that are not finite numbers, which no format can hold")
        if steps is not None and rounding is not None:
            rounding.met(leaf.name, x, None if kept is not None else small.astype(np.float32) * _wide(scales, block, x.shape))
        values[_within(piece, bounds)] = small
        at = [(start - low, by) for (start, _), (low, _), by in zip(piece, bounds, spec.block, strict=True)]
        scale[tuple(slice(start // by, start // by + size) for (start, by), size in zip(at, scales.shape, strict=True))] = scales
    return values, scale


def _kept(x: np.ndarray, steps: np.ndarray, block: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """(numbers, steps of the blocks) if x is exactly that in `dtype`; None if it is not."""
    scales = steps[tuple(slice(None, None, by) for by in block)]
    wide = _wide(scales, block, x.shape)
    if not scales.all() or not np.array_equal(wide, steps):
        return None
    exact = x / wide
    whole = exact
    if dtype != ml_dtypes.float8_e4m3fn:
        whole = np.clip(np.rint(exact), *((-8, 7) if dtype == ml_dtypes.int4 else (-128, 127)))
    numbers = whole.astype(dtype)
    held = np.abs(numbers.astype(np.float32) - exact) <= 1e-3 * np.maximum(1, np.abs(exact))
    return (numbers, scales.astype(np.float32)) if held.all() else None


def _wide(scales: np.ndarray, block: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Each scale over its block."""
    for axis, by in enumerate(block):
        scales = np.repeat(scales, by, axis)
    return scales[tuple(slice(size) for size in shape)]


def _pieces(bounds: Bounds, block: tuple[int, ...]) -> Iterator[Bounds]:
    """Parts of `bounds` of about PIECE_BYTES of float32, cut only where neighbours share no scale."""
    bytes_ = 4 * math.prod(stop - start for start, stop in bounds)
    axis = next((axis for axis, (start, stop) in enumerate(bounds) if block[axis] == 1 and stop - start > 1), None)
    if bytes_ <= PIECE_BYTES or axis is None:
        yield bounds
        return
    start, stop = bounds[axis]
    run = max(1, (stop - start) * PIECE_BYTES // bytes_)
    for low in range(start, stop, run):
        yield from _pieces((*bounds[:axis], (low, min(low + run, stop)), *bounds[axis + 1 :]), block)


def _within(inner: Bounds, outer: Bounds) -> tuple[slice, ...]:
    return tuple(slice(start - low, stop - low) for (start, stop), (low, _) in zip(inner, outer, strict=True))
