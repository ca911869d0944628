"""Continuous batching: which tokens of which sequences go into the next step, and what their results mean.

`plan` writes down integers, the device executes plans in order, `commit` takes the results in the same order. Up to
`limits.in_flight` plans may be uncommitted, so a decode row may be planned before its input token is known to the host.

Invariants
- Each sampled row yields exactly one token, so positions are known ahead; nothing is planned beyond max_tokens.
- A slot and its pages change owner only when no uncommitted plan names them: a late write lands on its own pages.
- Pages reach the prefix cache only after the plan that filled them was committed.
- Pages are taken only from juniors (policy), so the most senior sequence always gets on.
It knows no device, no text and no clock.
"""

import random
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Listed

from novajax.core.errors import CapacityError, Conflict, InternalError
from novajax.core.types import Failure, FinishReason, Request, TokenLogprobs, Update
from novajax.kv.manager import KVManager, Lease
from novajax.scheduler import admission, policy
from novajax.scheduler.admission import Limits
from novajax.scheduler.budget import Shapes
from novajax.scheduler.plan import DecodeRow, PrefillRow, Seat, StepPlan, TokenResult
from novajax.scheduler.roster import Roster
from novajax.scheduler.sequence import Sequence, State
from novajax.scheduler.waiting import WaitingQueue

_Row = tuple[Sequence, int, bool, int]
"""(sequence, tokens computed once the row is committed, whether it samples, prompt scores it brings)."""


