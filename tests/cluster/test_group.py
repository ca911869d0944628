"""Groups of two fake ranks: what they answer, and what becomes of the answers when a rank, the leader or the supervisor is lost."""

import asyncio
import os
import signal
import time

import pytest

from novajax.cluster.process import process_state
from novajax.core.errors import ConfigError, EngineFailed, Unavailable
from tests.cluster.group_world import answer, group, hurt, pid_of, request, restarted, stream

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}


def run(work) -> None:
    asyncio.run(asyncio.wait_for(work, 120))


@pytest.mark.parametrize("lost", [False, True])
def test_a_drain_keeps_what_was_promised(lost: bool):
    """Streams inside go on to their end, even when a rank is lost meanwhile; who comes later is refused at once."""

    async def work() -> None:
        async with group(2) as engine:
            started = asyncio.Event()
            asked = [request(200), request(200, temperature=0.9, seed=11)]
            running = [asyncio.create_task(stream(engine, one, started)) for one in asked]
            await started.wait()
            draining = asyncio.create_task(engine.backend.drain(60))
            await asyncio.sleep(0)
            if lost:
                await hurt(engine, 1, signal.SIGKILL)
            with pytest.raises(Unavailable):
                await stream(engine, request(5))
            for (tokens, last), one in zip(await asyncio.gather(*running), asked, strict=True):
                assert tokens == answer(one)
                assert last.finish_reason == "length"
            await draining

    run(work())


def test_a_group_answers_and_leaves_nobody_behind():
    async def work() -> None:
        async with group(3) as engine:
            asked = [request(40), request(40, temperature=0.7, seed=5), request(30, prompt=tuple(range(150)))]
            for (tokens, last), one in zip(await asyncio.gather(*(stream(engine, one) for one in asked)), asked, strict=True):
                assert tokens == answer(one)
                assert last.finish_reason == "length"
            stats = await engine.backend.stats()
            assert [component.phase for component in stats.components] == ["ready"] * 3
            assert stats.epoch == 1
            pids = [component.pid for component in stats.components]
        assert all(process_state(pid) in ("", "Z") for pid in pids)

    run(work())


@pytest.mark.parametrize(("rank", "number"), [(0, "SIGKILL"), (1, "SIGKILL"), (0, "SIGSTOP"), (1, "SIGSTOP")])
def test_streams_go_on_with_the_same_tokens_when_a_rank_is_lost(rank: int, number: str):
    async def work() -> None:
        async with group(2) as engine:
            started = asyncio.Event()
            asked = [request(300), request(300, temperature=0.9, seed=11), request(300, temperature=0.9)]
            running = [asyncio.create_task(stream(engine, one, started)) for one in asked]
            await started.wait()
            pid = await pid_of(engine, rank)
            await hurt(engine, rank, SIGNALS[number])
            results = await asyncio.gather(*running)
            for (tokens, last), one in zip(results[:2], asked[:2], strict=True):
                assert tokens == answer(one)
                assert last.usage is not None
                assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 300)
            tokens, last = results[2]  # its seed was drawn by the front end, and is told
            assert last.seed is not None
            assert tokens == answer(request(300, temperature=0.9, seed=last.seed))
            restarts = await restarted(engine)
            assert restarts == {"exit" if number == "SIGKILL" else "stopped": 1}
            stats = await engine.backend.stats()
            assert stats.epoch == 2
            assert stats.recovery_s is not None
            assert process_state(pid) in ("", "Z")

    run(work())


@pytest.mark.parametrize(
    ("wrong", "reason", "words"),
    [
        ("1:20:token", "fault", "drew tokens"),
        ("1:20:hang", "stall", "rank 1"),
        ("0:20:hang", "stall", "rank 0"),
        ("1:20:raise", "fault", "RuntimeError"),
        ("0:20:raise", "fault", "RuntimeError"),
    ],
)
def test_a_rank_that_disagrees_hangs_or_fails_is_named(wrong: str, reason: str, words: str, capfd: pytest.CaptureFixture[str]):
    async def work() -> None:
        async with group(2, f"--wrong={wrong}", stall_s=1.5) as engine:
            asked = request(200)
            tokens, _ = await stream(engine, asked)
            assert len(tokens) == 200
            if "token" not in wrong:  # what was drawn before the disagreement was seen is out
                assert tokens == answer(asked)
            assert await restarted(engine) == {reason: 1}

    run(work())
    told = [line for line in capfd.readouterr().err.splitlines() if "started again" in line]
    assert words in told[0]


def test_the_supervisor_is_replaced_and_takes_its_ranks_along():
    async def work() -> None:
        async with group(2) as engine:
            asked, started = request(300), asyncio.Event()
            running = asyncio.create_task(stream(engine, asked, started))
            await started.wait()
            first = [await pid_of(engine, rank) for rank in (0, 1)]
            assert engine._child is not None
            assert engine._child.pid is not None
            os.kill(engine._child.pid, signal.SIGKILL)
            tokens, _ = await running
            assert tokens == answer(asked)
            assert await restarted(engine) == {"supervisor": 1}
            assert all(process_state(pid) in ("", "Z") for pid in first)
            assert (await engine.backend.stats()).epoch == 2

    run(work())


def test_what_cannot_be_replayed_gets_one_error():
    async def work() -> None:
        async with group(2, max_replays=0) as engine:
            started = asyncio.Event()
            running = asyncio.create_task(stream(engine, request(300), started))
            await started.wait()
            await hurt(engine, 1, signal.SIGKILL)
            with pytest.raises(EngineFailed, match="lost 1 times"):
                await running
            await restarted(engine)
            assert len((await stream(engine, request(20)))[0]) == 20

    run(work())


def test_a_wait_for_the_engine_is_bounded():
    async def work() -> None:
        async with group(2, "--start_s=3", replay_wait_s=0.3) as engine:
            started = asyncio.Event()
            running = asyncio.create_task(stream(engine, request(300), started))
            await started.wait()
            await hurt(engine, 0, signal.SIGKILL)
            with pytest.raises(EngineFailed, match="did not come back within"):
                await running
            before_s = time.monotonic()
            await engine.backend.drain(5)
            assert time.monotonic() - before_s < 5

    run(work())


def test_a_group_that_never_serves_is_given_up():
    async def work() -> None:
        async with group(2, "--no_such_flag=1", max_starts=2):
            raise AssertionError("it served")

    with pytest.raises(ConfigError, match="did not start"):
        run(work())
