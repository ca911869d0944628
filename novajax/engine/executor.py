"""Owns everything on the device: weights, KV pool, sampling state and the compiled programs. Runs plans in order.

`dispatch` uploads one array, enqueues the step and its draw, and starts the copy home; `collect` waits for that copy. It
never decides anything: plans come from the scheduler, shapes from the table.
"""

from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import jax
import msgspec
import numpy as np

from novajax.core.types import TokenLogprobs
from novajax.engine import inputs
from novajax.engine.buckets import Bucket, BucketTable
from novajax.engine.compiler import Programs
from novajax.engine.drafter import DraftModel
from novajax.engine.layout import EVERYWHERE, PACKED, Layout
from novajax.engine.sampler import END_IDS, GREEDY_BELOW, WRONG_GUESS, SamplingState, Variant
from novajax.engine.step import Stepped, Transit
from novajax.kv.pool import KVPool
from novajax.scheduler.plan import DecodeRow, Draw, PrefillRow, Seat, StepPlan, TokenResult, by_partition


class Pending(msgspec.Struct, frozen=True):
    """A plan that left the pipeline: device arrays on their way home."""

    plan: StepPlan
    bucket: Bucket
    tokens_X: jax.Array
    scores: tuple[jax.Array, ...] | None
    prompt_scores: tuple[jax.Array, ...] | None


class StepResult(msgspec.Struct, frozen=True):
    """What a step brought home, by slot."""

    number: int
    tokens: dict[int, TokenResult]
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    """For scoring rows: one entry per chunk token, about the token that FOLLOWS it."""


