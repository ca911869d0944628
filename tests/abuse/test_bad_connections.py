"""Bad bytes on the wire, clients that stall, and clients that leave. The common expectation is `unharmed`."""

import asyncio
import gzip
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest
from abuse_world import CHAT, HELLO, TEXT, Reply, Target, check_error, unharmed

from novajax.core.fake import FakeBackend
from novajax.server.fake import ServedFake, fake_card
from novajax.server.settings import ServerSettings, digest
from novajax.text.tokenizer import Tokenizer

OK_BODY = json.dumps({"prompt": "hello", "max_tokens": 2}).encode()
GROWTH_BYTES = 64 << 20


def long_request(**fields: object) -> bytes:
    """A body whose answer takes many steps."""
    return json.dumps({"prompt": "hello", "max_tokens": 400, "ignore_eos": True, "temperature": 0} | fields).encode()


def whole(target: Target, body: bytes, path: str = TEXT) -> bytes:
    return target.head(path, f"Content-Length: {len(body)}").encode() + b"\r\n" + body


def refused(reply: Reply, statuses: set[int]) -> None:
    """One of the statuses, or no answer and a closed connection."""
    assert reply.status in statuses or (reply.status == 0 and reply.closed), reply
    assert b"Traceback" not in reply.body


# 5: bodies -------------------------------------------------------------------------------------------------------------


def test_row_5_large_bodies(target: Target):
    front = psutil.Process(target.health()["components"]["process"]["pid"])
    with unharmed(target):
        before = front.memory_info().rss
        for _ in range(5):
            refused(target.raw(target.head(TEXT, "Content-Length: 10000000000").encode() + b"\r\n" + b"x" * 1000), {413})
            chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
            refused(target.raw(target.head(TEXT, "Transfer-Encoding: chunked").encode() + b"\r\n" + chunk * 40), {413})
        for extra in ("Content-Length: 99999999999999999999999", "Content-Length: 1e9", "Content-Length: +5", "Content-Length: 0x10"):
            refused(target.raw(target.head(TEXT, extra).encode() + b"\r\n" + OK_BODY), {400, 413})
        assert front.memory_info().rss - before < GROWTH_BYTES


def test_row_5_encoded_bodies(target: Target):
    bomb = gzip.compress(b" " * (32 << 20), 1)
    with unharmed(target):
        for coding in ("gzip", "deflate", "br", "identity, gzip"):
            check_error(target.post(TEXT, bomb, **{"content-encoding": coding}), {415})


def test_row_5_a_length_that_lies(impatient: Target):
    """Too short: the rest is no request. Too long: the body never comes."""
    with unharmed(impatient):
        short = impatient.raw(impatient.head(TEXT, f"Content-Length: {len(OK_BODY) - 3}").encode() + b"\r\n" + OK_BODY)
        assert short.status == 400
        assert short.closed
        refused(impatient.raw(impatient.head(TEXT, f"Content-Length: {len(OK_BODY) + 9}").encode() + b"\r\n" + OK_BODY), {408})


# 6, 7: heads -----------------------------------------------------------------------------------------------------------


