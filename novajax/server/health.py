"""/health (is this process worth keeping), /ready (may it get traffic), /metrics, /version.

The two public ones tell phases and process ids, nothing about requests or models.
"""

import importlib.metadata
import os
from typing import Any

import msgspec
from litestar import Response, get
from litestar.di import NamedDependency

from novajax.server.front import Front
from novajax.telemetry.metrics import CONTENT_TYPE


class Component(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    status: str
    pid: int | None
    detail: str = ""
    rank: int | None = None
    host: str = ""
    epoch: int | None = None
    step: int | None = None


class Health(msgspec.Struct, frozen=True):
    status: str
    """ok, restarting (its engine died and is being started again), stuck (it has work and completes none) or failed."""
    components: dict[str, Component]


class Ready(msgspec.Struct, frozen=True):
    ready: bool
    phase: str


@get("/health", opt={"public": True})
async def health(front: NamedDependency[Front]) -> Response[Any]:
    """200 while the process serves and the engine has not failed for good, also while it loads, drains or is started again."""
    stats = await front.backend.stats()
    engine = Component(status=stats.phase, pid=stats.pid, detail=stats.detail, epoch=stats.epoch or None)
    process = Component(status="draining" if front.gate.closed else "serving", pid=os.getpid())
    ranks = {
        f"rank {each.rank}": Component(
            status=each.phase, pid=each.pid, detail=each.detail, rank=each.rank, host=each.host, epoch=stats.epoch, step=each.step
        )
        for each in stats.components
    }
    status = stats.phase if stats.phase in ("failed", "restarting", "stuck") else "ok"
    return _uncached(Health(status, {"process": process, "engine": engine} | ranks), 503 if status == "failed" else 200)


@get("/ready", opt={"public": True})
async def ready(front: NamedDependency[Front]) -> Response[Any]:
    """200 only when a request sent now would be admitted to a loaded engine."""
    phase = "draining" if front.gate.closed else (await front.backend.stats()).phase
    return _uncached(Ready(phase == "ready", phase), 200 if phase == "ready" else 503)


@get("/version")
async def version() -> dict[str, str]:
    return {"version": importlib.metadata.version("novajax")}


@get("/metrics", opt={"metrics": True})
async def metrics(front: NamedDependency[Front]) -> Response[bytes]:
    """Prometheus text format."""
    front.metrics.absorb(await front.backend.stats())
    return Response(front.metrics.render(), media_type=CONTENT_TYPE)


def _uncached(body: Health | Ready, status: int) -> Response[bytes]:
    headers = {"cache-control": "no-store"} | ({"retry-after": "1"} if status == 503 else {})
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json", headers=headers)
