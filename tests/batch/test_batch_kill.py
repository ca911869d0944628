"""SIGKILL at random moments, a disk that is really full, and still exactly one output line for every input line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from batch_world import World, completion_line

LINES = 200


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    lines: list[Any] = [completion_line(i, max_tokens=1 + i % 9) for i in range(1, LINES + 1)]
    for i in range(9, LINES, 10):
        lines[i] = b'{"broken'
    world.write(*lines)
    return world


def rounds(world: World, *arguments: object) -> dict[str, Any]:
    """What kill_rounds.py says of its run over this world's files."""
    script = Path(__file__).with_name("kill_rounds.py")
    command = [sys.executable, str(script), str(world.directory), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_exactly_once(world: World) -> None:
    found = world.by_line()
    assert sorted(found) == list(range(1, LINES + 1))
    for number, record in found.items():
        if number % 10 == 0:
            assert record["error"]["line"] == number
        else:
            assert record["custom_id"] == f"id-{number}"
            last = world.tokenizer.encode(f"line {number}")[-1]
            tokens = [last + 1 + i for i in range(1 + number % 9)]
            assert record["response"]["body"]["choices"][0]["text"] == world.tokenizer.decode(tokens)


def test_killed_at_random_moments_every_line_is_answered_exactly_once(world):
    told = rounds(world, 10, 1)
    assert told["killed"] == 10, told
    assert told["sizes"] == sorted(told["sizes"])
    assert told["codes"][-1] == 0
    assert_exactly_once(world)


def test_a_full_disk_ends_the_run_by_itself_and_it_resumes(world):
    told = rounds(world, 1, 2, 20_000)
    assert told["codes"] == [4, 0]
    assert told["sizes"][0] <= 20_000
    assert_exactly_once(world)
