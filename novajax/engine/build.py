"""Builds an engine from a configuration, phase by phase: describe, plan memory, load, compile, allocate, warm up.

Everything that can be refused is refused by arithmetic before weights are read. Each phase is timed for the start-up
timeline and shown while it runs.
"""

import dataclasses
import secrets
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from novajax.core.clock import MonotonicClock
from novajax.core.config import EngineConfig
from novajax.core.errors import CapacityError, ConfigError
from novajax.core.types import ModelCard, Phase
from novajax.engine.buckets import BucketTable, make_table
from novajax.engine.capacity import Capacity, memory_limit_bytes, plan_capacity
from novajax.engine.compiler import CompileCounter, compile_programs
from novajax.engine.drafter import describe_draft, draft_page_bytes, load_draft
from novajax.engine.engine import Engine
from novajax.engine.executor import Executor
from novajax.engine.layout import DECODE_TRANSIT, PREFILL_TRANSIT, ROWS, Layout, kernels_for, pool_specs
from novajax.engine.runner import Runner
from novajax.engine.sampler import SamplingState, abstract_state
from novajax.engine.step import Transit
from novajax.engine.steptimes import StepTimes
from novajax.kernels.native.library import register
from novajax.kv.manager import KVManager
from novajax.kv.pool import KVPool, abstract_pool, page_bytes
from novajax.models.config import ModelConfig
from novajax.models.decoder import parameter_count
from novajax.models.precision import native_state, quantized_model
from novajax.parallel.mesh import mesh_for
from novajax.quant.cache import cache_format
from novajax.quant.qtensor import stored_bytes
from novajax.quant.spread import state_shardings
from novajax.scheduler.admission import Limits
from novajax.scheduler.budget import Shapes
from novajax.scheduler.scheduler import Scheduler
from novajax.scheduler.speculation import Drafter
from novajax.weights.load import LoadedModel, describe, load_model

Announce = Callable[[Phase, str], None]


