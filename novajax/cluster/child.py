"""The front end's hold on its engine: a supervisor of the engine's processes, and a Backend that outlives them.

With one process the supervisor runs in here; a group has one of its own, which is started again when it dies or falls
silent: its ranks die with it. `backend` is valid for the object's whole life.
"""

import asyncio
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence

import msgspec
import structlog

from novajax.cluster.hosts import Event, LocalHost
from novajax.cluster.process import ChildProcess, process_state
from novajax.cluster.remote import RemoteBackend
from novajax.cluster.replay import ReplayingBackend
from novajax.cluster.settings import ClusterSettings, GroupStatus, Order, Place
from novajax.cluster.supervisor import Supervisor
from novajax.core.config import EngineConfig
from novajax.core.errors import ConfigError

CONNECT_POLL_S = 0.02
STOP_WAIT_S = 8.0
GONE_WAIT_S = 5.0


class EngineProcess:
    """Owns the engine's processes, their secret and their socket directory."""

    def __init__(
        self,
        config: EngineConfig,
        settings: ClusterSettings = ClusterSettings(),
        place: Place = Place(),
        *,
        secret: bytes | None = None,
        command: Sequence[str] = ("-m", "novajax.worker"),
        environment: Mapping[str, str] = {},
    ):
        """`environment`: the ranks' whole environment, empty for this process's own."""
        self._remote = RemoteBackend()
        self.backend = ReplayingBackend(self._remote, settings)
        self._directory = tempfile.mkdtemp(prefix="novajax-")  # mode 0700
        self._order = Order(
            config=config,
            settings=settings,
            place=place,
            secret=secret or secrets.token_bytes(32),
            directory=self._directory,
            command=tuple(command),
            environment=dict(environment),
        )
        self._status = GroupStatus(epoch=0, phase="starting")
        self._told_s = time.monotonic()
        self._child: ChildProcess | None = None
        self._attaching: asyncio.Task[None] | None = None
        self._attached = ""
        self._past: dict[str, int] = {}
        """Restarts by reason, as supervisors that are gone counted them; and their own."""

    async def run(self) -> None:
        """Keeps the engine running until cancelled. Raises ConfigError if it cannot start at all."""
        alone = self._order.settings.processes == 1 and self._order.place.count == 1
        reason = await (self._supervise() if alone else self._keep_supervisor())
        self._remote.lost("failed", reason)
        raise ConfigError(f"the engine did not start: {reason}")

    async def close(self) -> None:
        """Ends the processes and removes their sockets. Idempotent; `run` must be cancelled."""
        await self.backend.close()
        if self._attaching is not None:
            self._attaching.cancel()
        if self._child is not None and self._child.running:
            self._child.terminate()
            try:
                await asyncio.wait_for(self._child.wait(), STOP_WAIT_S)
            except TimeoutError:
                self._child.kill()
                await self._child.wait()
            await self._ranks_gone()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _supervise(self) -> str:
        events: asyncio.Queue[Event] = asyncio.Queue()
        return await Supervisor(self._order, [LocalHost(self._order, events.put_nowait)], events, self._heard).run()

    async def _keep_supervisor(self) -> str:
        """A supervisor as a child of its own, always one. Returns why the group was given up."""
        bound_s = max(self._order.settings.stall_s, 3.0)
        silent = 0
        while True:
            ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self._child = ChildProcess(self._heard, GroupStatus, ended.set_result)
            self._told_s = began_s = time.monotonic()
            await self._child.start(("-m", "novajax.supervise"), msgspec.json.encode(self._order))
            while not ended.done():
                await asyncio.wait({ended}, timeout=0.5)
                if not ended.done() and time.monotonic() - self._told_s > bound_s:
                    structlog.get_logger("novajax.front").error("the supervisor says nothing and is killed", for_s=bound_s)
                    self._child.kill()
                    await ended
            if self._status.fatal:
                return self._status.fatal
            silent = silent + 1 if self._told_s == began_s else 0
            if silent >= self._order.settings.max_starts:
                return f"its supervisor ends with code {ended.result()} before it says anything"
            self._past = self._status.restarts | {"supervisor": self._status.restarts.get("supervisor", 0) + 1}
            epoch = self._status.epoch + 1
            structlog.get_logger("novajax.front").error("the supervisor died and is started again", code=ended.result(), epoch=epoch)
            self._remote.lost("restarting" if self._remote.was_ready else "starting", "its supervisor died")
            await self._ranks_gone()
            self._order = msgspec.structs.replace(self._order, first_epoch=epoch, served_before=self._remote.was_ready)
            self._heard(msgspec.structs.replace(self._status, epoch=epoch, phase="restarting", socket="", components=(), restarts={}))

    def _heard(self, status: GroupStatus) -> None:
        self._told_s = time.monotonic()
        if self._past:
            reasons = self._past.keys() | status.restarts.keys()
            status = msgspec.structs.replace(status, restarts={r: self._past.get(r, 0) + status.restarts.get(r, 0) for r in reasons})
        self._status = status
        self._remote.heard(status)
        if status.socket and status.socket != self._attached:
            self._attached = status.socket
            if self._attaching is not None:
                self._attaching.cancel()
            self._attaching = asyncio.create_task(self._attach(status.socket))

    async def _attach(self, path: str) -> None:
        """Connects to the leader of an epoch as soon as it listens."""
        while True:
            try:
                await self._remote.connect(path)
                return
            except OSError:
                await asyncio.sleep(CONNECT_POLL_S)

    async def _ranks_gone(self) -> None:
        """Waits for the ranks of a dead supervisor: they die with it, and their memory must be free before the next ones start."""
        pids = [component.pid for component in self._status.components if component.pid]
        deadline_s = time.monotonic() + GONE_WAIT_S
        while time.monotonic() < deadline_s and any(process_state(pid) not in ("", "Z", "X") for pid in pids):  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # nobody tells: they are no children of this process
