"""The engine's loop over a device of plain Python that may have pipeline stages. No jax: `engine.loop` needs only a Runner."""

import queue
import threading
from collections import deque
from typing import Any, NamedTuple

import pytest

from novajax.core.errors import NovaError
from novajax.core.types import Request, SamplingParams, Update
from novajax.engine.loop import Loop
from novajax.engine.steptimes import StepTimes
from novajax.kv.manager import KVManager
from novajax.scheduler.admission import Limits
from novajax.scheduler.budget import Shapes
from novajax.scheduler.plan import StepPlan, TokenResult
from novajax.scheduler.scheduler import Scheduler

SHAPES = Shapes(decode=(4,), prefill=((1, 8),), step_tokens=16)


class Landed(NamedTuple):
    number: int
    tokens: dict[int, TokenResult]
    prompt_logprobs: dict[int, Any]


class Line:
    """A device whose plans leave `stages` - 1 ticks after they entered; every token it draws is the position's number."""

    def __init__(self, stages: int):
        self._inside: deque[StepPlan] = deque()
        self._stages = stages
        self.gate = threading.Semaphore(0)  # one result leaves for each permit

    def dispatch(self, plan: StepPlan) -> StepPlan | None:
        self._inside.append(plan)
        if len(self._inside) < self._stages:
            return None
        leaving = self._inside.popleft()
        return None if leaving.bubble else leaving

    def collect(self, pending: StepPlan) -> Landed:
        self.gate.acquire()
        found = {row.slot: row.position + 1 for row in pending.decode}
        found |= {row.slot: row.start + len(row.tokens) for row in pending.prefill if row.last}
        return Landed(pending.number, {slot: TokenResult((token,)) for slot, token in found.items()}, {})

    def close(self) -> None: ...


class Ticks:
    """A clock that goes on by one each time it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def now_s(self) -> float:
        self.reads += 1
        return float(self.reads)


@pytest.mark.parametrize("stages", [1, 3])
def test_plans_go_in_and_what_leaves_the_pipeline_is_committed(stages):
    limits = Limits(vocab_size=64, max_context_tokens=32, max_sequences=4, stages=stages, in_flight=stages + 1)
    scheduler = Scheduler(limits, SHAPES, [KVManager(32, 4, key=b"k")])
    line, updates, failures = Line(stages), queue.SimpleQueue[list[Update]](), list[NovaError]()
    loop = Loop(scheduler, line, clock=Ticks(), publish=updates.put, failed=failures.append, times=StepTimes())
    assert not loop.busy
    loop.start()
    began_s = loop.last_step_s
    request = Request(id="a", prompt=(5, 6, 7), sampling=SamplingParams(max_tokens=4))
    loop.post(lambda: scheduler.add(request, 0.0))
    line.gate.release()
    assert updates.get(timeout=10)[0].tokens == (3,)
    assert loop.busy
    assert loop.last_step_s > began_s
    line.gate.release(100)
    tokens = [update.tokens[0] for _ in range(3) for update in updates.get(timeout=10)]
    assert tokens == [4, 5, 6]
    idle = threading.Event()
    loop.post(idle.set)
    assert idle.wait(10)
    loop.stop()
    assert not loop.busy
    assert loop.steps == 4
    assert failures == []
