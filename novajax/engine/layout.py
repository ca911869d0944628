"""How one engine's arrays lie on its mesh: a sharding for each kind of array, and the way host arrays get there.

- pool    [stages x slots, data x pages, kv heads, context x page, H]   cut over all axes but `query`; scales have no H
- rows    [data x rows, ...]: per-slot state, logits, draws; the sampler works on each partition apart
- packed  [data, stages, words]: the uploads of the plans in the pipeline, the newest first
- transit [stages, data x rows, ...]: activations between stages
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from novajax.kv.pool import KVPool
from novajax.models.config import ModelConfig
from novajax.parallel.axes import slots_per_stage

Kernels = Literal["plain", "native", "gpu"]
"""`kernels.attention` itself, or its form for a CPU or a GPU."""
POOL = PartitionSpec("stage", "data", "tensor", "context", None)
ROWS = PartitionSpec("data")
PACKED = PartitionSpec("data")
DECODE_TRANSIT = PartitionSpec("stage", "data")
PREFILL_TRANSIT = PartitionSpec("stage", "data", "context")
EVERYWHERE = PartitionSpec()


@dataclass(frozen=True)
class Layout:
    """The mesh and what follows from it for a model. Hashable: compiled programs are keyed by it."""

    mesh: Mesh
    model: ModelConfig
    kernels: Kernels = "plain"
    """The form that attention has."""

    @property
    def data(self) -> int:
        return self.mesh.shape["data"]

    @property
    def stages(self) -> int:
        return self.mesh.shape["stage"]

    @property
    def context(self) -> int:
        return self.mesh.shape["context"]

    @property
    def slots(self) -> int:
        """Layers of one stage, padding included."""
        return slots_per_stage(self.model.layers, self.stages)

    @property
    def pool_layers(self) -> int:
        return self.stages * self.slots

    @property
    def alone(self) -> bool:
        """One device: the step needs no shard_map."""
        return self.mesh.size == 1

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def abstract(self, array: Any, spec: PartitionSpec) -> Any:
        """The array's shape and dtype with its sharding: an argument to compile for."""
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self.sharding(spec))

    def upload(self, array: np.ndarray, spec: PartitionSpec) -> jax.Array | np.ndarray:
        """A host array, which every process has in full, as an argument of a compiled program. Moves nothing between processes; one
        device takes the host array itself, which must not change any more: the program's own upload is several times faster."""
        if self.alone:
            return array
        sharding = self.sharding(spec)
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def zeros_like(self, abstract: Any) -> jax.Array:
        """A device array of zeros for a shape with a sharding, never on the host."""
        return jax.jit(lambda: jax.numpy.zeros(abstract.shape, abstract.dtype), out_shardings=abstract.sharding)()

    def per_partition(self, function: Callable[..., Any], outputs: Any) -> Callable[..., Any]:
        """`function` on each data partition's rows apart: all arguments are cut by ROWS, and so are the outputs that say ROWS; those
        that say EVERYWHERE are put together on all devices, partition by partition. To be jitted."""

        def gather(spec: PartitionSpec, array: Any) -> Any:
            return array if spec == ROWS else jax.lax.all_gather(array, "data", tiled=True)

        def pinned(*arguments: Any, **how: Any) -> Any:
            made = cut(*arguments, **how)
            return jax.tree.map(lambda spec, part: jax.lax.with_sharding_constraint(part, self.sharding(spec)), outputs, made)

        def cut(*arguments: Any, **how: Any) -> Any:
            if self.data == 1:
                return function(*arguments, **how)

            def one(*parts: Any) -> Any:
                return jax.tree.map(gather, outputs, function(*parts, **how))

            return jax.shard_map(one, mesh=self.mesh, in_specs=ROWS, out_specs=outputs, check_vma=False)(*arguments)

        return cut if self.alone else pinned


def kernels_for(devices: Sequence[Any]) -> Kernels:
    """The form for devices of that kind; a CPU's native one has to be built first."""
    return "gpu" if devices[0].platform == "gpu" else "plain"


def pool_specs(pool: KVPool) -> Any:
    """A pool of partition specs."""
    return jax.tree.map(lambda array: PartitionSpec(*POOL[: array.ndim]), pool)
