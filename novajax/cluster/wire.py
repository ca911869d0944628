"""An authenticated connection of blocking sockets, for threads that have nothing else to do than to wait for it.

One thread receives, any may send. Every wait has a bound; a peer that goes away or breaks the protocol is a ChannelError.
"""

import contextlib
import socket
import struct
import threading
import time
from typing import Any

import msgspec

from novajax.cluster.channel import ChannelError
from novajax.cluster.secure import HEAD, MAX_FRAME_BYTES, Session, Talk, as_client, as_server
from novajax.core.errors import ConfigError

HANDSHAKE_S = 2.0
_RETRY_S = 0.02


class Wire:
    """Owns a connected socket. Messages are msgpack of a tagged union."""

    def __init__(self, sock: socket.socket, session: Session, receives: Any, send_s: float):
        self._socket = sock
        self._session = session
        self._decoder = msgspec.msgpack.Decoder(receives)
        self._sending = threading.Lock()
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        timeval = struct.pack("ll", int(send_s), int(send_s % 1 * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def send(self, message: msgspec.Struct) -> None:
        self.send_body(msgspec.msgpack.encode(message))

    def send_body(self, body: bytes) -> None:
        """A message that was encoded once for many peers. Raises ChannelError if the peer is gone or takes nothing."""
        with self._sending:
            try:
                self._socket.sendall(self._session.seal(body))
            except OSError as error:
                raise ChannelError(f"the connection broke: {error}") from None

    def receive(self, timeout_s: float | None = None) -> Any:
        """The next message. Raises ChannelError at the end, too, or after `timeout_s`."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        head = read_exactly(self._socket, HEAD.size, deadline_s)
        body = self._session.open(head, read_exactly(self._socket, self._session.length(head), deadline_s))
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ChannelError(f"a frame was not understood: {error}") from None

    def close(self) -> None:
        """Wakes a thread that receives. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def listen(port: int = 0, *, local: bool = True) -> socket.socket:
    """A listening socket on the loopback address, or on all of this host's; port 0 is any free one. Raises OSError."""
    if local:
        return socket.create_server(("127.0.0.1", port), backlog=64)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
    return socket.create_server(("", port), backlog=64)


def split_address(address: str) -> tuple[str, int]:
    """'host:port' or '[v6]:port' taken apart. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)


def accept(listener: socket.socket, secret: bytes, purpose: str, receives: Any, *, deadline_s: float, send_s: float) -> Wire:
    """The next peer that knows the secret; others are turned away. Raises ChannelError after the deadline."""
    while True:
        listener.settimeout(max(0.01, deadline_s - time.monotonic()))
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            raise ChannelError("nobody connected in time") from None
        try:
            return Wire(sock, _shake(sock, as_server(secret, purpose)), receives, send_s)
        except (OSError, ChannelError):
            sock.close()


def connect(address: tuple[str, int], secret: bytes, purpose: str, receives: Any, *, deadline_s: float, send_s: float) -> Wire:
    """Tries until somebody listens. Raises ChannelError after the deadline, Unauthenticated if the secrets differ."""
    while True:
        try:
            sock = socket.create_connection(address, max(0.01, deadline_s - time.monotonic()))
        except OSError as error:
            if time.monotonic() >= deadline_s:
                raise ChannelError(f"nobody listens at {address[0]}:{address[1]}: {error}") from None
            time.sleep(_RETRY_S)
            continue
        try:
            return Wire(sock, _shake(sock, as_client(secret, purpose)), receives, send_s)
        except BaseException:
            sock.close()
            raise


def read_exactly(sock: socket.socket, count: int, deadline_s: float | None = None) -> bytes:
    """Raises ChannelError if the peer closes or the deadline passes first."""
    if count > MAX_FRAME_BYTES:
        raise ChannelError(f"{count} bytes exceed the cap of {MAX_FRAME_BYTES}")
    parts, missing = [], count
    while missing:
        try:
            sock.settimeout(None if deadline_s is None else max(0.001, deadline_s - time.monotonic()))
            part = sock.recv(min(missing, 1 << 20))
        except TimeoutError:
            raise ChannelError("the peer says nothing") from None
        except OSError as error:
            raise ChannelError(f"the connection broke: {error}") from None
        if not part:
            raise ChannelError("the peer closed the connection")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _shake(sock: socket.socket, talk: Talk) -> Session:
    deadline_s = time.monotonic() + HANDSHAKE_S
    wanted = next(talk)
    try:
        while True:
            if isinstance(wanted, bytes):
                sock.sendall(wanted)
                wanted = next(talk)
            else:
                wanted = talk.send(read_exactly(sock, wanted, deadline_s))
    except StopIteration as done:
        return done.value
