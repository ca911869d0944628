"""Two processes that share a secret prove it to each other, then seal what they say. Bytes in, bytes out: no sockets here.

Each side sends a fresh nonce and proves the secret with an HMAC over both nonces, the purpose and its own role, so that a
recorded or reflected proof is worth nothing. The server proves itself only to a client that has. Frames carry a keyed
digest over a running number, in keys of that connection and direction: a frame altered, dropped, repeated or from another
connection is refused. It does not hide what is said; that is the network's business.
"""

import hmac
import secrets
import struct
from collections.abc import Generator
from hashlib import blake2b

from novajax.cluster.channel import ChannelError

NONCE_BYTES, PROOF_BYTES, MAC_BYTES = 32, 32, 16
SHORTEST_SECRET_BYTES = 16
MAX_FRAME_BYTES = 64 * 2**20
HEAD = struct.Struct(f">I{MAC_BYTES}s")
_NUMBER = struct.Struct(">Q")

type Talk = Generator[bytes | int, bytes, Session]
"""Yields bytes to send, or how many to receive; returns the session."""


class Unauthenticated(ChannelError):
    """The peer does not know the shared secret, or speaks for another purpose."""

    kind, status = "unauthenticated", 403


class Session:
    """Seals outgoing and checks incoming frames of one connection, in order."""

    def __init__(self, key: bytes, role: str, peer: str, max_frame_bytes: int = MAX_FRAME_BYTES):
        self._out_key, self._in_key = (_digest(key, side.encode()) for side in (role, peer))
        self._max_frame_bytes = max_frame_bytes
        self._sent = self._received = 0

    def seal(self, body: bytes) -> bytes:
        """The frame of `body`."""
        if len(body) > self._max_frame_bytes:
            raise ChannelError(f"a message of {len(body)} bytes exceeds the frame cap of {self._max_frame_bytes}")
        frame = HEAD.pack(len(body), _mac(self._out_key, self._sent, body)) + body
        self._sent += 1
        return frame

    def length(self, head: bytes) -> int:
        """How many bytes follow a frame's head. Raises ChannelError above the cap."""
        length, _ = HEAD.unpack(head)
        if length > self._max_frame_bytes:
            raise ChannelError(f"a frame of {length} bytes exceeds the cap of {self._max_frame_bytes}")
        return length

    def open(self, head: bytes, body: bytes) -> bytes:
        """The body, if it is the peer's next. Raises Unauthenticated."""
        _, mac = HEAD.unpack(head)
        if not hmac.compare_digest(mac, _mac(self._in_key, self._received, body)):
            raise Unauthenticated("a frame was altered, repeated or out of order")
        self._received += 1
        return body


def as_server(secret: bytes, purpose: str, max_frame_bytes: int = MAX_FRAME_BYTES) -> Talk:
    mine = secrets.token_bytes(NONCE_BYTES)
    yield mine
    answer = yield NONCE_BYTES + PROOF_BYTES
    theirs, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    key = _digest(secret, purpose.encode(), mine, theirs)
    if not hmac.compare_digest(proof, _digest(key, b"client proof")):
        raise Unauthenticated(f"the peer does not know the shared secret of this {purpose}")
    yield _digest(key, b"server proof")
    return Session(key, "server", "client", max_frame_bytes)


def as_client(secret: bytes, purpose: str, max_frame_bytes: int = MAX_FRAME_BYTES) -> Talk:
    theirs = yield NONCE_BYTES
    mine = secrets.token_bytes(NONCE_BYTES)
    key = _digest(secret, purpose.encode(), theirs, mine)
    yield mine + _digest(key, b"client proof")
    proof = yield PROOF_BYTES
    if not hmac.compare_digest(proof, _digest(key, b"server proof")):
        raise Unauthenticated(f"the server does not know the shared secret of this {purpose}")
    return Session(key, "client", "server", max_frame_bytes)


def _digest(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join(_NUMBER.pack(len(part)) + part for part in parts), "sha256")


def _mac(key: bytes, number: int, body: bytes) -> bytes:
    return blake2b(_NUMBER.pack(number) + body, key=key, digest_size=MAC_BYTES).digest()
