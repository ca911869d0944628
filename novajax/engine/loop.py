"""The engine's heartbeat: plan, dispatch, collect, commit, publish, on one thread that owns scheduler and executor.

Plan N+1 is dispatched before the result of N is read; the scheduler says when to stop and collect. With pipeline stages a plan's
result leaves some ticks after the plan entered. Other threads talk to the loop only by `post`, and read only its times and
`busy`. A request that cannot be planned fails alone; an error of the device ends the loop and every request in it.
"""

import queue
import statistics
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
from novajax.scheduler.scheduler import Scheduler

HOST_TIMES = 512
"""Steps over which the host time is a median."""


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
    ):
        self.scheduler = scheduler
        self._executor = executor
        self._clock = clock
        self._publish = publish
        self._failed = failed
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._host_s: deque[float] = deque(maxlen=HOST_TIMES)
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
    def host_step_s(self) -> float | None:
        """Median host time of the last steps: plan, pack, dispatch, commit, publish; without waiting for the device."""
        recent = list(self._host_s)
        return statistics.median(recent) if recent else None

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
                began = time.perf_counter()
                while (plan := self.scheduler.plan(self._clock.now_s())) is not None:
                    if (leaving := self._executor.dispatch(plan)) is not None:
                        pending.append(leaving)
                if news := self.scheduler.news():
                    self._publish(news)
                host_s = time.perf_counter() - began
                if pending:
                    result = self._executor.collect(pending.popleft())
                    began = time.perf_counter()
                    self._commit(result)
                    self._host_s.append(host_s + time.perf_counter() - began)
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

    def _commit(self, result: Landed) -> None:
        self.steps += 1
        self._last_step_s = self._clock.now_s()
        updates = self.scheduler.commit(result.number, result.tokens, result.prompt_logprobs, self._clock.now_s())
        if updates:
            self._publish(updates)

    def _check(self) -> None:
        if violations := self.scheduler.check():
            structlog.get_logger().error("page identity violated", violations=violations)
