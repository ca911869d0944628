"""Keeps the C heap of a long-lived process small: few arenas, because glibc gives each thread one of its own, up to eight per core.

Every arena keeps its own peak for ever, so that buffers which wander between threads are paid once for each of them. Nothing
happens where the C library is not glibc, or where the variable MALLOC_ARENA_MAX says what is wanted.
"""

import ctypes
import os
from collections.abc import Mapping

ARENAS = 2
M_ARENA_MAX = -8
"""mallopt(3)."""


def bound_arenas(environment: Mapping[str, str], arenas: int = ARENAS) -> bool:
    """From now on no thread makes an arena beyond so many. True if the C library took it; call it before threads are started."""
    if "MALLOC_ARENA_MAX" in environment or not hasattr(os, "confstr"):
        return False
    try:
        if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return False
    except (ValueError, OSError):
        return False
    return bool(ctypes.CDLL(None).mallopt(M_ARENA_MAX, arenas))
