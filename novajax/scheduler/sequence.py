"""One request on its way through the engine: the state machine and the counters, all in tokens.

    tokens    prompt and output the host knows                     [0, len(tokens))
    computed  KV in place by committed plans                       [0, computed_tokens)
    planned   KV in place once all plans in flight are committed   [0, planned_tokens)

`pending` counts tokens that plans in flight will bring, so len(tokens) + pending tokens exist for the device. It knows
nothing of other sequences, of budgets or of time (moments come in as arguments).
"""

from enum import Enum
from typing import Literal

from novajax.core.errors import InternalError
from novajax.core.types import FinishReason, Request, Timing, TokenLogprobs, Usage
from novajax.kv.manager import Lease
from novajax.kv.prefix import Chain
from novajax.scheduler.lookup import Lookup
from novajax.scheduler.plan import ON_DEVICE, Draw, Seat
from novajax.scheduler.record import Record


class State(Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    ABORTED = "aborted"


_MOVES = {
    State.WAITING: (State.PREFILL, State.FINISHED, State.ABORTED),
    State.PREFILL: (State.DECODE, State.PREEMPTED, State.FINISHED, State.ABORTED),
    State.DECODE: (State.PREEMPTED, State.FINISHED, State.ABORTED),
    State.PREEMPTED: (State.PREFILL, State.FINISHED, State.ABORTED),
    State.FINISHED: (),
    State.ABORTED: (),
}


class Sequence:
    """See the module docstring. Fields are written by the scheduler alone."""

    def __init__(
        self, request: Request, *, number: int, seed: int, max_tokens: int, end_token_ids: tuple[int, ...], chain: Chain, arrival_s: float
    ):
        sampling = request.sampling
        self.request = request
        self.number = number  # order of arrival
        self.max_tokens = max_tokens
        self.prompt_tokens = len(request.prompt)
        self.tokens = [*request.prompt, *request.resumed]  # as after a preemption
        self.chain = chain
        self.ends = frozenset(sampling.stop_token_ids) | frozenset(() if sampling.ignore_eos else end_token_ids)
        self.state = State.WAITING
        self.slot = -1
        self.lease: Lease | None = None
        self.rank = 0
        self.queued_at_plan = 0
        self.waited_plans = 0
        self.leaving = False  # gives up its slot and pages as soon as no plan in flight holds it
        self.in_flight = 0
        self.pending = 0
        self.planned_in = -1  # number of the plan with its last row
        self.computed_tokens = 0
        self.planned_tokens = 0
        self.prefill_tokens = 0  # where prefill ends and decode begins
        self.cached_tokens: int | None = None
        self.to_score = sampling.prompt_logprobs is not None
        self.scores: list[TokenLogprobs | None] = [None]
        self.preemptions = 0
        self.lookup = Lookup()
        self.record = Record()
        self.drafted = 0  # guesses in its row in flight
        self.arrival_s = arrival_s
        self.admitted_s: float | None = None
        self.first_token_s: float | None = None
        penalties = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty
        banned_first = sampling.min_tokens > 0 and len(self.ends) > 0
        self.draw = Draw(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            seed=seed,
            logprobs=-1 if sampling.logprobs is None else sampling.logprobs,
            prompt_logprobs=-1 if sampling.prompt_logprobs is None else sampling.prompt_logprobs,
            seated=penalties != (0.0, 0.0, 1.0) or bool(sampling.logit_bias) or banned_first,
        )

    def move(self, state: State) -> None:
        """The only way to change state. Raises InternalError for a move the machine does not have."""
        if state not in _MOVES[self.state]:
            raise InternalError(f"a sequence cannot go from {self.state.value} to {state.value}")
        self.state = state

    @property
    def phase(self) -> Literal["queued", "prefill", "decode"]:
        """How far it ever came; a preempted one keeps its phase."""
        return "queued" if self.admitted_s is None else "prefill" if self.first_token_s is None else "decode"

    @property
    def running(self) -> bool:
        return self.state is State.PREFILL or self.state is State.DECODE

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def existing_tokens(self) -> int:
        """Tokens the device will know once the plans in flight are done."""
        return len(self.tokens) + self.pending

    @property
    def exhausted(self) -> bool:
        """Every token it may have exists or is on its way."""
        return self.existing_tokens - self.prompt_tokens >= self.max_tokens

    @property
    def ends_banned(self) -> int:
        """How many of the next tokens to be planned may not be an end."""
        return max(0, self.request.sampling.min_tokens - (self.existing_tokens - self.prompt_tokens)) if self.ends else 0

    def input_at(self, position: int) -> int:
        return self.tokens[position] if position < len(self.tokens) else ON_DEVICE

    def seat(self) -> Seat:
        sampling, prompt = self.request.sampling, self.prompt_tokens
        bias = dict(sorted(sampling.logit_bias.items()))
        return Seat(self.slot, self.request.prompt, tuple(self.tokens[prompt:]), bias, tuple(sorted(self.ends)))

    def admit(self, slot: int, lease: Lease, prefill_tokens: int, plan_number: int, now_s: float) -> None:
        """Takes a slot and pages; prefill goes up to `prefill_tokens`."""
        self.move(State.PREFILL)
        self.slot, self.lease, self.prefill_tokens = slot, lease, prefill_tokens
        self.computed_tokens = self.planned_tokens = lease.cached_tokens
        self.waited_plans += plan_number - self.queued_at_plan
        if self.cached_tokens is None:
            self.cached_tokens, self.admitted_s = lease.cached_tokens, now_s

    def vacate(self) -> None:
        """Has no slot and pages any more. If it ran it is preempted: everything is computed again later."""
        self.slot, self.lease, self.leaving = -1, None, False
        if not self.running:
            return
        self.move(State.PREEMPTED)
        self.computed_tokens = self.planned_tokens = 0
        self.preemptions += 1
        if self.to_score:
            self.scores = [None]

    def take_scores(self) -> tuple[TokenLogprobs | None, ...] | None:
        """The prompt's scores when they are complete, once."""
        if not self.to_score or len(self.scores) < self.prompt_tokens:
            return None
        self.to_score = False
        return tuple(self.scores)

    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, self.output_tokens, self.cached_tokens or 0)

    def timing(self, now_s: float) -> Timing:
        admitted, first = self.admitted_s, self.first_token_s
        return Timing(
            queued_s=(now_s if admitted is None else admitted) - self.arrival_s,
            prefill_s=None if admitted is None or first is None else first - admitted,
            decode_s=None if first is None else now_s - first,
            preemptions=self.preemptions,
        )

    def can_take(self, drawn: tuple[int, ...], last: bool, vocab_size: int) -> bool:
        """Whether a row could have drawn these tokens: one if it is the last known one, and one more for each right guess."""
        return last <= len(drawn) <= last + self.drafted and all(0 <= token < vocab_size for token in drawn)

    def land(self, end: int, drawn: tuple[int, ...]) -> tuple[FinishReason | None, int]:
        """A row is back: KV is in place up to `end` and for the right guesses behind it, and these tokens were drawn. Returns why the
        sequence ends, if it does, and how many of them are its output: not one that stops it, and none behind its end."""
        reason, taken, known = None, 0, len(self.tokens)
        for token in drawn:
            reason = self.stop_reason(token)
            if reason == "stop":
                break
            self.tokens.append(token)
            taken += 1
            if reason is not None:
                break
        self.computed_tokens = end
        if self.drafted:
            self.computed_tokens = self.planned_tokens = min(end + len(drawn) - 1, known + taken)
            self.record.landed(self.drafted, len(drawn) - 1)
            self.drafted = 0
        return reason, taken

    def stop_reason(self, token: int) -> FinishReason | None:
        """Why the sequence would end with this token, before it is appended."""
        count = self.output_tokens
        if token in self.ends and count >= self.request.sampling.min_tokens:
            return "stop"
        return "length" if count + 1 >= self.max_tokens else None
