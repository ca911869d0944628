"""The kernels for a CPU, in C++: built where a compiler is, kept, and made known to XLA.

The library is compiled once for this processor and these sources, into a folder that must be this user's alone (it holds code). Where
there is no compiler or no such folder, there are no native kernels, and the plain definitions run: same results, more slowly.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import structlog

from novajax.core.private import is_private

TARGETS = ("novajax_matmul", "novajax_paged_attention", "novajax_write_pages", "novajax_round_rows")
"""Names of the custom calls: symbols of the library."""
KEPT = 4
"""Libraries that stay in a folder: those built last."""
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared")
COMPILERS = ("g++", "clang++", "c++")
_BUILD_S = 300


def register(folder: Path) -> bool:
    """Whether the custom calls `TARGETS` can be used in this process; builds the library in `folder` if it is not there."""
    path = _built(folder)
    if path is None:
        return False
    known = _libraries()
    if path.name not in known:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            structlog.get_logger().warning("the native kernels cannot be loaded; the plain ones run", path=str(path), error=str(error))
            return False
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
        known[path.name] = library
    return True


def sources() -> list[Path]:
    """The C++ files, headers among them."""
    return sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cc", ".h"))


@functools.cache
def _libraries() -> dict[str, ctypes.CDLL]:
    """Those of this process, by name: XLA knows one address for each call as long as the process lives."""
    return {}


def _built(folder: Path) -> Path | None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None
    path = folder / f"native-{_key(compiler)}.so"
    if not is_private(folder):
        return None
    if path.exists():
        return path
    log = structlog.get_logger()
    log.info("building the native kernels", compiler=compiler)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / path.name
        units = [str(source) for source in sources() if source.suffix == ".cc"]
        command = [compiler, *_FLAGS, "-isystem", jax.ffi.include_dir(), *units, "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            log.warning("the native kernels cannot be built; the plain ones run", error=str(error)[:500])
            return None
        if done.returncode:
            log.warning("the native kernels cannot be built; the plain ones run", error=done.stderr[:500])
            return None
        made.replace(path)
    for old in sorted(folder.glob("native-*.so"), key=lambda library: library.stat().st_mtime)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def _key(compiler: str) -> str:
    """Changes with the sources, the compiler, XLA's interface and the processor."""
    digest = hashlib.sha256(repr((compiler, os.stat(compiler).st_mtime_ns, _FLAGS, jax.__version__, platform.machine())).encode())
    for source in sources():
        digest.update(source.name.encode() + source.read_bytes())
    try:
        lines = Path("/proc/cpuinfo").read_text("ascii", "replace").splitlines()
    except OSError:
        lines = []
    digest.update("".join(line for line in lines if line.startswith(("flags", "Features"))).encode())
    return digest.hexdigest()[:32]
