"""The whole server as a user starts it: one process tree, a killed engine, signals, refusals that end a start."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench.served import ServedModel

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "checkpoints" / "nova-small")
FLAGS = ["--max_rows=4", "--max_context_tokens=512"]
WAIT_S = 120.0


def stream(url: str, results: list[list[str]], started: threading.Event, tokens: int = 400) -> None:
    """Collects the SSE data lines of one long completion."""
    body = {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    lines: list[str] = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=WAIT_S) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                lines.append(line.removeprefix("data: "))
                started.set()
    results.append(lines)


def text_of(lines: list[str]) -> str:
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines if line != "[DONE]" and json.loads(line)["choices"])


def until(what, wait_s: float = WAIT_S) -> None:
    deadline_s = time.monotonic() + wait_s
    while not what():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.05)


def engine_pid(url: str) -> int | None:
    return httpx.get(f"{url}/health").json()["components"]["engine"]["pid"]


def ready(url: str) -> bool:
    return httpx.get(f"{url}/ready").status_code == 200


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def served() -> Iterator[ServedModel]:
    with ServedModel(MODEL, [*FLAGS, "--drain_s=20"]) as running:
        yield running


def test_a_killed_engine_comes_back_and_its_streams_go_on(served: ServedModel):
    url, results, started = served.url, [], threading.Event()
    stream(url, results, started)
    assert results[0][-1] == "[DONE]"
    first_pid = engine_pid(url)
    assert first_pid is not None
    started.clear()
    client = threading.Thread(target=stream, args=(url, results, started))
    client.start()
    assert started.wait(WAIT_S)
    os.kill(first_pid, signal.SIGKILL)
    until(lambda: not ready(url), 10)
    health = httpx.get(f"{url}/health")
    assert (health.status_code, health.json()["status"]) == (200, "restarting")
    while not ready(url):
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
        assert refused.status_code in (200, 503)
        if refused.status_code == 503:
            assert refused.json()["error"]["code"] == "unavailable"
            assert int(refused.headers["retry-after"]) >= 1
        time.sleep(0.1)
    client.join(WAIT_S)
    assert text_of(results[1]) == text_of(results[0])
    assert results[1][-1] == "[DONE]"
    assert engine_pid(url) not in (None, first_pid)
    metrics = httpx.get(f"{url}/metrics").text
    assert 'novajax_engine_restarts_total{model_name="nova-small",reason="exit"} 1.0' in metrics


def test_sigterm_drains_and_leaves_nothing(served: ServedModel):
    results, started = [], threading.Event()
    client = threading.Thread(target=stream, args=(served.url, results, started, 300))
    client.start()
    assert started.wait(WAIT_S)
    pid = served.ready["pid"]
    assert served._process is not None
    served._process.send_signal(signal.SIGTERM)
    client.join(WAIT_S)
    assert results[0][-1] == "[DONE]"
    assert served._process.wait(WAIT_S) == 0
    assert not alive(pid)


def test_a_killed_front_end_takes_its_engine_along(served: ServedModel):
    pid = served.ready["pid"]
    assert served._process is not None
    served._process.kill()
    served._process.wait()
    until(lambda: not alive(pid), 10)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=/nowhere"], "/nowhere"),
        ([f"--model={MODEL}", "--host=0.0.0.0"], "API key"),
        ([f"--model={MODEL}", "--kv_bytes=900Ti"], "does not fit"),
        ([f"--model={MODEL}", "--kv_bytes=lots"], "lots"),
        ([f"--model={MODEL}", "--max_context_tokens=1000000"], "max_context_tokens"),
        ([f"--model={MODEL}", "--dtype=bfloat16", "--native_kernels=off"], "bfloat16"),
        ([f"--model={MODEL}", "--config=/nowhere.yaml"], "/nowhere.yaml"),
        ([], "no model"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(flags: list[str], message: str):
    command = [sys.executable, "-m", "novajax.launch", "--port=0", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, cwd=ROOT)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_taken_port_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "novajax.launch", f"--model={MODEL}", f"--port={taken.getsockname()[1]}"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, cwd=ROOT)
    assert ended.returncode == 2
    assert "cannot listen" in ended.stderr


def test_unknown_keys_of_a_configuration_are_refused_by_path(tmp_path: Path):
    for text, named in (("engine: {modle: x}", "modle"), ("engine: {max_rows: 0}", "max_rows"), ("sever: {}", "sever"), ("a: [", "yaml")):
        file = tmp_path / "c.yaml"
        file.write_text(text)
        command = [sys.executable, "-m", "novajax.launch", f"--config={file}", f"--model={MODEL}"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, cwd=ROOT)
        assert ended.returncode == 2
        assert named in ended.stderr
