"""Owns the numbers of plans and what is inside the pipeline: which plans are uncommitted, and which results exist.

With p stages, plan n enters at tick n and its results exist after tick n + p - 1; a token drawn in plan m is on the device for plans
with numbers from m + p on. So one sequence draws at most every p ticks, and p microbatches take turns. A plan without rows (a
bubble) has a number, because it takes a tick, but brings nothing and is never uncommitted. p = 1 is a plain device.
"""

from collections import deque
from collections.abc import Sequence as Listed

from novajax.core.errors import ConfigError, InternalError
from novajax.scheduler.sequence import Sequence

Row = tuple[Sequence, int, bool, int]
"""(sequence, tokens computed once the row is committed, whether it samples, prompt scores it brings)."""


class Pipeline:
    """Raises ConfigError if fewer plans may be uncommitted than there are stages: no result would ever come out."""

    def __init__(self, stages: int, in_flight: int):
        if stages < 1 or in_flight < stages:
            raise ConfigError(f"in_flight={in_flight} plans cannot fill a pipeline of {stages} stages")
        self.stages = stages
        self.next_number = 0
        self._in_flight = in_flight
        self._flights: deque[tuple[int, list[Row]]] = deque()

    def __len__(self) -> int:
        """Plans that are not committed."""
        return len(self._flights)

    @property
    def full(self) -> bool:
        """The oldest uncommitted plan is as far back as it may be: nothing enters before it is committed."""
        return bool(self._flights) and self.next_number - self._flights[0][0] >= self._in_flight

    @property
    def needs_push(self) -> bool:
        """There are uncommitted plans, and not even the oldest one's results can exist before one more tick."""
        return bool(self._flights) and self._flights[0][0] > self.next_number - self.stages

    def enter(self, rows: list[Row]) -> int:
        """The number of the next plan. Its rows are uncommitted from now on; without rows it is a bubble."""
        number = self.next_number
        self.next_number += 1
        if rows:
            self._flights.append((number, rows))
        return number

    def leave(self, number: int) -> list[Row]:
        """The rows of the oldest uncommitted plan, which is committed now. Raises InternalError if that is not `number`."""
        if not self._flights or self._flights[0][0] != number:
            raise InternalError(f"plan {number} is not the oldest uncommitted plan")
        if self.needs_push:
            raise InternalError(f"plan {number} is still inside the pipeline")
        return self._flights.popleft()[1]

    def wait_ticks(self, sequence: Sequence) -> int:
        """Ticks until the next decode row of `sequence` may enter; 0: now.

        Only a draw lags: an input that the host knows (output replayed after a preemption) may follow the row before it at once.
        """
        if sequence.planned_tokens < len(sequence.tokens):
            return 0
        return max(0, sequence.planned_in + self.stages - self.next_number)


def share(waits_ticks: Listed[int], stages: int) -> int:
    """How many of the decoding sequences that wait 0 ticks go into this plan, given how long each one waits.

    Keeps the load of `stages` consecutive ticks even: never more than its share rounded up, and some are held back for the coming ticks
    that would get less than the share rounded down. So `stages` or more sequences that decode steadily leave no tick empty,
    and each decodes every `stages` ticks; fewer of them decode one a tick. One stage: all of them.
    """
    loads = [0] * stages
    for wait in waits_ticks:
        loads[wait] += 1
    least, most = len(waits_ticks) // stages, -(-len(waits_ticks) // stages)
    held_back = sum(max(0, least - load) for load in loads[1:])
    return min(loads[0], most, max(1, loads[0] - held_back))
