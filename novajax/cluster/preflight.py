"""What every rank tells the leader before the engine is built, and one line for each thing in which a rank differs.

Pure comparison: finding the facts is the business of `facts` here for files, and of the worker for devices.
"""

import json
import platform
import socket
import sys
import time
from collections.abc import Mapping
from hashlib import blake2b
from importlib import metadata
from pathlib import Path

import msgspec

from novajax.core.config import EngineConfig

CLOCK_SKEW_S = 30.0
"""Wall clocks of a group may differ by so much; more makes logs and certificates lie."""
_PACKAGES = ("novajax", "jax", "jaxlib", "numpy", "flax")
_WHOLE = {".json", ".jinja"}
"""Files that are hashed by content; of the others the size counts."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Of one rank. Equal where a group must agree, but for host, clock and pid."""

    host: str
    versions: dict[str, str]
    clock_s: float
    config: str
    """Digest of the engine's configuration, without the paths, which each host has its own of."""
    weights: str
    """Digest of what the weight directory lists."""
    devices: int | None = None
    """Local devices; None before they are opened."""
    device_kind: str = ""


def facts(config: EngineConfig, directory: Path | None) -> Facts:
    """What this process sees. A package that is not installed is left out."""
    versions = {"python": platform.python_version(), "machine": f"{sys.byteorder} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Facts(
        host=socket.gethostname(),
        versions=versions,
        clock_s=time.time(),
        config=_short(msgspec.json.encode(msgspec.structs.replace(config, model="", compile_cache=""))),
        weights="" if directory is None else listing_digest(directory),
    )


def listing_digest(directory: Path) -> str:
    """Names and sizes of a model's files, and the content of the small ones: cheap, and different for different checkpoints."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))
    entries = []
    for path in files:
        name, size = str(path.relative_to(directory)), path.stat().st_size
        content = _short(path.read_bytes()) if path.suffix in _WHOLE and size < 64 << 20 else ""
        entries.append((name, size, content))
    return _short(json.dumps(entries).encode())


def differences(found: Mapping[int, Facts]) -> list[str]:
    """One line for each rank and thing that differs from rank 0."""
    first, lines = found[0], []
    for rank in sorted(found):
        mine = found[rank]
        for name in sorted(first.versions.keys() | mine.versions.keys()):
            theirs, ours = mine.versions.get(name, "none"), first.versions.get(name, "none")
            if theirs != ours:
                lines.append(f"rank {rank} ({mine.host}) has {name} {theirs}, rank 0 has {ours}")
        if mine.config != first.config:
            lines.append(f"rank {rank} ({mine.host}) was given configuration {mine.config}, rank 0 {first.config}")
        if mine.weights != first.weights:
            lines.append(f"rank {rank} ({mine.host}) sees weights {mine.weights}, rank 0 {first.weights}")
        if mine.devices != first.devices or mine.device_kind != first.device_kind:
            here, there = (f"{of.devices} x {of.device_kind}" for of in (mine, first))
            lines.append(f"rank {rank} ({mine.host}) has devices {here}, rank 0 has {there}")
        if abs(mine.clock_s - first.clock_s) > CLOCK_SKEW_S:
            lines.append(f"the clock of rank {rank} ({mine.host}) is {mine.clock_s - first.clock_s:+.0f} s from rank 0's")
    return lines


def _short(data: bytes) -> str:
    return blake2b(data, digest_size=6).hexdigest()
