"""Every program the engine will run, compiled before it says ready: `forward` per bucket, `sample` per (rows, variant),
`score` per row count, and `seat`.

The programs are ahead-of-time executables, which cannot compile again: "no compile after ready" holds by construction,
and a listener counts what JAX compiles anyway. Compiling runs on threads (XLA releases the interpreter lock).
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
from jax.sharding import PartitionSpec

from novajax.engine import inputs, sampler
from novajax.engine.buckets import Bucket, BucketTable
from novajax.engine.drafter import DraftModel, follow
from novajax.engine.layout import EVERYWHERE, PACKED, ROWS, Layout
from novajax.engine.sampler import SamplingState, Variant
from novajax.engine.shelf import Shelf, describe_arrays
from novajax.engine.step import Transit, forward, result_specs
from novajax.kv.pool import KVPool
from novajax.telemetry.progress import Progress

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class Programs(msgspec.Struct, frozen=True):
    """The compiled table. Keys are what the executor looks up each step."""

    forward: dict[Bucket, Callable[..., Any]]
    sample: dict[tuple[int, Variant], Callable[..., Any]]
    score: dict[int, Callable[..., Any]]
    seat: Callable[..., Any]
    follow: dict[Bucket, Callable[..., Any]]
    """A draft model's part of each step; empty without one."""
    temp_bytes: int
    """The largest temporary any of them needs, by XLA's own analysis."""


