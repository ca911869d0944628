"""From logical axis names to mesh axes, and so from declared parameters to shardings.

Invariants: a dimension is cut evenly or the layout is refused; no mesh axis cuts two dimensions of one array. It reads
the `axes` metadata of any abstract NNX state, and knows neither models nor sizes beyond the shapes it is given.
"""

import math

from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from novajax.core.errors import ConfigError
from novajax.parallel.axes import DEFAULT_RULES, Rules


def partition_spec(mesh: Mesh, logical_axes: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules = DEFAULT_RULES) -> PartitionSpec:
    """One entry per dimension; mesh axes of size 1 are left out.

    Raises ConfigError for an unknown name, a dimension that does not divide, or a mesh axis used twice.
    """
    if len(logical_axes) != len(shape):
        raise ConfigError(f"{len(logical_axes)} axis names {logical_axes} for the {len(shape)} dimensions of {shape}")
    entries: list[tuple[str, ...] | None] = []
    cut_by: dict[str, str] = {}
    for name, size in zip(logical_axes, shape, strict=True):
        if name is not None and name not in rules:
            raise ConfigError(f"logical axis {name!r} has no rule; rules: {', '.join(rules)}")
        wanted = tuple(axis for axis in (rules[name] if name else ()) if mesh.shape[axis] > 1)
        for axis in wanted:
            if axis in cut_by:
                raise ConfigError(f"mesh axis {axis!r} would cut both {cut_by[axis]!r} and {name!r} of an array {logical_axes} {shape}")
            cut_by[axis] = str(name)
        parts = math.prod(mesh.shape[axis] for axis in wanted)
        if size % parts:
            cuts = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in wanted)
            raise ConfigError(f"{name}={size} of an array {logical_axes} {shape} does not divide by {parts} ({cuts})", param=name)
        entries.append(wanted or None)
    return PartitionSpec(*entries)


def only(axes: tuple[str, ...], spec: PartitionSpec) -> PartitionSpec:
    """The part of `spec` that names these mesh axes: what a shard_map that is manual over them is told."""
    entries = []
    for entry in spec:
        kept = tuple(axis for axis in ((entry,) if isinstance(entry, str) else entry or ()) if axis in axes)
        entries.append(kept or None)
    return PartitionSpec(*entries)


def named_sharding(mesh: Mesh, logical_axes: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules = DEFAULT_RULES) -> NamedSharding:
    """`partition_spec` on the mesh."""
    return NamedSharding(mesh, partition_spec(mesh, logical_axes, shape, rules))


def state_shardings(mesh: Mesh, state: nnx.State, rules: Rules = DEFAULT_RULES) -> nnx.State:
    """The same tree with a NamedSharding in each leaf; every Variable must carry `axes`. Fit for device_put and jit's shardings.

    Raises ConfigError with the parameter's path in front.
    """
    shardings = []
    for path, variable in nnx.to_flat_state(state):
        try:
            shardings.append((path, variable.replace(named_sharding(mesh, variable.get_metadata("axes"), variable.shape, rules))))
        except ConfigError as error:
            raise ConfigError(f"{'/'.join(map(str, path))}: {error.message}", param=error.param) from None
    return nnx.from_flat_state(shardings)
