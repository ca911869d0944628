"""The in-process Backend: joins the loop's thread to asyncio. Building one is `engine.build.open_engine`'s business."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Protocol

from novajax.core.clock import Clock
from novajax.core.errors import EngineFailed, InternalError, NovaError, Unavailable
from novajax.core.types import ModelCard, Phase, Request, Stats, Update
from novajax.engine.loop import Loop
from novajax.engine.runner import Runner
from novajax.engine.steptimes import StepTimes
from novajax.scheduler.scheduler import Scheduler


class Compilations(Protocol):
    """Counts what is compiled although everything should be."""

    @property
    def count(self) -> int: ...
    def close(self) -> None: ...


class _Stream:
    """Where one request's updates go: a queue on the event loop that submitted it."""

    __slots__ = ("events", "queue")

    def __init__(self) -> None:
        self.events = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Update | NovaError] = asyncio.Queue()


class Engine:
    """A ready engine. Owns the loop, the device memory and the compile counter; `close` frees them."""

    def __init__(
        self,
        card: ModelCard,
        scheduler: Scheduler,
        executor: Runner,
        clock: Clock,
        startup: dict[str, float],
        compilations: Compilations,
        times: StepTimes | None = None,
    ):
        self._card = card
        self._scheduler = scheduler
        self._executor = executor
        self._clock = clock
        self._startup = startup
        self._streams: dict[str, _Stream] = {}
        self._phase: Phase = "ready"
        self._detail = ""
        self._emptied: asyncio.Event | None = None
        """While draining: set when the last stream has ended."""
        self._compiled = compilations
        self._loop = Loop(scheduler, executor, clock=clock, publish=self._publish, failed=self._failed, times=times or StepTimes())
        self._loop.start()

    @property
    def busy(self) -> bool:
        """Whether work is unfinished; any thread may ask."""
        return self._loop.busy

    async def card(self) -> ModelCard:
        return self._card

    async def submit(self, request: Request) -> AsyncIterator[Update]:
        if self._phase != "ready":
            raise Unavailable(f"the engine is {self._phase}", retry_after_s=5)
        if request.id in self._streams:
            raise InternalError(f"request id {request.id} is already running")
        stream = self._streams[request.id] = _Stream()
        finished = False
        self._loop.post(partial(self._add, request))
        try:
            while not finished:
                item = await stream.queue.get()
                if isinstance(item, NovaError):
                    finished = True
                    raise item
                finished = item.finish_reason is not None
                yield item
        finally:
            self._streams.pop(request.id, None)
            if not self._streams and self._emptied is not None:
                self._emptied.set()
            if not finished:
                self._loop.post(partial(self._abort, request.id))

    async def abort(self, request_id: str) -> None:
        self._loop.post(partial(self._abort, request_id))

    async def stats(self) -> Stats:
        counted: dict[str, Any] = {**self._scheduler.stats()}
        times = self._loop.times
        return Stats(
            phase=self._phase,
            detail=self._detail,
            compilations_after_ready=self._compiled.count,
            host_step_s=times.host_step_s,
            step_phases_s=times.phases_s,
            device_busy=times.device_busy,
            pid=os.getpid(),
            startup=self._startup,
            **counted,
        )

    async def drain(self, grace_s: float) -> None:
        if self._phase == "ready":
            self._phase = "draining"
        self._emptied = asyncio.Event()
        if self._streams:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._emptied.wait(), grace_s)
        for request_id in list(self._streams):
            await self.abort(request_id)

    async def close(self) -> None:
        if self._phase == "failed" and self._detail == "closed":
            return
        self._loop.stop()
        self._failed(EngineFailed("closed"))
        self._loop.times.close()
        self._executor.close()
        self._compiled.close()

    def _add(self, request: Request) -> None:
        """On the loop's thread: a refusal goes to this request alone."""
        try:
            self._scheduler.add(request, self._clock.now_s())
        except NovaError as error:
            self._deliver(request.id, error)
        except Exception as error:
            self._deliver(request.id, InternalError(f"{type(error).__name__} while admitting this request"))

    def _abort(self, request_id: str) -> None:
        """On the loop's thread."""
        if (update := self._scheduler.abort(request_id, self._clock.now_s())) is not None:
            self._publish([update])

    def _publish(self, updates: list[Update]) -> None:
        """One call into each event loop for all of a step's updates: such a call costs more than what it carries."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Update]]] = {}
        for update in updates:
            if (stream := self._streams.get(update.request_id)) is not None:
                by_loop.setdefault(stream.events, []).append((stream, update))
        for events, items in by_loop.items():
            if not events.is_closed():
                events.call_soon_threadsafe(_put_all, items)

    def _deliver(self, request_id: str, item: Update | NovaError) -> None:
        if (stream := self._streams.get(request_id)) is not None and not stream.events.is_closed():
            stream.events.call_soon_threadsafe(stream.queue.put_nowait, item)

    def _failed(self, cause: NovaError) -> None:
        self._phase, self._detail = "failed", cause.message
        for request_id in list(self._streams):
            self._deliver(request_id, EngineFailed(f"the engine stopped: {cause.message}", retry_after_s=5))


def _put_all(items: list[tuple[_Stream, Update]]) -> None:
    for stream, update in items:
        stream.queue.put_nowait(update)
