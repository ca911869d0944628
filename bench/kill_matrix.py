"""Kills ranks, leaders, supervisors and channels of a served group under load, and watches what the clients get.

Every fault kind comes at least once when there are rounds enough, then they are drawn. Each client asks for answers that were
recorded before the first fault, greedy and seeded; it must get its full answer, or one error. Linux only; nothing but signals, /proc
and one shutdown(2) on a duplicated socket is used, so what is tried is what ships.

Examples:
  python -m bench.kill_matrix --rounds=20
  python -m bench.kill_matrix --rounds=4 --processes=2 --devices_per_process=1 --mesh=tensor=2
"""

import asyncio
import ctypes
import logging
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
from absl import app, flags

from bench.common import describe_machine, markdown_table, publish, settings
from bench.served import ServedModel

_ROUNDS = flags.DEFINE_integer("rounds", 20, "faults to inject", lower_bound=1)
_MODEL = flags.DEFINE_string("model", "checkpoints/nova-small", "model to serve")
_PROCESSES = flags.DEFINE_integer("processes", 4, "ranks", lower_bound=2)
_DEVICES = flags.DEFINE_integer("devices_per_process", 2, "virtual devices of each rank", lower_bound=1)
_MESH = flags.DEFINE_string("mesh", "tensor=2,stage=2,data=2", "mesh; its product is processes x devices_per_process")
_CLIENTS = flags.DEFINE_integer("clients", 4, "streams at a time", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "which faults, and when")
_TOKENS = flags.DEFINE_integer("tokens", 32, "tokens of each answer", lower_bound=8)

BOUND_S = 120.0
"""No client may wait longer for its answer or its error."""
SYS_PIDFD_GETFD = 438


class Round(msgspec.Struct, frozen=True):
    kind: str
    detected_s: float
    """From the fault to the moment in which the front end says that it is being mended."""
    serving_s: float
    """From the fault to being ready again."""
    recovery_s: float
    """From detection to serving, by the supervisor's own clock."""


class Outcome(msgspec.Struct):
    """What clients got."""

    correct: int = 0
    wrong: int = 0
    errors: int = 0
    refused: int = 0
    """New requests turned away with 503 while the group was down; nothing was promised to them."""
    hung: int = 0
    longest_s: float = 0.0


def question(number: int) -> dict[str, Any]:
    """Greedy and seeded in turn."""
    sampling = {"temperature": 0} if number % 2 == 0 else {"temperature": 0.8, "seed": 1000 + number}
    prompt = ["Once upon a time", "The fox", "What is", "A small house"][number % 4]
    return {"prompt": prompt, "max_tokens": _TOKENS.value, "ignore_eos": True, "stream": True} | sampling


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, str]:
    """(how it ended, text): 'done', 'error' or 'refused'."""
    text, ended = "", "cut"
    async with http.stream("POST", "/v1/completions", json=body) as reply:
        if reply.status_code == 503:
            return "refused", ""
        async for line in reply.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                ended = "done"
            elif '"error"' in line:
                ended = "error"
            else:
                choices = msgspec.json.decode(line[6:])["choices"]
                text += choices[0]["text"] if choices else ""
    return ended, text


class Group:
    """The served group, as its health page and /proc tell it."""

    def __init__(self, http: httpx.AsyncClient):
        self._http = http
        self.seen: set[int] = set()

    async def health(self) -> dict[str, Any]:
        body = (await self._http.get("/health")).json()
        self.seen |= {component["pid"] for component in body["components"].values() if component["pid"]}
        return body

    async def ranks(self) -> list[int]:
        components = (await self.health())["components"]
        return [components[f"rank {rank}"]["pid"] for rank in range(_PROCESSES.value)]

    async def epoch(self) -> int:
        return (await self.health())["components"]["engine"].get("epoch", 0)

    async def ready(self) -> bool:
        return (await self._http.get("/ready")).status_code == 200

    async def recovery_s(self) -> float:
        """The supervisor's figure, which it tells within a second or so of serving."""
        await asyncio.sleep(1.5)
        lines = (await self._http.get("/metrics")).text.splitlines()
        return float(next((line for line in lines if line.startswith("novajax_recovery_seconds{")), "nan").split()[-1])

    async def hurt(self, kind: str) -> None:
        """Does one fault: 'kill 2', 'stop 0', 'cut 1', 'kill supervisor'."""
        what, _, whom = kind.partition(" ")
        ranks = await self.ranks()
        supervisor = parent(ranks[0])
        self.seen.add(supervisor)
        if whom == "supervisor":
            os.kill(supervisor, signal.SIGKILL)
        elif what == "cut":
            cut_channel(ranks[int(whom)])
        else:
            os.kill(ranks[int(whom)], signal.SIGKILL if what == "kill" else signal.SIGSTOP)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def cut_channel(pid: int) -> None:
    """Shuts down the oldest TCP connection of a rank, which is its plan channel. Raises OSError if the kernel forbids it."""
    established = {line.split()[9] for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "01"}
    for fd in sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd")):
        link = os.readlink(f"/proc/{pid}/fd/{fd}")
        if link.startswith("socket:[") and link[8:-1] in established:
            handle = os.pidfd_open(pid)
            copied = ctypes.CDLL(None, use_errno=True).syscall(SYS_PIDFD_GETFD, handle, fd, 0)
            os.close(handle)
            if copied < 0:
                raise OSError(ctypes.get_errno(), "pidfd_getfd")
            with socket.socket(fileno=copied) as duplicate:
                duplicate.shutdown(socket.SHUT_RDWR)
            return
    raise OSError(f"process {pid} has no TCP connection")


