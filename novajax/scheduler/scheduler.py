"""Continuous batching: which tokens of which sequences go into the next step, and what their results mean.

`plan` writes down integers, the device executes plans in order, `commit` takes the results in the same order. Up to
`limits.in_flight` plans may be uncommitted, so a decode row may be planned before its input token is known to the host. Each
data partition has its own slots and pages; they share the waiting queue and the shapes of a step.

Invariants
- Each sampled row yields exactly one token, so positions are known ahead; nothing is planned beyond max_tokens.
- A slot and its pages change owner only when no uncommitted plan names them: a late write lands on its own pages.
- Pages reach the prefix cache only after the plan that filled them was committed.
- Pages are taken only from juniors of the same partition (policy), so the most senior sequence there always gets on.
- An input that the host does not know was drawn at least `limits.stages` plans before (pipeline).
- A plan with guesses is alone in flight: only its results say where its sequences stand.
It knows no device, no text and no clock.
"""

import random
from collections.abc import Mapping
from collections.abc import Sequence as Listed

from novajax.core.errors import CapacityError, Conflict, InternalError
from novajax.core.types import Failure, FinishReason, Request, TokenLogprobs, Update
from novajax.kv.manager import KVManager, Lease
from novajax.scheduler import admission, placement, policy, prompts
from novajax.scheduler.admission import Limits
from novajax.scheduler.budget import Shapes
from novajax.scheduler.partition import Partition, deal, totals
from novajax.scheduler.pipeline import Pipeline, Row, share
from novajax.scheduler.plan import DecodeRow, PrefillRow, Seat, StepPlan, TokenResult
from novajax.scheduler.sequence import Sequence, State
from novajax.scheduler.speculation import Drafter, Guesses, Speculation
from novajax.scheduler.waiting import WaitingQueue

_COUNTED = (
    *("prompt_tokens", "generation_tokens", "drafted_tokens", "accepted_tokens", "preemptions", "steps"),
    *("aborted_queued", "aborted_prefill", "aborted_decode"),
)