class Timeline:
    """Seconds by phase of a start, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str):
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 3)


class Prepared(NamedTuple):
    """A warm executor, and what the host half of the engine is made from. The same in every process of a group."""

    executor: Executor
    loaded: LoadedModel
    capacity: Capacity
    table: BucketTable
    max_context_tokens: int
    timeline: Timeline
    drafter: Drafter = "lookup"


def open_engine(config: EngineConfig, announce: Announce = lambda phase, detail: None) -> Engine:
    """A ready engine. Raises ConfigError, WeightsError or CapacityError, naming what is wrong, before it serves anything."""
    prepared = open_executor(config, announce)
    return make_engine(config, prepared, prepared.executor)


def make_engine(config: EngineConfig, prepared: Prepared, runner: Runner) -> Engine:
    """The engine of one process, or of a group's leader: the scheduler's plans go to `runner`, which owns the executor."""
    _, loaded, capacity, table, max_context_tokens, timeline, drafter = prepared
    scheduler = make_scheduler(config, loaded, capacity, table, max_context_tokens, drafter)
    card = make_card(config, loaded, capacity, max_context_tokens)
    return Engine(card, scheduler, runner, MonotonicClock(), timeline.seconds, CompileCounter(), StepTimes(config.trace_file))


def open_executor(
    config: EngineConfig, announce: Announce = lambda phase, detail: None, meet: Callable[[], None] = lambda: None
) -> Prepared:
    """Everything on the device, warm, in the same way in every process of a group. Raises like `open_engine`.

    `meet` is called before the first program runs and returns when all processes are there: one that still compiles would let the
    others' collectives run into their time-outs.
    """
    timeline = Timeline()
    with timeline.phase("describe"):
        announce("loading", f"reading {config.model}")
        description = describe(config.model)
        devices = jax.devices()
        on_cpu = devices[0].platform == "cpu"
        model = description.config
        mesh = mesh_for(config.mesh, model.kv_heads, devices)
        native = on_cpu and mesh.size == 1 and has_native_kernels(config)
        layout = Layout(mesh, model, kernels="native" if native else kernels_for(devices))
        dtype = resolve_dtype(config.dtype, on_cpu=on_cpu, native=native)
        max_context_tokens = resolve_context(config, model)
        table = make_table(config, max_context_tokens, on_cpu=on_cpu)
        _, abstract = quantized_model(model, layout.stages, dtype, config.quantization, on_cpu=on_cpu, rules=description.rules)
        weights_bytes = device_bytes(state_shardings(layout.mesh, abstract), abstract)
        draft = describe_draft(config, description, layout) if config.draft_model and table.drafts else None
        cache = cache_format(config.kv_cache_dtype, config.quantization)
        if "int4" in (cache.keys, cache.values) and model.head_dim % 2:
            raise ConfigError(f"int4 in the KV cache needs an even head_dim, not {model.head_dim}", param="kv_cache_dtype")
        each = page_bytes(layout.slots, model.kv_heads, config.page_tokens, model.head_dim, dtype, cache)
        if draft is not None:
            weights_bytes += parameter_count(draft.config) * dtype.itemsize
            each += draft_page_bytes(draft.config, config.page_tokens, dtype)
        here = [device for device in layout.mesh.devices.flat if device.process_index == jax.process_index()]
        capacity = plan_capacity(
            config,
            model,
            table,
            limit_bytes=memory_limit_bytes(here),
            weights_bytes=weights_bytes,
            page_bytes=each // layout.mesh.shape["tensor"],
            itemsize=dtype.itemsize,
        )
        announce("loading", capacity.summary())
    with timeline.phase("load"):
        loaded = load_model(description, layout.mesh, dtype, quantization=config.quantization, verify=config.verify_hashes)
        if native:
            loaded = dataclasses.replace(loaded, state=native_state(model, loaded.state))
        drafter = None
        if draft is not None:
            most = max(drafts for _, drafts in table.drafts)
            drafter = load_draft(draft, layout, capacity.pages, config.page_tokens, dtype, most, verify=config.verify_hashes)
    pool, transit, sampling = abstract_arrays(config, layout, capacity, table, dtype)
    with timeline.phase("compile"):
        announce("compiling", f"{len(table.buckets())} step shapes")
        programs = compile_programs(loaded.graphdef, loaded.state, pool, transit, sampling, table, layout, config.compile_cache, drafter)
        if programs.temp_bytes > capacity.limit_bytes - capacity.weights_bytes - capacity.kv_bytes - capacity.sampling_bytes:
            raise CapacityError(f"a step needs {programs.temp_bytes:,} bytes of temporaries, more than is left: {capacity.summary()}")
    with timeline.phase("allocate"):
        pool, transit, sampling = jax.tree.map(layout.zeros_like, (pool, transit, sampling))
        if drafter is not None:
            drafter = dataclasses.replace(drafter, pool=jax.tree.map(layout.zeros_like, drafter.pool))
        jax.block_until_ready((pool, transit, sampling))
    executor = Executor(loaded.state, pool, transit, sampling, table, programs, layout, drafter)
    meet()
    with timeline.phase("warm"):
        announce("compiling", "running every program once")
        executor.warm()
    return Prepared(executor, loaded, capacity, table, max_context_tokens, timeline, "lookup" if drafter is None else "draft")


def abstract_arrays(
    config: EngineConfig, layout: Layout, capacity: Capacity, table: BucketTable, dtype: Any
) -> tuple[KVPool, Transit | None, SamplingState]:
    """What the engine holds beside the weights, as shapes with their shardings."""
    model = layout.model
    pages, page_tokens = capacity.pages * layout.data, config.page_tokens * layout.context
    cache = cache_format(config.kv_cache_dtype, config.quantization)
    pool = abstract_pool(layout.pool_layers, pages, model.kv_heads, page_tokens, model.head_dim, dtype, cache)
    pool = jax.tree.map(layout.abstract, pool, pool_specs(pool))
    transit = None
    if layout.stages > 1:
        rows, chunk = max(table.prefill[-1], table.score)
        decode = jax.ShapeDtypeStruct((layout.stages, layout.data * table.decode_rows[-1], model.embed), dtype)
        prefill = jax.ShapeDtypeStruct((layout.stages, layout.data * rows, chunk, model.embed), dtype)
        transit = Transit(layout.abstract(decode, DECODE_TRANSIT), layout.abstract(prefill, PREFILL_TRANSIT))
    sampling = jax.tree.map(partial(layout.abstract, spec=ROWS), abstract_state(config.max_rows, model.vocab))
    return pool, transit, sampling


def device_bytes(shardings: Any, state: Any) -> int:
    """Bytes of one device's part of `state`."""
    parts = zip(jax.tree.leaves(shardings), jax.tree.leaves(state), strict=True)
    return sum(stored_bytes(sharding.shard_shape(leaf.shape), leaf.dtype) for sharding, leaf in parts)


