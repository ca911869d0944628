"""Sealed arrays of single layers as arrays stacked over pipeline stages: each device's slice is read by itself.

Orbax restores an array into a sharding of its own shape; here one array of the run tree is made of several stored ones,
so their files are read through tensorstore, which wrote them for Orbax.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tensorstore as ts

from novajax.core.errors import WeightsError
from novajax.models.stages import Path
from novajax.quant.qtensor import QTensor
from novajax.telemetry.progress import Reporter
from novajax.weights.manifest import array_name


def restore_stacked(
    directory: pathlib.Path,
    leaves: list[tuple[Path, Any]],
    shardings: dict[Path, Any],
    places: dict[Path, tuple[Path, int]],
    progress: Reporter,
    check: Callable[[str], None],
) -> list[tuple[Path, Any]]:
    """The leaves, [stages, ...] each, filled and on their devices; a stage without the layer has zeros.

    Raises WeightsError naming the stored array.
    """
    layer_at = {(slot, stage): layer for layer, (slot, stage) in places.items()}

    def stacked(path: Path, ending: str, part: Any, sharding: Any) -> jax.Array:
        stored: dict[int, Any] = {}
        for stage in range(part.shape[0]):
            if (layer := layer_at.get((path[:2], stage))) is not None:
                name = array_name((*layer, *path[2:])) + ending
                check(name)
                stored[stage] = _open(directory / name)
        progress.note(array_name(path) + ending)
        shape = tuple(part.shape)
        return jax.block_until_ready(
            jax.make_array_from_callback(shape, sharding, _reader(stored, shape, part.dtype, progress), dtype=part.dtype)
        )

    filled = []
    for path, variable in leaves:
        held, target = variable.get_value(), shardings[path].get_value()
        if isinstance(held, QTensor):
            values = stacked(path, ".values", held.values, target.values)
            whole: Any = QTensor(values, stacked(path, ".scale", held.scale, target.scale), held.block, held.format)
        else:
            whole = stacked(path, "", held, target)
        filled.append((path, variable.replace(whole)))
    return filled


def _open(path: pathlib.Path) -> Any:
    try:
        return ts.open({"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}}, open=True, read=True).result()
    except ValueError as error:
        raise WeightsError(f"{path}: cannot be opened: {error}") from error


def _reader(stored: dict[int, Any], shape: tuple[int, ...], dtype: Any, progress: Reporter) -> Callable[[Any], np.ndarray]:
    """The callback that reads one slice of the stacked array."""

    def read(index: Any) -> np.ndarray:
        bounds = [range(size)[part] for size, part in zip(shape, index, strict=True)]
        out = np.zeros([len(part) for part in bounds], dtype)
        start, stop = bounds[-1].start, bounds[-1].stop
        paired = dtype == ml_dtypes.int4
        last = slice(start // 2, -(-stop // 2)) if paired else slice(start, stop)
        for at, stage in enumerate(bounds[0]):
            if stage in stored:
                try:
                    values = stored[stage][(*index[1:-1], last)].read().result()
                except ValueError as error:
                    raise WeightsError(f"{stored[stage].spec().to_json()['kvstore']['path']}: reading failed: {error}") from error
                out[at] = _apart(values)[..., start % 2 : start % 2 + stop - start] if paired else values
                progress.advance(values.nbytes)
        return out

    return read


def _apart(stored: np.ndarray) -> np.ndarray:
    """int4[..., 2 C] of uint8[..., C], on the host: `orbax.unpaired` of whole bytes."""
    both = np.stack([stored & 0xF, stored >> 4], axis=-1).reshape(*stored.shape[:-1], -1).astype(np.int8)
    return ((both ^ 8) - 8).astype(ml_dtypes.int4)
