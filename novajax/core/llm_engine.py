"""The `llm_engine:` YAML tree as typed structs: what a cluster's owner writes. Unknown keys and unreadable quantities are
refused with their path. It says what was asked, not what it leads to (see `novajax.deployment`).
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from novajax.core.config import parse_bytes
from novajax.core.errors import ConfigError
from novajax.core.units import parse_bytes_per_s, parse_cpus, parse_gpus, parse_seconds

Size = Annotated[int, Meta(ge=1)]


class CoordinatorResources(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one coordinator may use."""

    cpu: str = "1"
    memory: str = "1Gi"
    storage: str = "1Gi"


class Coordinator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The front ends: everything outside the SPMD group."""

    replicas: Size = 1
    resources: CoordinatorResources = CoordinatorResources()


class WorkerResources(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One host."""

    cpu: str = "1"
    memory: str = "1Gi"
    gpu: str = "8xH100"
    """COUNTxCHIP."""
    storage: str = "1Ti"
    network_bandwidth: str | None = None
    """The host's, one direction. None: the chip's usual host."""


class Workers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The hosts that compute."""

    replicas: Size = 1
    resources: WorkerResources = WorkerResources()


class Sharding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one program is cut."""

    tensor_parallel: Size = 1
    pipeline_parallel: Size = 1
    sequence_parallel: Size = 1


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is served."""

    model_id: str
    quantization: str = "bf16"
    """A precision profile's name, or auto."""
    sharding: Sharding | Literal["auto"] = "auto"


class Performance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is wanted of it."""

    max_batch_size: Annotated[int, Meta(ge=1, le=1024)] = 16
    target_latency: str | None = None
    """To the first token."""
    cache_size: str | None = None
    """Host memory for KV pages that left the devices."""
    compression: bool = False
    """KV pages are quantized."""


class Networking(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How hosts talk."""

    transport: Literal["rdma", "tcp"] = "rdma"
    compression: bool = False
    priority_queuing: bool = True
    bandwidth_limit: str | None = None
    """Of one host, one direction."""


class LlmEngine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole tree."""

    model: Model
    coordinator: Coordinator = Coordinator()
    workers: Workers = Workers()
    performance: Performance = Performance()
    networking: Networking = Networking()


_QUANTITIES: dict[str, Callable[[str], Any]] = {
    "coordinator.resources.cpu": parse_cpus,
    "coordinator.resources.memory": parse_bytes,
    "coordinator.resources.storage": parse_bytes,
    "workers.resources.cpu": parse_cpus,
    "workers.resources.memory": parse_bytes,
    "workers.resources.gpu": parse_gpus,
    "workers.resources.storage": parse_bytes,
    "workers.resources.network_bandwidth": parse_bytes_per_s,
    "performance.target_latency": parse_seconds,
    "performance.cache_size": parse_bytes,
    "networking.bandwidth_limit": parse_bytes_per_s,
}


def read_tree(document: Any) -> LlmEngine:
    """The value of `llm_engine:`. Raises ConfigError naming the path of what is unknown, missing or unreadable."""
    try:
        tree = msgspec.convert(document, LlmEngine)
    except msgspec.ValidationError as error:
        raise ConfigError(f"llm_engine: {error}".replace("`$", "`llm_engine"), param="llm_engine") from None
    for path, parse in _QUANTITIES.items():
        value: Any = tree
        for name in path.split("."):
            value = getattr(value, name)
        if value is not None:
            try:
                parse(value)
            except ConfigError as error:
                raise ConfigError(f"llm_engine.{path}: {error.message}", param=path) from None
    return tree


def given_paths(document: Any, prefix: str = "") -> list[str]:
    """The dotted paths of every value that the document itself holds, in order."""
    if not isinstance(document, dict):
        return [prefix]
    return [path for key, value in document.items() for path in given_paths(value, f"{prefix}.{key}" if prefix else str(key))]
