"""Frames between processes: a 4-byte big-endian length, then msgpack of one typed message. No pickle, caps before work.

`Channel` owns one stream pair. Sending never blocks the caller: messages queue and one writer task joins whatever is
ready into one write. A frame over the cap or of no known type ends the connection with ChannelError.
"""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from novajax.core.errors import NovaError
from novajax.core.types import Failure, ModelCard, Phase, Request, Stats, Update

MAX_FRAME_BYTES = 64 * 2**20
_LENGTH = struct.Struct(">I")


class ChannelError(NovaError):
    """The peer broke the protocol or went away."""

    kind, status = "channel_error", 503


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str


class AskStats(msgspec.Struct, frozen=True, tag="ask_stats"):
    number: int


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    grace_s: float


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The engine's phase; with its card once it is ready."""

    phase: Phase
    detail: str = ""
    card: ModelCard | None = None


class Updates(msgspec.Struct, frozen=True, tag="updates"):
    updates: list[Update]


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    request_id: str
    failure: Failure


class TellStats(msgspec.Struct, frozen=True, tag="stats"):
    number: int
    stats: Stats


class Drained(msgspec.Struct, frozen=True, tag="drained"):
    pass


ToEngine = Submit | Abort | AskStats | Drain
FromEngine = Hello | Updates | Refused | TellStats | Drained


class Channel:
    """One connection. `receives` is the union of message types this side accepts."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, receives: Any, *, max_frame_bytes: int = MAX_FRAME_BYTES
    ):
        self._reader = reader
        self._writer = writer
        self._decoder = msgspec.msgpack.Decoder(receives)
        self._encoder = msgspec.msgpack.Encoder()
        self._max_frame_bytes = max_frame_bytes
        self._outgoing: list[bytes] = []
        self._ready = asyncio.Event()
        self._closed = False
        self._task = asyncio.create_task(self._write(), name="channel-writer")

    def send(self, message: msgspec.Struct) -> None:
        """Queues a message. After the peer went away it is dropped: `receive` ends and tells."""
        if self._closed:
            return
        body = self._encoder.encode(message)
        if len(body) > self._max_frame_bytes:
            raise ChannelError(f"a {type(message).__name__} of {len(body)} bytes exceeds the frame cap of {self._max_frame_bytes}")
        self._outgoing += (_LENGTH.pack(len(body)), body)
        self._ready.set()

    async def receive(self) -> AsyncIterator[Any]:
        """Yields messages until the peer closes. Raises ChannelError for a frame that is too long, cut or not understood."""
        while True:
            try:
                head = await self._reader.readexactly(_LENGTH.size)
                (length,) = _LENGTH.unpack(head)
                if length > self._max_frame_bytes:
                    raise ChannelError(f"a frame of {length} bytes exceeds the cap of {self._max_frame_bytes}")
                body = await self._reader.readexactly(length)
            except asyncio.IncompleteReadError as error:
                if error.partial:
                    raise ChannelError("the peer closed in the middle of a frame") from None
                return
            except ConnectionError:
                return
            try:
                message = self._decoder.decode(body)
            except (msgspec.DecodeError, RecursionError) as error:
                raise ChannelError(f"a frame was not understood: {error}") from None
            yield message

    async def close(self) -> None:
        """Sends what is queued, then closes. Idempotent."""
        if not self._closed:
            self._closed = True
            self._ready.set()
        await self._task

    async def _write(self) -> None:
        try:
            while self._outgoing or not self._closed:
                await self._ready.wait()
                self._ready.clear()
                batch, self._outgoing = self._outgoing, []
                self._writer.write(b"".join(batch))
                await self._writer.drain()
        except ConnectionError:
            pass
        finally:
            self._closed = True
            self._outgoing.clear()
            self._writer.close()


def same_user(writer: asyncio.StreamWriter, user_id: int) -> bool:
    """Whether the peer of a Unix socket runs as `user_id` (or root): the kernel's word, not the peer's."""
    sock = writer.get_extra_info("socket")
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, peer, _ = struct.unpack("3i", credentials)
    return peer in (user_id, 0)
