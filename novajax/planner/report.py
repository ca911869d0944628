"""A plan in words and tables, for a terminal. Every bound is called one; every number has its unit."""

from collections.abc import Iterable

from novajax.planner.compiled import Compiled
from novajax.planner.memory import Memory, gib
from novajax.planner.plan import Plan
from novajax.planner.roofline import Bounds, StepBound
from novajax.planner.search import Candidate


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Aligned columns: bare numbers to the right, words and units to the left."""
    lines = [list(head), *(list(row) for row in rows)]
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numbers = [all(not cell.strip("0123456789.,e+-% ") for cell in column[1:]) for column in columns]
    lines.insert(1, ["-" * width for width in widths])
    cells = [[cell.rjust(w) if n else cell.ljust(w) for cell, w, n in zip(line, widths, numbers, strict=True)] for line in lines]
    return ["  " + "  ".join(line).rstrip() for line in cells]


def report(plan: Plan) -> list[str]:
    """The whole plan, line by line."""
    memory, bounds = plan.chosen.fitted()
    lines = [
        f"{plan.model}: {plan.parameters:,} parameters, {plan.bfloat16_bytes:,} bytes in bf16, "
        f"{plan.bfloat16_kv_token_bytes:,} bytes of KV per token in bf16",
        f"profile {plan.chosen.profile}: {plan.profile_bytes:,} bytes of weights, {plan.kv_token_bytes:,} bytes of KV per token",
        f"booking: {plan.cluster.name()} ({plan.cluster.devices} devices; NVLink {_rate(plan.cluster.chip.nvlink_bytes_per_s)}, "
        f"network {_rate(plan.cluster.network_bytes_per_s)} a GPU, one direction)",
        f"layout: {plan.chosen.layout.name()}",
        *(f"  because {line}" for line in plan.why),
        *(f"  WARNING {line}" for line in plan.warnings),
        "",
        "Bytes on the fullest device",
        *_memory(memory),
        "",
        f"Lower bounds of one step (a tick of each stage) with {bounds.rows:,.0f} rows a replica, requests of "
        f"{plan.config.prompt_tokens:,} + {plan.config.output_tokens:,} tokens",
        *_steps(bounds, plan.config.chunk_tokens),
        "",
        "Collectives of a decode step, of one device",
        *_collectives(bounds.decode),
        "",
        "Bounds (right: with nothing overlapped, each part at its full rate)",
        *_speeds(bounds),
        "",
        "Other layouts",
        *_others((plan.chosen, *plan.others)),
    ]
    if plan.scaling:
        lines += ["", "Best layouts by nodes", *_scaling(plan)]
    if plan.comparisons:
        lines += ["", "Published results beside our bounds for the same chips and lengths", *_published(plan)]
    for one in plan.compiled:
        lines += ["", *_compiled(one)]
    return lines


def _memory(memory: Memory) -> list[str]:
    rows = [(f"weights: {name}", gib(size)) for name, size in memory.weights_bytes.items()]
    rows += [("weights, all", gib(memory.all_weights_bytes))]
    if memory.masked_layers:
        rows.append((f"  of it zeros of {memory.masked_layers} masked layers, on the last stage", gib(memory.padding_bytes)))
    kv = f"KV pool: {memory.pages:,} pages of {memory.page_tokens} tokens, {memory.kv_tokens:,} tokens a replica"
    rows += [
        (kv, gib(memory.kv_pool_bytes)),
        ("sampling state", gib(memory.sampling_bytes)),
        ("activations of two steps, at most", gib(memory.activation_bytes)),
        ("runtime's share", gib(memory.runtime_bytes)),
        ("free", gib(memory.free_bytes)),
        ("all", gib(memory.hbm_bytes)),
    ]
    return table(("kind", "bytes"), rows)


def _steps(bounds: Bounds, chunk_tokens: int) -> list[str]:
    named = (("decode", bounds.decode), (f"prefill, chunk of {chunk_tokens}", bounds.prefill), ("steady mix", bounds.mixed))
    rows = [
        (
            name,
            f"{one.matmul_flop + one.attention_flop:.3g}",
            _ms(one.math_s),
            gib(one.weights_read_bytes),
            gib(one.kv_read_bytes),
            _ms(one.hbm_s),
            _ms(one.links_s),
            _ms(one.seconds),
            one.binds,
        )
        for name, one in named
    ]
    return table(("step", "FLOP", "math ms", "weights read", "KV read", "HBM ms", "links ms", "bound ms", "binds"), rows)


def _collectives(step: StepBound) -> list[str]:
    rows = [
        (one.what, one.kind, "x".join(one.axes), str(one.count), f"{one.bytes:,}", one.link, _rate(one.bytes_per_s), _ms(one.seconds))
        for one in step.collectives
    ]
    head = ("what", "kind", "axes", "times", "bytes each", "link", "rate", "ms")
    return table(head, rows) if rows else ["  none: one device"]


def _speeds(bounds: Bounds) -> list[str]:
    mixed = bounds.group_tokens_per_s / bounds.total_tokens_per_s * bounds.total_serial_tokens_per_s
    rows = [
        ("time to first token, prompt alone, ms", _ms(bounds.ttft_s), _ms(bounds.ttft_serial_s)),
        ("time between tokens, all rows, ms", _ms(bounds.token_s), _ms(bounds.token_serial_s)),
        ("tokens/s of a stream, all rows", f"{bounds.stream_tokens_per_s:,.1f}", f"{1 / bounds.token_serial_s:,.1f}"),
        ("tokens/s of a stream, alone", f"{1 / bounds.alone_token_s:,.1f}", ""),
        ("output tokens/s of a replica", f"{bounds.group_tokens_per_s:,.0f}", f"{mixed:,.0f}"),
        ("output tokens/s of the booking", f"{bounds.total_tokens_per_s:,.0f}", f"{bounds.total_serial_tokens_per_s:,.0f}"),
    ]
    return table(("figure", "bound", "no overlap"), rows)


def _others(candidates: Iterable[Candidate]) -> list[str]:
    fits = [
        (
            one.layout.name(),
            one.profile,
            gib(one.memory.all_weights_bytes),
            f"{one.bounds.rows * one.layout.replicas:,.0f}",
            _ms(one.bounds.token_s),
            f"{one.bounds.total_tokens_per_s:,.0f}",
            f"{one.bounds.total_serial_tokens_per_s:,.0f}",
            one.bounds.mixed.binds,
        )
        for one in candidates
        if one.bounds and one.memory
    ]
    head = ("layout", "profile", "weights a device", "rows in all", "token ms", "tokens/s bound", "no overlap", "binds")
    return [*table(head, fits), *(f"  refused: {one.layout.name()} {one.profile}: {one.refused}" for one in candidates if one.refused)]


def _scaling(plan: Plan) -> list[str]:
    rows = [
        (str(one.nodes), "", "", "", "", one.refused[:110])
        if one.refused
        else (
            str(one.nodes),
            f"{one.total_tokens_per_s:,.0f}",
            f"{one.total_serial_tokens_per_s:,.0f}",
            _ms(one.token_s),
            _ms(one.ttft_s),
            one.layout,
        )
        for one in plan.scaling
    ]
    return table(("nodes", "tokens/s bound", "no overlap", "token ms", "first token ms", "layout"), rows)


def _published(plan: Plan) -> list[str]:
    rows = []
    for one in plan.comparisons:
        p = one.published
        lengths = f"{p.prompt_tokens or '?'}/{p.output_tokens}"
        what = f"{p.model} on {p.devices} {p.chip}, {p.profile}, {lengths}, {p.measure}"
        rows.append(
            (what, f"{one.bound:,.4g}" if one.bound < 100 else f"{one.bound:,.0f}", f"{p.value:,g}", f"{one.reached:.0%}", p.source)
        )
    return table(("result", "bound", "published", "reached", "source"), rows)


def _compiled(found: Compiled) -> list[str]:
    layers = " and ".join(map(str, found.layers_compiled))
    sizes = [
        ("arguments", gib(found.argument_bytes)),
        ("temporaries", gib(found.temp_bytes)),
        ("outputs", gib(found.output_bytes)),
        ("of them donated arguments", gib(found.alias_bytes)),
    ]
    rows = [(one.kind, str(one.group), f"{one.bytes:,}", f"{one.per_layer:g}", f"{one.once:g}") for one in found.collectives]
    return [
        f"The step compiled: {found.bucket}, for {found.target}",
        f"  {layers} layers a stage, extrapolated to {found.layers}; {found.seconds:.0f} s",
        *table(("on one device", "bytes"), sizes),
        *table(("collective", "devices", "bytes each", "a layer", "besides"), rows),
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:,.4g} GB/s"
