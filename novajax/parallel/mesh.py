"""The device mesh: five named axes, all always present, size 1 when unused.

data: rows inside one program · stage: pipeline over layers · context: sequence · tensor: up to the number of KV heads ·
query: the rest of tensor parallelism. Axes are Auto: XLA propagates shardings from the weights. It does not know models.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from novajax.core.config import MeshConfig
from novajax.core.errors import CapacityError, ConfigError
from novajax.parallel.axes import AXES, split_tensor_parallel


def make_mesh(
    data: int = 1, stage: int = 1, context: int = 1, tensor: int = 1, query: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A Mesh over the first data*stage*context*tensor*query of `devices` (default: all of jax's), `query` innermost.

    Raises ConfigError for a size below 1 and CapacityError when there are too few devices.
    """
    sizes = dict(zip(AXES, (data, stage, context, tensor, query), strict=True))
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ConfigError(f"mesh axis {name}={size!r} must be a whole number of at least 1", param=name)
    wanted = math.prod(sizes.values())
    found = list(jax.devices() if devices is None else devices)
    if wanted > len(found):
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        raise CapacityError(f"the mesh {shape} needs {wanted} devices; {len(found)} are here")
    grid = np.asarray(found[:wanted], dtype=object).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_for(config: MeshConfig, kv_heads: int, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of an engine. Raises ConfigError or CapacityError as the functions below and above do."""
    tensor, query = split_tensor_parallel(config.tensor_parallel, kv_heads)
    return make_mesh(config.data, config.stage, config.context, tensor, query, devices)
