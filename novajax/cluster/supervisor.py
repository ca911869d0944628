"""Keeps a group of ranks running: starts all of them for an epoch, watches, and at any fault kills all and starts the next epoch.

Invariants: at most one epoch's ranks run at a time; every restart has one named reason; a group that never served is given
up, one that served is not. It runs no jax and holds no request: those wait in the front end.
"""

import asyncio
from collections.abc import Callable, Sequence

import structlog

from novajax.cluster.epoch import Epoch, History
from novajax.cluster.hosts import Event, Host
from novajax.cluster.settings import GroupStatus, Order

BRIEF_S = 2.0
"""An epoch that served for less counts as one more failure in a row."""
LONGEST_PAUSE_S = 30.0


class Supervisor:
    """Of the whole group, on the head's host. `events` is what the hosts emit; `tell` gets every status."""

    def __init__(self, order: Order, hosts: Sequence[Host], events: asyncio.Queue[Event], tell: Callable[[GroupStatus], None]):
        self._order = order
        self._hosts = hosts
        self._events = events
        self._tell = tell
        self._history = History()
        if order.served_before:  # the loss of the supervisor before this one is the first fault
            self._history.ever_served = True
            self._history.faulted()

    async def run(self) -> str:
        """Runs until cancelled. Returns why the group was given up, which only a group that never served is."""
        epoch, failures, history = self._order.first_epoch, 0, self._history
        try:
            while True:
                await self._assemble(epoch)
                verdict, served_s = await Epoch(epoch, self._order, self._hosts, self._events, history, self._tell).run()
                failures = 0 if served_s > BRIEF_S else failures + 1
                if not history.ever_served and (verdict.reason == "config" or failures >= self._order.settings.max_starts):
                    self._tell(GroupStatus(epoch=epoch, phase="failed", detail=verdict.message, fatal=verdict.message))
                    return verdict.message
                history.restarted(verdict)
                pause_s = 0.0 if failures < 2 else min(0.5 * 2 ** (failures - 2), LONGEST_PAUSE_S)
                log = structlog.get_logger("novajax.supervisor")
                log.error("the group is started again", epoch=epoch, reason=verdict.reason, cause=verdict.message, pause_s=pause_s)
                epoch += 1
                self._tell(history.status(epoch, "restarting" if history.ever_served else "starting"))
                await asyncio.sleep(pause_s)
        finally:
            await asyncio.gather(*(host.stop() for host in self._hosts), return_exceptions=True)

    async def _assemble(self, epoch: int) -> None:
        """Waits until every host is there; what was heard before concerns no epoch to come."""
        phase = "restarting" if self._history.ever_served else "starting"
        for host in self._hosts:
            self._tell(self._history.status(epoch, phase, detail=f"waiting for {host.name}"))
            await host.present()
        while not self._events.empty():
            self._events.get_nowait()
