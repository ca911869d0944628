"""A rank's progress on its way to the supervisor: counters that the working threads move, and one thread that writes them down.

The thread proves nothing by speaking; the supervisor judges the counters. When the supervisor is gone, so is this process:
its end closes both pipes, and either thread ends the process at once.
"""

import os
import threading
from collections.abc import Callable

import msgspec

from novajax.cluster.settings import Alive, Fault
from novajax.core.types import Phase

REPORT_S = 0.25
ORPHANED = 5
"""Exit code of a rank whose supervisor went away."""


class Tally:
    """Counters of one epoch; each is written by one thread. `busy` tells whether completions are owed."""

    def __init__(self) -> None:
        self.phase: Phase = "starting"
        self.detail = ""
        self.dispatched = 0
        self.completed = 0
        self.busy: Callable[[], bool] = lambda: False

    def alive(self) -> Alive:
        return Alive(self.phase, self.detail, self.dispatched, self.completed, self.busy())


class Reporter:
    """Owns the write end of the report pipe. Without one (fd None) it says nothing."""

    def __init__(self, tally: Tally, fd: int | None):
        self._tally = tally
        self._fd = fd
        self._poked = threading.Event()
        self._writing = threading.Lock()
        if fd is not None:
            threading.Thread(target=self._run, name="reporter", daemon=True).start()

    def phase(self, phase: Phase, detail: str = "") -> None:
        """Tells the phase now."""
        self._tally.phase, self._tally.detail = phase, detail
        self._poked.set()

    def fault(self, fault: Fault) -> None:
        """Tells that the group cannot go on; any thread."""
        self._write(fault)

    def _run(self) -> None:
        while True:
            self._write(self._tally.alive())
            self._poked.wait(REPORT_S)
            self._poked.clear()

    def _write(self, report: Alive | Fault) -> None:
        if self._fd is None:
            return
        line = memoryview(msgspec.json.encode(report) + b"\n")
        with self._writing:
            try:
                while line:
                    line = line[os.write(self._fd, line) :]
            except OSError:
                os._exit(ORPHANED)


def die_with_pipe(fd: int) -> None:
    """Ends this process when the other end of a pipe, held by the parent, is closed: by will or by death."""

    def wait() -> None:
        while os.read(fd, 4096):
            pass
        os._exit(ORPHANED)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
