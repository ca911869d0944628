"""Owns the sequences that have no slot: a bounded queue of three classes, oldest first in each.

Bounds hold for arrivals only; a preempted sequence always finds its place again, by its arrival.
"""

from bisect import bisect_left, insort

from novajax.scheduler.policy import CLASSES, next_waiting
from novajax.scheduler.sequence import Sequence


def _number(sequence: Sequence) -> int:
    return sequence.number


class WaitingQueue:
    def __init__(self) -> None:
        self._classes: list[list[Sequence]] = [[] for _ in CLASSES]
        self.tokens = 0
        """Tokens to prefill in all waiting sequences, cached prefixes not known yet."""

    def __len__(self) -> int:
        return sum(map(len, self._classes))

    def __iter__(self):
        for members in self._classes:
            yield from members

    def push(self, sequence: Sequence, plan_number: int) -> None:
        sequence.queued_at_plan = plan_number
        self.tokens += len(sequence.tokens)
        insort(self._classes[CLASSES[sequence.request.priority]], sequence, key=_number)

    def remove(self, sequence: Sequence) -> None:
        members = self._classes[CLASSES[sequence.request.priority]]
        del members[bisect_left(members, sequence.number, key=_number)]
        self.tokens -= len(sequence.tokens)

    def head(self, plan_number: int, age_plans: int) -> Sequence | None:
        """Who is next. Only heads are compared: inside a class nobody overtakes."""
        heads = [members[0] for members in self._classes if members]
        return next_waiting(heads, plan_number, age_plans) if heads else None
