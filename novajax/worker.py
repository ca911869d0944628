"""One engine behind a Unix socket: the child of `novajax.launch`. Reads its EngineConfig as JSON from standard input.

Exit codes: 0 told to stop; 2 the configuration, weights or memory do not allow a start; 3 the engine failed.
"""

import asyncio
import ctypes
import os
import signal
import sys

import msgspec
import structlog
from absl import app, flags

from novajax.cluster.remote import BackendServer
from novajax.core.config import EngineConfig
from novajax.core.errors import ConfigError
from novajax.core.types import Phase
from novajax.engine.build import open_engine
from novajax.engine.engine import Engine
from novajax.telemetry.logging import configure as configure_logging

_SOCKET = flags.DEFINE_string("socket", None, "path of the Unix socket to serve", required=True)
PR_SET_PDEATHSIG = 1
"""prctl(2): the signal this process gets when its parent dies."""
WATCH_S = 0.5
NOT_STARTED, FAILED = 2, 3


def main(_: list[str]) -> int:
    configure_logging()
    die_with_parent()
    try:
        config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    except msgspec.MsgspecError as error:
        print(f"novajax: the engine's configuration is not understood: {error}", file=sys.stderr)
        return NOT_STARTED
    return asyncio.run(serve(config, _SOCKET.value))


def die_with_parent() -> None:
    """A killed parent must leave no engine behind: the kernel delivers SIGKILL when it dies, also before this call."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(FAILED)


async def serve(config: EngineConfig, path: str) -> int:
    """Serves until SIGTERM, or until the engine fails. The exit code."""
    server = BackendServer()
    await server.listen(path)
    events = asyncio.get_running_loop()
    stop = asyncio.Event()
    events.add_signal_handler(signal.SIGTERM, stop.set)

    def announce(phase: Phase, detail: str) -> None:
        print(f"{phase}: {detail}", file=sys.stderr, flush=True)
        events.call_soon_threadsafe(server.announce, phase, detail)

    opening = asyncio.create_task(asyncio.to_thread(open_engine, config, announce))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not opening.done():
        os._exit(0)  # a compilation cannot be interrupted; nothing was promised yet
    try:
        engine = await opening
    except ConfigError as error:
        print(f"novajax: {error.message}", file=sys.stderr)
        server.announce("failed", error.message)
        await server.close()
        return NOT_STARTED
    await server.offer(engine)
    code = await watch(engine, stop)
    stopping.cancel()
    await server.close()
    await engine.close()
    return code


async def watch(engine: Engine, stop: asyncio.Event) -> int:
    """Waits for `stop`, looking now and then whether the engine still lives."""
    while not stop.is_set():
        if (stats := await engine.stats()).phase == "failed":
            structlog.get_logger().error("the engine failed", detail=stats.detail)
            return FAILED
        try:
            await asyncio.wait_for(stop.wait(), WATCH_S)
        except TimeoutError:
            continue
    return 0


if __name__ == "__main__":
    app.run(main)
