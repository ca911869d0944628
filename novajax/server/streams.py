"""Server-sent events: many sources, one bounded queue, one writer that waits for no reader longer than it must.

Invariants: whatever ends a stream (its end, an error, a client that left or stopped reading, shutdown), every source is
closed and the end hook is called exactly once; frames that are ready together leave in one write; a failure in mid-stream is one
error event, then the end. It knows nothing of what the frames say.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any

import msgspec
from litestar import Request, Response

from novajax.server.errors import as_nova_error, reply_of
from novajax.server.leaving import Receive, end, until_gone

DONE = b"data: [DONE]\n\n"
_COMMENT = b": keep-alive\n\n"
_QUEUED_ITEMS = 128
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

type Send = Callable[[Any], Any]


def frame(value: Any) -> bytes:
    """One `data:` event; JSON has no raw line break, so one line is enough."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class Pump[T]:
    """Runs sources in tasks of their own, at most `at_once` of them at a time, into one bounded queue."""

    def __init__(self, sources: Sequence[AsyncGenerator[T, None]], *, at_once: int):
        self._queue: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(_QUEUED_ITEMS)
        self._turns = asyncio.Semaphore(at_once)
        self._open = len(sources)
        self._error: BaseException | None = None
        self._tasks = [asyncio.create_task(self._run(number, source)) for number, source in enumerate(sources)]

    async def ready(self, timeout_s: float) -> list[tuple[int, T]] | None:
        """(source number, item) of everything that has come, after waiting up to timeout_s for the first: then it is empty.

        None after the last item. Raises what a source raised, after the items before it.
        """
        items: list[tuple[int, T]] = []
        while self._open and self._error is None and not (items and self._queue.empty()):
            try:
                async with asyncio.timeout(timeout_s):
                    item = await self._queue.get()
            except TimeoutError:
                return []
            if isinstance(item, tuple):
                items.append(item)
            elif item is None:
                self._open -= 1
            else:
                self._error = item
        if items:
            return items
        if self._error is not None:
            raise self._error
        return None

    async def close(self) -> None:
        """Ends and closes every source; idempotent."""
        await end(*self._tasks)

    async def _run(self, number: int, source: AsyncGenerator[T, None]) -> None:
        try:
            async with self._turns:
                async for item in source:
                    await self._queue.put((number, item))
            await self._queue.put(None)
        except Exception as error:
            await self._queue.put(error)
        finally:
            await source.aclose()


class EventStream[T](Response[None]):
    """The reply that writes a pump's items as they come. `encode` makes frames of an item, `last` the frames after all of them."""

    def __init__(
        self,
        pump: Pump[T],
        first: list[tuple[int, T]],
        *,
        encode: Callable[[int, T], Iterable[bytes]],
        last: Callable[[], Iterable[bytes]],
        on_end: Callable[[], None],
        keep_alive_s: float,
        write_timeout_s: float,
    ):
        super().__init__(None)
        self._pump = pump
        self._first = first
        self._encode = encode
        self._last = last
        self._on_end = on_end
        self._keep_alive_s = keep_alive_s
        self._write_timeout_s = write_timeout_s

    def to_asgi_response(self, app: Any, request: Request[Any, Any, Any], **_: Any) -> Any:
        return self._serve

    async def _serve(self, scope: Any, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(until_gone(receive))
        writing = asyncio.create_task(self._write(send))
        try:
            await asyncio.wait({gone, writing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            try:
                await end(writing, gone)
                await self._pump.close()
            finally:
                self._on_end()

    async def _write(self, send: Send) -> None:
        await self._put(send, {"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            items: list[tuple[int, T]] | None = self._first
            while items is not None:
                data, failure = self._encoded(items) if items else (_COMMENT, None)
                if data:
                    await self._put(send, {"type": "http.response.body", "body": data, "more_body": True})
                if failure is not None:
                    raise failure
                items = await self._pump.ready(self._keep_alive_s)
            tail = b"".join(self._last())
        except _Stalled:
            return
        except Exception as error:
            tail = frame(reply_of(as_nova_error(error)))
        await self._put(send, {"type": "http.response.body", "body": tail, "more_body": False})

    def _encoded(self, items: list[tuple[int, T]]) -> tuple[bytes, Exception | None]:
        """The frames of the items up to the first that fails, and its failure."""
        data = bytearray()
        try:
            for number, item in items:
                for part in self._encode(number, item):
                    data += part
        except Exception as error:
            return bytes(data), error
        return bytes(data), None

    async def _put(self, send: Send, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await send(message)
        except TimeoutError:
            raise _Stalled from None


class _Stalled(Exception):
    """The reader takes nothing."""
