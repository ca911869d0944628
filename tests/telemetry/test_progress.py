import io
import threading
import time

import pytest

from novajax.telemetry.progress import Progress, Silent, quantity, seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_come_at_intervals_and_a_closing_line_always():
    out = io.StringIO()
    with Progress(100, "lines", "batch", stream=out, every_s=0.05) as progress:
        progress.advance(25)
        progress.note("part 1")
        time.sleep(0.2)
        progress.advance(75)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("batch: 25 of 100 lines, 25 %, ")
    assert lines[0].endswith("left; part 1")
    assert lines[-1].startswith("batch: 100 lines in ")


def test_short_work_prints_one_line_only():
    out = io.StringIO()
    with Progress(None, "B", "load", stream=out) as progress:
        progress.advance(1_500_000)
    assert len(out.getvalue().splitlines()) == 1
    assert out.getvalue().startswith("load: 1.5 MB in ")


def test_an_error_is_told_and_passes_through():
    out = io.StringIO()
    with pytest.raises(KeyError):
        with Progress(10, "programs", "compile", stream=out) as progress:
            progress.advance(3)
            raise KeyError
    assert out.getvalue().startswith("compile: stopped at 3 of 10 programs after ")


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with Progress(4, "programs", "compile", stream=out) as progress:
        progress.advance(2)
        time.sleep(0.3)
        progress.advance(2)
    shown = out.getvalue()
    assert "2 of 4 programs" in shown
    assert "\x1b[9" not in shown, "NO_COLOR leaves no colour codes"
    assert shown.splitlines()[-1].endswith("each)") or "/s)" in shown.splitlines()[-1]


def test_no_advance_is_lost_between_threads():
    out = io.StringIO()
    with Progress(8000, "steps", "count", stream=out) as progress:
        threads = [threading.Thread(target=lambda: [progress.advance() for _ in range(1000)]) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert out.getvalue().startswith("count: 8,000 steps in ")


def test_silent_is_a_reporter():
    with Silent(3, "B", "x") as progress:
        progress.advance(1)
        progress.note("y")


def test_words():
    assert [quantity(n, "B") for n in (0, 999, 1500, 2.5e9, 250e9, 3e12)] == ["0 B", "999 B", "1.5 kB", "2.5 GB", "250 GB", "3.0 TB"]
    assert [quantity(n, "rows") for n in (3, 1234, 0.5)] == ["3 rows", "1,234 rows", "0.5 rows"]
    assert [seconds(s) for s in (0.123, 4.56, 12.3, 75, 7500)] == ["0.12 s", "4.6 s", "12 s", "1 min 15 s", "2 h 05 min"]
