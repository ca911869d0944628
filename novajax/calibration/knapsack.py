"""One option for each item, least loss for the bytes: the multiple-choice knapsack, for every budget at once.

Dynamic programming over bytes above the smallest choice (Dudzinski and Walukiewicz 1987, for the problem). Bytes are counted in the
largest unit that divides them all, or in GRID parts of their span where that is coarser, rounded up: a choice then never
exceeds its budget and is the best but for those roundings.
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from novajax.core.errors import CapacityError

GRID = 1 << 17


class Option(msgspec.Struct, frozen=True):
    """A way to hold an item."""

    name: str
    bytes: int
    loss: float


class Choice(msgspec.Struct, frozen=True):
    """An option's number for each item, and their sums."""

    options: tuple[int, ...]
    bytes: int
    loss: float


class Knapsack:
    """Solved when made; asking is cheap."""

    def __init__(self, items: Sequence[Sequence[Option]]):
        self._items = items
        self.least_bytes = sum(min(one.bytes for one in item) for item in items)
        extra = [[one.bytes - min(other.bytes for other in item) for one in item] for item in items]
        span = sum(max(item) for item in extra)
        self._unit = max(math.gcd(*(size for item in extra for size in item)), -(-span // GRID), 1)
        cells = sum(-(-max(item) // self._unit) for item in extra) + 1
        best = np.zeros(cells)  # least loss of the items so far within that many units
        self._taken = np.empty((len(items), cells), np.int16)
        for number, item in enumerate(items):
            tried = np.full((len(item), cells), np.inf)
            for option, one in enumerate(item):
                units = -(-extra[number][option] // self._unit)
                tried[option, units:] = best[: cells - units] + one.loss
            self._taken[number] = tried.argmin(axis=0)
            best = tried.min(axis=0)
        self._best, self._extra = best, extra

    def within(self, budget_bytes: int) -> Choice:
        """Of least loss in at most `budget_bytes`. Raises CapacityError where nothing fits."""
        if budget_bytes < self.least_bytes:
            raise CapacityError(f"{budget_bytes:,} bytes are too few: the smallest formats take {self.least_bytes:,}", param="budget_bytes")
        return self._read(min((budget_bytes - self.least_bytes) // self._unit, len(self._best) - 1))

    def at_most(self, loss: float) -> Choice:
        """Of fewest bytes with a loss of at most `loss`. Raises CapacityError where every choice loses more."""
        if self._best[-1] > loss:
            raise CapacityError(f"a loss of {loss:.3g} is out of reach: the best choice has {self._best[-1]:.3g}", param="max_loss")
        return self._read(int(np.argmax(self._best <= loss)))

    def _read(self, cell: int) -> Choice:
        options: list[int] = []
        for number in reversed(range(len(self._items))):
            options.append(int(self._taken[number, cell]))
            cell -= -(-self._extra[number][options[-1]] // self._unit)
        options.reverse()
        taken = [item[option] for item, option in zip(self._items, options, strict=True)]
        return Choice(tuple(options), sum(one.bytes for one in taken), sum(one.loss for one in taken))
