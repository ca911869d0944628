"""Runs the engine as a child process and keeps a RemoteBackend connected to it.

The front end is the parent: a dying engine takes no client connection with it, and a dying parent takes the engine along
(the child asks the kernel for that). An engine that served and then died is started again, with growing pauses; one that
never became ready is not, since it would fail the same way.
"""

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence

import msgspec
import structlog

from novajax.cluster.remote import RemoteBackend
from novajax.core.config import EngineConfig
from novajax.core.errors import ConfigError, EngineFailed

CONNECT_POLL_S = 0.02
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
STEADY_S = 60.0
"""An engine that served this long starts the count of pauses anew."""
STOP_WAIT_S = 5.0


class EngineProcess:
    """Owns the child and its socket directory. `backend` is valid for the object's whole life."""

    def __init__(self, config: EngineConfig, arguments: Sequence[str] = ("-m", "novajax.worker")):
        self.backend = RemoteBackend()
        self._config = config
        self._arguments = arguments
        self._directory = tempfile.mkdtemp(prefix="novajax-")  # mode 0700
        self._process: asyncio.subprocess.Process | None = None
        self.restarts = 0

    async def run(self) -> None:
        """Keeps an engine running until cancelled. Raises ConfigError if it cannot start at all."""
        pause_s = FIRST_PAUSE_S
        while True:
            began = asyncio.get_running_loop().time()
            code = await self._run_once()
            served = self.backend.was_ready
            reason = f"its process ended with code {code}"
            if not served:
                self.backend.lost("failed", reason)
                raise ConfigError(f"the engine did not start: {reason}")
            self.backend.lost("starting", reason)
            if asyncio.get_running_loop().time() - began > STEADY_S:
                pause_s = FIRST_PAUSE_S
            structlog.get_logger().error("the engine died and is started again", code=code, pause_s=pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            self.restarts += 1

    async def close(self) -> None:
        """Ends the child and removes its socket. Idempotent."""
        await self.backend.close()
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_WAIT_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _run_once(self) -> int:
        """Starts a child, connects, and waits for its end. Its exit code."""
        path = os.path.join(self._directory, f"engine-{self.restarts}.sock")
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self._arguments,
            f"--socket={path}",
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,  # the terminal's Ctrl-C is for the parent, which drains first
        )
        if process.stdin is None:
            raise EngineFailed("the engine process has no input")
        ended = asyncio.create_task(process.wait())
        try:
            process.stdin.write(msgspec.json.encode(self._config))
            process.stdin.close()
            while not ended.done():
                try:
                    await self.backend.connect(path)
                    break
                except OSError:
                    await asyncio.wait({ended}, timeout=CONNECT_POLL_S)
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            ended.cancel()
            raise