class Scheduler:
    """See the module docstring. One thread calls it."""

    def __init__(
        self,
        limits: Limits,
        shapes: Shapes,
        kvs: Listed[KVManager],
        *,
        end_token_ids: tuple[int, ...] = (),
        seeds: random.Random | None = None,
        drafter: Drafter = "lookup",
    ):
        """`kvs`: the pages of each data partition, made with one key; slots are dealt out to them in equal runs. `seeds` draws a seed for
        each request that brings none; `drafter` guesses, where `shapes` have steps for that. Raises ConfigError for partitions that do not
        match and for a pipeline that cannot be filled, CapacityError if the decode block cannot hold its share of all slots."""
        self._limits = limits
        self._shapes = shapes
        self._end_token_ids = end_token_ids
        self._seeds = seeds if seeds is not None else random.SystemRandom()
        self._sequences: dict[str, Sequence] = {}
        self._waiting = WaitingQueue()
        self._partitions = deal(limits.max_sequences, kvs)
        self.slots_per_partition = limits.max_sequences // len(kvs)
        """A row's partition is its slot divided by this."""
        self._pipeline = Pipeline(limits.stages, limits.in_flight)
        if (most := -(-self.slots_per_partition // limits.stages)) > shapes.max_decode_rows:
            raise CapacityError(f"{most} sequences do not fit {shapes.max_decode_rows} decode rows")
        self._speculation = Speculation(drafter, shapes)
        self._news: list[Update] = []
        self._arrivals = 0
        self._scored_last = False
        self._counts: dict[str, int] = dict.fromkeys(_COUNTED, 0)

    # --- requests in and out

    def add(self, request: Request, now_s: float, *, retry_after_s: float = 1.0) -> None:
        """Queues a request. Raises InvalidRequest, Unsupported, ContextTooLong, Conflict (id in use) or Overloaded."""
        admission.check_tokens(request, self._limits, self._shapes)
        max_tokens = admission.resolve_max_tokens(request, self._limits, self._capacity_tokens)
        if request.id in self._sequences:
            raise Conflict("a request with this id is already running", param="id")
        free_slots = sum(partition.free_slots for partition in self._partitions)
        admission.check_queue(request, self._limits, len(self._waiting), self._waiting.tokens, free_slots, retry_after_s)
        seed = request.sampling.seed
        sequence = Sequence(
            request,
            number=self._arrivals,
            seed=self._seeds.getrandbits(53) if seed is None else seed,  # 53 bits survive JSON readers that use doubles
            max_tokens=max_tokens,
            end_token_ids=self._end_token_ids,
            chain=self._partitions[0].kv.chain(request.adapter, request.cache_salt),
            arrival_s=now_s,
        )
        self._arrivals += 1
        self._sequences[request.id] = sequence
        self._waiting.push(sequence, self._pipeline.next_number)

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
            self._home(sequence).kv.forget(sequence.lease)
        return self._finish(sequence, "error", now_s, failure=failure)

    def news(self) -> list[Update]:
        """Updates that no commit brings: of sequences that turned out to be impossible while planning. To be called after `plan`."""
        news, self._news = self._news, []
        return news

    # --- state

    @property
    def has_work(self) -> bool:
        """Whether anything waits, runs or is in flight."""
        return bool(self._sequences or len(self._pipeline))

    @property
    def in_flight(self) -> int:
        """Plans that are not committed."""
        return len(self._pipeline)

    def request_ids(self) -> list[str]:
        return list(self._sequences)

    def stats(self) -> dict[str, int]:
        """The fields of `core.types.Stats` that are known here, over all partitions. O(partitions)."""
        waiting = {"requests_waiting": len(self._waiting)}
        return self._counts | waiting | totals(self._partitions)

    def check(self) -> list[str]:
        """Recounts pages and slots, O(pages). Returns violations; they are counted, those of pages repaired, never raised."""
        return [violation for partition in self._partitions for violation in partition.check()]

    def _home(self, sequence: Sequence) -> Partition:
        """Of a sequence that has a slot."""
        return self._partitions[sequence.slot // self.slots_per_partition]

    @property
    def _capacity_tokens(self) -> int:
        """The longest sequence that fits in any partition when it is alone there."""
        return min(partition.kv.capacity_tokens for partition in self._partitions)

    # --- plan

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, or None: there is nothing to do now, or a result is to be committed first.

        Every plan must be executed, in order, and committed, in order, once its results exist; but a bubble, which comes when nothing
        can be planned and results are still inside the pipeline, is only executed.
        """
        if self._pipeline.full or self._speculation.drafting:
            return None
        guesses = {} if len(self._waiting) else self._speculation.guess(self._partitions, self._pipeline.next_number)
        if guesses and len(self._pipeline):
            return None  # they are made anew from the results
        rows: list[Row] = []
        decode = [self._plan_decode(partition, rows, guesses, now_s) for partition in self._partitions]
        most = max(map(len, decode))
        drafting = any(row.drafts for part in decode for row in part)
        decode_rows = self._shapes.drafting(most)[0] if drafting else self._shapes.decode_rows(most)
        prefill, seats, prefill_shape = [], [], None
        if not drafting:
            self._admit(now_s)
            prefill, seats, prefill_shape = self._plan_prefill(rows, decode_rows)
        if not rows and not self._pipeline.needs_push:
            return None
        number = self._pipeline.enter(rows)
        if not rows:
            return StepPlan(number, (), (), (), *self._shapes.bubble())
        self._speculation.planned(number, decode_rows, drafting=drafting, prefill=prefill_shape is not None)
        return StepPlan(number, tuple(row for part in decode for row in part), tuple(prefill), tuple(seats), decode_rows, prefill_shape)

    def _plan_decode(self, partition: Partition, rows: list[Row], guesses: Guesses, now_s: float) -> list[DecodeRow]:
        """Seniors first, so that a victim is never in this plan already; if some are left for later ticks, who waited longest first."""
        planned: list[DecodeRow] = []
        page_tokens = partition.kv.page_tokens
        decoding = [s for s in partition.running if s.state is State.DECODE and not s.leaving and not s.exhausted]
        waits = [self._pipeline.wait_ticks(sequence) for sequence in decoding]
        ready = [sequence for sequence, wait in zip(decoding, waits, strict=True) if wait == 0]
        most = share(waits, self._limits.stages)
        if most < len(ready):
            ready.sort(key=lambda sequence: sequence.planned_in)
        for sequence in ready:
            if len(planned) == most:
                break
            if sequence.state is not State.DECODE or sequence.leaving:  # a victim since
                continue
            position, lease = sequence.planned_tokens, sequence.lease
            if lease is None or (position >= len(lease.pages) * page_tokens and not self._grow(partition, sequence, lease, now_s)):
                continue
            last = position + 1 == sequence.existing_tokens
            token = sequence.input_at(position)
            drafts = guesses.get(sequence, ()) if last else ()
            if not partition.kv.extend(lease, position + 1 + len(drafts)):
                drafts = drafts[: len(lease.pages) * page_tokens - position - 1]  # nobody gives up pages for guesses
            banned = min(sequence.ends_banned, 1 + len(drafts))
            planned.append(DecodeRow(sequence.slot, position, lease.pages, sequence.draw, banned, token, last, drafts))
            sequence.drafted = len(drafts)
            self._launch(rows, sequence, position + 1, last, 0)
        return planned

    def _grow(self, partition: Partition, sequence: Sequence, lease: Lease, now_s: float) -> bool:
        """One more page, from juniors if need be. False: not in this plan."""
        while not partition.kv.extend(lease, sequence.planned_tokens + 1):
            if partition.leaving:
                return False  # their pages come free soon
            victim = policy.victim_for_growth(partition.running, sequence)
            if victim is None:
                # Alone, nothing on its way and still too large: pages were lost since it was added.
                if len(partition.running) == 1 and not sequence.in_flight:
                    self._news.append(self._impossible(sequence, now_s))
                return False
            self._displace(victim)
        return True

    def _admit(self, now_s: float) -> None:
        """Gives slots and pages to waiting sequences, as many as one step can prefill; who is next is never overtaken."""
        most = self._shapes.max_prefill_rows
        room = {partition: most - sum(s.state is State.PREFILL for s in partition.running) for partition in self._partitions}
        while open_partitions := [partition for partition in self._partitions if room[partition] > 0]:
            number = self._pipeline.next_number
            sequence = self._waiting.head(number, self._limits.age_plans)
            if sequence is None:
                return
            sequence.rank = policy.rank(sequence, number, self._limits.age_plans)
            place = self._place(sequence, open_partitions)
            if place is None:
                if len(self._pipeline) or any(partition.running or partition.leaving for partition in self._partitions):
                    return
                self._news.append(self._impossible(sequence, now_s))
                continue
            partition, lease = place
            self._waiting.remove(sequence)
            if sequence.cached_tokens is None:
                self._counts["prompt_tokens"] += sequence.prompt_tokens
            partition.admit(sequence, lease, placement.prefill_tokens(sequence, self._shapes), number, now_s)
            room[partition] -= 1

    def _place(self, sequence: Sequence, partitions: Listed[Partition]) -> tuple[Partition, Lease] | None:
        """Where it goes and its pages there. Preempts sequences of a lower class only if no partition has room as it is, and no
        others while somebody's room is about to come free."""
        ranked = placement.by_preference(partitions, sequence, self._shapes)
        for partition in ranked:
            if lease := placement.lease(partition, sequence, self._shapes):
                return partition, lease
        if any(partition.leaving for partition in self._partitions):
            return None
        for partition in ranked:
            if victims := placement.victims(partition, sequence):
                for victim in victims:
                    self._displace(victim)
                lease = None if partition.leaving else placement.lease(partition, sequence, self._shapes)
                return (partition, lease) if lease else None
        return None

    def _plan_prefill(self, rows: list[Row], decode_rows: int) -> tuple[list[PrefillRow], list[Seat], tuple[int, int] | None]:
        block = prompts.choose(self._partitions, self._shapes, decode_rows, scored_last=self._scored_last)
        if block is None:
            return [], [], self._shapes.prefill[0] if self._shapes.fixed else None
        self._scored_last = block.scoring
        planned, seats = [], []
        for sequence in block.sequences:
            lease, start = sequence.lease, sequence.planned_tokens
            if lease is None:
                raise InternalError("a sequence runs without pages")
            if start == lease.cached_tokens:
                seats += self._home(sequence).seat(sequence)
            end = min(start + block.shape[1], sequence.prefill_tokens)
            tokens = tuple(sequence.tokens[start:end])
            following = sequence.tokens[end] if end < len(sequence.tokens) else -1
            last = following < 0 < sequence.max_tokens
            banned = last and sequence.ends_banned > 0
            planned.append(PrefillRow(sequence.slot, start, tokens, lease.pages, last, block.scoring, following, sequence.draw, banned))
            self._launch(rows, sequence, end, last, len(tokens) - (following < 0) if block.scoring else 0)
            if end == sequence.prefill_tokens:
                sequence.move(State.DECODE)
        return planned, seats, block.shape

    def _launch(self, rows: list[Row], sequence: Sequence, end: int, last: bool, scores: int) -> None:
        rows.append((sequence, end, last, scores))
        sequence.planned_tokens = end
        sequence.planned_in = self._pipeline.next_number
        sequence.in_flight += 1
        sequence.pending += last

    # --- commit

    def commit(
        self, number: int, tokens: Mapping[int, TokenResult], prompt_logprobs: Mapping[int, Listed[TokenLogprobs]], now_s: float
    ) -> list[Update]:
        """Takes the results of the oldest uncommitted plan and returns what became known, in plan order.

        `tokens`: slot -> result of each row with `last`; `prompt_logprobs`: slot -> results of a row with `score`. Results of sequences
        that ended meanwhile are ignored; a missing or impossible result fails its own request. Raises InternalError out of order or
        before the results can exist.
        """
        rows = self._pipeline.leave(number)
        self._speculation.committed(number, now_s)
        self._counts["steps"] += 1
        updates = []
        for sequence, end, last, scores in rows:
            sequence.in_flight -= 1
            sequence.pending -= last
            if sequence.running:
                slot = sequence.slot
                update = self._land((sequence, end, last, scores), tokens.get(slot), prompt_logprobs.get(slot, ()), now_s)
                if update is not None:
                    updates.append(update)
            if sequence.leaving and self._home(sequence).settle(sequence):
                self._requeue(sequence)
        return updates

    def _land(self, row: Row, result: TokenResult | None, scored: Listed[TokenLogprobs], now_s: float) -> Update | None:
        sequence, end, last, scores = row
        drawn = result.tokens if last and result is not None else ()
        if not sequence.can_take(drawn, last, self._limits.vocab_size) or scores != len(scored):
            failure = InternalError("the step brought no usable result for this request").failure()
            return self.fail(sequence.request.id, failure, now_s)
        lease = sequence.lease
        if lease is None:
            raise InternalError("a sequence runs without pages")
        start = sequence.output_tokens
        self._counts["drafted_tokens"] += sequence.drafted
        self._counts["accepted_tokens"] += len(drawn) - 1 if sequence.drafted else 0
        reason, taken = sequence.land(end, drawn)
        self._counts["generation_tokens"] += taken
        end, kv = sequence.computed_tokens, self._home(sequence).kv
        if end // kv.page_tokens > lease.committed_pages:
            # With fixed shapes only prompt pages are shared: the output was computed one by one, a prompt is computed in chunks.
            kv.commit(lease, sequence.tokens, min(end, sequence.prompt_tokens) if self._shapes.fixed else end)
        if scores:
            sequence.scores.extend(scored)
        if result is None or not drawn:
            return self._finish(sequence, "length", now_s) if sequence.max_tokens == 0 and end == sequence.prompt_tokens else None
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
        news = {"start": start, "tokens": drawn[:taken], "logprobs": result.logprobs[:taken]}
        if reason is not None:
            return self._finish(sequence, reason, now_s, stop_token=drawn[taken] if reason == "stop" else None, **news)
        return Update(request_id=sequence.request.id, prompt_logprobs=sequence.take_scores(), **news)

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
        if reason == "abort":
            self._counts[f"aborted_{sequence.phase}"] += 1
        if sequence.slot >= 0:
            self._home(sequence).leave(sequence)
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
        if self._home(victim).leave(victim):
            self._requeue(victim)

    def _requeue(self, sequence: Sequence) -> None:
        self._counts["preemptions"] += 1
        self._waiting.push(sequence, self._pipeline.next_number)

    def _impossible(self, sequence: Sequence, now_s: float) -> Update:
        """Ends a sequence that can never be served: pages were lost after it was accepted."""
        needed, capacity = len(sequence.tokens), self._capacity_tokens
        error = CapacityError(f"{needed} tokens do not fit the {capacity} tokens of KV pages that are left")
        return self._finish(sequence, "error", now_s, failure=error.failure())
