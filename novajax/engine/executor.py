"""Owns everything on the device: weights, KV pool, sampling state and the compiled programs. Runs plans in order.

`dispatch` uploads one array, enqueues the step and its draw, and starts the copy home; `collect` waits for that copy. It
never decides anything: plans come from the scheduler, shapes from the table.
"""

from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from novajax.core.types import TokenLogprobs
from novajax.engine import inputs
from novajax.engine.buckets import Bucket, BucketTable
from novajax.engine.compiler import Programs, padding
from novajax.engine.sampler import END_IDS, GREEDY_BELOW, SamplingState, Variant
from novajax.kv.pool import KVPool
from novajax.scheduler.plan import Draw, Seat, StepPlan, TokenResult


class Pending(msgspec.Struct, frozen=True):
    """A dispatched step: device arrays on their way home."""

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
    """See the module docstring. Not thread-safe: one loop owns it."""

    def __init__(self, weights: Any, pool: KVPool, state: SamplingState, table: BucketTable, programs: Programs):
        self._weights = weights
        self._pool = pool
        self._state = state
        self._table = table
        self._programs = programs
        self._slots = state.last_tokens.shape[0]
        self._vocab = state.counts.shape[1]

    def warm(self) -> None:
        """Runs every program on padding, so that nothing is loaded or initialised under a request."""
        for bucket, forward in self._programs.forward.items():
            logits_XV, draws, scored = self._forward(forward, jnp.asarray(padding(bucket, self._slots)))
            for (rows, _), sample in self._programs.sample.items():
                if rows == logits_XV.shape[0]:
                    self._state, tokens_X = sample(self._state, logits_XV, draws)
                    jax.block_until_ready(self._score(logits_XV, tokens_X))
            if scored is not None:
                jax.block_until_ready(self._score(*scored))
        self._sit(Seat(slot=0, prompt=(), output=(), logit_bias={}, ends=()))

    def dispatch(self, plan: StepPlan) -> Pending:
        """Enqueues one plan. Returns at once; at most a few plans may be pending."""
        pages = max((len(row.pages) for row in (*plan.decode, *plan.prefill)), default=1)
        scoring = any(row.score for row in plan.prefill)
        bucket = self._table.choose(len(plan.decode), plan.prefill_shape, pages, scoring)
        for seat in plan.seats:
            self._sit(seat)
        packed = jnp.asarray(inputs.pack(plan, bucket, self._slots))
        logits_XV, draws, scored = self._forward(self._programs.forward[bucket], packed)
        drawing = [row.draw for row in (*plan.decode, *plan.prefill) if row.last]
        sample = self._programs.sample[logits_XV.shape[0], _variant(drawing)]
        self._state, tokens_X = sample(self._state, logits_XV, draws)
        scores = self._score(logits_XV, tokens_X) if any(d.logprobs >= 0 for d in drawing) else None
        prompt_scores = None if scored is None else self._score(*scored)
        for array in (tokens_X, *(scores or ()), *(prompt_scores or ())):
            array.copy_to_host_async()
        return Pending(plan, bucket, tokens_X, scores, prompt_scores)

    def collect(self, pending: Pending) -> StepResult:
        """Waits for a dispatched step and takes its results apart."""
        plan = pending.plan
        tokens = np.asarray(pending.tokens_X)
        scores = None if pending.scores is None else [np.asarray(a) for a in pending.scores]
        results = {}
        rows = [*enumerate(plan.decode), *enumerate(plan.prefill, start=pending.bucket.decode_rows)]
        for x, row in rows:
            if not row.last:
                continue
            token = int(tokens[x])
            logprobs = None if scores is None or row.draw.logprobs < 0 else _logprobs(token, x, scores, row.draw.logprobs)
            results[row.slot] = TokenResult(token, logprobs)
        prompt_logprobs = {}
        if pending.prompt_scores is not None:
            arrays = [np.asarray(a) for a in pending.prompt_scores]
            for row in plan.prefill:
                followers = (*row.tokens[1:], row.following)
                prompt_logprobs[row.slot] = [
                    _logprobs(token, x, arrays, row.draw.prompt_logprobs) for x, token in enumerate(followers) if token >= 0
                ]
        return StepResult(plan.number, results, prompt_logprobs)

    def close(self) -> None:
        """Frees the device memory."""
        for array in jax.tree.leaves((self._weights, self._pool, self._state)):
            array.delete()

    def _score(self, logits_XV: jax.Array, tokens_X: jax.Array) -> tuple[jax.Array, ...]:
        return self._programs.score[logits_XV.shape[0]](logits_XV, tokens_X)

    def _forward(self, forward: Any, packed: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        self._pool, logits_XV, draws, scored = forward(self._weights, self._pool, self._state.last_tokens, packed)
        return logits_XV, draws, scored

    def _sit(self, seat: Seat) -> None:
        counts = np.bincount(np.asarray(seat.output, np.int64), minlength=self._vocab).astype(np.int32)
        seen = np.zeros(self._vocab, np.bool_)
        seen[list(seat.prompt)] = True
        bias = np.zeros(self._vocab, np.float32)
        for token, value in seat.logit_bias.items():
            bias[token] = value
        ends = np.full(END_IDS, self._vocab, np.int32)
        ends[: len(seat.ends)] = seat.ends
        self._state = self._programs.seat(self._state, np.int32(seat.slot), counts, seen, bias, ends)


def _variant(draws: list[Draw]) -> Variant:
    if any(draw.seated for draw in draws):
        return "full"
    return "draw" if any(draw.temperature > GREEDY_BELOW for draw in draws) else "greedy"


def _logprobs(token: int, x: int, arrays: list[np.ndarray], alternatives: int) -> TokenLogprobs:
    chosen, rank, ids, values = arrays
    top = tuple((int(i), float(v)) for i, v in zip(ids[x, :alternatives], values[x, :alternatives], strict=True))
    return TokenLogprobs(token, float(chosen[x]), int(rank[x]), top)
