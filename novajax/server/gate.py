"""The one limiter: how many sequences are inside, and whether more may come in.

Invariants: `inside` is the sum of open passes; a pass gives back exactly what it took, once; a refusal waits for
nothing. It knows nothing of HTTP.
"""

import asyncio
from types import TracebackType

from novajax.core.errors import InvalidRequest, Overloaded, Unavailable


class Gate:
    """Owned by the app; used on one event loop."""

    def __init__(self, max_sequences: int, retry_after_s: float):
        self._max_sequences = max_sequences
        self._retry_after_s = retry_after_s
        self._empty = asyncio.Event()
        self._empty.set()
        self.inside = 0
        self.asked = 0
        """Sequences that wanted in so far, refused ones included."""
        self.closed = False

    def enter(self) -> "Pass":
        """A pass for one sequence; Overloaded when full, Unavailable when closed."""
        self.asked += 1
        if self.closed:
            raise Unavailable("the server is shutting down", retry_after_s=self._retry_after_s)
        taken = Pass(self)
        taken.grow(1)
        return taken

    def close(self) -> None:
        """From now on everybody is refused; whoever is inside goes on."""
        self.closed = True

    async def empty(self, timeout_s: float) -> bool:
        """Waits until nobody is inside; False if that took longer."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def take(self, count: int, *, owned: int = 0) -> None:
        """For passes: `count` more for one that owns `owned`."""
        if owned + count > self._max_sequences:
            raise InvalidRequest(f"{owned + count} sequences in one request; at most {self._max_sequences} are served")
        if self.inside + count > self._max_sequences:
            raise Overloaded(
                f"{self.inside} of {self._max_sequences} places are taken and this request wants {count}", retry_after_s=self._retry_after_s
            )
        self.inside += count
        self._empty.clear()

    def give_back(self, count: int) -> None:
        self.inside -= count
        if not self.inside:
            self._empty.set()


class Pass:
    """Places taken by one request. Use as a context manager, or `keep` it for a stream that goes on and `leave` later."""

    def __init__(self, gate: Gate):
        self._gate = gate
        self._count = 0
        self._kept = False

    def grow(self, count: int) -> None:
        """Takes `count` more places; Overloaded if there are not so many free, InvalidRequest if there never will be."""
        self._gate.take(count, owned=self._count)
        self._count += count

    def keep(self) -> "Pass":
        """The end of the `with` block does not give the places back any more; `leave` must."""
        self._kept = True
        return self

    def leave(self) -> None:
        """Idempotent."""
        count, self._count = self._count, 0
        if count:
            self._gate.give_back(count)

    def __enter__(self) -> "Pass":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None or not self._kept:
            self.leave()
