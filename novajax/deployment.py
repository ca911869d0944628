"""What an `llm_engine:` tree leads to: a plan's inputs, fields of EngineConfig, NCCL's environment, and a line for each key
that has no effect in this version. Pure: nothing is read from the machine.
"""

from pathlib import Path
from typing import Any

import msgspec

from novajax.core.errors import ConfigError
from novajax.core.llm_engine import LlmEngine, Sharding, given_paths, read_tree
from novajax.core.plan import PlanConfig
from novajax.core.units import parse_bytes_per_s, parse_gpus

_ARCHITECTURES = {
    "llama-405b": "llama-3.1-405b.yaml",
    "llama-70b": "llama-3.1-70b.yaml",
    "llama-8b": "llama-3.1-8b.yaml",
    "llama-3.1-405b": "llama-3.1-405b.yaml",
    "llama-3.1-70b": "llama-3.1-70b.yaml",
    "llama-3.1-8b": "llama-3.1-8b.yaml",
}
"""model_id -> the file in configs/ whose `architecture:` it means."""
_UNROUNDED = ("bf16", "float32")
"""Profiles that quantize nothing."""


def architecture_file(model_id: str, folder: Path) -> Path:
    """The configuration beside the tree's own that describes the model. Raises ConfigError for an id that is not in the table."""
    if model_id not in _ARCHITECTURES:
        raise ConfigError(
            f"llm_engine.model.model_id={model_id!r} is not known; known: {', '.join(_ARCHITECTURES)}", param="model.model_id"
        )
    return folder / _ARCHITECTURES[model_id]


def plan_config(tree: LlmEngine) -> PlanConfig:
    """What to plan for."""
    gpus = parse_gpus(tree.workers.resources.gpu)
    sharding = tree.model.sharding
    axes = "auto"
    if isinstance(sharding, Sharding):
        axes = f"tensor={sharding.tensor_parallel},stage={sharding.pipeline_parallel},context={sharding.sequence_parallel}"
    rates = [rate for rate in (tree.workers.resources.network_bandwidth, tree.networking.bandwidth_limit) if rate is not None]
    return PlanConfig(
        chip=gpus.kind,
        nodes=tree.workers.replicas,
        gpus_per_node=gpus.count,
        host_storage=tree.workers.resources.storage,
        network_bandwidth=min(rates, key=parse_bytes_per_s, default=None),
        layout=axes,
        profile=tree.model.quantization,
        kv_format="int8" if tree.performance.compression else None,
        rows=tree.performance.max_batch_size,
        ttft=tree.performance.target_latency,
    )


def engine_fields(document: dict[str, Any]) -> dict[str, Any]:
    """The fields of EngineConfig that the tree settles. `sharding: auto` settles no mesh: the planner does (`novajax.options`)."""
    if not document:
        return {}
    tree = read_tree(document)
    fields: dict[str, Any] = {"served_name": tree.model.model_id, "max_rows": tree.performance.max_batch_size}
    sharding = tree.model.sharding
    if isinstance(sharding, Sharding):
        mesh = {"stage": sharding.pipeline_parallel, "context": sharding.sequence_parallel, "tensor_parallel": sharding.tensor_parallel}
        fields["mesh"] = mesh
    if tree.model.quantization not in _UNROUNDED:
        fields["quantization"] = tree.model.quantization
    if tree.performance.compression:
        fields["kv_cache_dtype"] = "int8"
    return fields


def nccl_environment(tree: LlmEngine) -> dict[str, str]:
    """Variables for every worker process, by `networking.transport` (NVIDIA's NCCL user guide, environment variables)."""
    return {"NCCL_IB_DISABLE": "1"} if tree.networking.transport == "tcp" else {"NCCL_IB_DISABLE": "0", "NCCL_NET_GDR_LEVEL": "SYS"}


def not_honoured(document: dict[str, Any]) -> tuple[str, ...]:
    """A line for each key of the document that a start does not act on: 'not honoured here: key: why'."""
    if not document:
        return ()
    tree = read_tree(document)
    limits = "limits are set by whoever starts the process (see launch/)"
    planned = "the planner uses it;"
    reasons = {
        "coordinator.replicas": "one front end is started; more need a balancer before them" if tree.coordinator.replicas > 1 else "",
        "coordinator.resources.cpu": limits,
        "coordinator.resources.memory": limits,
        "coordinator.resources.storage": "the front end stores nothing of its own",
        "workers.replicas": f"{planned} a start takes the hosts it is launched on",
        "workers.resources.cpu": limits,
        "workers.resources.memory": limits,
        "workers.resources.gpu": f"{planned} a start takes the devices it finds",
        "workers.resources.storage": f"{planned} nothing limits what a host stores",
        "workers.resources.network_bandwidth": f"{planned} a start uses what the network gives",
        "model.model_id": "it is the served name and the planned architecture; the weights are named by --model or engine.model",
        "model.quantization": f"{planned} the weights have the type of --dtype" if tree.model.quantization in _UNROUNDED else "",
        "performance.target_latency": f"{planned} the scheduler does not enforce it",
        "performance.cache_size": "KV pages live on the devices only",
        "networking.transport": "set "
        + " ".join(f"{name}={value}" for name, value in nccl_environment(tree).items())
        + " in the workers' environment",
        "networking.compression": "nothing is sent that could be compressed" if tree.networking.compression else "",
        "networking.priority_queuing": "" if tree.networking.priority_queuing else "requests are always ordered by priority class",
        "networking.bandwidth_limit": f"{planned} nothing limits what NCCL sends",
    }
    return tuple(f"not honoured here: {path}: {reasons[path]}" for path in given_paths(document) if reasons.get(path))


def read_plan_section(document: dict[str, Any]) -> PlanConfig:
    """The value of `plan:`. Raises ConfigError naming the key."""
    try:
        return msgspec.convert(document, PlanConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"plan: {error}".replace("`$", "`plan"), param="plan") from None
