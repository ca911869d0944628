"""A world around one scheduler: a device that remembers what each page slot holds, and an oracle that knows every answer.

The device keeps, per (page, offset), a signature of ALL tokens up to that position (and the tenant), which is what real KV depends
on. Each row must find exactly its own sequence's signatures at the positions before it: page reuse, a stale prefix, a page
given away too early, a wrong position or a wrong device token all show at once. The next token is a function of that signature, so
the right output of each request is known in advance, whatever else happens to it.

The device may have data partitions (each with its own pages) and pipeline stages: then a drawn token can be read only `stages` plans later,
and a plan's results come only when that many ticks have passed.
"""

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from novajax.core.errors import NovaError
from novajax.core.types import Priority, Request, SamplingParams, TokenLogprobs, Update
from novajax.kv.manager import KVManager
from novajax.scheduler.admission import Limits
from novajax.scheduler.budget import Shapes
from novajax.scheduler.plan import ON_DEVICE, DecodeRow, PrefillRow, Seat, StepPlan, TokenResult, by_partition
from novajax.scheduler.scheduler import Scheduler
from novajax.scheduler.sequence import Sequence

VOCAB = 40
END = (1, 2)


def signature(previous: int, token: int) -> int:
    return hash((previous, token))


def signatures(request: Request, tokens: list[int]) -> list[int]:
    """After tokens[:i], for i = 0 .. len(tokens)."""
    found = [crc32(f"{request.cache_salt}|{request.adapter}".encode())]
    for token in tokens:
        found.append(signature(found[-1], token))
    return found


def draw_token(state: int, seed: int, banned: frozenset[int] = frozenset()) -> int:
    token = hash((state, seed)) % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    return token


def ends_of(request: Request) -> frozenset[int]:
    sampling = request.sampling
    return frozenset(sampling.stop_token_ids) | frozenset(() if sampling.ignore_eos else END)


@dataclass
class Answer:
    """What one request must get, and what it has got so far."""

    request: Request
    tokens: list[int]
    stop_token: int | None
    got: list[int] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    final: Update | None = None
    on_device: list[int] = field(default_factory=list)  # output the device has drawn, lost and drawn again after preemptions
    samples: list[int] = field(default_factory=list)  # positions whose logits were drawn from, in order
    chunks: list[tuple[int, int]] = field(default_factory=list)


def oracle(request: Request, max_tokens: int) -> Answer:
    sampling, ends = request.sampling, ends_of(request)
    state, output = signatures(request, list(request.prompt))[-1], []
    while len(output) < max_tokens:
        token = draw_token(state, sampling.seed or 0, ends if len(output) < sampling.min_tokens else frozenset())
        if token in ends and len(output) >= sampling.min_tokens:
            return Answer(request, output, token)
        output.append(token)
        state = signature(state, token)
    return Answer(request, output, None)


