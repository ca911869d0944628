"""Compiles the engine's real step for a layout nobody has booked: abstract weights on virtual devices, one and two pattern periods
of layers per stage, and a straight line through both to the full depth.

Exact for what the planner asks: layers are unrolled, so arguments, aliases and collectives grow by the same amount with each
period. Temporaries do not have to; their line is an estimate. It runs in a process whose jax has the devices already.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import msgspec

from novajax.core.config import EngineConfig
from novajax.engine.buckets import Bucket, make_table
from novajax.engine.build import abstract_arrays
from novajax.engine.capacity import Capacity
from novajax.engine.compiler import lower_forward
from novajax.engine.layout import Layout, kernels_for
from novajax.models.config import ModelConfig
from novajax.models.stages import staged_model
from novajax.parallel.axes import pattern_period, slots_per_stage
from novajax.parallel.mesh import mesh_for
from novajax.parallel.rules import state_shardings
from novajax.planner.compiled import Compiled, Counted
from novajax.planner.hlo import Found, read_collectives


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One compile. Bytes are of one device."""

    layers: int
    """Of a stage."""
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    alias_bytes: int
    collectives: dict[Found, int]
    seconds: float


def compile_step(
    model: ModelConfig, config: EngineConfig, dtype: Any, rows: int, chunk: int, pages: int, devices: Sequence[Any]
) -> Measured:
    """The forward of one bucket for `model` as it is, on the first of `devices`. `rows`: decode rows of one data partition; `chunk`: 0 or
    the table's chunk; `pages`: of one data partition. Raises ConfigError for a layout that does not divide."""
    began = time.monotonic()
    layout = Layout(mesh_for(config.mesh, model.kv_heads, devices), model, kernels=kernels_for(devices))
    table = make_table(config, config.max_context_tokens or model.max_context_tokens, on_cpu=False)
    fits = [count for count in table.decode_rows if count >= rows]
    prefill = next((shape for shape in table.prefill if shape == (1, table.prefill[-1][1])), table.prefill[-1]) if chunk else (0, 0)
    bucket = Bucket(fits[0] if fits else table.decode_rows[-1], *prefill, table.table_pages[-1])
    graphdef, abstract = staged_model(model, layout.stages, dtype)
    weights = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        state_shardings(layout.mesh, abstract),
    )
    nothing = dict.fromkeys(("limit_bytes", "weights_bytes", "sampling_bytes", "reserve_bytes", "page_bytes", "max_request_tokens"), 0)
    capacity = Capacity(pages=pages, page_tokens=config.page_tokens * layout.context, **nothing)
    pool, transit, _ = abstract_arrays(config, layout, capacity, table, dtype)
    with jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):  # says for which device kernels are lowered: there may be none here
        made = lower_forward(graphdef, weights, pool, transit, config.max_rows, table, bucket, layout).compile()
    memory = made.memory_analysis()
    return Measured(
        layers=layout.slots,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        collectives=dict(read_collectives(made.as_text())),
        seconds=time.monotonic() - began,
    )


def compile_shallow(
    model: ModelConfig, config: EngineConfig, dtype: str, rows: int, chunk: int, pages: int, devices: Sequence[Any], target: str
) -> Compiled:
    """The step at one and two pattern periods a stage, extrapolated to the model's depth."""
    period, stages = pattern_period(model.layers), config.mesh.stage
    slots = slots_per_stage(model.layers, stages)
    kind = jnp.dtype(dtype)
    short = [
        compile_step(_cut(model, times * period * stages), config, kind, rows, chunk, pages, devices)
        for times in (1, 2)
        if times * period <= slots
    ]
    what = f"{rows} decode rows" + (f" and a chunk of {chunk}" if chunk else "")
    return extrapolate(short, slots, target, what)


def extrapolate(short: Sequence[Measured], layers: int, target: str, bucket: str) -> Compiled:
    """A straight line through one or two compiles to `layers` a stage."""
    first, last = short[0], short[-1]
    step = last.layers - first.layers

    def line(low: float, high: float) -> float:
        return low if not step else low + (high - low) / step * (layers - first.layers)

    kinds = Counter(first.collectives) | Counter(last.collectives)
    counted = []
    for one in sorted(kinds):
        low, high = first.collectives.get(one, 0), last.collectives.get(one, 0)
        each = (high - low) / step if step else 0.0
        counted.append(Counted(kind=one.kind, group=one.group, bytes=one.bytes, per_layer=each, once=low - each * first.layers))
    return Compiled(
        target=target,
        bucket=bucket,
        layers_compiled=tuple(one.layers for one in short),
        layers=layers,
        argument_bytes=round(line(first.argument_bytes, last.argument_bytes)),
        temp_bytes=round(line(first.temp_bytes, last.temp_bytes)),
        output_bytes=round(line(first.output_bytes, last.output_bytes)),
        alias_bytes=round(line(first.alias_bytes, last.alias_bytes)),
        collectives=tuple(counted),
        seconds=sum(one.seconds for one in short),
    )


def _cut(model: ModelConfig, layers: int) -> ModelConfig:
    """The model with that many layers, its pattern repeated."""
    period = pattern_period(model.layers)
    return msgspec.structs.replace(model, layers=tuple(model.layers[index % period] for index in range(layers)))
