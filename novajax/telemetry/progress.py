"""How long work shows that it moves: a bar on a terminal, a plain line every few seconds anywhere else.

Invariants: `advance` and `note` are cheap and may be called from any thread; nothing is printed for work that ends at once
unless it is on a terminal; the closing line always says how much, how long and how fast. NO_COLOR and TERM are honoured
by rich. It does not know what is counted: bytes ("B") are shown in decimal units, everything else by its own name.
"""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TextIO

PLAIN_EVERY_S = 5.0
"""Seconds between plain lines."""


class Reporter(Protocol):
    """What a worker needs of a progress display; `Progress` and `Silent` are two."""

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...
    def advance(self, amount: float = 1) -> None: ...
    def note(self, text: str) -> None: ...


Report = Callable[[float | None, str, str], Reporter]
"""(total, unit, label) -> Reporter: how code that does the work is told where to show it."""


class Progress:
    """A display of `total` units of work (None: unknown), named `label`.

    with Progress(12_000_000_000, "B", "load weights") as progress:
        progress.advance(n)            # n more units are done
        progress.note("layer 3")       # what is being worked on now
    """

    def __init__(self, total: float | None, unit: str, label: str, *, stream: TextIO | None = None, every_s: float = PLAIN_EVERY_S):
        self._total, self._unit, self._label = total, unit, label
        self._stream = sys.stderr if stream is None else stream
        self._every_s = every_s
        self._done, self._note = 0.0, ""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._ticker: threading.Thread | None = None
        self._live = None
        self._start_s = 0.0

    def __enter__(self) -> Self:
        self._start_s = time.monotonic()
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            # What others print meanwhile goes above the bar, but a piped stdout must stay on stdout.
            self._live = Live(
                console=Console(file=self._stream),
                get_renderable=self._bar,
                refresh_per_second=8,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        else:
            self._ticker = threading.Thread(target=self._tick, name=f"progress: {self._label}", daemon=True)
            self._ticker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._ticker is not None:
            self._ticker.join()
        if self._live is not None:
            self._live.stop()
        self._print(self.summary() if kind is None else f"{self._label}: stopped at {self._amounts()} after {seconds(self._elapsed())}")

    def advance(self, amount: float = 1) -> None:
        with self._lock:
            self._done += amount

    def note(self, text: str) -> None:
        self._note = text

    def summary(self) -> str:
        """The closing line: "load weights: 2.1 GB in 1.4 s (1.5 GB/s)"."""
        elapsed_s = self._elapsed()
        return f"{self._label}: {quantity(self._done, self._unit)} in {seconds(elapsed_s)} ({self._rate(elapsed_s)})"

    def line(self) -> str:
        """The state in one plain line: "load weights: 1.2/2.1 GB, 57 %, 1.5 GB/s, 0.6 s left; layer 3"."""
        elapsed_s = self._elapsed()
        parts = [f"{self._label}: {self._amounts()}"]
        if self._total:
            parts.append(f"{100 * self._done / self._total:.0f} %")
        parts.append(self._rate(elapsed_s) if self._done else f"{seconds(elapsed_s)} so far")
        left_s = self._left(elapsed_s)
        if left_s is not None:
            parts.append(f"{seconds(left_s)} left")
        return ", ".join(parts) + (f"; {self._note}" if self._note else "")

    def _elapsed(self) -> float:
        return time.monotonic() - self._start_s

    def _left(self, elapsed_s: float) -> float | None:
        if not self._total or not 0 < self._done < self._total:
            return None
        return elapsed_s * (self._total - self._done) / self._done

    def _rate(self, elapsed_s: float) -> str:
        per_s = self._done / max(elapsed_s, 1e-9)
        if self._unit == "B" or per_s >= 1 or not self._done:
            return f"{quantity(per_s, self._unit)}/s"
        return f"{seconds(1 / per_s)} each"

    def _amounts(self) -> str:
        if self._total is None:
            return quantity(self._done, self._unit)
        done = quantity(self._done, self._unit)
        return f"{done if self._unit == 'B' else done.removesuffix(' ' + self._unit)} of {quantity(self._total, self._unit)}"

    def _tick(self) -> None:
        while not self._stop.wait(self._every_s):
            self._print(self.line())

    def _print(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _bar(self):
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head, _, rest = self.line().partition(": ")
        grid = Table.grid(padding=(0, 1))
        grid.add_row(Text(head), ProgressBar(total=self._total or None, completed=self._done, width=24, pulse=not self._total), Text(rest))
        return grid


class Silent:
    """A Reporter that shows nothing; its class is a `Report`."""

    def __init__(self, total: float | None = None, unit: str = "", label: str = ""):
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def advance(self, amount: float = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def quantity(amount: float, unit: str) -> str:
    """ "1.5 GB" for bytes ("B"), "1,234 lines" for whole counts, "2.4 lines" for small fractions."""
    if unit == "B":
        for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if amount >= factor:
                return f"{amount / factor:.{1 if amount < 100 * factor else 0}f} {prefix}B"
        return f"{amount:.0f} B"
    shown = f"{amount:,.0f}" if amount >= 100 or amount == int(amount) else f"{amount:.1f}"
    return f"{shown} {unit}"


def seconds(duration_s: float) -> str:
    """ "0.42 s", "12 s", "3 min 05 s", "2 h 07 min"."""
    if duration_s < 10:
        return f"{duration_s:.2g} s" if duration_s < 1 else f"{duration_s:.1f} s"
    if duration_s < 60:
        return f"{duration_s:.0f} s"
    minutes, rest_s = divmod(round(duration_s), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
