"""Plumbing that every benchmark shares: what machine this is, summaries of samples, and one way to report.

A report is a JSON object {benchmark, machine, settings, results, ...}; the Markdown table and the plot are views of it.
The machine's own limits (memory read rate, float32 rate) are measured in the same run, so that a speed can be read as a
share of them. Knows nothing of models or servers.
"""

import concurrent.futures
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from absl import flags

_PROBE_BYTES = 256 * 2**20
_PROBE_SIDE = 2048
_PROBE_ROUNDS = 3
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "grain", "granian", "litestar")


# Overridable, because an entry point that is imported in the same process may have a --json of its own.
JSON = flags.DEFINE_bool("json", False, "print the whole report as JSON to stdout instead of a Markdown table", allow_override=True)
OUT = flags.DEFINE_string("out", None, "also write PREFIX.json, PREFIX.md and, where there is a plot, PREFIX.png", allow_override=True)
PROBE = flags.DEFINE_bool("probe", True, "measure this machine's memory and float32 rates first (about a second)", allow_override=True)


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where a figure was measured. None: not measured, or not found."""

    cpu: str
    cores: int
    memory_bytes: int | None
    memory_read_bytes_per_s: float | None
    float32_flop_per_s: float | None
    system: str
    python: str
    packages: dict[str, str]
    commit: str | None
    load_before: float
    """One-minute load average before the run: above about 0.5, somebody else was measuring too."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Of one sample of numbers; all None when it is empty."""

    count: int
    mean: float | None = None
    sd: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None


def summarize(values: Iterable[float]) -> Summary:
    """Percentiles by linear interpolation; `sd` is of the sample (n - 1), None for one value."""
    data = np.fromiter(values, np.float64)
    if not len(data):
        return Summary(count=0)
    p50, p90, p99 = (float(x) for x in np.percentile(data, [50, 90, 99]))
    sd = float(data.std(ddof=1)) if len(data) > 1 else None
    return Summary(count=len(data), mean=float(data.mean()), sd=sd, p50=p50, p90=p90, p99=p99, max=float(data.max()))


def describe_machine(*, probe: bool) -> Machine:
    return Machine(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=_memory_bytes(),
        memory_read_bytes_per_s=_memory_read_bytes_per_s() if probe else None,
        float32_flop_per_s=_float32_flop_per_s() if probe else None,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages={name: version for name in _PACKAGES if (version := _version(name))},
        commit=_commit(),
        load_before=os.getloadavg()[0],
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Numbers right-aligned by Markdown's own colon; None prints as a dash."""
    body = [[_cell(value) for value in row] for row in rows]
    align = ["---:" if body and all(_numeric(row[i]) for row in body) else "---" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), align, *body])


def machine_line(machine: Machine) -> str:
    limits = []
    if machine.memory_read_bytes_per_s:
        limits.append(f"{machine.memory_read_bytes_per_s / 1e9:.1f} GB/s read")
    if machine.float32_flop_per_s:
        limits.append(f"{machine.float32_flop_per_s / 1e9:.0f} GFLOP/s float32")
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items() if name in ("jax", "flax"))
    parts = [
        f"{machine.cpu} x {machine.cores} cores",
        *limits,
        f"load {machine.load_before:.1f} before",
        packages,
        f"commit {machine.commit}",
    ]
    return " · ".join(part for part in parts if part)


def publish(report: dict[str, Any], markdown: str) -> None:
    """Prints the report as the flags ask, and writes it beside --out."""
    encoded = msgspec.json.format(msgspec.json.encode(report), indent=2).decode()
    print(encoded if JSON.value else markdown, flush=True)
    if OUT.value:
        Path(OUT.value + ".json").write_text(encoded + "\n")
        Path(OUT.value + ".md").write_text(markdown + "\n")


def settings(module: str, hidden: Iterable[str] = ()) -> dict[str, Any]:
    """The flags that `module` (its `__name__`) defines, with their values, for the report."""
    owner = sys.argv[0] if module == "__main__" else module
    return {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(owner) if flag.name not in hidden}


def say(text: str) -> None:
    """Progress of a benchmark goes to stderr, so that stdout holds only the report."""
    print(text, file=sys.stderr, flush=True)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
    return str(value)


def _numeric(text: str) -> bool:
    return text[:1].isdigit() or text[:1] in "-+."


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _memory_read_bytes_per_s() -> float:
    """Best of a few passes of all cores summing an array far larger than the caches."""
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(_PROBE_BYTES // 8, np.int64), cores)
    best_s = float("inf")
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        for _ in range(_PROBE_ROUNDS):
            begun_s = time.perf_counter()
            list(pool.map(np.max, parts))
            best_s = min(best_s, time.perf_counter() - begun_s)
    return _PROBE_BYTES / best_s


def _float32_flop_per_s() -> float:
    """Best of a few square matrix products by numpy's own BLAS."""
    a = np.ones((_PROBE_SIDE, _PROBE_SIDE), np.float32)
    best_s = float("inf")
    for _ in range(_PROBE_ROUNDS):
        begun_s = time.perf_counter()
        np.matmul(a, a)
        best_s = min(best_s, time.perf_counter() - begun_s)
    return 2 * _PROBE_SIDE**3 / best_s
