"""A NovaJAX server as a process to be watched from outside: started, asked for its metrics, weighed, stopped.

Everything is read from /proc and /metrics, so what is measured is what an operator could see. Linux only.
"""

import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

_ROOT = Path(__file__).resolve().parent.parent
_STOP_S = 60.0


class Weight(msgspec.Struct, frozen=True, kw_only=True):
    """The front end and its children at one moment."""

    resident_bytes: dict[str, int]
    """By role: 'front' and 'engine'."""
    files: int
    """Open file descriptors of all of them."""
    threads: int

    @property
    def total_bytes(self) -> int:
        return sum(self.resident_bytes.values())


class Gauges(msgspec.Struct, frozen=True, kw_only=True):
    """What /metrics said."""

    running: float
    waiting: float
    pages: dict[str, float]
    """KV pages by state; they add up to the pool."""
    compilations: float
    identity_violations: float

    @property
    def idle(self) -> bool:
        return self.running == self.waiting == self.pages.get("held", 0) == 0


class ServedModel:
    """`python -m novajax.launch` on a free port, while entered. `url` is its address, `ready` its own ready line."""

    def __init__(self, model: str, arguments: list[str], start_s: float = 600.0):
        self._command = [sys.executable, "-m", "novajax.launch", f"--model={model}", "--port=0", "--json", *arguments]
        self._start_s = start_s
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as this object
        self.ready: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return self.ready["url"]

    def __enter__(self) -> Self:
        """Returns when it is ready. Raises RuntimeError with its last words otherwise."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=self._log, cwd=_ROOT)
        try:
            self.ready = self._read_ready(self._process)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def weigh(self) -> Weight:
        if self._process is None:
            raise RuntimeError("the server is not running")
        front = self._process.pid
        pids = {"front": front} | {("engine" if i == 0 else f"engine{i}"): pid for i, pid in enumerate(_children(front))}
        return Weight(
            resident_bytes={role: _resident_bytes(pid) for role, pid in pids.items()},
            files=sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids.values()),
            threads=sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids.values()),
        )

    def gauges(self) -> Gauges:
        """Raises httpx.HTTPError when the server does not answer."""
        text = httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False).raise_for_status().text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

        def total(name: str) -> float:
            return sum(sample.value for sample in samples if sample.name == f"novajax_{name}")

        return Gauges(
            running=total("num_requests_running"),
            waiting=total("num_requests_waiting"),
            pages={sample.labels["state"]: sample.value for sample in samples if sample.name == "novajax_kv_blocks"},
            compilations=total("xla_compilations_total"),
            identity_violations=total("kv_pool_identity_violations_total"),
        )

    def wait_idle(self, timeout_s: float) -> Gauges:
        """The gauges once nothing runs and no page is held, or as they are after timeout_s."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            gauges = self.gauges()
            if gauges.idle or time.monotonic() > deadline_s:
                return gauges
            time.sleep(0.2)

    def last_words(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:]

    def _read_ready(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        deadline_s = time.monotonic() + self._start_s
        if process.stdout is None:
            raise RuntimeError("the server has no output")
        while (left_s := deadline_s - time.monotonic()) > 0:
            if not select.select([process.stdout], [], [], min(left_s, 1.0))[0]:
                continue
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server ended with code {process.wait()}: {self.last_words()}")
            if line.lstrip().startswith(b"{"):
                return msgspec.json.decode(line, type=dict[str, Any])
        raise RuntimeError(f"the server was not ready after {self._start_s:.0f} s: {self.last_words()}")

    def _stop(self) -> None:
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return sorted(found)


def _resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))