def kinds() -> list[str]:
    """Every fault, in the order of the first rounds: one of each sort before the second of any."""
    ranks = range(_PROCESSES.value)
    sorts = [[f"kill {rank}" for rank in ranks], [f"stop {rank}" for rank in ranks], [f"cut {rank}" for rank in ranks if rank]]
    sorts.append(["kill supervisor"])
    longest = max(len(sort) for sort in sorts)
    return [sort[i] for i in range(longest) for sort in sorts if i < len(sort)]


async def client(http: httpx.AsyncClient, first: int, known: dict[int, str], outcome: Outcome, stop: asyncio.Event) -> None:
    number = first
    while not stop.is_set():
        number = (number + 1) % len(known)
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(BOUND_S):
                ended, text = await ask(http, question(number))
        except TimeoutError:
            outcome.hung += 1
            continue
        except httpx.HTTPError:
            ended, text = "cut", ""
        outcome.longest_s = max(outcome.longest_s, time.monotonic() - began_s)
        if ended == "refused":
            outcome.refused += 1
            await asyncio.sleep(0.5)
        elif ended == "error":
            outcome.errors += 1
        elif ended == "done" and text == known[number]:
            outcome.correct += 1
        else:
            outcome.wrong += 1
            print(f"  question {number} ended {ended}:\n    got  {text!r}\n    want {known[number]!r}", file=sys.stderr)


async def until(what, bound_s: float) -> float:
    """Seconds until `what()` is true. Raises TimeoutError."""
    began_s = time.monotonic()
    async with asyncio.timeout(bound_s):
        while not await what():  # noqa: ASYNC110 - another process is asked
            await asyncio.sleep(0.05)
    return time.monotonic() - began_s


async def answered(outcome: Outcome) -> float:
    """Waits until each client has had an answer on average, so that faults meet a group that works; seconds that took."""
    wanted = outcome.correct + outcome.wrong + outcome.errors + _CLIENTS.value

    async def enough() -> bool:
        return outcome.correct + outcome.wrong + outcome.errors >= wanted

    return await until(enough, BOUND_S)


async def run(url: str) -> tuple[list[Round], Outcome, set[int]]:
    draw, outcome, rounds, stop = random.Random(_SEED.value), Outcome(), [], asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=BOUND_S + 30, trust_env=False) as http:
        group = Group(http)
        known = {number: (await ask(http, question(number)))[1] for number in range(8)}
        clients = [asyncio.create_task(client(http, 2 * i, known, outcome, stop)) for i in range(_CLIENTS.value)]
        try:
            order = (kinds() + draw.choices(kinds(), k=_ROUNDS.value))[: _ROUNDS.value]
            for number, kind in enumerate(order, 1):
                await asyncio.sleep(await answered(outcome) * draw.uniform(0.1, 0.9))
                before = await group.epoch()
                began_s = time.monotonic()
                await group.hurt(kind)

                async def detected(before: int = before) -> bool:
                    health = await group.health()
                    return health["status"] == "restarting" or health["components"]["engine"].get("epoch", 0) > before

                async def serving(before: int = before) -> bool:
                    return await group.epoch() > before and await group.ready()

                detected_s = await until(detected, BOUND_S)
                await until(serving, BOUND_S)
                done = Round(kind, detected_s, time.monotonic() - began_s, await group.recovery_s())
                rounds.append(done)
                print(
                    f"round {number:2d}  {kind:16s} detected after {done.detected_s:5.2f} s, serving after {done.serving_s:5.2f} s "
                    f"(detection to serving {done.recovery_s:5.2f} s)",
                    file=sys.stderr,
                )
            await asyncio.sleep(2.0)
        finally:
            stop.set()
            await asyncio.gather(*clients)
    return rounds, outcome, group.seen


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def main(_: list[str]) -> int:
    logging.getLogger("httpx").setLevel(logging.WARNING)
    shape = [f"--processes={_PROCESSES.value}", f"--devices_per_process={_DEVICES.value}", f"--mesh={_MESH.value}"]
    sizes = ["--max_rows=4", "--max_context_tokens=256", "--chunk_tokens=32", "--deterministic", "--drain_s=60"]
    with ServedModel(_MODEL.value, [*shape, *sizes], start_s=1200.0) as served:
        rounds, outcome, seen = asyncio.run(run(served.url))
    orphans = sorted(pid for pid in seen if alive(pid))
    header = ["fault", "detected after, s", "serving after, s", "detection to serving, s"]
    rows = [[done.kind, done.detected_s, done.serving_s, done.recovery_s] for done in rounds]
    results = {"rounds": [msgspec.to_builtins(done) for done in rounds], "clients": msgspec.to_builtins(outcome), "orphans": orphans}
    machine = describe_machine(probe=False)
    report = {"benchmark": "kill matrix", "machine": machine, "settings": settings(__name__), "results": results}
    publish(report, f"{markdown_table(header, rows)}\n\nclients: {msgspec.to_builtins(outcome)}; orphans: {len(orphans)}\n")
    print(f"clients: {outcome}; orphans: {orphans or 'none'}", file=sys.stderr)
    return int(bool(outcome.wrong or outcome.hung or orphans))


if __name__ == "__main__":
    app.run(main)