class Scheduler:
    """See the module docstring. One thread calls it."""

    def __init__(
        self, limits: Limits, shapes: Shapes, kv: KVManager, *, end_token_ids: tuple[int, ...] = (), seeds: random.Random | None = None
    ):
        """`seeds` draws a seed for each request that brings none. Raises CapacityError if the decode block cannot hold all slots."""
        if limits.max_sequences > shapes.max_decode_rows:
            raise CapacityError(f"{limits.max_sequences} sequences do not fit {shapes.max_decode_rows} decode rows")
        self._limits = limits
        self._shapes = shapes
        self._kv = kv
        self._end_token_ids = end_token_ids
        self._seeds = seeds if seeds is not None else random.SystemRandom()
        self._sequences: dict[str, Sequence] = {}
        self._waiting = WaitingQueue()
        self._roster = Roster(limits.max_sequences, kv)
        self._flights: deque[tuple[int, list[_Row]]] = deque()
        self._news: list[Update] = []
        self._arrivals = 0
        self._next_plan = 0
        self._scored_last = False
        self._cached_multiple = shapes.prefill[0][1] if shapes.fixed else 1
        self._counts = {"prompt_tokens": 0, "generation_tokens": 0, "preemptions": 0, "steps": 0}
        self._slot_violations = 0

    # --- requests in and out

    def add(self, request: Request, now_s: float, *, retry_after_s: float = 1.0) -> None:
        """Queues a request. Raises InvalidRequest, Unsupported, ContextTooLong, Conflict (id in use) or Overloaded."""
        admission.check_tokens(request, self._limits, self._shapes)
        max_tokens = admission.resolve_max_tokens(request, self._limits, self._kv.capacity_tokens)
        if request.id in self._sequences:
            raise Conflict("a request with this id is already running", param="id")
        admission.check_queue(request, self._limits, len(self._waiting), self._waiting.tokens, self._roster.free_slots, retry_after_s)
        seed = request.sampling.seed
        sequence = Sequence(
            request,
            number=self._arrivals,
            seed=self._seeds.getrandbits(53) if seed is None else seed,  # 53 bits survive JSON readers that use doubles
            max_tokens=max_tokens,
            end_token_ids=self._end_token_ids,
            chain=self._kv.chain(request.adapter, request.cache_salt),
            arrival_s=now_s,
        )
        self._arrivals += 1
        self._sequences[request.id] = sequence
        self._waiting.push(sequence, self._next_plan)

    def abort(self, request_id: str, now_s: float) -> Update | None:
        """Ends a request; returns its last update, None if there is no such request."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else self._finish(sequence, "abort", now_s)

    def fail(self, request_id: str, failure: Failure, now_s: float) -> Update | None:
        """Ends one request with finish_reason 'error' and takes back what it put into the prefix cache; the others go on."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        if sequence.lease is not None:
            self._kv.forget(sequence.lease)
        return self._finish(sequence, "error", now_s, failure=failure)

    def news(self) -> list[Update]:
        """Updates that no commit brings: of sequences that turned out to be impossible while planning. To be called after `plan`."""
        news, self._news = self._news, []
        return news

    # --- state

    @property
    def has_work(self) -> bool:
        """Whether anything waits, runs or is in flight."""
        return bool(self._sequences or self._flights)

    @property
    def in_flight(self) -> int:
        """Plans that are not committed."""
        return len(self._flights)

    def request_ids(self) -> list[str]:
        return list(self._sequences)

    def stats(self) -> dict[str, int]:
        """The fields of `core.types.Stats` that are known here. O(1)."""
        kv = self._kv
        return self._counts | {
            "requests_running": len(self._roster.running),
            "requests_waiting": len(self._waiting),
            "kv_pages_free": kv.free,
            "kv_pages_cached": kv.cached,
            "kv_pages_held": kv.held,
            "kv_pages_total": kv.total,
            "prefix_query_tokens": kv.query_tokens,
            "prefix_hit_tokens": kv.hit_tokens,
            "identity_violations": kv.violations + self._slot_violations,
        }

    def check(self) -> list[str]:
        """Recounts pages and slots, O(pages). Returns violations; they are counted and repaired, never raised."""
        slots = self._roster.violations()
        self._slot_violations += len(slots)
        return self._kv.check() + slots

    # --- plan

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, or None if there is nothing to do now or `in_flight` plans are uncommitted.

        Every plan must be executed and committed, in order.
        """
        if len(self._flights) >= self._limits.in_flight:
            return None
        rows: list[_Row] = []
        decode = self._plan_decode(rows, now_s)
        self._admit(now_s)
        decode_rows = self._shapes.decode_rows(len(decode))
        prefill, seats, prefill_shape = self._plan_prefill(rows, decode_rows)
        if not rows:
            return None
        number = self._next_plan
        self._next_plan += 1
        self._flights.append((number, rows))
        return StepPlan(number, tuple(decode), tuple(prefill), tuple(seats), decode_rows, prefill_shape)

    def _plan_decode(self, rows: list[_Row], now_s: float) -> list[DecodeRow]:
        planned = []
        page_tokens = self._kv.page_tokens
        for sequence in tuple(self._roster.running):  # seniors first, so that a victim is never in this plan already
            if sequence.state is not State.DECODE or sequence.leaving or sequence.exhausted:
                continue
            position, lease = sequence.planned_tokens, sequence.lease
            if lease is None or (position >= len(lease.pages) * page_tokens and not self._grow(sequence, lease, now_s)):
                continue
            last = position + 1 == sequence.existing_tokens
            token = sequence.input_at(position)
            planned.append(DecodeRow(sequence.slot, position, lease.pages, sequence.draw, sequence.ends_banned, token, last))
            self._launch(rows, sequence, position + 1, last, 0)
        return planned

    def _grow(self, sequence: Sequence, lease: Lease, now_s: float) -> bool:
        """One more page, from juniors if need be. False: not in this plan."""
        while not self._kv.extend(lease, sequence.planned_tokens + 1):
            if self._roster.leaving:
                return False  # their pages come free soon
            victim = policy.victim_for_growth(self._roster.running, sequence)
            if victim is None:
                if len(self._roster.running) == 1 and not self._flights:  # alone and still too large: pages were lost since it was added
                    self._news.append(self._impossible(sequence, now_s))
                return False
            self._displace(victim)
        return True

    def _admit(self, now_s: float) -> None:
        """Gives slots and pages to waiting sequences, as many as one step can prefill; who is next is never overtaken."""
        prefilling = sum(sequence.state is State.PREFILL for sequence in self._roster.running)
        while prefilling < self._shapes.max_prefill_rows:
            sequence = self._waiting.head(self._next_plan, self._limits.age_plans)
            if sequence is None:
                return
            sequence.rank = policy.rank(sequence, self._next_plan, self._limits.age_plans)
            lease = self._lease(sequence) or (self._lease(sequence) if self._make_room(sequence) else None)
            if lease is None:
                if self._roster.running or self._roster.leaving or self._flights:
                    return
                self._news.append(self._impossible(sequence, now_s))
                continue
            self._waiting.remove(sequence)
            if sequence.cached_tokens is None:
                self._counts["prompt_tokens"] += sequence.prompt_tokens
            self._roster.admit(sequence, lease, self._prefill_tokens(sequence), self._next_plan, now_s)
            prefilling += 1

    def _prefill_tokens(self, sequence: Sequence) -> int:
        """After a preemption the output is prefilled like a prompt; with fixed shapes it is replayed token by token, for the same bits."""
        return sequence.prompt_tokens if self._shapes.fixed else len(sequence.tokens)

    def _lease(self, sequence: Sequence) -> Lease | None:
        if not self._roster.free_slots:
            return None
        return self._kv.lease(
            sequence.tokens,
            sequence.chain,
            0 if sequence.to_score else self._prefill_tokens(sequence) - 1,
            cached_multiple=self._cached_multiple,
            spare_pages=len(self._roster.running),  # each may need a page soon: admitting now to preempt at once helps nobody
            counted=sequence.cached_tokens is None,
        )

    def _make_room(self, sequence: Sequence) -> bool:
        """Preempts sequences of a lower class if that can admit this one. True: worth another try at once."""
        victims = policy.victims_for_admission(self._roster.running, sequence)
        if self._roster.leaving or not victims:
            return False
        missing = self._kv.pages_for(len(sequence.tokens)) + len(self._roster.running) - self._kv.free - self._kv.cached
        if missing > sum(len(victim.lease.pages) for victim in victims if victim.lease):
            return False
        for victim in victims:
            missing -= len(victim.lease.pages) if victim.lease else 0
            self._displace(victim)
            if missing <= 0:
                break
        return not self._roster.leaving

    def _plan_prefill(self, rows: list[_Row], decode_rows: int) -> tuple[list[PrefillRow], list[Seat], tuple[int, int] | None]:
        ready = [sequence for sequence in self._roster.running if sequence.state is State.PREFILL and not sequence.leaving]
        if not ready:
            return [], [], self._shapes.prefill[0] if self._shapes.fixed else None
        plain = [sequence for sequence in ready if not sequence.to_score]
        # Scoring takes a step's whole prefill block; while others have prompts to compute, it takes every other one.
        scoring = not plain or (ready[0].to_score and not self._scored_last)
        self._scored_last = scoring
        if scoring and self._shapes.score is not None:
            chosen, shape = ready[:1], self._shapes.score
        else:
            shape = self._shapes.prefill_shape([sequence.prefill_tokens - sequence.planned_tokens for sequence in plain], decode_rows)
            chosen = plain[: shape[0]]
        planned, seats = [], []
        for sequence in chosen:
            lease, start = sequence.lease, sequence.planned_tokens
            if lease is None:
                raise InternalError("a sequence runs without pages")
            if start == lease.cached_tokens:
                seats += self._roster.seat(sequence)
            end = min(start + shape[1], sequence.prefill_tokens)
            tokens = tuple(sequence.tokens[start:end])
            following = sequence.tokens[end] if end < len(sequence.tokens) else -1
            last = following < 0 < sequence.max_tokens
            row = PrefillRow(
                sequence.slot, start, tokens, lease.pages, last, scoring, following, sequence.draw, last and sequence.ends_banned
            )
            planned.append(row)
            self._launch(rows, sequence, end, last, len(tokens) - (following < 0) if scoring else 0)
            if end == sequence.prefill_tokens:
                sequence.move(State.DECODE)
        return planned, seats, shape

    def _launch(self, rows: list[_Row], sequence: Sequence, end: int, last: bool, scores: int) -> None:
        rows.append((sequence, end, last, scores))
        sequence.planned_tokens = end
        sequence.in_flight += 1
        sequence.pending += last

    # --- commit

    def commit(
        self, number: int, tokens: Mapping[int, TokenResult], prompt_logprobs: Mapping[int, Listed[TokenLogprobs]], now_s: float
    ) -> list[Update]:
        """Takes the results of the oldest uncommitted plan and returns what became known, in plan order.

        `tokens`: slot -> result of each row with `last`; `prompt_logprobs`: slot -> results of a row with `score`. Results of sequences
        that ended meanwhile are ignored; a missing or impossible result fails its own request. Raises InternalError out of order.
        """
        if not self._flights or self._flights[0][0] != number:
            raise InternalError(f"plan {number} is not the oldest uncommitted plan")
        _, rows = self._flights.popleft()
        self._counts["steps"] += 1
        updates = []
        for sequence, end, last, scores in rows:
            sequence.in_flight -= 1
            sequence.pending -= last
            if sequence.running:
                slot = sequence.slot
                update = self._land(sequence, end, last, scores, tokens.get(slot), prompt_logprobs.get(slot, ()), now_s)
                if update is not None:
                    updates.append(update)
            if sequence.leaving and self._roster.settle(sequence):
                self._requeue(sequence)
        return updates

    def _land(
        self,
        sequence: Sequence,
        end: int,
        last: bool,
        scores: int,
        result: TokenResult | None,
        scored: Listed[TokenLogprobs],
        now_s: float,
    ) -> Update | None:
        if (last and (result is None or not 0 <= result.token < self._limits.vocab_size)) or scores != len(scored):
            failure = InternalError("the step brought no usable result for this request").failure()
            return self.fail(sequence.request.id, failure, now_s)
        lease = sequence.lease
        if lease is None:
            raise InternalError("a sequence runs without pages")
        sequence.computed_tokens = end
        if end // self._kv.page_tokens > lease.committed_pages:
            # With fixed shapes only prompt pages are shared: the output was computed one by one, a prompt is computed in chunks.
            self._kv.commit(lease, sequence.tokens, min(end, sequence.prompt_tokens) if self._shapes.fixed else end)
        if scores:
            sequence.scores.extend(scored)
        if not last or result is None:
            return self._finish(sequence, "length", now_s) if sequence.max_tokens == 0 and end == sequence.prompt_tokens else None
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
        token = result.token
        reason = sequence.stop_reason(token)
        if reason == "stop":
            return self._finish(sequence, reason, now_s, stop_token=token)
        start = sequence.output_tokens
        sequence.tokens.append(token)
        self._counts["generation_tokens"] += 1
        logprobs = () if result.logprobs is None else (result.logprobs,)
        if reason is not None:
            return self._finish(sequence, reason, now_s, start=start, tokens=(token,), logprobs=logprobs)
        prompt_scores = sequence.take_scores()
        return Update(request_id=sequence.request.id, start=start, tokens=(token,), logprobs=logprobs, prompt_logprobs=prompt_scores)

    # --- ends

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now_s: float,
        *,
        start: int | None = None,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        stop_token: int | None = None,
        failure: Failure | None = None,
    ) -> Update:
        del self._sequences[sequence.request.id]
        if sequence.slot < 0:
            self._waiting.remove(sequence)
        sequence.move(State.ABORTED if reason == "abort" else State.FINISHED)
        if sequence.slot >= 0:
            self._roster.leave(sequence)
        return Update(
            request_id=sequence.request.id,
            start=sequence.output_tokens if start is None else start,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=sequence.take_scores(),
            finish_reason=reason,
            stop_token=stop_token,
            failure=failure,
            usage=sequence.usage(),
            timing=sequence.timing(now_s),
            seed=sequence.draw.seed,
        )

    def _displace(self, victim: Sequence) -> None:
        """Preempts now, or as soon as the plans in flight that hold it are committed; it is not planned again until then."""
        if self._roster.leave(victim):
            self._requeue(victim)

    def _requeue(self, sequence: Sequence) -> None:
        self._counts["preemptions"] += 1
        self._waiting.push(sequence, self._next_plan)

    def _impossible(self, sequence: Sequence, now_s: float) -> Update:
        """Ends a sequence that can never be served: pages were lost after it was accepted."""
        needed, capacity = len(sequence.tokens), self._kv.capacity_tokens
        error = CapacityError(f"{needed} tokens do not fit the {capacity} tokens of KV pages that are left")
        return self._finish(sequence, "error", now_s, failure=error.failure())
