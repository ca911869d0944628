"""Where ranks run: this host, or another one behind a channel. The supervisor of the group orders both alike.

A host starts its ranks for an epoch, tells what they say and how they end, and kills them. Events carry their epoch: those of
an old one are dropped by who reads them.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Protocol

import msgspec

from novajax.cluster.process import ChildProcess, process_state, rank_process
from novajax.cluster.settings import Assignment, Order, Report

STOP_WAIT_S = 5.0


class Start(msgspec.Struct, frozen=True, tag="start"):
    """The epoch's plan for one host: its ranks are first_rank, first_rank + 1, ..."""

    epoch: int
    first_rank: int
    ranks: int
    """Of the whole group."""
    plans: str
    coordinator: str
    socket: str = ""


class Said(msgspec.Struct, frozen=True, tag="said"):
    epoch: int
    rank: int
    report: Report


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    epoch: int
    rank: int
    code: int
    """As of subprocess: negative for a signal."""


class Seen(msgspec.Struct, frozen=True, tag="seen"):
    """The kernel's view of a host's ranks: (rank, pid, state letter)."""

    epoch: int
    ranks: tuple[tuple[int, int, str], ...]


class Left(msgspec.Struct, frozen=True, tag="left"):
    """A host cannot be reached any more."""

    message: str


Event = Said | Ended | Seen | Left


class Host(Protocol):
    name: str
    ranks: int

    async def present(self) -> None:
        """Returns when it can be given orders, and its `ranks` are known."""
        ...

    async def start(self, start: Start) -> None: ...
    async def look(self) -> None:
        """Emits `Seen`; cheap."""
        ...

    async def kill(self) -> None:
        """Returns when no rank of it runs."""
        ...

    async def stop(self) -> None:
        """The same, in order."""
        ...


class LocalHost:
    """Ranks as children of this process. `emit` gets events on the event loop."""

    def __init__(self, order: Order, emit: Callable[[Event], None], name: str = "localhost"):
        self.name = name
        self.ranks = order.settings.processes
        self._order = order
        self._emit = emit
        self._epoch = 0
        self._processes: dict[int, ChildProcess] = {}

    async def present(self) -> None:
        return

    async def start(self, start: Start) -> None:
        order, self._epoch, self._processes = self._order, start.epoch, {}
        for rank in range(start.first_rank, start.first_rank + self.ranks):
            assignment = Assignment(
                config=order.config,
                settings=order.settings,
                epoch=start.epoch,
                rank=rank,
                ranks=start.ranks,
                secret=order.secret,
                socket=start.socket,
                plans=start.plans if start.ranks > 1 else "",
                coordinator=start.coordinator if start.ranks > 1 else "",
            )
            process = rank_process(partial(self._said, start.epoch, rank), partial(self._ended, start.epoch, rank))
            self._processes[rank] = process
            await process.start(order.command, msgspec.json.encode(assignment), order.environment)

    async def look(self) -> None:
        seen = tuple((rank, process.pid or 0, process_state(process.pid)) for rank, process in self._processes.items())
        self._emit(Seen(self._epoch, seen))

    async def kill(self) -> None:
        for process in self._processes.values():
            process.kill()
        await self._gone()

    async def stop(self) -> None:
        for process in self._processes.values():
            process.terminate()
        try:
            await asyncio.wait_for(self._gone(), STOP_WAIT_S)
        except TimeoutError:
            await self.kill()

    async def _gone(self) -> None:
        await asyncio.gather(*(process.wait() for process in self._processes.values()))

    def _said(self, epoch: int, rank: int, report: Report) -> None:
        self._emit(Said(epoch, rank, report))

    def _ended(self, epoch: int, rank: int, code: int) -> None:
        self._emit(Ended(epoch, rank, code))
