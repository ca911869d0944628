"""The supervisors of other hosts: how they come to the head's, take its orders, and what either does when the other is lost.

The head listens; each other host connects, proves the shared secret and registers. A lost or silent connection ends the epoch on
both sides: the head says so to the group, the other host kills its ranks and comes back. Nothing is assumed of the other side's end.
"""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from novajax.cluster.channel import ChannelError
from novajax.cluster.hosts import Ended, Event, Left, LocalHost, Said, Seen, Start
from novajax.cluster.secure import HEAD, Session, Talk, Unauthenticated, as_client, as_server
from novajax.cluster.settings import Order
from novajax.cluster.wire import HANDSHAKE_S, listen, split_address

PURPOSE = "supervisor channel"
KILL_WAIT_S = 10.0
_RETRY_S = 0.5
STOPPED, NOT_ADMITTED, ORPHANED = 0, 2, 3


class Register(msgspec.Struct, frozen=True, tag="register"):
    index: int
    name: str
    ranks: int


class Kill(msgspec.Struct, frozen=True, tag="kill"):
    pass


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    pass


class Look(msgspec.Struct, frozen=True, tag="look"):
    pass


class Gone(msgspec.Struct, frozen=True, tag="gone"):
    """No rank runs on this host."""


ToHost = Start | Kill | Stop | Look
ToHead = Register | Said | Ended | Seen | Gone


