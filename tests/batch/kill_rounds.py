"""A program for tests: runs one batch again and again, killing it with SIGKILL at random moments, then lets it finish.

Everything is imported once and each round is a fork, so that a round costs milliseconds. A round is killed when its output has
grown by a random amount, so that kills meet every part of a run however slow the machine. Prints one JSON line of what happened.
With a byte limit, files cannot grow beyond it (as on a full disk) in the first round, which must stop by itself.
"""

import asyncio
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import grain  # noqa: F401  for all rounds at once
from batch_world import World

from novajax.core.fake import FakeBackend
from novajax.offline.output import OutputStopped

STEP_S = 0.003


def run_round(directory: Path, limit_bytes: int | None) -> int:
    """In the child: 0 finished, 4 stopped by the disk."""
    world = World(directory)
    world.backend = FakeBackend(world.backend._card, step_s=STEP_S)
    if limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    try:
        asyncio.run(world.run_async(max_in_flight=8, sync_every_s=0.05))
    except OutputStopped:
        return 4
    return 0


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def wait_for_growth(path: Path, by_bytes: int, child: int) -> None:
    """Returns early when the child has ended; it stays to be waited for."""
    wanted_bytes = size_of(path) + by_bytes
    while size_of(path) < wanted_bytes and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)


def main() -> None:
    directory, rounds, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    limit_bytes = int(sys.argv[4]) if len(sys.argv) > 4 else None
    draw = random.Random(seed)
    killed, codes, sizes = 0, [], []
    for number in range(rounds + 1):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = run_round(directory, limit_bytes if number == 0 else None)
            finally:
                os._exit(code)
        if number < rounds and not (number == 0 and limit_bytes is not None):
            wait_for_growth(directory / "out.jsonl", draw.randrange(1, 8_000), child)
            time.sleep(draw.uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        killed += os.WIFSIGNALED(status)
        codes.append(os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status))
        sizes.append(size_of(directory / "out.jsonl"))
    print(json.dumps({"killed": killed, "codes": codes, "sizes": sizes}))


if __name__ == "__main__":
    main()
