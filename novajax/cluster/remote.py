"""A Backend in another process: the same seam, spoken over a channel. `serve` is the engine's side, `RemoteBackend` the front's."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator

import msgspec

from novajax.cluster.channel import (
    Abort,
    AskStats,
    Channel,
    ChannelError,
    Drain,
    Drained,
    FromEngine,
    Hello,
    Refused,
    Submit,
    TellStats,
    ToEngine,
    Updates,
    same_user,
)
from novajax.cluster.settings import GroupStatus
from novajax.core.backend import Backend
from novajax.core.errors import EngineFailed, InternalError, NovaError, Unavailable, from_failure
from novajax.core.types import Failure, ModelCard, Phase, Request, Stats, Update

STATS_WAIT_S = 2.0


class BackendServer:
    """Offers a backend to whoever connects to a Unix socket as the same user. A connection's requests end with it.

    It listens before the backend exists, so that the peer sees the start's progress (`announce`).
    """

    def __init__(self) -> None:
        self._backend: Backend | None = None
        self._hello = Hello("starting")
        self._channels: set[Channel] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def listen(self, path: str) -> None:
        """Binds `path`, readable by this user only."""
        umask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._connected, path)
        finally:
            os.umask(umask)

    def announce(self, phase: Phase, detail: str = "", card: ModelCard | None = None) -> None:
        """Tells every peer, present and future, the engine's phase."""
        self._hello = Hello(phase, detail, card)
        for channel in self._channels:
            channel.send(self._hello)

    async def offer(self, backend: Backend) -> None:
        """From now on requests go to `backend`, which is ready."""
        self._backend = backend
        self.announce("ready", card=await backend.card())

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for channel in list(self._channels):
            await channel.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not same_user(writer, os.getuid()):
            writer.close()
            return
        channel = Channel(reader, writer, ToEngine)
        self._channels.add(channel)
        requests: dict[str, asyncio.Task[None]] = {}
        try:
            channel.send(self._hello)
            async for message in channel.receive():
                self._handle(channel, message, requests)
        except ChannelError as error:
            self._hello = Hello(self._hello.phase, error.message, self._hello.card)
        finally:
            self._channels.discard(channel)
            for task in requests.values():
                task.cancel()
            await asyncio.gather(*requests.values(), return_exceptions=True)
            await channel.close()

    def _handle(self, channel: Channel, message: Submit | Abort | AskStats | Drain, requests: dict[str, asyncio.Task[None]]) -> None:
        backend = self._backend
        if backend is None:
            if isinstance(message, Submit):
                channel.send(Refused(message.request.id, Unavailable(f"the engine is {self._hello.phase}").failure()))
            return
        match message:
            case Submit(request) if request.id in requests:
                channel.send(Refused(request.id, InternalError(f"request id {request.id} is already running").failure()))
            case Submit(request):
                # Eager, so that the backend knows the request before an abort that follows in the same breath.
                task = asyncio.Task(self._relay(backend, channel, request), loop=asyncio.get_running_loop(), eager_start=True)
                if not task.done():
                    requests[request.id] = task
                    task.add_done_callback(lambda _: requests.pop(request.id, None))
            case Abort(request_id):
                if request_id in requests:
                    self._spawn(backend.abort(request_id))
            case AskStats(number):
                self._spawn(self._tell_stats(backend, channel, number))
            case Drain(grace_s):
                self._spawn(self._drain(backend, channel, grace_s))

    def _spawn(self, work) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relay(self, backend: Backend, channel: Channel, request: Request) -> None:
        stream = backend.submit(request)
        try:
            async for update in stream:
                channel.send(Updates([update]))
        except NovaError as error:
            channel.send(Refused(request.id, error.failure()))
        except Exception as error:
            channel.send(Refused(request.id, InternalError(f"{type(error).__name__} while serving this request").failure()))
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    async def _tell_stats(self, backend: Backend, channel: Channel, number: int) -> None:
        channel.send(TellStats(number, await backend.stats()))

    async def _drain(self, backend: Backend, channel: Channel, grace_s: float) -> None:
        await backend.drain(grace_s)
        channel.send(Drained())


