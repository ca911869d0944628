"""Two hosts on one machine: the head's supervisor and another's, over the authenticated channel."""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from novajax.cluster.epoch import free_ports
from novajax.cluster.process import process_state
from novajax.cluster.settings import Place
from novajax.core.errors import ConfigError
from tests.cluster.group_world import answer, group, hurt, pid_of, request, restarted, stream

ROOT = Path(__file__).resolve().parents[2]
SECRET = "a secret that both hosts know"
STALL_S = 2.0


@contextmanager
def other_host(coordinator: str, secret: str = SECRET, ranks: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.cluster.fake_host", coordinator, secret, "1", "2", str(ranks), str(STALL_S)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def run(work) -> None:
    asyncio.run(asyncio.wait_for(work, 120))


def place() -> Place:
    return Place(count=2, coordinator=f"127.0.0.1:{free_ports(1, local=True)[0]}")


def test_two_hosts_serve_as_one_and_restart_together():
    async def work() -> None:
        here = place()
        with other_host(here.coordinator, ranks=2) as other:
            async with group(1, stall_s=STALL_S, place=here, secret=SECRET.encode()) as engine:
                asked = request(40)
                assert (await stream(engine, asked))[0] == answer(asked)
                assert len((await engine.backend.stats()).components) == 3
                for count, rank in enumerate((2, 0), start=1):
                    started, asked = asyncio.Event(), request(300)
                    running = asyncio.create_task(stream(engine, asked, started))
                    await started.wait()
                    await hurt(engine, rank, signal.SIGKILL)
                    assert (await running)[0] == answer(asked)
                    await restarted(engine, count)
                pids = [await pid_of(engine, rank) for rank in range(3)]
            assert other.wait(20) == 0  # told to stop by the head
        assert all(process_state(pid) in ("", "Z") for pid in pids)

    run(work())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_host_is_a_fault_and_another_takes_its_place(number: signal.Signals):
    async def work() -> None:
        here = place()
        with other_host(here.coordinator) as lost:
            async with group(1, stall_s=STALL_S, place=here, secret=SECRET.encode()) as engine:
                started, asked = asyncio.Event(), request(300)
                running = asyncio.create_task(stream(engine, asked, started))
                await started.wait()
                pid = await pid_of(engine, 1)
                lost.send_signal(number)
                await asyncio.sleep(0.5)
                lost.kill()
                with other_host(here.coordinator):
                    assert (await running)[0] == answer(asked)
                    assert sum((await restarted(engine)).values()) == 1
                    assert process_state(pid) in ("", "Z")

    run(work())


def test_a_host_with_another_secret_is_not_let_in():
    async def work() -> None:
        here = place()
        with other_host(here.coordinator, secret="another secret of some length") as stranger:
            with pytest.raises(AssertionError, match="did not come up"):
                async with group(1, stall_s=STALL_S, place=here, secret=SECRET.encode(), wait_s=4.0):
                    raise AssertionError("it served")
            assert stranger.poll() is None or stranger.returncode == 2

    run(work())


def test_a_taken_port_is_told():
    async def work() -> None:
        here = place()
        with socket.create_server(("127.0.0.1", int(here.coordinator.rpartition(":")[2]))):
            with pytest.raises(ConfigError, match="cannot listen for other hosts"):
                async with group(1, place=here, secret=SECRET.encode()):
                    raise AssertionError("it served")

    run(work())
