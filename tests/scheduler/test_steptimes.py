"""Where a step's time goes, from times that are given."""

import json
from pathlib import Path

import pytest

from novajax.core.errors import ConfigError
from novajax.engine.steptimes import StepTimes


def two_ahead(times: StepTimes, steps: int) -> None:
    """Each step: plan 1 s, dispatch 2 s, commit 1 s, publish 1 s; the device needs 8 s and is always given the next one in time."""
    now_s = 100.0
    for number in range(steps):
        times.span("plan", number, now_s, now_s + 1)
        times.span("dispatch", number, now_s + 1, now_s + 3)
        if number:
            times.landed(number - 1, now_s + 8)
            times.span("commit", number - 1, now_s + 8, now_s + 9)
            times.span("publish", number - 1, now_s + 9, now_s + 10)
            times.stepped()
        now_s += 10


def test_medians_and_the_busy_share():
    times = StepTimes()
    assert (times.host_step_s, times.device_busy, times.phases_s) == (None, None, {})
    two_ahead(times, 20)
    assert times.phases_s == {"plan": 1, "dispatch": 2, "device": 10, "commit": 1, "publish": 1}
    assert times.host_step_s == 5
    assert times.device_busy == 1


def test_a_device_that_waits_is_not_busy():
    times = StepTimes()
    for number in range(10):
        times.span("dispatch", number, 10.0 * number, 10.0 * number + 1)
        times.landed(number, 10.0 * number + 3)
    assert times.device_busy == pytest.approx(10 * 2 / 92)


def test_a_bubble_is_forgotten():
    times = StepTimes()
    times.span("dispatch", 0, 0, 1)
    times.span("dispatch", 1, 1, 2)
    times.landed(1, 5)
    times.landed(0, 6)
    assert times.phases_s["device"] == pytest.approx((3 + 0) / 2)


def test_a_trace_that_a_profiler_opens(tmp_path: Path):
    path = tmp_path / "trace.json"
    times = StepTimes(str(path))
    two_ahead(times, 3)
    times.close()
    events = json.loads(path.read_bytes())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["name"] for event in spans} == {"plan", "dispatch", "device", "commit", "publish"}
    assert [event["args"]["step"] for event in spans if event["name"] == "device"] == [0, 1]
    assert all(event["dur"] > 0 for event in spans)
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"host", "device"}
    with pytest.raises(ConfigError, match="there is no folder"):
        StepTimes(str(tmp_path / "nowhere" / "trace.json"))