def make_scheduler(
    config: EngineConfig, loaded: LoadedModel, capacity: Capacity, table: BucketTable, max_context_tokens: int, drafter: Drafter
) -> Scheduler:
    """The host half of the engine, sized by `capacity`, using exactly the table's shapes."""
    key = secrets.token_bytes(32)  # one for all partitions: a sequence may come back in another one than it left
    kvs = [
        KVManager(
            capacity.pages,
            capacity.page_tokens,
            key=key,
            weights_digest=loaded.digest,
            kv_format=str(jnp.dtype(loaded.dtype)),
            prefix_cache=config.prefix_cache,
        )
        for _ in range(config.mesh.data)
    ]
    largest = max(rows * chunk for rows, chunk in (*table.prefill, table.score))
    shapes = Shapes(
        decode=table.decode_rows,
        prefill=table.prefill,
        score=table.score,
        drafts=table.drafts,
        step_tokens=table.decode_rows[-1] + largest,
        fixed=table.deterministic,
    )
    limits = Limits(
        vocab_size=loaded.config.vocab,
        max_context_tokens=max_context_tokens,
        max_sequences=config.max_rows,
        max_waiting=config.max_waiting,
        stages=config.mesh.stage,
        in_flight=config.mesh.stage - 1 + config.in_flight,
    )
    return Scheduler(limits, shapes, kvs, end_token_ids=loaded.end_token_ids, drafter=drafter)


def make_card(config: EngineConfig, loaded: LoadedModel, capacity: Capacity, max_context_tokens: int) -> ModelCard:
    name = config.served_name or config.model.rstrip("/").rpartition("/")[2].partition("@")[0]
    return ModelCard(
        id=name,
        directory=str(loaded.directory),
        vocab_size=loaded.config.vocab,
        max_context_tokens=max_context_tokens,
        max_request_tokens=min(capacity.max_request_tokens, max_context_tokens),
        weights_digest=loaded.digest,
        created=int(time.time()),
        end_token_ids=loaded.end_token_ids,
        default_sampling=loaded.default_sampling,
        parameters=parameter_count(loaded.config),
        variants=(_precision(config, loaded),),
    )


def _precision(config: EngineConfig, loaded: LoadedModel) -> str:
    return Path(config.quantization).stem or loaded.description.profile or "float"


def has_native_kernels(config: EngineConfig) -> bool:
    """Whether a CPU's native kernels are wanted, and there or can be built (`kernels.native`). Raises ConfigError for `on` without them."""
    if config.native_kernels == "off" or not (config.compile_cache or config.native_kernels == "on"):
        return False
    there = bool(config.compile_cache) and register(Path(config.compile_cache))
    if config.native_kernels == "on" and not there:
        raise ConfigError("native_kernels=on needs a C++ compiler and a compile_cache folder", param="native_kernels")
    return there


def resolve_dtype(wanted: str, *, on_cpu: bool, native: bool = False) -> Any:
    """The compute type. Raises ConfigError for bfloat16 on a CPU without native kernels."""
    if on_cpu and wanted == "bfloat16" and not native:
        raise ConfigError("dtype=bfloat16 needs native kernels on a CPU: XLA has no fast one-row form there; use float32", param="dtype")
    narrow = wanted == "bfloat16" or (wanted == "auto" and not on_cpu)
    return jnp.dtype(jnp.bfloat16 if narrow else jnp.float32)


def resolve_context(config: EngineConfig, model: ModelConfig) -> int:
    """Tokens of context served. Raises ConfigError for more than the model was made for."""
    if config.max_context_tokens is None:
        return model.max_context_tokens
    if config.max_context_tokens > model.max_context_tokens:
        raise ConfigError(
            f"max_context_tokens={config.max_context_tokens} exceeds the model's {model.max_context_tokens}", param="max_context_tokens"
        )
    return config.max_context_tokens
