"""The pump and the writer of event streams, with hand-made sources and a hand-made connection."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from novajax.core.errors import InvalidRequest
from novajax.server.leaving import ClientGone, unless_gone
from novajax.server.streams import EventStream, Pump, frame


class Source:
    """Yields 0, 1, 2 ..., `step_s` apart; says when it was closed."""

    def __init__(self, count: int, step_s: float = 0.0, error: Exception | None = None):
        self.count, self.step_s, self.error = count, step_s, error
        self.closed = False

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(self.count):
                await asyncio.sleep(self.step_s)
                yield number
            if self.error:
                raise self.error
        finally:
            self.closed = True


class Connection:
    """An ASGI peer: records bodies, may stop reading after `reads` of them, may leave."""

    def __init__(self, reads: int | None = None):
        self.reads = reads
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        if self.reads is not None and len(self.bodies) >= self.reads:
            await asyncio.Event().wait()
        self.sent.append(message)

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent if message["type"] == "http.response.body"]


async def stream(
    sources: list[Source],
    connection: Connection,
    *,
    keep_alive_s: float = 5,
    write_timeout_s: float = 5,
    at_once: int = 8,
    encode: Any = None,
) -> int:
    """Serves the sources on the connection; returns how often the end was told."""
    ends = 0

    def ended() -> None:
        nonlocal ends
        ends += 1

    pump = Pump([source.items() for source in sources], at_once=at_once)
    response = EventStream(
        pump,
        [],
        encode=encode or (lambda number, item: [frame([number, item])]),
        last=lambda: [b"data: [DONE]\n\n"],
        on_end=ended,
        keep_alive_s=keep_alive_s,
        write_timeout_s=write_timeout_s,
    )
    await response.to_asgi_response(None, None)({}, connection.receive, connection.send)  # type: ignore[arg-type]
    assert len(asyncio.all_tasks()) == 1
    assert all(source.closed for source in sources)
    return ends


def events(connection: Connection) -> list[bytes]:
    return [event for event in b"".join(connection.bodies).split(b"\n\n") if event and not event.startswith(b":")]


def test_everything_comes_in_order_and_then_done():
    async def run() -> None:
        connection = Connection()
        assert await stream([Source(50)], connection) == 1
        assert events(connection) == [b"data: [0,%d]" % number for number in range(50)] + [b"data: [DONE]"]
        assert connection.sent[-1]["more_body"] is False

    asyncio.run(run())


def test_what_is_ready_together_leaves_together():
    async def run() -> None:
        connection = Connection()
        await stream([Source(100) for _ in range(4)], connection)
        assert len(events(connection)) == 401
        assert len(connection.bodies) < 150

    asyncio.run(run())


def test_at_once_bounds_what_runs():
    async def run() -> None:
        running, most = 0, 0

        async def source() -> AsyncGenerator[int, None]:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            yield 1
            running -= 1

        pump = Pump([source() for _ in range(9)], at_once=3)
        while await pump.ready(5) is not None:
            pass
        await pump.close()
        assert most == 3

    asyncio.run(run())


def test_silence_is_filled_with_comments():
    async def run() -> None:
        connection = Connection()
        await stream([Source(1, step_s=0.1)], connection, keep_alive_s=0.02)
        assert connection.bodies.count(b": keep-alive\n\n") >= 2

    asyncio.run(run())


def test_a_failure_is_one_error_event_and_the_end():
    async def run() -> None:
        connection = Connection()
        assert await stream([Source(2, error=InvalidRequest("no more", param="x")), Source(9, step_s=5)], connection) == 1
        assert events(connection)[:2] == [b"data: [0,0]", b"data: [0,1]"]
        assert events(connection)[2:] == [
            b'data: {"error":{"message":"no more","type":"invalid_request_error","param":"x","code":"invalid_request"}}'
        ]
        assert connection.sent[-1]["more_body"] is False

    asyncio.run(run())


def test_what_came_before_a_failure_in_the_same_write_is_not_lost():
    async def run() -> None:
        def picky(number: int, item: int) -> list[bytes]:
            if number == 3:
                raise InvalidRequest("not the fourth")
            return [frame(number)]

        connection = Connection()
        await stream([Source(9) for _ in range(5)], connection, encode=picky)
        assert events(connection)[:3] == [b"data: 0", b"data: 1", b"data: 2"]
        assert b"not the fourth" in events(connection)[3]
        assert len(events(connection)) == 4

    asyncio.run(run())


def test_an_unexpected_failure_tells_nothing():
    async def run() -> None:
        def broken(number: int, item: int) -> list[bytes]:
            raise ValueError("the secret prompt")

        connection = Connection()
        await stream([Source(2)], connection, encode=broken)
        assert b"secret" not in b"".join(connection.bodies)
        assert b"internal_error" in events(connection)[0]

    asyncio.run(run())


def test_a_client_that_leaves_ends_the_sources():
    async def run() -> None:
        connection = Connection()
        asyncio.get_running_loop().call_later(0.03, connection.gone.set)
        assert await stream([Source(10**9, step_s=0.001)], connection) == 1

    asyncio.run(run())


def test_a_client_that_stops_reading_is_dropped_and_nothing_piles_up():
    async def run() -> None:
        connection, source = Connection(reads=3), Source(10**6)
        assert await stream([source], connection, write_timeout_s=0.05) == 1
        assert len(connection.bodies) == 3

    asyncio.run(run())


def test_unless_gone():
    async def run() -> None:
        connection, cancelled = Connection(), []

        async def work(seconds: float) -> int:
            try:
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                cancelled.append(seconds)
                raise
            return 7

        assert await unless_gone(connection.receive, work(0.01)) == 7
        asyncio.get_running_loop().call_later(0.01, connection.gone.set)
        with pytest.raises(ClientGone):
            await unless_gone(connection.receive, work(60))
        assert cancelled == [60]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