class World:
    """Drives the scheduler by hand: add, abort, fail, dispatch (plan and execute), collect (commit)."""

    def __init__(
        self,
        *,
        shapes: Shapes,
        pages=16,
        page_tokens=4,
        slots=3,
        in_flight=2,
        context=64,
        prefix_cache=True,
        partitions=1,
        stages=1,
        **limits,
    ):
        """`pages` and `slots` are those of each partition; `in_flight` is 1 for a synchronous device, whatever the stages."""
        self.kvs = [KVManager(pages, page_tokens, key=b"test", prefix_cache=prefix_cache) for _ in range(partitions)]
        self.kv = self.kvs[0]
        self.slots = slots
        self.stages = stages
        self.limits = Limits(
            vocab_size=VOCAB,
            max_context_tokens=context,
            max_sequences=slots * partitions,
            stages=stages,
            in_flight=stages - 1 + in_flight,
            **limits,
        )
        self.shapes = shapes
        self.scheduler = Scheduler(self.limits, shapes, self.kvs, end_token_ids=END, seeds=random.Random(0))
        self.rng = random.Random(1)
        if shapes.drafts:
            self.scheduler._speculation._guesses = self.guess
        self.context = min(context, pages * page_tokens)
        self.answers: dict[str, Answer] = {}
        self.refused = 0
        self.memory: dict[tuple[int, int, int], int] = {}  # by partition, page, place in the page
        self.made: dict[tuple[int, int, int], tuple[str, int]] = {}  # how each KV was computed: block and row in it
        self.drawn: dict[int, tuple[int, int]] = {}  # by slot: the number of the plan that drew its last token, and the token
        self.next_number = 0
        self.seats: dict[int, Seat] = {}
        self.seat_output: dict[int, list[int]] = {}
        self.uncommitted: deque[tuple[StepPlan, dict, dict]] = deque()
        self.now_s = 0.0
        self.plans: list[StepPlan] = []

    # --- requests

    def add(self, prompt, *, priority: Priority = "medium", salt="", adapter="", **sampling: Any) -> str | None:
        """The id of the request, None if it was refused. Seeds are unique: the device tells requests apart by them."""
        name = f"r{len(self.answers) + self.refused}"
        seed = 1000 + len(self.answers) + self.refused
        request = Request(
            id=name,
            prompt=tuple(prompt),
            sampling=SamplingParams(seed=seed, **sampling),
            priority=priority,
            cache_salt=salt,
            adapter=adapter,
        )
        wanted = request.sampling.max_tokens
        try:
            self.scheduler.add(request, self.now_s)
        except NovaError:
            self.refused += 1
            return None
        self.answers[name] = oracle(request, self.context - len(prompt) if wanted is None else wanted)
        return name

    def abort(self, name: str) -> None:
        update = self.scheduler.abort(name, self.now_s)
        assert (update is None) == (self.answers[name].final is not None)
        self.receive([update] if update else [])

    def fail(self, name: str) -> None:
        update = self.scheduler.fail(name, NovaError("told to fail").failure(), self.now_s)
        self.receive([update] if update else [])

    def guess(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        """What the sequence will say, for the most part."""
        said = sequence.output_tokens + sequence.pending
        right = [*self.answers[sequence.request.id].tokens, END[0]][said : said + count]
        return tuple(token if self.rng.random() < 0.8 else self.rng.randrange(VOCAB) for token in right)

    # --- the device

    def dispatch(self) -> StepPlan | None:
        """Plans a step and executes it at once; its results wait for `collect`."""
        self.now_s += 1
        plan = self.scheduler.plan(self.now_s)
        self.receive(self.scheduler.news())
        oldest = self.uncommitted[0][0].number if self.uncommitted else None
        if plan is None:
            assert oldest is None or oldest <= self.next_number - self.stages, "a result is in the pipeline and nothing pushes it out"
            return None
        assert plan.number == self.next_number
        assert oldest is None or plan.number - oldest < self.limits.in_flight
        self.next_number += 1
        self.plans.append(plan)
        self.check_shape(plan)
        if plan.bubble:
            assert oldest is not None
            assert oldest > plan.number - self.stages, "a bubble, and a result to collect"
            return plan
        for seat in plan.seats:
            self.seats[seat.slot] = seat
            self.seat_output[seat.slot] = list(seat.output)
        results: dict[int, TokenResult] = {}
        scores: dict[int, list[TokenLogprobs]] = {}
        self.check_owners(plan)
        for row in plan.decode:
            self.execute_decode(plan.number, row, results)
        for row in plan.prefill:
            self.execute_prefill(plan.number, row, results, scores)
        self.uncommitted.append((plan, results, scores))
        return plan

    def collect(self) -> bool:
        """Commits the oldest plan, if its results exist."""
        if not self.uncommitted or self.uncommitted[0][0].number > self.next_number - self.stages:
            return False
        plan, results, scores = self.uncommitted.popleft()
        self.now_s += 1
        self.receive(self.scheduler.commit(plan.number, results, scores, self.now_s))
        return True

    def answer_of(self, row: DecodeRow | PrefillRow) -> Answer:
        return self.answers[f"r{row.draw.seed - 1000}"]

    def place(self, row: DecodeRow | PrefillRow, position: int) -> tuple[int, int, int]:
        size = self.kv.page_tokens
        return row.slot // self.slots, row.pages[position // size], position % size

    def read(self, row: DecodeRow | PrefillRow, tokens: list[int], start: int) -> list[int]:
        """Checks that the KV before `start` is the sequence's own; returns the signatures of all its tokens."""
        expected = signatures(self.answer_of(row).request, tokens)
        for position in range(start):
            place = self.place(row, position)
            assert self.memory.get(place) == expected[position + 1], f"{row} reads foreign KV at {position}"
            if self.shapes.fixed:  # then the bits must be the same too: each KV is computed in the same place of the same shape
                chunk, prompt = self.shapes.prefill[0][1], len(self.answer_of(row).request.prompt)
                made = ("prefill", position % chunk) if position < prompt else ("decode", 0)
                assert self.made[place] == made
        return expected

    def write(self, row: DecodeRow | PrefillRow, position: int, value: int) -> None:
        place = self.place(row, position)
        self.memory[place] = value
        self.made[place] = ("decode", 0) if isinstance(row, DecodeRow) else ("prefill", position - row.start)

    def execute_decode(self, number: int, row: DecodeRow, results: dict) -> None:
        answer = self.answer_of(row)
        drawn_in, token = self.drawn[row.slot] if row.input == ON_DEVICE else (number - self.stages, row.input)
        assert drawn_in + self.stages <= number, f"{row} wants a token that is still in the pipeline"
        tokens = list(answer.request.prompt) + answer.on_device
        assert tokens[row.position] == token, f"{row} gets token {token}"
        expected = self.read(row, tokens[: row.position + 1], row.position)
        self.write(row, row.position, expected[row.position + 1])
        assert row.last == (row.position + 1 == len(tokens))
        if row.last:
            self.sample(number, row, answer, expected[-1], row.position, results)
        state, right = expected[-1], True
        for j, guess in enumerate(row.drafts, start=1):
            state = signature(state, guess)
            self.write(row, row.position + j, state)
            right = right and guess == answer.on_device[-1]
            if right:
                self.sample(number, row, answer, state, row.position + j, results)

    def execute_prefill(self, number: int, row: PrefillRow, results: dict, scores: dict) -> None:
        answer = self.answer_of(row)
        tokens = list(answer.request.prompt) + answer.on_device
        end = row.start + len(row.tokens)
        assert list(row.tokens) == tokens[row.start : end]
        answer.chunks.append((row.start, end))
        expected = self.read(row, tokens[:end], row.start)
        for position in range(row.start, end):
            self.write(row, position, expected[position + 1])
        assert row.following == (tokens[end] if end < len(tokens) else -1)
        if row.score:
            targets = [*row.tokens[1:], *((row.following,) if row.following >= 0 else ())]
            scores[row.slot] = [TokenLogprobs(target, -float(row.start + i + 1), 1) for i, target in enumerate(targets)]
        if row.last:
            assert end == len(tokens)
            self.sample(number, row, answer, expected[-1], end - 1, results)

    def sample(self, number: int, row, answer: Answer, state: int, position: int, results: dict) -> None:
        sampling, count = answer.request.sampling, len(answer.on_device)
        assert position + 1 - len(answer.request.prompt) == count, "a token is drawn at the wrong position"
        assert count < len(answer.tokens) + 12 + self.limits.in_flight
        assert sampling.max_tokens is None or count < sampling.max_tokens, "a token beyond max_tokens is planned"
        assert len(answer.request.prompt) + count < self.context, "a token beyond the context is planned"
        ends = ends_of(answer.request)
        before = results[row.slot].tokens if row.slot in results else ()
        banned = count < sampling.min_tokens and bool(ends)
        assert (row.ban_ends > len(before)) == banned
        seat = self.seats.get(row.slot, Seat(row.slot, (), (), {}, ()))
        assert seat.logit_bias == sampling.logit_bias, "the slot has another owner's bias"
        assert not banned or set(seat.ends) == ends
        if row.draw.seated:
            assert seat.prompt == answer.request.prompt
            assert self.seat_output[row.slot] == answer.on_device, "the slot's penalties count another output"
        else:
            assert sampling.presence_penalty == 0
        token = draw_token(state, row.draw.seed, ends if banned else frozenset())
        answer.samples.append(position)
        answer.on_device.append(token)
        self.drawn[row.slot] = number, token
        if row.draw.seated:
            self.seat_output[row.slot].append(token)
        drawn = (*before, token)
        results[row.slot] = TokenResult(drawn, () if sampling.logprobs is None else tuple(TokenLogprobs(t, -1.0, 1) for t in drawn))

    # --- checks

    def check_shape(self, plan: StepPlan) -> None:
        decode = by_partition(plan.decode, self.slots, len(self.kvs))
        prefill = by_partition(plan.prefill, self.slots, len(self.kvs))
        assert len(decode) == len(prefill) == len(self.kvs), "a slot beyond the last partition"
        assert max(map(len, decode)) <= plan.decode_rows
        if most := max((len(row.drafts) for row in plan.decode), default=0):
            assert not self.uncommitted, "a plan with guesses is not alone"
            assert plan.prefill_shape is None
            assert (plan.decode_rows, max(most, self.shapes.drafting(plan.decode_rows)[1])) in self.shapes.drafts
        else:
            assert (plan.decode_rows, plan.prefill_shape) in self.shapes.buckets()
        for row in (*plan.decode, *plan.prefill):
            assert all(0 <= page < self.kv.total for page in row.pages)
        slots = [row.slot for row in (*plan.decode, *plan.prefill)]
        assert len(slots) == len(set(slots))
        assert (plan.prefill_shape is not None) >= bool(plan.prefill)
        rows, chunk = plan.prefill_shape or (0, 0)
        assert max(map(len, prefill)) <= rows
        assert all(1 <= len(row.tokens) <= chunk for row in plan.prefill)
        assert not any(row.score for row in plan.prefill) or (len(plan.prefill) == 1 and plan.prefill_shape == self.shapes.score)
        assert plan.decode_rows + rows * chunk <= self.shapes.step_tokens

    def check_owners(self, plan: StepPlan) -> None:
        """No page that one sequence writes is in the table of another one in any uncommitted plan; nothing cached is written."""
        size = self.kv.page_tokens
        writers: dict[tuple[int, int], int] = {}
        readers: dict[tuple[int, int], set[int]] = {}
        slots: dict[int, int] = {}
        for step in (*(step for step, _, _ in self.uncommitted), plan):
            for row in (*step.decode, *step.prefill):
                first = row.position if isinstance(row, DecodeRow) else row.start
                last = first + (len(row.drafts) if isinstance(row, DecodeRow) else len(row.tokens) - 1)
                partition = row.slot // self.slots
                assert last < len(row.pages) * size
                assert slots.setdefault(row.slot, row.draw.seed) == row.draw.seed, "a slot changed owner while in flight"
                for page in row.pages:
                    readers.setdefault((partition, page), set()).add(row.draw.seed)
                for page in row.pages[first // size : last // size + 1]:
                    assert writers.setdefault((partition, page), row.draw.seed) == row.draw.seed, f"page {page} has two writers"
                    if step is plan:
                        assert page not in self.kvs[partition]._cache, f"cached page {page} is written"
        for page, writer in writers.items():
            assert readers[page] == {writer}, f"page {page} is written by one sequence and read by another"

    def receive(self, updates: list[Update]) -> None:
        for update in updates:
            answer = self.answers[update.request_id]
            assert answer.final is None, "an update after the last one"
            assert update.start == len(answer.got)
            answer.got += update.tokens
            assert answer.got == answer.tokens[: len(answer.got)], f"{update.request_id} got a wrong token"
            sampling = answer.request.sampling
            assert len(update.logprobs) == (0 if sampling.logprobs is None else len(update.tokens))
            if update.prompt_logprobs is not None:
                assert answer.prompt_logprobs is None
                answer.prompt_logprobs = update.prompt_logprobs
            if update.tokens and sampling.prompt_logprobs is not None:
                assert answer.prompt_logprobs is not None, "prompt scores must come with the first tokens"
            if update.finish_reason is not None:
                self.check_final(answer, update)

    def check_final(self, answer: Answer, update: Update) -> None:
        answer.final = update
        prompt, sampling = answer.request.prompt, answer.request.sampling
        assert update.seed == sampling.seed
        assert update.usage is not None
        assert update.timing is not None
        assert update.usage.prompt_tokens == len(prompt)
        assert update.usage.completion_tokens == len(answer.got)
        assert update.usage.cached_tokens < len(prompt)
        assert update.timing.queued_s >= 0
        assert (update.failure is not None) == (update.finish_reason == "error")
        if update.finish_reason in ("stop", "length"):
            assert answer.got == answer.tokens
            assert update.stop_token == answer.stop_token
            assert (update.finish_reason == "stop") == (answer.stop_token is not None)
            if sampling.prompt_logprobs is not None:
                scored = tuple(TokenLogprobs(token, -float(i), 1) for i, token in enumerate(prompt) if i)
                assert answer.prompt_logprobs == (None, *scored)
                assert update.usage.cached_tokens == 0

    def check(self) -> None:
        assert self.scheduler.check() == []
        stats = self.scheduler.stats()
        known = stats["kv_pages_free"] + stats["kv_pages_cached"] + stats["kv_pages_held"]
        assert known + sum(kv.quarantined for kv in self.kvs) == stats["kv_pages_total"]

    def live(self) -> list[str]:
        return [name for name, answer in self.answers.items() if answer.final is None]

    def run(self, steps: int = 10_000) -> None:
        """Until nothing is left, as an engine loop does it: as many plans ahead as allowed, then the oldest result."""
        for _ in range(steps):
            while self.dispatch() is not None:
                pass
            if not self.collect():
                break
        assert not self.scheduler.has_work, f"stuck with {self.live()}"
        self.check()
        assert all(kv.held == 0 for kv in self.kvs)
        assert self.live() == []