class Executor:
    """See the module docstring. Not thread-safe: one loop owns it.

    In a group of processes each has one, with its part of every array; all are given the same plans in the same order.
    """

    def __init__(
        self,
        weights: Any,
        pool: KVPool,
        transit: Transit | None,
        state: SamplingState,
        table: BucketTable,
        programs: Programs,
        layout: Layout,
        drafter: DraftModel | None = None,
    ):
        self._weights = tuple(jax.tree.leaves(weights))
        self._pool = pool
        self._transit = transit
        self._state = state
        self._table = table
        self._programs = programs
        self._layout = layout
        self._draft_weights = () if drafter is None else tuple(jax.tree.leaves(drafter.state))
        self._draft_pool = None if drafter is None else drafter.pool
        self._slots = state.last_tokens.shape[0] // layout.data
        self._vocab = state.counts.shape[1]
        self._inside: deque[StepPlan | None] = deque([None] * layout.stages, maxlen=layout.stages)
        """The plan at each stage, the newest first; None: nothing yet."""

    def warm(self) -> None:
        """Runs every program on padding, so that nothing is loaded or initialised under a request."""
        sampled: set[int] = set()
        for bucket, forward in self._programs.forward.items():
            stepped = self._forward(forward, bucket)
            height = stepped.logits.shape[0] // self._layout.data
            for (rows, _), sample in self._programs.sample.items():
                if rows == height and height not in sampled:
                    self._state, tokens_X, _ = sample(self._state, stepped.logits, stepped.draws)
                    jax.block_until_ready(self._score(stepped.logits, tokens_X))
            sampled.add(height)
            if stepped.scored is not None:
                jax.block_until_ready(self._score(*stepped.scored))
        self._sit(Seat(slot=0, prompt=(), output=(), logit_bias={}, ends=()))

    def dispatch(self, plan: StepPlan) -> Pending | None:
        """Enqueues one plan and returns at once, with the plan that leaves the pipeline; None if that is a bubble, or none yet."""
        for seat in plan.seats:
            self._sit(seat)
        self._inside.appendleft(plan)
        bucket = self._bucket()
        stepped = self._forward(self._programs.forward[bucket], bucket)
        leaving = self._inside[-1]
        if leaving is None or leaving.bubble:
            return None
        drawing = [row.draw for row in (*leaving.decode, *leaving.prefill) if row.last]
        sample = self._programs.sample[stepped.logits.shape[0] // self._layout.data, _variant(drawing)]
        self._state, drawn_X, tokens_X = sample(self._state, stepped.logits, stepped.draws)
        scores = self._score(stepped.logits, drawn_X) if any(d.logprobs >= 0 for d in drawing) else None
        scoring = stepped.scored is not None and any(row.score for row in leaving.prefill)
        prompt_scores = self._score(*stepped.scored) if stepped.scored is not None and scoring else None
        for array in (tokens_X, *(scores or ()), *(prompt_scores or ())):
            array.copy_to_host_async()
        return Pending(leaving, bucket, tokens_X, scores, prompt_scores)

    def collect(self, pending: Pending) -> StepResult:
        """Waits for a dispatched step and takes its results apart."""
        bucket, plan, partitions = pending.bucket, pending.plan, self._layout.data
        tokens = np.asarray(pending.tokens_X)
        height = len(tokens) // partitions
        scores = None if pending.scores is None else [np.asarray(a) for a in pending.scores]
        prompt_scores = None if pending.prompt_scores is None else [np.asarray(a) for a in pending.prompt_scores]
        results, prompt_logprobs = {}, {}
        decode = by_partition(plan.decode, self._slots, partitions)
        prefill = by_partition(plan.prefill, self._slots, partitions)
        for partition in range(partitions):
            first = partition * height
            rows = [(first + i * (1 + bucket.drafts), 1 + len(row.drafts), row) for i, row in enumerate(decode[partition])]
            rows += [(first + bucket.decode_tokens + i, 1, row) for i, row in enumerate(prefill[partition])]
            for at, most, row in rows:
                if row.last:
                    drawn = tuple(takewhile(lambda token: token != WRONG_GUESS, tokens[at : at + most].tolist()))
                    wanted = () if scores is None or row.draw.logprobs < 0 else enumerate(drawn, start=at)
                    logprobs = tuple(_logprobs(token, x, scores or [], row.draw.logprobs) for x, token in wanted)
                    results[row.slot] = TokenResult(drawn, logprobs)
            for r, row in enumerate(prefill[partition] if prompt_scores is not None else ()):
                first = (partition * bucket.prefill_rows + r) * bucket.chunk_tokens
                followers = enumerate((*row.tokens[1:], row.following), start=first) if row.score else ()
                prompt_logprobs[row.slot] = [
                    _logprobs(token, at, prompt_scores or [], row.draw.prompt_logprobs) for at, token in followers if token >= 0
                ]
        return StepResult(plan.number, results, prompt_logprobs)

    def close(self) -> None:
        """Frees the device memory."""
        for array in jax.tree.leaves((self._weights, self._pool, self._transit, self._state, self._draft_weights, self._draft_pool)):
            array.delete()

    def _bucket(self) -> Bucket:
        """The shape that holds every plan in the pipeline."""
        inside = [plan for plan in self._inside if plan is not None]
        rows = [(plan, (*plan.decode, *plan.prefill)) for plan in inside]
        return self._table.choose(
            max(_height(plan.decode, self._slots, self._layout.data) for plan in inside),
            max((plan.prefill_shape for plan in inside if plan.prefill_shape), default=None),
            max((len(row.pages) for _, of in rows for row in of), default=1),
            any(row.score for plan in inside for row in plan.prefill),
            max((len(row.drafts) for plan in inside for row in plan.decode), default=0),
        )

    def _score(self, logits_XV: jax.Array, tokens_X: jax.Array) -> tuple[jax.Array, ...]:
        return self._programs.score[logits_XV.shape[0] // self._layout.data](logits_XV, tokens_X)

    def _forward(self, forward: Any, bucket: Bucket) -> Stepped:
        packed = np.stack([inputs.pack(plan, bucket, self._layout.data, self._slots) for plan in self._inside], axis=1)
        upload, last_tokens, guesses = self._layout.upload(packed, PACKED), self._state.last_tokens, None
        if self._programs.follow:
            self._draft_pool, guesses = self._programs.follow[bucket](self._draft_weights, self._draft_pool, last_tokens, upload)
        stepped = forward(self._weights, self._pool, self._transit, last_tokens, guesses, upload)
        self._pool, self._transit = stepped.pool, stepped.transit
        return stepped

    def _sit(self, seat: Seat) -> None:
        counts = np.bincount(np.asarray(seat.output, np.int64), minlength=self._vocab).astype(np.int32)
        seen = np.zeros(self._vocab, np.bool_)
        seen[list(seat.prompt)] = True
        bias = np.zeros(self._vocab, np.float32)
        for token, value in seat.logit_bias.items():
            bias[token] = value
        ends = np.full(END_IDS, self._vocab, np.int32)
        ends[: len(seat.ends)] = seat.ends
        arrays = (np.int32(seat.slot), counts, seen, bias, ends)
        self._state = self._programs.seat(self._state, *(self._layout.upload(np.asarray(array), EVERYWHERE) for array in arrays))


def _height(rows: Sequence[DecodeRow | PrefillRow], slots: int, partitions: int) -> int:
    """Rows of the fullest partition."""
    if partitions == 1:
        return len(rows)
    return int(np.bincount([row.slot // slots for row in rows], minlength=1).max())


def _variant(draws: list[Draw]) -> Variant:
    if any(draw.seated for draw in draws):
        return "full"
    return "draw" if any(draw.temperature > GREEDY_BELOW for draw in draws) else "greedy"


def _logprobs(token: int, x: int, arrays: list[np.ndarray], alternatives: int) -> TokenLogprobs:
    chosen, rank, ids, values = arrays
    top = tuple((int(i), float(v)) for i, v in zip(ids[x, :alternatives], values[x, :alternatives], strict=True))
    return TokenLogprobs(token, float(chosen[x]), int(rank[x]), top)
