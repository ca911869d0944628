"""Sealed arrays: a model's state as an Orbax checkpoint, one folder per parameter.

Invariants: arrays are stored as they are, uncompressed (weights hardly compress, and reading would be several times
slower) and one array to a folder, so that a damaged file's name says which parameter it hurts; they are restored straight
into the shardings asked for, a group of leaves at a time, so that a change of dtype never holds the model twice. Orbax is
imported when used: it costs a start that does not need it nothing.
"""

import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from flax import nnx

from novajax.core.errors import WeightsError
from novajax.models.stages import Path
from novajax.telemetry.progress import Reporter
from novajax.weights.manifest import array_name
from novajax.weights.stacked import restore_stacked

GROUP_BYTES = 512 << 20
"""Restored at a time."""


def save_arrays(directory: pathlib.Path, state: nnx.State, progress: Reporter) -> None:
    """Writes every array of `state` under `directory`, which must not exist. Raises WeightsError when writing fails."""
    import orbax.checkpoint as ocp

    arrays = {array_name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}
    try:
        with _quiet(), ocp.Checkpointer(_handler()) as checkpointer:
            checkpointer.save(directory, args=ocp.args.PyTreeSave(arrays))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{directory}: writing the arrays failed: {error}") from error
    progress.advance(sum(array.nbytes for array in arrays.values()))


def restore_arrays(
    directory: pathlib.Path,
    state: nnx.State,
    shardings: nnx.State,
    stored_dtype: str,
    progress: Reporter,
    check: Callable[[str], None] = lambda name: None,
    places: dict[Path, tuple[Path, int]] | None = None,
) -> nnx.State:
    """`state` (abstract) with the arrays under `directory`, on their devices, in the dtypes of `state`.

    `check(name)` is called for each parameter before it is read. `places`: `models.stages.stage_places`, where layers are
    stacked over pipeline stages. Raises WeightsError.
    """
    import orbax.checkpoint as ocp

    targets = dict(nnx.to_flat_state(shardings))
    leaves = nnx.to_flat_state(state)
    filled = []
    if places:
        layers = [(path, variable) for path, variable in leaves if path[0] == "layers"]
        leaves = [(path, variable) for path, variable in leaves if path[0] != "layers"]
        filled = restore_stacked(directory, layers, targets, places, progress, check)
    with _quiet(), ocp.Checkpointer(_handler()) as checkpointer:
        for group in _groups(leaves, jnp.dtype(stored_dtype).itemsize):
            wanted = {}
            for path, variable in group:
                check(array_name(path))
                sharding = targets[path].get_value()
                wanted[array_name(path)] = jax.ShapeDtypeStruct(variable.shape, jnp.dtype(stored_dtype), sharding=sharding)
            progress.note(next(iter(wanted)))
            args = ocp.args.PyTreeRestore(wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True)
            try:
                arrays = checkpointer.restore(directory, args=args)
            except (OSError, ValueError, KeyError) as error:
                raise WeightsError(f"{directory}: reading {', '.join(wanted)} failed: {error}") from error
            for path, variable in group:
                array = arrays.pop(array_name(path))
                progress.advance(array.nbytes)
                filled.append((path, variable.replace(jax.block_until_ready(array.astype(variable.dtype)))))
    return nnx.from_flat_state(filled)


def _handler():
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax tells every step of its work through absl's logger."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _groups(leaves: Iterable, itemsize: int) -> Iterator[list]:
    group, size_bytes = [], 0
    for path, variable in leaves:
        leaf_bytes = variable.size * itemsize
        if group and size_bytes + leaf_bytes > GROUP_BYTES:
            yield group
            group, size_bytes = [], 0
        group.append((path, variable))
        size_bytes += leaf_bytes
    if group:
        yield group
