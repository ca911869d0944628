"""One rank's process seen from its supervisor: started, listened to, killed. It dies with the supervisor.

Its standard input carries the assignment and then stays open as a lifeline; reports come back as JSON lines on a pipe of
its own. The end of the process is known at once, from waitpid.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

import msgspec

from novajax.cluster.settings import Report

MAX_LINE_BYTES = 1 << 20


class ChildProcess:
    """A Python program with a lifeline and a report pipe. `heard` gets each decoded report, `ended` the exit code, once."""

    def __init__[Line](self, heard: Callable[[Line], None], lines: type[Line], ended: Callable[[int], None]):
        self._heard = heard
        self._decoder = msgspec.json.Decoder(lines)
        self._ended = ended
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, arguments: Sequence[str], first_line: bytes, environment: Mapping[str, str] = {}) -> None:
        """Raises OSError if the interpreter cannot be started."""
        reading, writing = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                f"--report_fd={writing}",
                stdin=asyncio.subprocess.PIPE,
                pass_fds=(writing,),
                env=dict(environment) or None,
                start_new_session=True,  # the terminal's Ctrl-C is for the front end, which drains first
            )
        finally:
            os.close(writing)
        reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb"))
        self._tasks = [asyncio.create_task(self._read(reader)), asyncio.create_task(self._wait(self._process))]
        if self._process.stdin is not None:
            self._process.stdin.write(first_line + b"\n")

    def terminate(self) -> None:
        """Asks it to end in order."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it, also when it is stopped. Idempotent."""
        self._signal(signal.SIGKILL)

    async def wait(self) -> None:
        """Until it has ended and its end was told."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ValueError, msgspec.MsgspecError):  # a line too long or unknown: it is judged by its silence
            while line := await reader.readline():
                self._heard(self._decoder.decode(line))

    async def _wait(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        self._ended(code)


def rank_process(heard: Callable[[Report], None], ended: Callable[[int], None]) -> ChildProcess:
    return ChildProcess(heard, Report, ended)  # type: ignore[arg-type]


def process_state(pid: int | None) -> str:
    """The kernel's letter: R running, S sleeping, D in the kernel, T stopped, Z dead; '' if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return ""
