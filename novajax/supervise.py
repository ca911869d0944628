"""The supervisor of a group as a process of its own, between the front end and the ranks. Takes its order as one line of JSON.

On the head's host it is a child of `novajax.launch`, to which it reports the group's status. Exit codes: 0 told to stop; 2 the
group was given up.
"""

import asyncio
import os
import signal
import sys

import msgspec
from absl import app, flags

from novajax.cluster.epoch import TELL_S
from novajax.cluster.hosts import Event, LocalHost
from novajax.cluster.progress import ORPHANED, die_with_pipe
from novajax.cluster.rank import die_with_parent, read_line
from novajax.cluster.remotehost import Head
from novajax.cluster.settings import GroupStatus, Order
from novajax.cluster.supervisor import Supervisor
from novajax.telemetry.logging import configure as configure_logging

_REPORTS = flags.DEFINE_integer("report_fd", None, "descriptor of the pipe for the group's status", required=True)
GIVEN_UP = 2


def main(_: list[str]) -> int:
    configure_logging()
    die_with_parent()
    stdin = sys.stdin.fileno()
    order = msgspec.json.decode(read_line(stdin), type=Order)
    die_with_pipe(stdin)
    return asyncio.run(supervise(order, _REPORTS.value))


async def supervise(order: Order, report_fd: int) -> int:
    """Until SIGTERM, or until the group is given up. The exit code."""

    latest = GroupStatus(epoch=order.first_epoch, phase="restarting" if order.served_before else "starting")

    def tell(status: GroupStatus) -> None:
        nonlocal latest
        latest = status
        try:
            os.write(report_fd, msgspec.json.encode(status) + b"\n")
        except OSError:
            os._exit(ORPHANED)

    async def repeat() -> None:
        """So that a supervisor that waits is not taken for one that hangs."""
        while True:
            tell(latest)
            await asyncio.sleep(TELL_S)

    events: asyncio.Queue[Event] = asyncio.Queue()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    head = Head(order, events.put_nowait)
    if order.place.count > 1:
        try:
            await head.listen()
        except OSError as error:
            why = f"cannot listen for other hosts on {order.place.coordinator}: {error.strerror}"
            tell(GroupStatus(epoch=order.first_epoch, phase="failed", detail=why, fatal=why))
            return GIVEN_UP
    hosts = [LocalHost(order, events.put_nowait), *head.hosts]
    repeating = asyncio.create_task(repeat())
    supervising = asyncio.create_task(Supervisor(order, hosts, events, tell).run())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({supervising, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if supervising.done():
        supervising.result()
        return GIVEN_UP
    supervising.cancel()
    await asyncio.gather(supervising, return_exceptions=True)
    repeating.cancel()
    head.close()
    return 0


if __name__ == "__main__":
    app.run(main)
