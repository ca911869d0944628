"""A group of fake ranks under a real supervisor, with clients whose answers are known in advance."""

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from novajax.cluster.child import EngineProcess
from novajax.cluster.fake import expected
from novajax.cluster.settings import ClusterSettings, Place
from novajax.core.config import EngineConfig
from novajax.core.types import Request, SamplingParams, Update
from novajax.scheduler.plan import Draw

WAIT_S = 60.0


@asynccontextmanager
async def group(
    ranks: int = 2, *arguments: str, place: Place = Place(), secret: bytes | None = None, wait_s: float = WAIT_S, **settings: Any
) -> AsyncIterator[EngineProcess]:
    """A ready group. `arguments` go to the fake workers, `settings` to the supervisor."""
    told = ClusterSettings(**({"processes": ranks, "stall_s": 2.0, "gather_s": 30.0} | settings))
    engine = EngineProcess(EngineConfig(model="fake"), told, place, secret=secret, command=("-m", "tests.cluster.fake_worker", *arguments))
    running = asyncio.create_task(engine.run())
    try:
        card = asyncio.create_task(engine.backend.card())
        done, _ = await asyncio.wait({running, card}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        if running in done:
            running.result()
        assert card in done, "the group did not come up"
        yield engine
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await engine.close()


_names = itertools.count()


def request(tokens: int = 100, prompt: tuple[int, ...] = (1, 2, 3), **sampling: Any) -> Request:
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True} | sampling))
    return Request(id=f"r{next(_names)}", prompt=prompt, sampling=params)


def answer(asked: Request) -> list[int]:
    draw = Draw(temperature=asked.sampling.temperature, seed=asked.sampling.seed or 0)
    return expected(asked.prompt, draw, asked.sampling.max_tokens or 0)


async def stream(engine: EngineProcess, asked: Request, started: asyncio.Event | None = None) -> tuple[list[int], Update]:
    """All tokens, checked to come once and in order, and the last update."""
    tokens: list[int] = []
    last = None
    async for update in engine.backend.submit(asked):
        assert not update.tokens or update.start == len(tokens)
        tokens += update.tokens
        last = update
        if started is not None:
            started.set()
    assert last is not None
    return tokens, last


async def pid_of(engine: EngineProcess, rank: int) -> int:
    for _ in range(500):
        found = [component.pid for component in (await engine.backend.stats()).components if component.rank == rank]
        if found and found[0]:
            return found[0]
        await asyncio.sleep(0.02)
    raise AssertionError(f"nobody knows rank {rank}")


async def hurt(engine: EngineProcess, rank: int, number: signal.Signals) -> None:
    os.kill(await pid_of(engine, rank), number)


async def restarted(engine: EngineProcess, count: int = 1) -> dict[str, int]:
    """Waits until the group serves after `count` restarts; the counts by reason."""
    async with asyncio.timeout(WAIT_S):
        while True:
            stats = await engine.backend.stats()
            if sum(stats.restarts.values()) >= count and stats.phase == "ready":
                return stats.restarts
            await asyncio.sleep(0.05)
