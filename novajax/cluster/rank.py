"""The life of a rank's process around `member`: assignment in, reports out, exit codes. Called by entry points.

Exit codes: 0 told to stop; 2 the configuration, weights or memory do not allow a start; 3 the engine or its group failed;
5 its supervisor went away.
"""

import asyncio
import ctypes
import os
import signal
import sys
from typing import Any

import msgspec
import structlog

from novajax.cluster.channel import ChannelError
from novajax.cluster.member import Builder, follow, lead
from novajax.cluster.progress import Reporter, Tally, die_with_pipe
from novajax.cluster.remote import BackendServer
from novajax.cluster.settings import LOST, Assignment, Fault
from novajax.core.backend import Backend
from novajax.core.errors import ConfigError, NovaError
from novajax.core.types import Phase

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal this process gets when its parent dies."""
WATCH_S = 0.25
STOPPED, NOT_STARTED, FAILED = 0, 2, 3


def die_with_parent() -> None:
    """A killed parent must leave nothing behind: the kernel delivers SIGKILL when it dies, also before this call."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(FAILED)


def read_line(fd: int) -> bytes:
    """One line of a pipe and no byte more: what follows is only waited for, until the other end closes."""
    line = bytearray()
    while not line.endswith(b"\n"):
        part = os.read(fd, 1)
        if not part:
            break
        line += part
    return bytes(line)


def run(builder: Builder[Any], report_fd: int | None) -> int:
    """Reads the assignment from standard input and lives it. The exit code; a rank of a group does not return but exits."""
    die_with_parent()
    stdin = sys.stdin.fileno()
    try:
        assignment = msgspec.json.decode(read_line(stdin), type=Assignment)
    except msgspec.MsgspecError as error:
        _say(f"novajax: the engine's assignment is not understood: {error}")
        return NOT_STARTED
    die_with_pipe(stdin)
    tally = Tally()
    reporter = Reporter(tally, report_fd)
    structlog.contextvars.bind_contextvars(rank=assignment.rank, epoch=assignment.epoch)
    leads = assignment.rank == 0
    code = asyncio.run(_lead(assignment, builder, tally, reporter)) if leads else _follow(assignment, builder, tally, reporter)
    if assignment.ranks > 1:
        sys.stderr.flush()
        os._exit(code)  # leaving in order would wait for the others at jax.distributed's last barrier
    return code


def _follow(assignment: Assignment, builder: Builder[Any], tally: Tally, reporter: Reporter) -> int:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(STOPPED))
    try:
        follow(assignment, builder, tally, reporter.phase)
    except ConfigError as error:
        reporter.fault(Fault(error.message, "config"))
        return NOT_STARTED
    except Exception as error:
        reporter.fault(_told(error, assignment.rank))
        return FAILED
    return STOPPED


async def _lead(assignment: Assignment, builder: Builder[Any], tally: Tally, reporter: Reporter) -> int:
    """Serves until SIGTERM, or until the engine fails."""
    server = BackendServer()
    await server.listen(assignment.socket)
    events = asyncio.get_running_loop()
    stop = asyncio.Event()
    events.add_signal_handler(signal.SIGTERM, stop.set)

    def announce(phase: Phase, detail: str) -> None:
        _say(f"{phase}: {detail}")
        reporter.phase(phase, detail)
        events.call_soon_threadsafe(server.announce, phase, detail)

    opening = asyncio.create_task(asyncio.to_thread(lead, assignment, builder, tally, reporter, announce))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not opening.done():
        os._exit(STOPPED)  # a compilation cannot be interrupted; nothing was promised yet
    try:
        engine = await opening
    except ConfigError as error:
        _say(f"novajax: {error.message}")
        reporter.fault(Fault(error.message, "config"))
        server.announce("failed", error.message)
        await server.close()
        return NOT_STARTED
    except Exception as error:
        if not isinstance(error, NovaError):
            structlog.get_logger().exception("the engine could not be built")
        reporter.fault(_told(error, assignment.rank))
        await server.close()
        return FAILED
    reporter.phase("ready")
    await server.offer(engine)
    code = await _watch(engine, stop, reporter)
    stopping.cancel()
    await server.close()
    if code == STOPPED or assignment.ranks == 1:
        await engine.close()
    return code


async def _watch(engine: Backend, stop: asyncio.Event, reporter: Reporter) -> int:
    """Waits for `stop`, looking now and then whether the engine still lives."""
    while not stop.is_set():
        if (stats := await engine.stats()).phase == "failed":
            structlog.get_logger().error("the engine failed", detail=stats.detail)
            reporter.fault(Fault(stats.detail, LOST))  # perhaps: its collectives fail when another rank is lost
            return FAILED
        try:
            await asyncio.wait_for(stop.wait(), WATCH_S)
        except TimeoutError:
            continue
    return STOPPED


def _told(error: Exception, rank: int) -> Fault:
    if not isinstance(error, NovaError):
        return Fault(f"rank {rank}: {type(error).__name__}: {str(error)[:300]}")
    return Fault(f"rank {rank}: {error.message}", LOST if type(error) is ChannelError else "fault")


def _say(line: str) -> None:
    """To the user who started this; logs are for the operator."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
