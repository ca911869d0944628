"""Fills a model's state from a Hugging Face directory: every device gets its own slice, read for it alone.

Invariants: what is on the host at any moment is a few leaves' local shards (bounded in bytes; one leaf larger than the
bound goes alone) and one small piece per thread, never a checkpoint. Values are changed in dtype and layout only, or
quantized on the way (`weights.quantizing`). What goes where was decided before (`weights.leaves`).

On a CPU a device's array takes over the host buffer, so there is no second copy: hence the 64-byte alignment.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np

from novajax.models.families.keys import place, source_slice
from novajax.quant.qtensor import QTensor
from novajax.telemetry.progress import Reporter
from novajax.weights.foreign import PackedDirectory, Tensors
from novajax.weights.leaves import Bounds, Index, Leaf, Path, bounds_of, letters
from novajax.weights.quantizing import quantized_leaf
from novajax.weights.rounding import Rounding

PIECE_BYTES = 2 << 20
"""Read, converted and laid out at a time by one thread."""
STRIP = 32
"""Elements of the source's contiguous dimension that are transposed at a time."""
IN_FLIGHT_BYTES = 256 << 20
"""Of leaves being filled at the same time."""
ALIGNMENT_BYTES = 64


def source_bytes(directory: Tensors, leaves: tuple[Leaf, ...]) -> int:
    """Stored bytes of what this process's devices hold: the total of `import_leaves`'s progress."""
    return sum(leaf.host_bytes() // leaf.dtype.itemsize * _stored(directory, leaf).itemsize for leaf in leaves)


def import_leaves(
    directory: Tensors, leaves: tuple[Leaf, ...], progress: Reporter, rounding: Rounding
) -> list[tuple[Path, jax.Array | QTensor]]:
    """The leaves' arrays, on their devices; `rounding` is told what became of numbers that others quantized. Raises WeightsError; nothing
    is left running then."""
    room = _Room(IN_FLIGHT_BYTES)
    failed = threading.Event()
    own = threading.local()

    def fill(leaf: Leaf) -> tuple[Path, jax.Array | QTensor] | None:
        try:
            if failed.is_set():
                return None
            scratch = own.__dict__.setdefault("scratch", _Scratch())
            shards: dict[Bounds, np.ndarray] = {}

            def shard(index: Index | None) -> np.ndarray:
                bounds = bounds_of(index or (), leaf.shape)
                if bounds not in shards:
                    shards[bounds] = _read_shard(directory, leaf, bounds, scratch, progress.advance)
                return shards[bounds]

            progress.note(leaf.name)
            if leaf.quantized is not None:
                steps = None
                if isinstance(directory, PackedDirectory):
                    read_steps = directory.steps
                    steps = lambda bounds: _read_shard(directory, leaf, bounds, scratch, lambda _: None, read_steps)  # noqa: E731
                read = lambda bounds: _read_shard(directory, leaf, bounds, scratch, progress.advance)  # noqa: E731
                return leaf.path, quantized_leaf(leaf, leaf.quantized, read, steps, rounding)
            array = jax.make_array_from_callback(leaf.shape, leaf.sharding, shard, dtype=leaf.dtype)
            return leaf.path, jax.block_until_ready(array)
        except BaseException:
            failed.set()
            raise
        finally:
            room.leave(leaf.host_bytes())

    with ThreadPoolExecutor(max(4, min(16, len(os.sched_getaffinity(0)))), thread_name_prefix="import") as pool:
        running = []
        for leaf in leaves:
            room.enter(leaf.host_bytes())
            running.append(pool.submit(fill, leaf))
        filled = [future.result() for future in sorted(running, key=lambda future: future.exception() is None)]
    return [one for one in filled if one is not None]


class _Room:
    """A bound on bytes in flight; one thing larger than the bound goes in alone."""

    def __init__(self, limit_bytes: int):
        self._limit_bytes, self._used_bytes = limit_bytes, 0
        self._changed = threading.Condition()

    def enter(self, size_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._used_bytes or self._used_bytes + size_bytes <= self._limit_bytes)
            self._used_bytes += size_bytes

    def leave(self, size_bytes: int) -> None:
        with self._changed:
            self._used_bytes -= size_bytes
            self._changed.notify_all()


class _Scratch:
    """Memory that one thread uses over and over: pages that are fresh each time would cost more than the copies."""

    def __init__(self) -> None:
        self._raw = self._wide = np.empty(0, np.uint8)

    def raw(self, size_bytes: int) -> np.ndarray:
        if self._raw.size < size_bytes:
            self._raw = np.empty(size_bytes, np.uint8)
        return self._raw[:size_bytes]

    def wide(self, size_bytes: int) -> np.ndarray:
        if self._wide.size < size_bytes:
            self._wide = np.empty(size_bytes, np.uint8)
        return self._wide[:size_bytes]


def _read_shard(
    directory: Tensors,
    leaf: Leaf,
    bounds: Bounds,
    scratch: _Scratch,
    advance: Callable[[float], None],
    source: Callable[[str, Index], np.ndarray] | None = None,
) -> np.ndarray:
    """One device's slice of the leaf, in the leaf's dtype; of another `source` than the tensors themselves, if there is one."""
    out = _aligned(tuple(stop - start for start, stop in bounds), leaf.dtype)
    left, right = letters(leaf.axes)
    stacked = [axis for axis, letter in enumerate(right) if letter not in left]
    bits = np.dtype(f"u{leaf.dtype.itemsize}")
    for piece in _pieces(leaf, bounds, _stored(directory, leaf).itemsize):
        here = tuple(slice(part.start - start, part.stop - start) for part, (start, _) in zip(piece, bounds, strict=True))
        name = leaf.tensors.get(tuple(piece[axis].start for axis in stacked))
        if name is None:  # a layer that this pipeline stage does not have
            out.view(bits)[here] = 0
            continue
        where = source_slice(leaf.axes, leaf.shape, piece)
        read = directory.read(name, where, scratch.raw) if source is None else source(name, where)
        values = place(leaf.axes, leaf.shape, piece, _converted(read, leaf.dtype, scratch))
        # As plain integers: numpy moves those faster than a dtype it does not know, and without the interpreter's lock.
        _store(out.view(bits)[here], values.view(bits))
        advance(values.size * read.dtype.itemsize)
    return out


def _store(out: np.ndarray, values: np.ndarray) -> None:
    """out[...] = values; a transposed source is packed strip by strip first, which makes it two to three times faster."""
    wide = [axis for axis in range(values.ndim) if values.shape[axis] > 1]
    axis = min(wide, key=lambda axis: values.strides[axis], default=0)  # along which the source is contiguous
    if not wide or axis == wide[-1]:
        out[...] = values
        return
    for start in range(0, values.shape[axis], STRIP):
        here = (slice(None),) * axis + (slice(start, start + STRIP),)
        out[here] = values[here].copy(order="K")


def _pieces(leaf: Leaf, bounds: Bounds, itemsize: int) -> Iterator[Index]:
    """Cuts a slice of the leaf into parts that are each one short run of bytes of one tensor, in the tensor's order."""
    left, right = letters(leaf.axes)
    order = [letter for letter in right if letter not in left] + left
    sizes = dict(zip(right, leaf.shape, strict=True))

    def cut(depth: int, piece: list[slice]) -> Iterator[Index]:
        if depth == len(order):
            yield tuple(piece)
            return
        axis = right.index(order[depth])
        step_bytes = itemsize * math.prod(sizes[letter] for letter in order[depth + 1 :])
        run = 1 if order[depth] not in left else max(1, PIECE_BYTES // step_bytes)
        for start in range(bounds[axis][0], bounds[axis][1], run):
            piece[axis] = slice(start, min(start + run, bounds[axis][1]))
            if run == 1 and (order[depth] not in left or step_bytes > PIECE_BYTES):
                yield from cut(depth + 1, piece)
                for inner in order[depth + 1 :]:
                    piece[right.index(inner)] = slice(*bounds[right.index(inner)])
            else:
                yield tuple(piece)

    return cut(0, [slice(*bound) for bound in bounds])


def _converted(values: np.ndarray, dtype: np.dtype[Any], scratch: _Scratch) -> np.ndarray:
    if values.dtype == dtype:
        return values
    wide = scratch.wide(values.size * 4).view(np.uint32).reshape(values.shape)
    if values.dtype == ml_dtypes.bfloat16:
        np.left_shift(values.view(np.uint16), 16, out=wide, dtype=np.uint32, casting="unsafe")
    else:
        wide.view(np.float32)[...] = values
    return wide.view(np.float32).astype(dtype, copy=False)


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    size_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(size_bytes + ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + size_bytes].view(dtype).reshape(shape)


def _stored(directory: Tensors, leaf: Leaf) -> np.dtype[Any]:
    return directory.dtype(next(iter(leaf.tensors.values())))
