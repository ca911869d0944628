"""The one seam: what a front end may ask of whatever generates tokens.

An in-process engine, an engine in a child process behind a socket, a router over many, and the fake in
`novajax.core.fake` all are Backends, and one contract suite (tests/contract) runs against each.
"""

from collections.abc import AsyncIterator
from typing import Protocol

from novajax.core.types import ModelCard, Request, Stats, Update


class Backend(Protocol):
    """Asyncio-facing; every method is called on one event loop."""

    async def card(self) -> ModelCard:
        """The model served. Waits until it is known (load finished); raises Unavailable if the backend failed."""
        ...

    def submit(self, request: Request) -> AsyncIterator[Update]:
        """Admits the request at the first `__anext__` and yields its updates, the last with a finish_reason.

        Raises a NovaError before the first update when it is refused (InvalidRequest, ContextTooLong, Overloaded, Unavailable),
        and EngineFailed if the engine dies under it. Closing the iterator early aborts the request: all its work
        stops within one step. A failure of this request alone arrives as its last update with `failure` set.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """Ends a request with finish_reason 'abort'. Unknown, finished and repeated ids are no-ops."""
        ...

    async def stats(self) -> Stats:
        """Never waits for the device and never raises: a dead engine is a Stats with phase 'failed'."""
        ...

    async def drain(self, grace_s: float) -> None:
        """Refuses new requests (Unavailable) and returns when running ones finished or grace_s passed; the rest are aborted."""
        ...

    async def close(self) -> None:
        """Frees everything; idempotent."""
        ...
