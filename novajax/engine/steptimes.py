"""Where the time of each step goes, as the loop's thread sees it: plan, dispatch (pack, upload, enqueue), device, commit, publish.

The device works on a step from the moment it was enqueued, or the step before it was done, until its result is home; a host that comes
late for a result makes that time look longer than it was. Times are seconds of `time.perf_counter`. One thread writes; others may read.
"""

import statistics
from collections import deque
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from novajax.core.errors import ConfigError

Phase = Literal["plan", "dispatch", "device", "commit", "publish"]
PHASES: tuple[Phase, ...] = get_args(Phase)
HELD = 512
"""Steps that figures are made from."""
TRACED = 100_000
"""Spans of a trace: the last ones."""


class StepTimes:
    """See the module docstring."""

    def __init__(self, trace_file: str = ""):
        """trace_file: where `close` writes the last spans in Chrome's trace format (Perfetto reads it); "": nowhere. Raises ConfigError for
        a folder that is not there."""
        if trace_file and not Path(trace_file).absolute().parent.is_dir():
            raise ConfigError(f"trace_file: there is no folder {Path(trace_file).absolute().parent}", param="trace_file")
        self._file = trace_file
        self._recent: dict[Phase, deque[float]] = {phase: deque(maxlen=HELD) for phase in PHASES}
        self._host: deque[float] = deque(maxlen=HELD)
        self._busy: deque[tuple[float, float]] = deque(maxlen=HELD)
        self._enqueued: dict[int, float] = {}
        self._done_s = 0.0
        self._host_now_s = 0.0
        self._trace: deque[tuple[Phase, int, float, float]] = deque(maxlen=TRACED if trace_file else 0)

    def span(self, phase: Phase, number: int, began_s: float, ended_s: float) -> None:
        """The host did this for step `number`."""
        self._recent[phase].append(ended_s - began_s)
        self._host_now_s += ended_s - began_s
        self._trace.append((phase, number, began_s, ended_s))
        if phase == "dispatch":
            self._enqueued[number] = ended_s

    def landed(self, number: int, at_s: float) -> None:
        """The result of step `number` is home."""
        began_s = max(self._done_s, self._enqueued.pop(number, at_s))
        for older in [each for each in self._enqueued if each < number]:  # bubbles: nothing comes of them
            del self._enqueued[older]
        self._done_s = at_s
        self._busy.append((began_s, at_s))
        self._recent["device"].append(at_s - began_s)
        self._trace.append(("device", number, began_s, at_s))

    def stepped(self) -> None:
        """A step was committed and published: what the host did since the last one is its host time."""
        self._host.append(self._host_now_s)
        self._host_now_s = 0.0

    @property
    def host_step_s(self) -> float | None:
        """Median host time of the last steps, without waiting for the device."""
        recent = list(self._host)
        return statistics.median(recent) if recent else None

    @property
    def phases_s(self) -> dict[str, float]:
        """Median seconds by phase of the last steps; a phase that did not happen yet is absent."""
        return {phase: statistics.median(recent) for phase in PHASES if (recent := list(self._recent[phase]))}

    @property
    def device_busy(self) -> float | None:
        """Share of the time of the last steps in which the device worked; None before there are two."""
        spans = list(self._busy)
        if len(spans) < 2 or spans[-1][1] <= spans[0][0]:
            return None
        return sum(ended - began for began, ended in spans) / (spans[-1][1] - spans[0][0])

    def close(self) -> None:
        """Writes the trace where one is wanted."""
        if self._file:
            Path(self._file).write_bytes(
                msgspec.json.encode({"traceEvents": [*_NAMES, *map(_event, self._trace)], "displayTimeUnit": "ms"})
            )
            self._file = ""


_NAMES = [
    {"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": name}} for tid, name in enumerate(("host", "device"), start=1)
]


def _event(span: tuple[Phase, int, float, float]) -> dict[str, Any]:
    phase, number, began_s, ended_s = span
    times = {"ts": began_s * 1e6, "dur": (ended_s - began_s) * 1e6}
    return {"ph": "X", "name": phase, "pid": 1, "tid": 2 if phase == "device" else 1, "args": {"step": number}} | times
