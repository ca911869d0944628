"""Parts of the step where each device computes on the heads or columns it holds, with nothing moved unless written.

Everywhere else XLA's partitioner follows the weights' shardings. An island is for what it would gather: indexing pages,
choosing experts. Its arguments are described by logical axis names, which the rule table turns into mesh axes. With one
device, or outside a mesh, an island is the plain function.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from novajax.parallel.axes import CUT_AXES, DEFAULT_RULES
from novajax.parallel.rules import only

Axes = tuple[str | None, ...]


def cut_axes() -> tuple[str, ...]:
    """The axes of the mesh around us (tensor, query) that cut anything; empty outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in CUT_AXES if not mesh.empty and mesh.shape.get(axis, 1) > 1)


def island(function: Callable[..., Any], inputs: tuple[Any, ...], outputs: Any) -> Callable[..., Any]:
    """`function` on local parts; `inputs` and `outputs` are trees of logical axis names. It may be traced inside the step's own
    shard_map, whose axes it can use for collectives."""
    axes = cut_axes()
    if not axes:
        return function

    def spec(names: Axes) -> PartitionSpec:
        return only(axes, PartitionSpec(*(DEFAULT_RULES[name] if name else None for name in names)))

    in_specs, out_specs = (jax.tree.map(spec, tree, is_leaf=_is_axes) for tree in (inputs, outputs))
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False)


def joined(part: jax.Array) -> jax.Array:
    """The sum of an island's partial results over the devices of (tensor, query). Inside an island."""
    axes = cut_axes()
    return jax.lax.psum(part, axes) if axes else part


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)