class CompileCounter:
    """Counts backend compilations in this process from construction on; `close` stops listening."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILE_EVENT:
            self.count += 1
            self.seconds += duration_secs

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)


def compile_programs(
    graphdef: Any,
    weights: Any,
    pool: KVPool,
    transit: Transit | None,
    state: SamplingState,
    table: BucketTable,
    layout: Layout,
    directory: str = "",
    drafter: DraftModel | None = None,
) -> Programs:
    """Lowers and compiles the whole table, but for what is kept in `directory`; the arguments may be abstract, with their shardings. Shows
    its progress."""
    drafting = drafter and (drafter.layout, describe_arrays((drafter.state, drafter.pool)))
    shelf = Shelf(directory, (layout, table, describe_arrays((weights, pool, transit, state)), drafting))
    slots, vocab = state.counts.shape
    everywhere = layout.sharding(EVERYWHERE)
    sample_jit = jax.jit(layout.per_partition(_sample, (ROWS, ROWS, EVERYWHERE)), static_argnames="variant", donate_argnums=0)
    score_jit = jax.jit(layout.per_partition(sampler.score, (EVERYWHERE,) * 4))
    seat_jit = jax.jit(sampler.seat, donate_argnums=0, out_shardings=layout.sharding(ROWS))

    def rows_of(count: int, *more: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((layout.data * count, *more), dtype, sharding=layout.sharding(ROWS))

    def one_forward(bucket: Bucket) -> Any:
        most = 0 if drafter is None else drafter.most
        return lower_forward(graphdef, weights, pool, transit, slots, table, bucket, layout, most).compile()

    def one_sample(rows: int, variant: Variant) -> Any:
        drawn = (rows_of(rows, vocab, dtype=jnp.float32), rows_of(rows, inputs.DRAW_COLUMNS, dtype=jnp.int32))
        return sample_jit.lower(state, *drawn, variant=variant).compile()

    def one_score(rows: int) -> Any:
        return score_jit.lower(rows_of(rows, vocab, dtype=jnp.float32), rows_of(rows, dtype=jnp.int32)).compile()

    def one_seat() -> Any:
        shape = partial(jax.ShapeDtypeStruct, sharding=everywhere)
        row = (shape((vocab,), jnp.int32), shape((vocab,), jnp.bool_), shape((vocab,), jnp.float32), shape((sampler.END_IDS,), jnp.int32))
        return seat_jit.lower(state, shape((), jnp.int32), *row).compile()

    def one_follow(drafter: DraftModel, bucket: Bucket) -> Any:
        return _lower_follow(drafter, slots, bucket).compile()

    buckets = table.buckets()
    jobs: dict[Any, Callable[[], Any]] = {b: partial(one_forward, b) for b in buckets}
    heights = {table.sample_rows(bucket) for bucket in buckets}
    jobs |= {(x, v): partial(one_sample, x, v) for x in sorted(heights) for v in sampler.VARIANTS}
    scored = heights | {b.prefill_rows * b.chunk_tokens for b in buckets if b.score}
    jobs |= {x: partial(one_score, x) for x in sorted(scored)}
    jobs["seat"] = one_seat
    if drafter is not None:
        jobs |= {("follow", b): partial(one_follow, drafter, b) for b in buckets}
    threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="compile")
    with threads, Progress(len(jobs), "programs", "compile") as progress:

        def run(key: Any) -> Any:
            made = shelf.get(str(key), jobs[key])
            progress.advance(1)
            return made

        done = dict(zip(jobs, threads.map(run, jobs), strict=True))
    return Programs(
        forward={key: made for key, made in done.items() if isinstance(key, Bucket)},
        sample={key: made for key, made in done.items() if isinstance(key, tuple) and key[0] != "follow"},
        score={key: made for key, made in done.items() if isinstance(key, int)},
        seat=done["seat"],
        follow={key[1]: made for key, made in done.items() if isinstance(key, tuple) and key[0] == "follow"},
        temp_bytes=max(made.memory_analysis().temp_size_in_bytes for made in done.values()),
    )


def _sample(state: SamplingState, logits_XV: jax.Array, draws: jax.Array, *, variant: Variant) -> tuple[Any, jax.Array, jax.Array]:
    """`sampler.sample`, its tokens once for `score` beside their logits and once for the host."""
    state, tokens_X = sampler.sample(state, logits_XV, draws, variant=variant)
    return state, tokens_X, tokens_X


def lower_forward(
    graphdef: Any,
    weights: Any,
    pool: KVPool,
    transit: Transit | None,
    slots: int,
    table: BucketTable,
    bucket: Bucket,
    layout: Layout,
    guesses: int = 0,
) -> Any:
    """The step program of one bucket, lowered for arguments that may be abstract. Donates: pool, transit. `guesses`: those of a draft model
    in each row; 0: there is none.

    It takes the weights as the tuple of their leaves: taking a Flax state apart in Python would cost every step a millisecond.
    """
    rows = table.sample_rows(bucket)
    specs = result_specs(pool, transit is not None, bucket.score)
    results = jax.tree.map(layout.sharding, specs, is_leaf=lambda node: isinstance(node, PartitionSpec))
    by_rows = layout.sharding(ROWS)
    last_tokens = jax.ShapeDtypeStruct((slots,), jnp.int32, sharding=by_rows)
    guessed = jax.ShapeDtypeStruct((slots, guesses), jnp.int32, sharding=by_rows) if guesses else None
    packed = jax.ShapeDtypeStruct((layout.data, layout.stages, inputs.size(bucket)), jnp.int32, sharding=layout.sharding(PACKED))
    leaves, structure = jax.tree.flatten(weights)

    def step(leaves: tuple[jax.Array, ...], *state: Any) -> Any:
        return forward(graphdef, jax.tree.unflatten(structure, leaves), *state, layout=layout, bucket=bucket, rows=rows)

    return jax.jit(step, donate_argnums=(1, 2), out_shardings=results).lower(tuple(leaves), pool, transit, last_tokens, guessed, packed)


def _lower_follow(drafter: DraftModel, slots: int, bucket: Bucket) -> Any:
    """The draft model's program of one bucket. Donates: its pool."""
    leaves, structure = jax.tree.flatten(drafter.state)

    def step(leaves: tuple[jax.Array, ...], pool: KVPool, *given: jax.Array) -> Any:
        weights = jax.tree.unflatten(structure, leaves)
        return follow(drafter.graphdef, weights, pool, *given, layout=drafter.layout, bucket=bucket, most=drafter.most)

    words = jax.ShapeDtypeStruct((1, 1, inputs.size(bucket)), jnp.int32)
    return jax.jit(step, donate_argnums=1).lower(tuple(leaves), drafter.pool, jax.ShapeDtypeStruct((slots,), jnp.int32), words)
