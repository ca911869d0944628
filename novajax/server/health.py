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


class Component(msgspec.Struct, frozen=True, kw_only=True):
    status: str
    pid: int | None
    detail: str = ""


class Health(msgspec.Struct, frozen=True):
    status: str
    components: dict[str, Component]


class Ready(msgspec.Struct, frozen=True):
    ready: bool
    phase: str


@get("/health", opt={"public": True})
async def health(front: NamedDependency[Front]) -> Response[Any]:
    """200 while the process serves and the engine has not failed, also while it loads or drains."""
    stats = await front.backend.stats()
    engine = Component(status=stats.phase, pid=stats.pid, detail=stats.detail)
    process = Component(status="draining" if front.gate.closed else "serving", pid=os.getpid())
    failed = stats.phase == "failed"
    body = Health("failed" if failed else "ok", {"process": process, "engine": engine})
    return _uncached(body, 503 if failed else 200)


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
