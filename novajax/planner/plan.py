"""One plan: a model on a booking, as a value. Everything the report, the JSON and the chart show is in it, with the reasons."""

import msgspec

from novajax.core.config import parse_bytes, parse_mesh
from novajax.core.errors import ConfigError
from novajax.core.plan import PlanConfig
from novajax.core.units import parse_bytes_per_s, parse_seconds
from novajax.planner.compiled import Compiled
from novajax.planner.formats import Profile, profile
from novajax.planner.hardware import Cluster, cluster
from novajax.planner.layout import make_layout
from novajax.planner.memory import Demand, gib, kv_token_bytes, model_bytes
from novajax.planner.published import Comparison, compare, published
from novajax.planner.search import (
    PROFILES_BY_QUALITY,
    Candidate,
    Wanted,
    best,
    choose_page_tokens,
    closest,
    crossing,
    evaluate,
    nearest_better,
    search,
)
from novajax.planner.sizes import ModelSizes

NODES_SHOWN = (1, 2, 4, 8, 16, 32, 64)


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """The best layout of one number of nodes, as bounds."""

    nodes: int
    refused: str = ""
    layout: str = ""
    total_tokens_per_s: float = 0.0
    total_serial_tokens_per_s: float = 0.0
    token_s: float = 0.0
    ttft_s: float = 0.0
    rows: int = 0
    """Sequences at once in the whole booking."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to book, what it holds, what it can at most do, and why."""

    model: str
    parameters: int
    bfloat16_bytes: int
    profile_bytes: int
    """The whole model in the chosen profile, scales included, without padding."""
    bfloat16_kv_token_bytes: int
    kv_token_bytes: int
    """In the chosen profile."""
    cluster: Cluster
    config: PlanConfig
    """The mesh that `engine.mesh` takes is in `mesh`."""
    mesh: dict[str, int]
    chosen: Candidate
    others: tuple[Candidate, ...]
    """The next best, and the closest that do not fit."""
    why: tuple[str, ...]
    warnings: tuple[str, ...]
    scaling: tuple[Scale, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    compiled: tuple[Compiled, ...] = ()


def booking(config: PlanConfig) -> Cluster:
    """The hosts of a plan. Raises ConfigError for an unknown chip or an unreadable rate."""
    rate = None if config.network_bandwidth is None else parse_bytes_per_s(config.network_bandwidth)
    return cluster(config.chip, config.nodes, config.gpus_per_node, rate)


def make_plan(name: str, sizes: ModelSizes, config: PlanConfig) -> Plan:
    """Plans `sizes` for `config`. Raises CapacityError with the numbers when nothing fits, ConfigError for what is not understood."""
    if config.context_tokens > sizes.max_context_tokens:
        raise ConfigError(f"context_tokens={config.context_tokens} exceeds the model's {sizes.max_context_tokens}", param="context_tokens")
    if config.prompt_tokens + config.output_tokens > config.context_tokens:
        wanted = f"prompt_tokens={config.prompt_tokens} and output_tokens={config.output_tokens}"
        raise ConfigError(f"{wanted} do not fit in context_tokens={config.context_tokens}", param="context_tokens")
    hosts, demand, wanted = booking(config), _demand(config), _wanted(config)
    tried = _search(sizes, config, hosts, demand, wanted)
    chosen, why = _choose(sizes, config, hosts, demand, wanted, tried)
    form = _form(config, chosen.profile)
    warnings = _warnings(chosen, tried, hosts)
    if config.host_storage is not None and parse_bytes(config.host_storage) < model_bytes(sizes, form):
        warnings.append(f"the checkpoint's {model_bytes(sizes, form):,} bytes exceed a host's storage of {config.host_storage}")
    mesh = chosen.layout.mesh()
    return Plan(
        model=name,
        parameters=sizes.parameters,
        bfloat16_bytes=model_bytes(sizes, profile("bf16")),
        profile_bytes=model_bytes(sizes, form),
        bfloat16_kv_token_bytes=kv_token_bytes(sizes, profile("bf16")),
        kv_token_bytes=kv_token_bytes(sizes, form),
        cluster=hosts,
        config=config,
        mesh={"data": mesh.data, "stage": mesh.stage, "context": mesh.context, "tensor_parallel": mesh.tensor_parallel},
        chosen=chosen,
        others=_others(chosen, tried),
        why=tuple(why),
        warnings=tuple(warnings),
    )


def scaling(sizes: ModelSizes, config: PlanConfig) -> tuple[Scale, ...]:
    """The best layout of 1 to 64 nodes of the same kind."""
    found = []
    for nodes in NODES_SHOWN:
        hosts = booking(msgspec.structs.replace(config, nodes=nodes))
        tried = _search(sizes, config, hosts, _demand(config), _wanted(config))
        top = tried[0]
        if top.bounds is None:
            found.append(Scale(nodes=nodes, refused=f"{closest(tried, 1)[0].layout.name()} {closest(tried, 1)[0].refused}"))
            continue
        found.append(
            Scale(
                nodes=nodes,
                layout=top.layout.name(),
                total_tokens_per_s=top.bounds.total_tokens_per_s,
                total_serial_tokens_per_s=top.bounds.total_serial_tokens_per_s,
                token_s=top.bounds.token_s,
                ttft_s=top.bounds.ttft_s,
                rows=int(top.bounds.rows) * top.layout.replicas,
            )
        )
    return tuple(found)


def comparisons(models: dict[str, ModelSizes]) -> tuple[Comparison, ...]:
    """Published results of the given models (by '8b', '70b', '405b') beside their bounds."""
    return tuple(compare(result, models[result.model]) for result in published() if result.model in models)


def _demand(config: PlanConfig) -> Demand:
    return Demand(
        rows=config.rows,
        context_tokens=config.context_tokens,
        prompt_tokens=config.prompt_tokens,
        output_tokens=config.output_tokens,
        chunk_tokens=config.chunk_tokens,
        page_tokens=config.page_tokens or 16,
    )


def _wanted(config: PlanConfig) -> Wanted:
    ttft_s, token_s = (None if text is None else parse_seconds(text) for text in (config.ttft, config.token_time))
    return Wanted(ttft_s=ttft_s, token_s=token_s)


def _form(config: PlanConfig, name: str) -> Profile:
    form = profile(name)
    if config.kv_format is None:
        return form
    return msgspec.convert(msgspec.structs.asdict(form) | {"keys": config.kv_format, "values": config.kv_format}, Profile)


def _search(sizes: ModelSizes, config: PlanConfig, hosts: Cluster, demand: Demand, wanted: Wanted) -> list[Candidate]:
    found: list[Candidate] = []
    for name in PROFILES_BY_QUALITY if config.profile == "auto" else (config.profile,):
        found += search(sizes, _form(config, name), hosts, demand, wanted, choose_pages=config.page_tokens is None)
        if any(one.bounds for one in found):
            break
    return sorted(found, key=lambda one: one.bounds is None)  # stable: what fits keeps its order


def _choose(
    sizes: ModelSizes, config: PlanConfig, hosts: Cluster, demand: Demand, wanted: Wanted, tried: list[Candidate]
) -> tuple[Candidate, list[str]]:
    """The asked layout, or the best one, and why."""
    if config.layout == "auto":
        chosen = best(tried)
        fitting = [one for one in tried if one.bounds]
        most = max(fitting, key=lambda one: one.fitted()[1].total_serial_tokens_per_s if len(one.missed) == len(chosen.missed) else 0.0)
        reason = "the most tokens/s without overlap" if most is chosen else f"the smallest group nearly as fast as {most.layout.name()}"
        why = [f"{chosen.layout.name()}: {reason}, of {len(fitting)} layouts that fit and {len(tried)} tried"]
        if config.profile == "auto":
            refused = [name for name in PROFILES_BY_QUALITY[: PROFILES_BY_QUALITY.index(chosen.profile)]]
            why.append(f"profile {chosen.profile}: the most exact that fits" + (f" ({', '.join(refused)} do not)" if refused else ""))
    else:
        layout = make_layout(parse_mesh(config.layout, "layout"), sizes.kv_heads, hosts.devices)
        names = PROFILES_BY_QUALITY if config.profile == "auto" else (config.profile,)
        chosen = Candidate(layout=layout, profile=names[0], page_tokens=demand.page_tokens)
        for name in names:
            pages = config.page_tokens or choose_page_tokens(demand, layout.context)[0]
            chosen = evaluate(sizes, _form(config, name), layout, hosts, msgspec.structs.replace(demand, page_tokens=pages), wanted)
            if chosen.bounds:
                break
        chosen.fitted()
        why = [f"{layout.name()}: as asked"]
    if config.page_tokens is None:
        why.append(choose_page_tokens(demand, chosen.layout.context)[1])
    if chosen.memory and chosen.memory.masked_layers:
        per_stage = (len(sizes.layers) + chosen.memory.masked_layers) // chosen.layout.stage
        why.append(f"{chosen.layout.stage} stages of {per_stage} layers hold {chosen.memory.masked_layers} masked layers of zeros")
    return chosen, why


def _warnings(chosen: Candidate, tried: list[Candidate], hosts: Cluster) -> list[str]:
    found = [f"cannot be met: {text}" for text in chosen.missed]
    unused = hosts.devices - chosen.layout.group_devices * chosen.layout.replicas
    if unused:
        found.append(f"{unused} of {hosts.devices} devices are left over")
    crossed = crossing(chosen.layout, hosts)
    if crossed:
        better = nearest_better(chosen, tried, hosts)
        if better and better.bounds and chosen.bounds:
            gain = better.bounds.total_serial_tokens_per_s / chosen.bounds.total_serial_tokens_per_s
            crossed += f"; nearest better layout: {better.layout.name()}, {gain:.2f} times the tokens/s without overlap"
        found.append(crossed)
    memory, _ = chosen.fitted()
    if memory.free_bytes < memory.all_weights_bytes:
        need = f"{gib(memory.all_weights_bytes)} a device, {gib(memory.free_bytes)} free"
        found.append(f"no room for a second set of weights ({need}): no live swap unless the pool is made smaller")
    return found


def _others(chosen: Candidate, tried: list[Candidate]) -> tuple[Candidate, ...]:
    fits = [one for one in tried if one.bounds and one.layout != chosen.layout]
    return (*fits[:5], *closest(tried))
