"""The C heap in a process of its own: its arenas are bounded, a choice made in the environment stands, free pages go back at rest."""

import os
import subprocess
import sys

import pytest

GLIBC = hasattr(os, "confstr") and "CS_GNU_LIBC_VERSION" in os.confstr_names
# 24 threads that hold memory at the same time; arenas are mapped at multiples of 64 MiB, the first one is the program's own heap.
PROGRAM = """
import ctypes, os, threading
from novajax.core.heap import bound_arenas
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
print(bound_arenas(os.environ))
barrier = threading.Barrier(24)
def hold():
    barrier.wait()
    libc.malloc(ctypes.c_size_t(50000))
    barrier.wait()
threads = [threading.Thread(target=hold) for _ in range(24)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
starts = [int(line.split('-')[0], 16) for line in open('/proc/self/maps') if len(line.split()) == 5 and ' rw-p ' in line]
print(sum(start % (64 << 20) == 0 for start in starts))
"""


def bounded(**environment: str) -> tuple[str, int]:
    base = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=base | environment, capture_output=True, text=True, timeout=60, check=True)
    taken, arenas = done.stdout.split()
    return taken, int(arenas)


@pytest.mark.skipif(not GLIBC or sys.platform != "linux", reason="arenas are glibc's")
def test_threads_share_few_arenas():
    taken, arenas = bounded()
    assert taken == "True"
    assert arenas <= 2


@pytest.mark.skipif(not GLIBC or sys.platform != "linux", reason="arenas are glibc's")
def test_a_choice_in_the_environment_stands():
    taken, arenas = bounded(MALLOC_ARENA_MAX="6")
    assert taken == "False"
    assert arenas > 2


TRIMMED = """
import ctypes
from novajax.core.heap import give_back
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096
blocks = [libc.malloc(ctypes.c_size_t(100_000)) for _ in range(1000)]
for block in blocks: ctypes.memset(block, 1, 100_000)
top = libc.malloc(ctypes.c_size_t(110_000))  # too large for a hole: it lives on above them
for block in blocks: libc.free(block)
before = resident()
print(give_back(), before - resident())
"""


@pytest.mark.skipif(not GLIBC or sys.platform != "linux", reason="malloc_trim is glibc's")
def test_free_pages_below_a_block_that_lives_are_given_back():
    done = subprocess.run([sys.executable, "-c", TRIMMED], capture_output=True, text=True, timeout=60, check=True)
    trimmed, freed_bytes = done.stdout.split()
    assert trimmed == "True"
    assert int(freed_bytes) > 80_000_000
