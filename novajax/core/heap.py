"""Keeps the C heap of a long-lived process small.

Few arenas, because glibc gives each thread one of its own, up to eight per core, and every arena keeps its own peak: buffers which
wander between threads are paid once for each of them. And free pages given back at rest, because a heap shrinks by itself only
at its end, where a small block that lives long keeps all below it. Nothing happens where the C library is not glibc.
"""

import ctypes
import os
from collections.abc import Mapping
from functools import cache

ARENAS = 2
M_ARENA_MAX = -8
"""mallopt(3)."""
REST_S = 1.0
"""Idle for so long, a process gives back what it does not use: long enough that no request waits for it in a busy time."""


def bound_arenas(environment: Mapping[str, str], arenas: int = ARENAS) -> bool:
    """From now on no thread makes an arena beyond so many, unless MALLOC_ARENA_MAX says what is wanted. True if the C library took it;
    call it before threads are started."""
    return "MALLOC_ARENA_MAX" not in environment and _is_glibc() and bool(ctypes.CDLL(None).mallopt(M_ARENA_MAX, arenas))


def give_back() -> bool:
    """Returns the free pages of all arenas to the system (malloc_trim(3)); milliseconds. True if there were any."""
    return _is_glibc() and bool(ctypes.CDLL(None).malloc_trim(0))


@cache
def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False
