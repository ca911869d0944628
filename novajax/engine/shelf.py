"""Compiled programs on disk, so that a start which has seen them before neither traces nor compiles.

A program is found by everything that determines it: the source of this package that a step is made from, the versions of jax and
of its runtime, the devices, the mesh, the model, and shape, type and sharding of every array. What is not there, or does not
come back whole, is compiled and put there. Loading a program runs its code (JAX keeps them as pickles), so the folder must
belong to this user and be writable by nobody else; any other folder is left alone. JAX's own persistent cache must stay off:
on a CPU an executable that came out of it cannot be written again; it loads, and fails when it is run, with functions that are
not found (jaxlib 0.11.2).
"""

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import structlog
from jax.experimental import serialize_executable

from novajax.core.private import is_private

KEPT = 12
"""Sets of programs that stay: those used last."""
_DIGEST_BYTES = hashlib.sha256().digest_size
_ROOMS = ("core", "engine", "kernels", "kv", "models", "parallel", "planner", "quant")
"""What a step is traced from, and what that imports."""
_SOURCES = (".py", ".cc", ".h")
_NOT_PROGRAM = ("cache", "dir", "log", "profil", "traceback", "debug")
"""Parts of names of jax's settings that change no program."""


class Shelf:
    """The programs of one engine. `get` may be called by several threads."""

    def __init__(self, directory: str, determined_by: Any):
        """directory: "" keeps nothing. determined_by: a value whose `repr` with the arrays' descriptions tells engines apart."""
        self._folder: Path | None = None
        if directory and is_private(Path(directory)):
            self._folder = Path(directory) / "programs" / _key(determined_by)
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.utime(self._folder)
            _forget_all_but(self._folder.parent, KEPT)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The executable of that name: kept, or made and kept."""
        if self._folder is None:
            return make()
        path = self._folder / hashlib.sha256(f"{jax.process_index()} {name}".encode()).hexdigest()[:32]
        kept = _read(path)
        if kept is not None:
            return kept
        made = make()
        _write(path, made)
        return made


def describe_arrays(tree: Any) -> str:
    """Structure, shapes, types and shardings of arrays, or of what stands for them."""
    leaves, structure = jax.tree.flatten(tree)
    return f"{structure} {[(leaf.shape, str(leaf.dtype), str(leaf.sharding)) for leaf in leaves]}"


def _read(path: Path) -> Any:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
            raise ValueError("its digest is wrong")
        return serialize_executable.deserialize_and_load(*pickle.loads(data[_DIGEST_BYTES:]))  # noqa: S301 a private folder, see the module
    except Exception as error:  # whatever is wrong with it, it can be made again
        structlog.get_logger().warning("a kept program is not usable and is compiled again", path=str(path), error=str(error)[:200])
        return None


def _write(path: Path, program: Any) -> None:
    """Best effort: a full disk costs the next start time, nothing else."""
    try:
        data = pickle.dumps(serialize_executable.serialize(program))
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(hashlib.sha256(data).digest() + data)
        part.replace(path)
    except Exception as error:
        structlog.get_logger().warning("a compiled program could not be kept", path=str(path), error=str(error)[:200])


def _forget_all_but(folder: Path, count: int) -> None:
    sets = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in sets[count:]:
        shutil.rmtree(old, ignore_errors=True)


def _key(determined_by: Any) -> str:
    digest = hashlib.sha256()
    source = Path(__file__).parents[1]
    for path in sorted(path for room in _ROOMS for path in (source / room).rglob("*") if path.suffix in _SOURCES):
        digest.update(f"{path.relative_to(source)} ".encode() + path.read_bytes())
    devices = [(device.id, device.device_kind, device.process_index) for device in jax.devices()]
    settings = {name: value for name, value in sorted(jax.config.values.items()) if not any(part in name for part in _NOT_PROGRAM)}
    runtime = (jax.__version__, version("jaxlib"), jax.devices()[0].client.platform_version, os.environ.get("XLA_FLAGS"), _processor())
    digest.update(repr((devices, settings, runtime, determined_by)).encode())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """What a program compiled for this CPU may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text("ascii", "replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
