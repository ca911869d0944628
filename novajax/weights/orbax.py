"""Sealed arrays: a model's state as an Orbax checkpoint, one folder per parameter.

Invariants: arrays are stored as they are, uncompressed (weights hardly compress, and reading would be several times
slower) and one array to a folder, so that a damaged file's name says which parameter it hurts; they are restored straight
into the shardings asked for, a group of leaves at a time, so that a change of dtype never holds the model twice. Orbax is
imported when used: it costs a start that does not need it nothing.
"""

import logging
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from novajax.core.errors import WeightsError
from novajax.models.stages import Path
from novajax.quant.qtensor import QTensor
from novajax.telemetry.progress import Reporter
from novajax.weights.manifest import array_name
from novajax.weights.stacked import restore_stacked

GROUP_BYTES = 512 << 20
"""Restored at a time."""


def save_arrays(directory: pathlib.Path, state: nnx.State, progress: Reporter) -> None:
    """Writes every array of `state` under `directory`, which must not exist. Raises WeightsError when writing fails."""
    import orbax.checkpoint as ocp

    arrays = {name: array for path, variable in nnx.to_flat_state(state) for name, array in _stored(array_name(path), variable.get_value())}
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
    parts = [part for path, variable in leaves for part in _parts(path, variable.get_value(), targets[path].get_value(), stored_dtype)]
    made: dict[Path, list[jax.Array]] = {}
    with _quiet(), ocp.Checkpointer(_handler()) as checkpointer:
        for group in _groups(parts):
            for part in group:
                check(part.name)
            wanted = {part.name: part.stored for part in group}
            progress.note(group[0].name)
            args = ocp.args.PyTreeRestore(wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True)
            try:
                arrays = checkpointer.restore(directory, args=args)
            except (OSError, ValueError, KeyError) as error:
                raise WeightsError(f"{directory}: reading {', '.join(wanted)} failed: {error}") from error
            for part in group:
                array = arrays.pop(part.name)
                progress.advance(array.nbytes)
                made.setdefault(part.path, []).append(jax.block_until_ready(part.finish(array)))
    for path, variable in leaves:
        held, arrays = variable.get_value(), made[path]
        whole = QTensor(arrays[0], arrays[1], held.block, held.format) if isinstance(held, QTensor) else arrays[0]
        filled.append((path, variable.replace(whole)))
    return nnx.from_flat_state(filled)


class _Part(NamedTuple):
    """One stored array, and what is to be made of it."""

    path: Path
    name: str
    stored: jax.ShapeDtypeStruct
    finish: Callable[[jax.Array], jax.Array]


def _stored(name: str, held: Any) -> Iterator[tuple[str, jax.Array]]:
    """The arrays that a parameter is stored as, by name: a QTensor as two, int4 in pairs, since Orbax spends a byte on each."""
    if not isinstance(held, QTensor):
        yield name, held
        return
    yield f"{name}.values", pairs(held.values) if held.values.dtype == jnp.int4 else held.values
    yield f"{name}.scale", held.scale


def _parts(path: Path, held: Any, target: Any, stored_dtype: str) -> Iterator[_Part]:
    """`_stored` the other way: `target` is a sharding, or a QTensor of two."""

    def part(name: str, shape: tuple[int, ...], dtype: Any, sharding: Any, finish: Callable[[jax.Array], jax.Array]) -> _Part:
        return _Part(path, name, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding), finish)

    name = array_name(path)
    if not isinstance(held, QTensor):
        yield part(name, held.shape, stored_dtype, target, lambda array: array.astype(held.dtype))
        return
    values = held.values
    if values.dtype == jnp.int4:
        *outer, last = values.shape
        whole = NamedSharding(target.values.mesh, PartitionSpec())
        unpack = jax.jit(partial(unpaired, last=last), out_shardings=target.values)
        yield part(f"{name}.values", (*outer, -(-last // 2)), jnp.uint8, whole, unpack)
    else:
        yield part(f"{name}.values", values.shape, values.dtype, target.values, lambda array: array)
    yield part(f"{name}.scale", held.scale.shape, held.scale.dtype, target.scale, lambda array: array)


def pairs(values: jax.Array) -> jax.Array:
    """uint8[..., ceil(H / 2)] of int4[..., H]: neighbours share a byte, the first in the low bits."""
    even = jnp.pad(values.astype(jnp.int8), [(0, 0)] * (values.ndim - 1) + [(0, values.shape[-1] % 2)]).view(jnp.uint8) & 0xF
    return even[..., ::2] | even[..., 1::2] << 4


def unpaired(stored: jax.Array, last: int) -> jax.Array:
    """int4[..., last] of what `pairs` made."""
    both = jnp.stack([stored & 0xF, stored >> 4], axis=-1).reshape(*stored.shape[:-1], -1)[..., :last].astype(jnp.int8)
    return ((both ^ 8) - 8).astype(jnp.int4)


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


def _groups(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    group, size_bytes = [], 0
    for part in parts:
        part_bytes = math.prod(part.stored.shape) * part.stored.dtype.itemsize
        if group and size_bytes + part_bytes > GROUP_BYTES:
            yield group
            group, size_bytes = [], 0
        group.append(part)
        size_bytes += part_bytes
    if group:
        yield group
