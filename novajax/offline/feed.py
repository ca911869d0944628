"""The order in which a batch reads its input: a grain iterator that can be saved and set, and the lines now in flight.

Invariant: `position` is a state of the iterator from which every unfinished line will be read again, and no line before
the first unfinished one. Used on one event loop.
"""

from typing import Any

import numpy as np

from novajax.offline.index import Line, LineIndex


class Feed:
    """Gives out unfinished lines in order. `done` is the output's own record and is read, never written."""

    def __init__(self, index: LineIndex, done: np.ndarray):
        import grain  # brings jax along, which a refusal of flags or files need not wait for

        self._done = done  # [lines]
        options = grain.ReadOptions(num_threads=0)
        self._iterator = iter(grain.MapDataset.source(index).to_iter_dataset(options))
        self._next_number = 1
        self._in_flight: dict[int, dict[str, Any]] = {}

    def fast_forward(self, first_open_line: int, state: dict[str, Any]) -> bool:
        """Starts where a saved position says, unless the output shows that a line before it is not finished."""
        if not 1 <= first_open_line <= len(self._done) + 1 or not self._done[: first_open_line - 1].all():
            return False
        self._iterator.set_state(state)
        self._next_number = first_open_line
        return True

    def take(self) -> Line | None:
        """The next unfinished line, in flight from now on; None at the end."""
        while True:
            state = self._iterator.get_state()
            try:
                line: Line = next(self._iterator)
            except StopIteration:
                return None
            self._next_number = line.number + 1
            if not self._done[line.number - 1]:
                self._in_flight[line.number] = state
                return line

    def finish(self, number: int) -> None:
        """The line has its record."""
        del self._in_flight[number]

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def position(self) -> tuple[int, dict[str, Any]]:
        """(first unfinished line, iterator state that reads it next): lines enter in order, so the oldest is the first."""
        for number, state in self._in_flight.items():
            return number, state
        return self._next_number, self._iterator.get_state()
