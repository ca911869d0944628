"""Sealed arrays of single layers as arrays stacked over pipeline stages: each device's slice is read by itself.

Orbax restores an array into a sharding of its own shape; here one array of the run tree is made of several stored ones,
so their files are read through tensorstore, which wrote them for Orbax.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from novajax.core.errors import WeightsError
from novajax.models.stages import Path
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
    filled = []
    for path, variable in leaves:
        stored: dict[int, Any] = {}
        for stage in range(variable.shape[0]):
            if (layer := layer_at.get((path[:2], stage))) is not None:
                name = array_name((*layer, *path[2:]))
                check(name)
                stored[stage] = _open(directory / name)
        progress.note(array_name(path))
        array = jax.make_array_from_callback(
            tuple(variable.shape), shardings[path].get_value(), _reader(stored, variable, progress), dtype=variable.dtype
        )
        filled.append((path, variable.replace(jax.block_until_ready(array))))
    return filled


def _open(path: pathlib.Path) -> Any:
    try:
        return ts.open({"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}}, open=True, read=True).result()
    except ValueError as error:
        raise WeightsError(f"{path}: cannot be opened: {error}") from error


def _reader(stored: dict[int, Any], variable: Any, progress: Reporter) -> Callable[[Any], np.ndarray]:
    """The callback that reads one slice of the stacked array."""

    def read(index: Any) -> np.ndarray:
        stages = range(variable.shape[0])[index[0]]
        shape = [len(range(size)[part]) for size, part in zip(variable.shape, index, strict=True)]
        out = np.zeros(shape, variable.dtype)
        for at, stage in enumerate(stages):
            if stage in stored:
                try:
                    values = stored[stage][index[1:]].read().result()
                except ValueError as error:
                    raise WeightsError(f"{stored[stage].spec().to_json()['kvstore']['path']}: reading failed: {error}") from error
                out[at] = values
                progress.advance(values.nbytes)
        return out

    return read
