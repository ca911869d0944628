"""The engine's heartbeat: plan, dispatch, collect, commit, publish, on one thread that owns scheduler and executor.

Plan N+1 is dispatched before the result of N is read; the scheduler says when to stop and collect. With pipeline stages a plan's
result leaves some ticks after the plan entered. Other threads talk to the loop only by `post`, and read only its times and
`busy`. A request that cannot be planned fails alone; an error of the device ends the loop and every request in it.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import structlog

from novajax.core.clock import Clock
from novajax.core.errors import EngineFailed, NovaError
from novajax.core.heap import REST_S, give_back
from novajax.core.types import Update
from novajax.engine.runner import Landed, Runner
from novajax.engine.steptimes import StepTimes
from novajax.scheduler.scheduler import Scheduler


class Loop:
    """See the module docstring. `publish` is called on the loop's thread with the updates of one step."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Runner,
        *,
        clock: Clock,
        publish: Callable[[list[Update]], None],
        failed: Callable[[NovaError], None],
        times: StepTimes,
    ):
        self.scheduler = scheduler
        self._executor = executor
        self._clock = clock
        self._publish = publish
        self._failed = failed
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self.times = times
        self.steps = 0
        self._last_step_s = clock.now_s()
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, work: Callable[[], None]) -> None:
        """Runs `work` on the loop's thread between two steps."""
        self._inbox.put(work)

    def stop(self) -> None:
        """Ends the loop after the step in flight and waits for its thread."""
        self._stopping.set()
        self.post(lambda: None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def last_step_s(self) -> float:
        """When the last step was committed, or when the loop last had nothing to do, on the loop's clock. Any thread may read it.

        While `busy`, its age is how long no step has come home: what a supervisor bounds. While not busy its age means nothing.
        """
        return self._last_step_s

    @property
    def busy(self) -> bool:
        """Whether requests or plans are unfinished. Any thread may read it; who reads True finds a `last_step_s` that is
        not older than the work. It stays True when the loop failed with work left."""
        return self._busy

    def _run(self) -> None:
        pending: deque[Any] = deque()
        try:
            while not self._stopping.is_set():
                self._take_work(pending)
                self._dispatch(pending)
                if news := self.scheduler.news():
                    self._publish(news)
                if pending:
                    result = self._executor.collect(pending.popleft())
                    self.times.landed(result.number, time.perf_counter())
                    self._commit(result)
                elif not self.scheduler.has_work:
                    self._check()
        except Exception as error:
            structlog.get_logger().exception("the engine loop failed")
            cause = error if isinstance(error, NovaError) else EngineFailed(f"{type(error).__name__} in step {self.steps}")
            self._failed(cause)

    def _take_work(self, pending: deque[Any]) -> None:
        """Runs what was posted; waits for a post when there is nothing else to do."""
        idle = not pending and not self.scheduler.has_work
        if idle:
            self._busy = False
        self._take_posts(wait=idle)
        if idle:
            self._last_step_s = self._clock.now_s()  # before `busy`, see there
            self._busy = self.scheduler.has_work

    def _take_posts(self, *, wait: bool) -> None:
        try:
            work = self._next_post() if wait else self._inbox.get_nowait()
            while True:
                work()
                work = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _next_post(self) -> Callable[[], None]:
        try:
            return self._inbox.get(timeout=REST_S)
        except queue.Empty:
            give_back()
            return self._inbox.get()

    def _dispatch(self, pending: deque[Any]) -> None:
        """Plans and enqueues as far ahead as the scheduler likes."""
        began_s = time.perf_counter()
        while (plan := self.scheduler.plan(self._clock.now_s())) is not None:
            planned_s = time.perf_counter()
            if (leaving := self._executor.dispatch(plan)) is not None:
                pending.append(leaving)
            dispatched_s = time.perf_counter()
            self.times.span("plan", plan.number, began_s, planned_s)
            self.times.span("dispatch", plan.number, planned_s, dispatched_s)
            began_s = dispatched_s

    def _commit(self, result: Landed) -> None:
        self.steps += 1
        self._last_step_s = self._clock.now_s()
        began_s = time.perf_counter()
        updates = self.scheduler.commit(result.number, result.tokens, result.prompt_logprobs, self._clock.now_s())
        committed_s = time.perf_counter()
        self.times.span("commit", result.number, began_s, committed_s)
        if updates:
            self._publish(updates)
            self.times.span("publish", result.number, committed_s, time.perf_counter())
        self.times.stepped()

    def _check(self) -> None:
        if violations := self.scheduler.check():
            structlog.get_logger().error("page identity violated", violations=violations)
