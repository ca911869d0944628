"""Decides when steps carry guesses, and learns from their results: how many prove right, and what a step with guesses costs.

A step with guesses computes them beside each row's token and may bring one token more for each; nothing can be planned beside it, since
how far it gets is known at its end only. So guesses are worth their while when the tokens they are expected to bring, by each
sequence's own record, outweigh the time such steps took, beside that of steps without. Both are measured all the time, so guesses
stop where they do not pay: at high load, with a model that computes more than it reads, with text that does not repeat.
"""

import statistics
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Listed
from typing import Literal

from novajax.scheduler.budget import Shapes
from novajax.scheduler.partition import Partition
from novajax.scheduler.plan import ON_DEVICE
from novajax.scheduler.sequence import Sequence, State

Guesses = Mapping[Sequence, tuple[int, ...]]
Drafter = Literal["lookup", "draft"]
"""Who guesses: the sequence's own tokens, or a draft model."""
MARGIN = 1.05
"""How much better steps with guesses must look than steps without."""
SAMPLES = 9
"""Step times that a median is of."""
STALE_PLANS = 1000
"""Plans after which a shape's times are forgotten, so that they are measured again."""
PLAIN_RUN = 4
"""Steps without guesses in a row when theirs have to be measured."""


class Speculation:
    """See the module docstring. Times are those of the scheduler's caller, in seconds."""

    def __init__(self, drafter: Drafter, shapes: Shapes):
        self._drafter = drafter
        self._shapes = shapes
        self._times: dict[tuple[int, bool], deque[float]] = {}
        """By decode rows of the step, and whether it has guesses."""
        self._timed_in: dict[tuple[int, bool], int] = {}
        self._planned: deque[tuple[int, tuple[int, bool] | None]] = deque()
        self._last: tuple[int, tuple[int, bool] | None, float] = (-2, None, 0.0)
        """The plan committed last: number, kind, when."""
        self._plain_left = 0
        self.drafting = False
        """Whether a plan with guesses is uncommitted."""

    def guess(self, partitions: Listed[Partition], number: int) -> Guesses:
        """Guesses for the sequences of plan `number`; none if they would not pay, or some prompts are not done.

        For tokens that are still on their way it guesses too: who plans then should wait for them and ask again.
        """
        most = max(len(partition.running) for partition in partitions)
        shape = self._shapes.drafting(most)
        running = [sequence for partition in partitions for sequence in partition.running]
        if not shape[1] or any(sequence.state is not State.DECODE for sequence in running):
            return {}
        rows = [sequence for sequence in running if not sequence.leaving and not sequence.exhausted]
        found: dict[Sequence, tuple[int, ...]] = {}
        gain = 0.0
        for sequence in rows:
            count = min(shape[1], sequence.max_tokens - sequence.output_tokens - sequence.pending - 1)
            if count > 0 and (guesses := self._guesses(sequence, count)):
                found[sequence] = guesses
                gain += sequence.record.expected(len(guesses))
        if not found or self._unmeasured(plain := (self._shapes.decode_rows(most), False), number):
            return {}
        plain_s = statistics.median(self._times[plain])
        drafted_s = plain_s if self._stale((shape[0], True), number) else statistics.median(self._times[shape[0], True])
        if (len(rows) + gain) * plain_s >= MARGIN * len(rows) * drafted_s:
            return found
        for sequence in found:
            sequence.record.fade()
        return {}

    def planned(self, number: int, decode_rows: int, *, drafting: bool, prefill: bool) -> None:
        """Plan `number` has that decode block, with guesses or without, and maybe a prefill block."""
        self._planned.append((number, None if prefill else (decode_rows, drafting)))
        self.drafting = drafting
        self._plain_left -= not drafting and not prefill

    def committed(self, number: int, now_s: float) -> None:
        """The results of plan `number`, the oldest one, are there."""
        _, kind = self._planned.popleft()
        before, kind_before, then_s = self._last
        self._last = (number, kind, now_s)
        if kind is None:
            return
        drafted = kind[1]
        self.drafting = self.drafting and not drafted
        # A step without guesses runs while the one before it is committed, if that has none either.
        if before + 1 == number and (drafted or kind_before == kind):
            self._times.setdefault(kind, deque(maxlen=SAMPLES)).append(now_s - then_s)
            self._timed_in[kind] = number

    def _guesses(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        if self._drafter == "draft":
            return (ON_DEVICE,) * count
        return sequence.lookup.guess(sequence.tokens, count + sequence.pending)[sequence.pending :]

    def _unmeasured(self, plain: tuple[int, bool], number: int) -> bool:
        """Whether steps without guesses must come first, to be timed."""
        if self._stale(plain, number) and self._plain_left <= 0:
            self._plain_left = PLAIN_RUN
        return self._plain_left > 0 or plain not in self._times

    def _stale(self, kind: tuple[int, bool], number: int) -> bool:
        return number - self._timed_in.get(kind, -STALE_PLANS) >= STALE_PLANS
