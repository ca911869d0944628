"""One life of a group: its ranks started with new ports and a new socket, watched until the first fault, and killed.

Events of another epoch change nothing. What outlasts epochs is the `History`.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence

import structlog

from novajax.cluster.hosts import Ended, Event, Host, Left, Said, Seen, Start
from novajax.cluster.settings import LOST, Fault, GroupStatus, Order
from novajax.cluster.watch import Verdict, Watch
from novajax.cluster.wire import listen
from novajax.core.types import Component, Phase

POLL_S = 0.25
TELL_S = 1.0
LAST_WORDS_S = 0.15
"""After a rank complained of another one: how long its end may take to be known, which says more."""
CONFIG_CODE = 2


class History:
    """What a group lived through; it outlasts epochs."""

    def __init__(self) -> None:
        self.ever_served = False
        self.detail = ""
        self._restarts: dict[str, int] = {}
        self._recovery_s: float | None = None
        self._faulted_s: float | None = None

    def faulted(self) -> None:
        """A fault was seen; the first since the group last served counts."""
        if self._faulted_s is None:
            self._faulted_s = time.monotonic()

    def restarted(self, verdict: Verdict) -> None:
        self._restarts[verdict.reason] = self._restarts.get(verdict.reason, 0) + 1
        self.detail = verdict.message

    def serving(self) -> None:
        self.ever_served, self.detail = True, ""
        if self._faulted_s is not None:
            self._recovery_s = round(time.monotonic() - self._faulted_s, 3)
            self._faulted_s = None
            structlog.get_logger("novajax.supervisor").info("the group serves again", recovery_s=self._recovery_s)

    def status(self, epoch: int, phase: Phase, socket: str = "", components: tuple[Component, ...] = (), detail: str = "") -> GroupStatus:
        return GroupStatus(
            epoch=epoch,
            phase=phase,
            detail=detail or self.detail,
            socket=socket,
            components=components,
            restarts=dict(self._restarts),
            recovery_s=self._recovery_s,
        )


class Epoch:
    """One life of the group, from its start to the verdict that ends it."""

    def __init__(
        self,
        number: int,
        order: Order,
        hosts: Sequence[Host],
        events: asyncio.Queue[Event],
        history: History,
        tell: Callable[[GroupStatus], None],
    ):
        self._epoch = number
        self._order = order
        self._hosts = hosts
        self._events = events
        self._history = history
        self._tell_front = tell
        self._ranks = sum(host.ranks for host in hosts)
        self._watch = Watch(self._ranks, order.settings, time.monotonic())
        self._pids: dict[int, int] = {}
        self._names = [host.name for host in hosts for _ in range(host.ranks)]
        self._socket = os.path.join(order.directory, f"engine-{number}.sock")
        self._served_s: float | None = None
        self._suspected: list[int] = []
        self._told_s = 0.0

    async def run(self) -> tuple[Verdict, float]:
        """The verdict, and for how long the group had served."""
        try:
            await self._start()
            verdict = await self._until_fault()
        except OSError as error:
            verdict = Verdict("fault", f"the ranks cannot be started: {error}")
        served_s = 0.0 if self._served_s is None else time.monotonic() - self._served_s
        self._history.faulted()
        await asyncio.gather(*(host.kill() for host in self._hosts))
        return verdict, served_s

    async def _start(self) -> None:
        place = self._order.place
        local = place.count == 1
        address = "127.0.0.1" if local else place.coordinator.rpartition(":")[0]
        plans, coordinator = (f"{address}:{port}" for port in free_ports(2, local=local))
        first = 0
        for host in self._hosts:
            await host.start(Start(self._epoch, first, self._ranks, plans, coordinator, self._socket))
            first += host.ranks

    async def _until_fault(self) -> Verdict:
        looked_s = 0.0
        while True:
            now_s = time.monotonic()
            if now_s - looked_s >= POLL_S:
                looked_s = now_s
                await asyncio.gather(*(host.look() for host in self._hosts))
                if verdict := self._watch.verdict(now_s):
                    return verdict
            if now_s - self._told_s >= TELL_S:
                self._tell()
            try:
                event = await asyncio.wait_for(self._events.get(), POLL_S)
            except TimeoutError:
                continue
            if verdict := self._take(event):
                return await self._last_words(verdict)

    def _take(self, event: Event) -> Verdict | None:
        now_s = time.monotonic()
        match event:
            case Left(message):
                return Verdict("host", message)
            case Said(epoch) | Ended(epoch) | Seen(epoch) if epoch != self._epoch:
                return None
            case Said(_, rank, Fault(message, reason)):
                return Verdict("config" if reason == "config" else "fault", message, certain=reason != LOST)
            case Said(_, rank, alive):
                phase = self._watch.alive(rank).phase
                self._watch.heard(rank, alive, now_s)  # type: ignore[arg-type]
                if alive.phase != phase:  # type: ignore[union-attr]
                    self._tell()
            case Ended(_, rank, code):
                return Verdict("config" if code == CONFIG_CODE else "exit", f"rank {rank} {told_end(code)}", certain=code < 0)
            case Seen(_, ranks):
                for rank, pid, letter in ranks:
                    self._pids[rank] = pid
                    self._watch.state(rank, letter, now_s)
        return None

    async def _last_words(self, verdict: Verdict) -> Verdict:
        """A killed rank breaks its neighbours' connections, which may be heard of first; and an exit may have had a reason."""
        deadline_s = time.monotonic() + LAST_WORDS_S
        while not verdict.certain and (rest_s := deadline_s - time.monotonic()) > 0:
            try:
                event = await asyncio.wait_for(self._events.get(), rest_s)
            except TimeoutError:
                break
            if (other := self._take(event)) is not None and other.certain:
                verdict = other
        return verdict

    def _tell(self) -> None:
        now_s = time.monotonic()
        self._told_s = now_s
        self._suspected = self._watch.suspects(now_s)
        if self._watch.ready and self._served_s is None:
            self._served_s = now_s
            self._history.serving()
        leader = self._watch.alive(0)
        phase: Phase = leader.phase
        if self._served_s is None:
            phase = "restarting" if self._history.ever_served else leader.phase if leader.phase != "ready" else "starting"
        elif self._suspected:
            phase = "stuck"
        self._tell_front(self._history.status(self._epoch, phase, self._socket, self._components(), leader.detail))

    def _components(self) -> tuple[Component, ...]:
        found = []
        for rank in range(self._ranks):
            alive = self._watch.alive(rank)
            phase = "stuck" if rank in self._suspected else alive.phase
            found.append(
                Component(
                    rank=rank, phase=phase, pid=self._pids.get(rank), host=self._names[rank], step=alive.completed, detail=alive.detail
                )
            )
        return tuple(found)


def told_end(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def free_ports(count: int, *, local: bool) -> list[int]:
    """Ports that were free a moment ago, all different."""
    sockets = [listen(local=local) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports
