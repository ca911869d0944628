"""The engine's heartbeat: plan, dispatch, collect, commit, publish, on one thread that owns scheduler and executor.

Plan N+1 is dispatched before the result of N is read, up to `in_flight` plans. Other threads talk to it only by `post`.
A request that cannot be planned fails alone; an error of the device ends the loop and every request in it.
"""

import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable

import structlog

from novajax.core.clock import Clock
from novajax.core.errors import EngineFailed, NovaError
from novajax.core.types import Update
from novajax.engine.executor import Executor, Pending, StepResult
from novajax.scheduler.scheduler import Scheduler

HOST_TIMES = 512
"""Steps over which the host time is a median."""


class Loop:
    """See the module docstring. `publish` is called on the loop's thread with the updates of one step."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        in_flight: int,
        clock: Clock,
        publish: Callable[[list[Update]], None],
        failed: Callable[[NovaError], None],
    ):
        self.scheduler = scheduler
        self._executor = executor
        self._in_flight = in_flight
        self._clock = clock
        self._publish = publish
        self._failed = failed
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._host_s: deque[float] = deque(maxlen=HOST_TIMES)
        self.steps = 0
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

    def _run(self) -> None:
        pending: deque[Pending] = deque()
        try:
            while not self._stopping.is_set():
                self._take_posts(wait=not pending and not self.scheduler.has_work)
                began = time.perf_counter()
                while len(pending) < self._in_flight and (plan := self.scheduler.plan(self._clock.now_s())) is not None:
                    pending.append(self._executor.dispatch(plan))
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

    def _take_posts(self, *, wait: bool) -> None:
        try:
            work = self._inbox.get(block=wait)
            while True:
                work()
                work = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _commit(self, result: StepResult) -> None:
        self.steps += 1
        updates = self.scheduler.commit(result.number, result.tokens, result.prompt_logprobs, self._clock.now_s())
        if updates:
            self._publish(updates)

    def _check(self) -> None:
        if violations := self.scheduler.check():
            structlog.get_logger().error("page identity violated", violations=violations)
