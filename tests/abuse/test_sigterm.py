"""Row 40: SIGTERM under load. Running streams finish, new requests are told to come back, and the process ends by itself."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from abuse_world import TEXT, Target, check_error

from novajax.text.tokenizer import Tokenizer

TOKENS = 60
ENDS_S = 60


@contextmanager
def launched(tokenizer: Tokenizer, step_s: float, drain_s: float) -> Iterator[tuple[subprocess.Popen[str], Target]]:
    script = Path(__file__).with_name("fake_launch.py")
    command = [sys.executable, str(script), str(tokenizer.directory), str(step_s), str(drain_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process, Target(f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.kill()


class Stream:
    """Reads one streamed answer in a thread; `begun` when its first event came."""

    def __init__(self, target: Target, tokens: int):
        self.target, self.tokens = target, tokens
        self.begun = threading.Event()
        self.events: list[str] = []
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        body = {"prompt": "a", "max_tokens": self.tokens, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", self.target.url + TEXT, json=body, timeout=ENDS_S) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))
                    self.begun.set()

    @property
    def text(self) -> str:
        return "".join(choice["text"] for event in self.events[:-1] for choice in json.loads(event)["choices"])


def start(target: Target, count: int, tokens: int) -> list[Stream]:
    streams = [Stream(target, tokens) for _ in range(count)]
    assert all(stream.begun.wait(ENDS_S) for stream in streams)
    return streams


def test_a_drain_finishes_streams_and_refuses_newcomers(tokenizer: Tokenizer):
    with launched(tokenizer, 0.05, 60) as (process, target):
        streams = start(target, 6, TOKENS)
        process.send_signal(signal.SIGTERM)
        while target.client.get("/ready").status_code != 503:
            pass
        refused = target.post(TEXT, {"prompt": "a", "max_tokens": 1})
        assert check_error(refused, {503})["code"] == "unavailable"
        assert int(refused.headers["retry-after"]) >= 1
        assert target.client.get("/health").json()["components"]["process"]["status"] == "draining"
        for stream in streams:
            stream.thread.join(ENDS_S)
            assert stream.events[-1] == "[DONE]"
            assert len(stream.text.encode("utf-8", "replace")) >= TOKENS
        assert process.wait(ENDS_S) == 0
        assert process.stderr
        assert "Traceback" not in process.stderr.read()


def test_what_takes_longer_than_the_grace_ends_with_an_error_event(tokenizer: Tokenizer):
    with launched(tokenizer, 0.05, 0.3) as (process, target):
        streams = start(target, 3, 2000)
        process.send_signal(signal.SIGTERM)
        assert process.wait(ENDS_S) == 0
        for stream in streams:
            stream.thread.join(ENDS_S)
            assert json.loads(stream.events[-1])["error"]["code"] == "unavailable"


def test_a_second_signal_does_not_wait(tokenizer: Tokenizer):
    with launched(tokenizer, 0.05, 3600) as (process, target):
        streams = start(target, 2, 2000)
        process.send_signal(signal.SIGTERM)
        while target.client.get("/ready").status_code != 503:
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(ENDS_S) == 0
        for stream in streams:
            stream.thread.join(ENDS_S)
            assert json.loads(stream.events[-1])["error"]["code"] == "unavailable"
