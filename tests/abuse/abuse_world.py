"""A server under attack and the common expectation: the same engine, ready, nothing left live, and a canary that never notices.

A `Target` is any running server: the served fake, or a real launch whose address NOVAJAX_TEST_URL (and key NOVAJAX_TEST_KEY) gives.
Everything is asked over HTTP, so the same tables run against both.
"""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import httpx

JSON = {"content-type": "application/json"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
_SETTLE_S = 30.0
_BREATH_S = 0.03
"""Between two songs of the canary."""
_LEAKED = ("Traceback", 'File "', "site-packages")


class Reply(NamedTuple):
    status: int
    """0: the connection was closed without one."""
    headers: str
    body: bytes
    closed: bool
    """The server closed the connection."""


class Target:
    """`patience_s`: how long the server may take to close a connection that stalls."""

    def __init__(self, url: str, key: str | None = None, patience_s: float = 30.0, *, fake: bool = False):
        self.fake = fake
        self.url, self.key, self.patience_s = url, key, patience_s
        self.address = (httpx.URL(url).host, httpx.URL(url).port or 80)
        self.headers = {} if key is None else {"authorization": f"Bearer {key}"}
        # Making a client costs more than a request, mostly for the TLS that is not used.
        self.client = httpx.Client(base_url=url, headers=self.headers, timeout=120, verify=False, limits=httpx.Limits(keepalive_expiry=0.3))

    def health(self) -> dict[str, Any]:
        return self.client.get("/health").json()

    def engine_pid(self) -> int:
        return self.health()["components"]["engine"]["pid"]

    def context_tokens(self) -> int:
        return self.client.get("/v1/models").json()["data"][0]["max_model_len"]

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """`body`: bytes as they are, anything else as JSON (with NaN and Infinity, as careless clients write it)."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(path, content=content, headers=JSON | headers)

    def raw(self, data: bytes, *, wait_s: float | None = None) -> Reply:
        """Sends bytes on a fresh connection and reads until the server closes it or wait_s is over."""
        with socket.create_connection(self.address, timeout=wait_s or self.patience_s) as connection:
            received, closed = bytearray(), False
            with suppress(OSError):  # refused while we were still sending; the reply may be there
                connection.sendall(data)
            try:
                while piece := connection.recv(65536):
                    received += piece
                closed = True
            except TimeoutError:
                pass
            except OSError:
                closed = True
        head, _, body = bytes(received).partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/") else 0
        return Reply(status, head.decode("latin-1").lower(), body, closed)

    def head(self, path: str, *extra: str) -> str:
        """The start of a raw JSON request, without the empty line that ends its headers."""
        key = [f"Authorization: Bearer {self.key}"] if self.key else []
        return "\r\n".join([f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *key, *extra]) + "\r\n"

    def live(self) -> float:
        """Sequences running or waiting, as the metrics tell."""
        lines = self.client.get("/metrics").text.splitlines()
        names = ("novajax_num_requests_running", "novajax_num_requests_waiting")
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names))

    def settle(self) -> None:
        """Waits until nothing is live; fails if something stays."""
        end = time.monotonic() + _SETTLE_S
        while (left := self.live()) and time.monotonic() < end:
            time.sleep(0.02)
        assert left == 0, f"{left} sequences are still live"


class Canary:
    """Asks the same question again and again in a thread of its own; the answer must never change."""

    def __init__(self, target: Target):
        self._target = target
        self._over = threading.Event()
        self.answers: list[str] = []
        self._thread = threading.Thread(target=self._sing)

    def ask(self) -> str:
        body = {"prompt": "once upon a time", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 1}
        answer = self._target.post(TEXT, body)
        assert answer.status_code == 200, answer.text
        return json.dumps(answer.json()["choices"])

    def _sing(self) -> None:
        while not self._over.is_set():
            try:
                self.answers.append(self.ask())
            except Exception as error:
                self.answers.append(repr(error))
            self._over.wait(_BREATH_S)

    def __enter__(self) -> "Canary":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@contextmanager
def unharmed(target: Target) -> Iterator[None]:
    """The common expectation around one row of the table."""
    pid = target.engine_pid()
    canary = Canary(target)
    song = canary.ask()
    with canary:
        yield
    assert canary.answers
    assert set(canary.answers) == {song}
    assert target.engine_pid() == pid
    assert target.client.get("/ready").status_code == 200
    target.settle()


def check_error(answer: httpx.Response, statuses: set[int]) -> dict[str, Any]:
    """The reply is an OpenAI error object of one of these statuses and tells no secrets; returns the error."""
    assert answer.status_code in statuses, f"{answer.status_code}: {answer.text[:300]}"
    assert not any(mark in answer.text for mark in _LEAKED), answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) <= 600
    return error


def check_finite(answer: httpx.Response) -> None:
    """An answer, then: no NaN or infinity anywhere in it."""
    assert answer.status_code == 200
    assert not any(word in answer.text for word in ("NaN", "Infinity"))
