"""Memory decided by arithmetic before anything is allocated: weights + KV pages + sampling state + reserve <= what there is,
on each device of the mesh alike.

Nothing is profiled and nothing grows later, so there is no out-of-memory after ready. `plan_capacity` either returns the
split or raises CapacityError with the numbers.
"""

import os
from collections.abc import Sequence
from typing import Any

import msgspec

from novajax.core.config import EngineConfig
from novajax.core.errors import CapacityError
from novajax.engine.buckets import BucketTable
from novajax.models.config import ModelConfig
from novajax.planner.hardware import USABLE_SHARE

HOST_SHARE = 0.80
"""Share of the memory available on a CPU machine, where other programs live too."""


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes by kind on the fullest device, and the pages they buy."""

    limit_bytes: int
    weights_bytes: int
    sampling_bytes: int
    reserve_bytes: int
    page_bytes: int
    pages: int
    """Of one data partition."""
    page_tokens: int
    """Of a page over all its context shards."""
    max_request_tokens: int
    """The longest prompt + output that a partition's pages can hold."""

    @property
    def kv_bytes(self) -> int:
        return self.pages * self.page_bytes

    @property
    def used_bytes(self) -> int:
        return self.weights_bytes + self.sampling_bytes + self.reserve_bytes + self.kv_bytes

    def summary(self) -> str:
        """One line for people."""
        return (
            f"memory {_gib(self.limit_bytes)} = weights {_gib(self.weights_bytes)} + KV {_gib(self.kv_bytes)} ({self.pages:,} pages, "
            f"{self.pages * self.page_tokens:,} tokens) + sampling {_gib(self.sampling_bytes)} + reserve {_gib(self.reserve_bytes)}"
            f" + free {_gib(self.limit_bytes - self.used_bytes)}"
        )


def plan_capacity(
    config: EngineConfig, model: ModelConfig, table: BucketTable, *, limit_bytes: int, weights_bytes: int, page_bytes: int, itemsize: int
) -> Capacity:
    """Splits the `limit_bytes` of one device, which holds `weights_bytes` and `page_bytes` of each page. The pool gets what
    `config.kv_bytes` says, else every row's full context if that fits, else the rest.

    Raises CapacityError when weights, reserve and the smallest useful pool (one full-length table) do not fit.
    """
    widest = table.table_pages[-1]
    rows, page_tokens = config.max_rows // config.mesh.data, config.page_tokens * config.mesh.context
    sampling = rows * model.vocab * (4 + 1 + 4)  # counts, seen, bias
    reserve = step_reserve_bytes(model, table, config.page_tokens, itemsize, config.mesh.tensor_parallel)
    left = limit_bytes - weights_bytes - sampling - reserve
    wanted = config.kv_bytes if config.kv_bytes is not None else rows * widest * page_bytes
    numbers = f"weights {_gib(weights_bytes)} + sampling {_gib(sampling)} + reserve {_gib(reserve)} of {_gib(limit_bytes)}"
    if config.kv_bytes is not None and wanted > left:
        raise CapacityError(f"a KV pool of {_gib(wanted)} does not fit: {numbers} leave {_gib(max(left, 0))}", param="kv_bytes")
    pages = min(wanted, max(left, 0)) // page_bytes
    if pages < 1 or (config.kv_bytes is None and pages < widest):
        raise CapacityError(
            f"{numbers} leave {_gib(max(left, 0))}, less than one context of {widest * page_tokens:,} tokens "
            f"({_gib(widest * page_bytes)}): lower max_context_tokens or use a smaller model",
            param="max_context_tokens",
        )
    return Capacity(
        limit_bytes=limit_bytes,
        weights_bytes=weights_bytes,
        sampling_bytes=sampling,
        reserve_bytes=reserve,
        page_bytes=page_bytes,
        pages=pages,
        page_tokens=page_tokens,
        max_request_tokens=min(pages, widest) * page_tokens,
    )


def step_reserve_bytes(model: ModelConfig, table: BucketTable, page_tokens: int, itemsize: int, cut: int = 1) -> int:
    """A bound on one step's temporaries and outputs, doubled because the next step is enqueued while one runs.

    The largest of: gathered pages with scores (attention), the MLP's three activations, logits with their filters.
    Heads and widths are those of one of `cut` devices; pages have `page_tokens` on each. Checked against XLA's own figure after
    compiling.
    """
    worst = 0
    for b in table.buckets():
        keys = b.table_pages * page_tokens
        gathered = 2 * b.rows * keys * -(-model.kv_heads // cut) * model.head_dim * itemsize
        scores = 4 * 4 * -(-model.heads // cut) * keys * max(b.decode_rows, b.prefill_rows * b.chunk_tokens)
        width = max(getattr(kind.mlp, "mlp", 0) * getattr(kind.mlp, "per_token", 1) for kind in model.layers)
        activations = 4 * b.tokens * (4 * model.embed + (3 * width + 3 * model.heads * model.head_dim) // cut)
        logits = 4 * 6 * model.vocab * (b.rows + (b.tokens if b.score else 0))
        worst = max(worst, gathered + scores + activations, logits)
    return 2 * worst


def memory_limit_bytes(devices: Sequence[Any]) -> int:
    """Bytes this process may plan with on the fullest of its `devices`; on a CPU they share what the host has left."""
    stats = [d.memory_stats() for d in devices] if devices[0].platform != "cpu" else []
    if stats and all(s and "bytes_limit" in s for s in stats):
        return int(min(s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats if s) * USABLE_SHARE)
    return int(min(_available_bytes(), _cgroup_left_bytes()) * HOST_SHARE / len(devices))


def _available_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_left_bytes() -> int:
    """What a container's limit leaves (cgroup v2); without a limit, no bound."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit, open("/sys/fs/cgroup/memory.current", encoding="ascii") as used:
            text = limit.read().strip()
            return 2**63 if text == "max" else int(text) - int(used.read())
    except (OSError, ValueError):
        return 2**63


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