class RemoteBackend:
    """The Backend on the other side of a socket. Before `connect` and after a loss it says so in `stats` and refuses."""

    def __init__(self) -> None:
        self._channel: Channel | None = None
        self._reader: asyncio.Task[None] | None = None
        self._card: ModelCard | None = None
        self._known = asyncio.Event()
        self._phase: Phase = "starting"
        self._detail = ""
        self._streams: dict[str, asyncio.Queue[Update | Failure]] = {}
        self._asked: dict[int, asyncio.Future[Stats]] = {}
        self._numbers = itertools.count()
        self._drained = asyncio.Event()
        self._ready = asyncio.Event()
        self._group = GroupStatus(epoch=0, phase="starting")
        self.was_ready = False

    async def connect(self, path: str) -> None:
        """Connects to a listening engine; raises OSError while there is none. An older connection ends: its epoch is over."""
        reader, writer = await asyncio.open_unix_connection(path)
        old, self._channel = self._channel, Channel(reader, writer, FromEngine)
        if old is not None:
            self.lost("restarting" if self.was_ready else "starting", "another epoch began")
            await old.close()
        self._drained.clear()
        self._reader = asyncio.create_task(self._read(self._channel), name="remote-backend")

    def heard(self, status: GroupStatus) -> None:
        """The supervisor's word on the group. A new epoch ends the old one's requests here, whatever its leader still says."""
        began, self._group = status.epoch != self._group.epoch, status
        if began and self._ready.is_set():
            self.lost("restarting", status.detail)
        if not self._ready.is_set() and self._phase != "failed":
            self._phase, self._detail = status.phase if status.phase != "ready" else self._phase, status.detail

    async def until_ready(self) -> None:
        """Returns when requests are welcome, or will never be any more (`given_up`)."""
        await self._ready.wait()

    @property
    def given_up(self) -> bool:
        return self._phase == "failed"

    def lost(self, phase: Phase, detail: str) -> None:
        """The engine process ended: every open request gets one terminal error, new ones are refused until it is back."""
        self._phase, self._detail = phase, detail
        self._ready.clear()
        failure = EngineFailed(f"the engine stopped: {detail}", retry_after_s=5).failure()
        for queue in self._streams.values():
            queue.put_nowait(failure)
        for future in self._asked.values():
            if not future.done():
                future.cancel()
        self._drained.set()
        if phase == "failed":
            self._known.set()
            self._ready.set()

    async def card(self) -> ModelCard:
        await self._known.wait()
        if self._card is None:
            raise Unavailable(f"the engine failed: {self._detail}")
        return self._card

    async def submit(self, request: Request) -> AsyncIterator[Update]:
        channel = self._channel
        if channel is None or self._phase != "ready":
            raise Unavailable(f"the engine is {self._phase}", retry_after_s=5)
        queue: asyncio.Queue[Update | Failure] = asyncio.Queue()
        self._streams[request.id] = queue
        finished = False
        try:
            channel.send(Submit(request))
            while not finished:
                item = await queue.get()
                if isinstance(item, Failure):
                    finished = True
                    raise from_failure(item)
                finished = item.finish_reason is not None
                yield item
        finally:
            self._streams.pop(request.id, None)
            if not finished:
                channel.send(Abort(request.id))

    async def abort(self, request_id: str) -> None:
        if request_id in self._streams and self._channel is not None:
            self._channel.send(Abort(request_id))

    async def stats(self) -> Stats:
        stats = await self._ask_stats()
        group = self._group
        if stats.phase == "ready" and group.phase == "stuck":
            stats = msgspec.structs.replace(stats, phase="stuck", detail=group.detail)
        return msgspec.structs.replace(
            stats, epoch=group.epoch, components=group.components, restarts=group.restarts, recovery_s=group.recovery_s
        )

    async def _ask_stats(self) -> Stats:
        if self._channel is None or self._phase not in ("ready", "draining"):
            return Stats(phase=self._phase, detail=self._detail)
        number = next(self._numbers)
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._channel.send(AskStats(number))
            return await asyncio.wait_for(future, STATS_WAIT_S)
        except (TimeoutError, asyncio.CancelledError):
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            phase = "stuck" if self._ready.is_set() else self._phase
            return Stats(phase=phase, detail=f"the engine has not answered for {STATS_WAIT_S:g} s")
        finally:
            del self._asked[number]

    async def drain(self, grace_s: float) -> None:
        if self._channel is None or self._phase != "ready":
            return
        self._phase = "draining"
        self._channel.send(Drain(grace_s))
        await asyncio.wait([asyncio.ensure_future(self._drained.wait())], timeout=grace_s + STATS_WAIT_S)

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self.lost("failed", "closed")

    async def _read(self, channel: Channel) -> None:
        try:
            async for message in channel.receive():
                self._handle(message)
            detail = "its connection ended"
        except ChannelError as error:
            detail = error.message
        await channel.close()
        if self._channel is channel:
            self._channel = None
            self.lost("failed" if self._phase == "failed" else "restarting" if self.was_ready else "starting", detail)

    def _handle(self, message: Hello | Updates | Refused | TellStats | Drained) -> None:
        match message:
            case Hello(phase, detail, card):
                if phase == "ready" or not self.was_ready:
                    self._phase, self._detail = phase, detail
                if card is not None:
                    self._card, self.was_ready = card, True
                    self._ready.set()
                if card is not None:
                    self._known.set()
            case Updates(updates):
                for update in updates:
                    if queue := self._streams.get(update.request_id):
                        queue.put_nowait(update)
            case Refused(request_id, failure):
                if failure.kind in (EngineFailed.kind, Unavailable.kind):
                    self._ready.clear()  # until the next Hello: this engine ends soon
                if queue := self._streams.get(request_id):
                    queue.put_nowait(failure)
            case TellStats(number, stats):
                if (future := self._asked.get(number)) and not future.done():
                    future.set_result(stats)
            case Drained():
                self._drained.set()
