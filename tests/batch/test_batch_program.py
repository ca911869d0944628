"""The program itself: exit codes, signals, and what is printed where."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batch_world import World, completion_line

PROGRAM = str(Path(__file__).with_name("fake_batch.py"))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def command(world: World, *more: str) -> list[str]:
    paths = [f"--model={world.directory / 'model'}", f"--input={world.input}", f"--output={world.output}"]
    return [sys.executable, PROGRAM, *paths, *more]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=100)


def test_success_is_0_and_the_summary_is_the_only_output(world):
    world.write(completion_line(1), completion_line(2, model="another-name"))
    done = run(*command(world, "--json", "--ordered", "--model_names=another-name"))
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["lines"], summary["succeeded"], summary["failed_in_output"]) == (2, 2, 0)
    assert sorted(world.by_line()) == [1, 2]


def test_an_interrupted_run_says_so_and_goes_on(world):
    world.write(*(completion_line(i) for i in range(1, 101)), b"bad")
    process = subprocess.Popen(command(world, "--max_in_flight=4"), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (world.output.exists() and world.output.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "run the same command again" in said
    assert 0 < len(world.records()) < 101
    done = run(*command(world, "--ignore_model"))
    assert done.returncode == 3, done.stderr
    assert sorted(world.by_line()) == list(range(1, 102))
    assert world.by_line()[101]["error"]["line"] == 101


@pytest.mark.parametrize("change", ["--input=/no/such/file", "--max_line_bytes=many"])
def test_what_cannot_work_is_refused_before_anything_is_written(world, change):
    world.write(completion_line(1))
    done = run(*command(world, change))
    assert done.returncode in (1, 2)
    assert done.stderr
    assert not world.output.exists()