class AsyncWire:
    """`wire.Wire` for asyncio: sealed frames over a stream pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, session: Session, receives: Any):
        self._reader, self._writer, self._session = reader, writer, session
        self._decoder = msgspec.msgpack.Decoder(receives)

    def send(self, message: msgspec.Struct) -> None:
        """Queues it; a peer that is gone is found out by `receive`."""
        if not self._writer.is_closing():
            self._writer.write(self._session.seal(msgspec.msgpack.encode(message)))

    async def receive(self) -> Any:
        """Raises ChannelError at the end and for what is not understood."""
        try:
            head = await self._reader.readexactly(HEAD.size)
            body = await self._reader.readexactly(self._session.length(head))
            return self._decoder.decode(self._session.open(head, body))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ChannelError(f"the connection ended: {type(error).__name__}") from None
        except (msgspec.DecodeError, RecursionError) as error:
            raise ChannelError(f"a frame was not understood: {error}") from None

    async def flush(self) -> None:
        with contextlib.suppress(OSError):
            await self._writer.drain()

    def close(self) -> None:
        self._writer.close()


async def shake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, talk: Talk) -> Session:
    """Runs a handshake. Raises ChannelError or TimeoutError."""
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            wanted = next(talk)
            while True:
                if isinstance(wanted, bytes):
                    writer.write(wanted)
                    wanted = next(talk)
                else:
                    wanted = talk.send(await reader.readexactly(wanted))
    except StopIteration as done:
        return done.value
    except (asyncio.IncompleteReadError, OSError) as error:
        raise ChannelError(f"the peer left the handshake: {type(error).__name__}") from None


class RemoteHost:
    """Another host as the head sees it. It outlives its connections."""

    def __init__(self, index: int, emit: Callable[[Event], None], silence_s: float):
        self.name = f"host {index}"
        self.ranks = 0
        self._emit = emit
        self._silence_s = silence_s
        self._wire: AsyncWire | None = None
        self._connected, self._gone = asyncio.Event(), asyncio.Event()
        self._heard_s = 0.0

    async def present(self) -> None:
        await self._connected.wait()

    async def start(self, start: Start) -> None:
        self._gone.clear()
        self._send(start)

    async def look(self) -> None:
        if self._wire is not None and time.monotonic() - self._heard_s > self._silence_s:
            self._lost(self._wire, f"{self.name} says nothing for {self._silence_s:g} s")
        else:
            self._send(Look())

    async def kill(self) -> None:
        await self._end(Kill())

    async def stop(self) -> None:
        await self._end(Stop())

    async def serve(self, wire: AsyncWire, register: Register) -> None:
        """Takes what a new connection says until it ends. An older one is dropped."""
        if self._wire is not None:
            self._lost(self._wire, f"{self.name} connected anew")
        self.name, self.ranks, self._wire, self._heard_s = register.name, register.ranks, wire, time.monotonic()
        self._connected.set()
        try:
            while True:
                message = await wire.receive()
                self._heard_s = time.monotonic()
                if isinstance(message, Gone):
                    self._gone.set()
                elif not isinstance(message, Register):
                    self._emit(message)
        except ChannelError as error:
            self._lost(wire, f"{self.name} lost its connection: {error.message}")

    def _send(self, message: msgspec.Struct) -> None:
        if self._wire is None:
            raise ConnectionError(f"{self.name} is not connected")
        self._wire.send(message)

    async def _end(self, message: Kill | Stop) -> None:
        if self._wire is None:
            return  # it kills its ranks when it loses the head
        self._gone.clear()
        self._wire.send(message)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._gone.wait(), KILL_WAIT_S)
            return
        if self._wire is not None:
            self._lost(self._wire, f"{self.name} did not end its ranks")

    def _lost(self, wire: AsyncWire, message: str) -> None:
        wire.close()
        if self._wire is wire:
            self._wire = None
            self._connected.clear()
            self._gone.set()
            self._emit(Left(message))


class Head:
    """Where other hosts register. Owns the listening socket."""

    def __init__(self, order: Order, emit: Callable[[Event], None]):
        self._order = order
        silence_s = max(order.settings.stall_s, 1.0)
        self.hosts = [RemoteHost(index, emit, silence_s) for index in range(1, order.place.count)]
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        """Raises OSError if the port is taken."""
        host, port = split_address(self._order.place.coordinator)
        self._server = await asyncio.start_server(self._connected, sock=listen(port, local=host == "127.0.0.1"))

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            session = await shake(reader, writer, as_server(self._order.secret, PURPOSE))
            wire = AsyncWire(reader, writer, session, ToHead)
            async with asyncio.timeout(HANDSHAKE_S):
                register = await wire.receive()
        except (ChannelError, TimeoutError) as error:
            structlog.get_logger("novajax.supervisor").warning("a connection was refused", cause=str(error))
            writer.close()
            return
        if not isinstance(register, Register) or not 0 < register.index < self._order.place.count or register.ranks < 1:
            writer.close()
            return
        await self.hosts[register.index - 1].serve(wire, register)


async def attend(order: Order) -> int:
    """The life of a host that is not the head: serves it until told to stop, or until it does not come back. The exit code."""
    log = structlog.get_logger("novajax.supervisor")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    address = split_address(order.place.coordinator)
    lost_s = time.monotonic()
    while not stop.is_set():
        try:
            reader, writer = await asyncio.open_connection(*address)
            session = await shake(reader, writer, as_client(order.secret, PURPOSE))
        except Unauthenticated as error:
            log.error("the head was refused", cause=error.message)
            return NOT_ADMITTED
        except (OSError, ChannelError, TimeoutError) as error:
            if time.monotonic() - lost_s > order.settings.start_stall_s:
                log.error("the head does not come back", address=order.place.coordinator, cause=str(error))
                return ORPHANED
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _RETRY_S)
            continue
        if await _serve_head(order, AsyncWire(reader, writer, session, ToHost), stop):
            return STOPPED
        lost_s = time.monotonic()
        log.error("the head was lost; this host's ranks were ended")
    return STOPPED


async def _serve_head(order: Order, wire: AsyncWire, stop: asyncio.Event) -> bool:
    """Takes the head's orders over one connection. True: told to stop; no rank runs on return."""
    host = LocalHost(order, lambda event: wire.send(event))
    wire.send(Register(order.place.index, socket.gethostname(), host.ranks))
    stopping = asyncio.create_task(stop.wait())
    running = False
    try:
        while True:
            receiving = asyncio.create_task(wire.receive())
            silence_s = 2 * max(order.settings.stall_s, 1.0) if running else None
            await asyncio.wait({receiving, stopping}, timeout=silence_s, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                receiving.cancel()
                return stopping.done()
            match receiving.result():
                case Start() as start:
                    running = True
                    await host.start(start)
                case Look():
                    await host.look()
                case Kill():
                    running = False
                    await host.kill()
                    wire.send(Gone())
                case Stop():
                    await host.stop()
                    wire.send(Gone())
                    await wire.flush()
                    return True
    except ChannelError:
        return False
    finally:
        stopping.cancel()
        await host.kill()
        wire.close()
