"""How a quantized weight lies on a mesh: values as the weight would, scales beside the values that they belong to.

Scales are cut along a dimension where each device's part is whole groups, and are whole on every device elsewhere.
"""

import math
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from novajax.parallel.axes import DEFAULT_RULES, Rules
from novajax.parallel.rules import state_shardings as plain_shardings
from novajax.quant.qtensor import QTensor

Axes = tuple[str | None, ...]


def axes_of(weight: Any, axes: Axes, mesh: Mapping[str, int], rules: Rules = DEFAULT_RULES) -> Any:
    """The logical axes of the weight's array, or of both arrays of a QTensor, where `mesh` has those sizes."""
    if not isinstance(weight, QTensor):
        return axes

    def scales(name: str | None, size: int, by: int) -> str | None:
        parts = math.prod(mesh.get(axis, 1) for axis in (rules[name] if name else ()))
        return name if by == 1 or parts == 1 or size % (parts * by) == 0 else None

    return QTensor(axes, tuple(map(scales, axes, weight.shape, weight.block)), weight.block, weight.format)


def state_shardings(mesh: Mesh, state: nnx.State, rules: Rules = DEFAULT_RULES) -> nnx.State:
    """`parallel.rules.state_shardings` of a state that may hold QTensors: where one is, there is a QTensor of two shardings."""
    leaves = nnx.to_flat_state(state)
    parts = []
    for path, variable in leaves:
        if isinstance(held := variable.get_value(), QTensor):
            axes = axes_of(held, variable.get_metadata("axes"), mesh.shape, rules)
            parts.append(((*path, "values"), variable.replace(held.values, axes=axes.values)))
            parts.append(((*path, "scale"), variable.replace(held.scale, axes=axes.scale)))
        else:
            parts.append((path, variable))
    made = dict(nnx.to_flat_state(plain_shardings(mesh, nnx.from_flat_state(parts), rules)))
    joined = []
    for path, variable in leaves:
        if isinstance(held := variable.get_value(), QTensor):
            values, scale = made[(*path, "values")].get_value(), made[(*path, "scale")].get_value()
            joined.append((path, variable.replace(QTensor(values, scale, held.block, held.format))))
        else:
            joined.append((path, made[path]))
    return nnx.from_flat_state(joined)