def test_row_6_large_heads(target: Target):
    with unharmed(target):
        for extra in (b"X: " + b"a" * (16 << 20), b"X: y\r\n" * 200_000, b"X-Request-Id: " + b"a" * (1 << 20)):
            refused(target.raw(target.head(TEXT).encode() + extra + b"\r\n\r\n"), {400, 431})
        refused(target.raw(b"GET /v1/models?" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"), {400, 414, 431})


HEADS = {
    "negative length": ["Content-Length: -1"],
    "two lengths": ["Content-Length: 4", "Content-Length: 41"],
    "length list": ["Content-Length: 4, 41"],
    "unknown coding": ["Transfer-Encoding: chunked, identity"],
    "coding in disguise": ["Transfer-Encoding : chunked"],
    "folded header": ["X-A: b\r\n c"],
    "no colon": ["Nonsense"],
    "control character": ["X-A: b\x00c"],
}


@pytest.mark.parametrize("name", HEADS)
def test_row_7_malformed_heads(target: Target, name: str):
    with unharmed(target):
        refused(target.raw(target.head(TEXT, *HEADS[name]).encode() + b"\r\n" + OK_BODY, wait_s=5), {400, 408, 411, 413, 501})


def test_row_7_hosts(target: Target):
    key = f"Authorization: Bearer {target.key}\r\n" if target.key else ""
    lines = ["GET /v1/models HTTP/1.0\r\nX-Forwarded-Host: localhost\r\n", "GET /v1/models HTTP/1.1\r\n"]
    lines += ["GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n"]
    with unharmed(target):
        for line in lines:
            assert target.raw(f"{line}Connection: close\r\n{key}\r\n".encode()).status == 400


def test_row_7_length_and_coding_cannot_smuggle(target: Target):
    """The chunked coding wins and the connection ends, so what the length would have hidden is no second request."""
    hidden = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(OK_BODY), OK_BODY)
    with unharmed(target):
        head = target.head(TEXT, f"Content-Length: {len(chunked) + len(hidden)}", "Transfer-Encoding: chunked").encode()
        reply = target.raw(head + b"\r\n" + chunked + hidden)
        assert reply.closed
        assert reply.status in (200, 400)
        assert b"HTTP/1.1" not in reply.body


def test_row_7_bare_line_feeds_make_one_request(target: Target):
    """A known gap, closed by the proxy: heads may end their lines with a bare line feed. It is still one request."""
    reply = target.raw(b"GET /health HTTP/1.1\nHost: localhost\nConnection: close\n\n")
    assert reply.status in (200, 400)
    assert reply.body.count(b"HTTP/1.1") == 0


# 8: stalls -------------------------------------------------------------------------------------------------------------


def test_row_8_stalled_connections_are_closed(impatient: Target):
    with unharmed(impatient):
        head = impatient.head(TEXT, "Content-Length: 40").encode()
        starts = [b"", head[:30], head, head + b"\r\n", head + b"\r\n" + OK_BODY[:5], b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"]
        replies: list[Reply | None] = [None] * len(starts)

        def stall(number: int) -> None:
            replies[number] = impatient.raw(starts[number])

        threads = [threading.Thread(target=stall, args=(number,)) for number in range(len(starts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(reply is not None and reply.closed for reply in replies), replies
        assert [reply.status for reply in replies if reply] == [0, 0, 0, 408, 408, 200]


# 27, 28: keys and origins ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(tokenizer: Tokenizer) -> Iterator[Target]:
    with ServedFake(tokenizer, settings=ServerSettings(port=0, key_digests=(digest("k" * 20),))) as running:
        yield Target(running.url, "k" * 20)


def test_row_27_keys(locked: Target):
    key, paths = locked.key or "", (CHAT, TEXT, "/v1/models", "/metrics", "/version", "/tokenize", "/detokenize", "/v1/models/x")
    wrong: list[list[tuple[bytes, bytes]]] = [[]]
    wrong += [[(b"authorization", b"Bearer " + value)] for value in (key[:-1].encode(), b"\xff" * 20, b"a" * 50_000, b"k" * 21)]
    wrong += [[(b"authorization", f"Bearer {key}".encode())] * 2, [(b"x-api-key", b"")]]
    with unharmed(locked), httpx.Client(base_url=locked.url) as client:
        for path in paths:
            for headers in wrong:
                answer = client.request("POST" if path in (CHAT, TEXT) else "GET", path, headers=headers)
                assert answer.status_code in ((401, 405) if path.startswith(("/tokenize", "/detokenize")) else (401,)), (path, headers)
            assert client.get(f"{path}?api_key={key}&key={key}").status_code in (401, 405)
        refused(locked.raw(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nx-api-key: " + b"a" * (1 << 20) + b"\r\n\r\n"), {401, 431})


def test_row_28_origins_and_hosts(target: Target):
    with unharmed(target):
        for origin in ("https://evilXexample.com", "null", "http://localhost.evil.example"):
            answer = target.client.get("/v1/models", headers={"origin": origin, "x-forwarded-host": "evil", "x-forwarded-for": "8.8.8.8"})
            assert answer.status_code == 200
            assert not [name for name in answer.headers if name.startswith("access-control")]


# 29, 30, 31: clients that leave, or stay without reading -----------------------------------------------------------------


def leave(target: Target, data: bytes, *, after_bytes: int = 0, after_s: float = 0.0, reset: bool = False) -> None:
    """Sends, reads until after_bytes came (or after_s passed), and goes, with FIN or RST."""
    connection = socket.create_connection(target.address, timeout=30)
    connection.sendall(data)
    received = 0
    while received < after_bytes and (piece := connection.recv(4096)):
        received += len(piece)
    time.sleep(after_s)
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


STATES: dict[str, Callable[[Target, bool], None]] = {
    "before the body": lambda target, reset: leave(target, target.head(TEXT, "Content-Length: 99").encode() + b"\r\n", reset=reset),
    "within the body": lambda target, reset: leave(target, whole(target, long_request())[:-9], after_s=0.01, reset=reset),
    "at once": lambda target, reset: leave(target, whole(target, long_request()), reset=reset),
    "while tokenizing": lambda target, reset: leave(target, whole(target, long_request(prompt="ab " * 20_000)), after_s=0.005, reset=reset),
    "waiting for a whole reply": lambda target, reset: leave(target, whole(target, long_request()), after_s=0.1, reset=reset),
    "before the first token": lambda target, reset: leave(target, whole(target, long_request(stream=True)), reset=reset),
    "at the first token": lambda target, reset: leave(target, whole(target, long_request(stream=True)), after_bytes=1, reset=reset),
    "in mid stream": lambda target, reset: leave(target, whole(target, long_request(stream=True)), after_bytes=9000, reset=reset),
    "n = 4 whole": lambda target, reset: leave(target, whole(target, long_request(n=4)), after_s=0.05, reset=reset),
    "n = 4 in mid stream": lambda target, reset: leave(
        target, whole(target, long_request(n=4, stream=True)), after_bytes=9000, reset=reset
    ),
    "at the last token": lambda target, reset: leave(
        target, whole(target, long_request(max_tokens=2, stream=True)), after_bytes=500, reset=reset
    ),
    "after the end": lambda target, reset: leave(target, whole(target, OK_BODY), after_bytes=100, after_s=0.1, reset=reset),
    "chat in mid stream": lambda target, reset: leave(
        target,
        whole(target, json.dumps({"messages": HELLO, "max_tokens": 400, "ignore_eos": True, "stream": True}).encode(), CHAT),
        after_bytes=3000,
        reset=reset,
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_row_29_clients_that_leave(target: Target, state: str):
    with unharmed(target):
        for reset in (False, True):
            for _ in range(3):
                STATES[state](target, reset)


def test_row_29_nothing_is_left_in_the_front(tokenizer: Tokenizer):
    """Tasks and places of the front end itself, after a storm of clients that leave."""
    with ServedFake(tokenizer, FakeBackend(fake_card(tokenizer), step_s=0.002, max_waiting=1000), ServerSettings(port=0)) as running:
        target = Target(running.url)

        async def tasks() -> int:
            return len(asyncio.all_tasks())

        target.post(TEXT, OK_BODY)
        before, descriptors = running.call(tasks()), psutil.Process().num_fds()
        storm = [
            threading.Thread(target=STATES[state], args=(target, reset)) for state in STATES for reset in (False, True) for _ in range(4)
        ]
        for thread in storm:
            thread.start()
        for thread in storm:
            thread.join()
        end = time.monotonic() + 20
        while time.monotonic() < end and (running.front.gate.inside or running.backend.live or running.call(tasks()) > before):
            time.sleep(0.05)
        assert running.front.gate.inside == 0
        assert not running.backend.live
        assert running.call(tasks()) <= before
        while time.monotonic() < end and psutil.Process().num_fds() > descriptors:
            time.sleep(0.05)
        assert psutil.Process().num_fds() <= descriptors


def test_row_30_aborts_that_come_late_or_twice(tokenizer: Tokenizer):
    with ServedFake(tokenizer) as running:
        for name in ("unknown", "", "cmpl-0"):
            for _ in range(2):
                running.call(running.backend.abort(name))
        assert Target(running.url).post(TEXT, OK_BODY).status_code == 200


def test_row_31_a_reader_that_stops_is_dropped_and_others_do_not_notice(impatient: Target):
    body = long_request(stream=True, n=8, logprobs=20, max_tokens=1500)
    with unharmed(impatient):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(impatient.address)
        connection.sendall(whole(impatient, body))
        impatient.settle()
        connection.close()
