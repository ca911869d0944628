"""A lower bound on the time of a step: arithmetic, memory traffic and collectives, each at the data sheet's rate.

`seconds` is the largest of the three: no program is faster, however well it overlaps. `serial_s` is their sum: a program
that overlaps nothing, each part at its full rate. Not counted, so that the bound holds: reading activations, launches, the
host, sampling. Of a mixture every expert is read, as the engine's program does, and only those a token visits are multiplied by.
"""

from typing import Literal

import msgspec

from novajax.parallel.axes import slots_per_stage
from novajax.planner.formats import Profile, item_bytes, kv_bytes
from novajax.planner.hardware import Cluster
from novajax.planner.layout import Layout, local_shape, stage_kinds
from novajax.planner.links import Collective, Tokens, collectives
from novajax.planner.memory import device_kv_token_bytes, weights_bytes
from novajax.planner.sizes import ModelSizes


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What one microbatch of one data partition does in a step."""

    decode_rows: float = 0.0
    decode_context_tokens: float = 0.0
    """Tokens each decode row attends to, on average."""
    prefill_tokens: float = 0.0
    prefill_context_tokens: float = 0.0
    """Tokens each prompt token attends to, on average."""
    prefill_read_tokens: float = 0.0
    """Tokens whose keys and values are read once for the prompt tokens together."""
    drawing_rows: float = 0.0


class StepBound(msgspec.Struct, frozen=True, kw_only=True):
    """One device's share of one step (one tick of a pipeline), and the bound."""

    matmul_flop: float
    attention_flop: float
    weights_read_bytes: float
    kv_read_bytes: float
    math_s: float
    hbm_s: float
    links_s: float
    collectives: tuple[Collective, ...]

    seconds: float
    """The bound: the largest of the three."""
    serial_s: float
    """Their sum."""
    binds: Literal["math", "HBM", "links"]


def step(sizes: ModelSizes, profile: Profile, layout: Layout, cluster: Cluster, work: Work) -> StepBound:
    """The bound of one step. Raises ConfigError for a layout that does not divide."""
    chip, ring = cluster.chip, layout.context
    counts = stage_kinds(sizes, layout.stage)
    local_tokens = work.decode_rows + work.prefill_tokens / ring
    times: dict[str, float] = {}
    flop = 0.0

    def multiply(elements: float, rows: float, component: str) -> None:
        nonlocal flop
        kind = profile.arithmetic(getattr(profile, component))
        flop += 2 * elements * rows
        times[kind] = times.get(kind, 0.0) + 2 * elements * rows / chip.flop_per_s[kind]

    for count, layer in zip(counts, sizes.kinds, strict=True):
        for array in layer.arrays:
            if array.contracted:
                used = layer.experts_per_token / layer.experts if "experts" in array.axes else 1.0
                multiply(count * _product(local_shape(array, layout)) * used, local_tokens, array.component)
    head = sizes.head()
    multiply(_product(local_shape(head, layout)), work.drawing_rows, "head")

    heads = sizes.heads / layout.tensor_parallel
    seen = zip(counts, sizes.seen_tokens(work.decode_context_tokens), sizes.seen_tokens(work.prefill_context_tokens), strict=True)
    pairs = sum(c * (work.decode_rows * decode + work.prefill_tokens * prefill) for c, decode, prefill in seen) / ring
    attention = 4 * pairs * heads * sizes.head_dim
    kind = profile.attention_arithmetic
    times[kind] = times.get(kind, 0.0) + attention / chip.flop_per_s[kind]

    weights = weights_bytes(sizes, profile, layout)
    read = sum(bytes_ for component, bytes_ in weights.items() if component != "embedding" or sizes.tied)
    kv_local = kv_bytes(profile.keys, sizes.kv_heads // layout.tensor, sizes.head_dim)
    kv_local += kv_bytes(profile.values, sizes.kv_heads // layout.tensor, sizes.head_dim)
    decode_seen = sum(c * tokens for c, tokens in zip(counts, sizes.seen_tokens(work.decode_context_tokens), strict=True))
    kv = work.decode_rows * decode_seen * kv_local / ring
    kv += (work.prefill_read_tokens + work.prefill_tokens + work.decode_rows) * device_kv_token_bytes(sizes, profile, layout) / ring

    layers = slots_per_stage(sizes.layers, layout.stage)
    tokens = Tokens(work.decode_rows, work.prefill_tokens, work.drawing_rows)
    said = collectives(sizes, layout, cluster, layers, tokens, item_bytes(profile.activations))
    parts: dict[Literal["math", "HBM", "links"], float] = {
        "math": sum(times.values()),
        "HBM": (read + kv) / chip.hbm_bytes_per_s,
        "links": sum(one.seconds for one in said),
    }
    return StepBound(
        matmul_flop=flop,
        attention_flop=attention,
        weights_read_bytes=read,
        kv_read_bytes=kv,
        math_s=parts["math"],
        hbm_s=parts["HBM"],
        links_s=parts["links"],
        collectives=said,
        seconds=max(parts.values()),
        serial_s=sum(parts.values()),
        binds=max(parts, key=lambda name: parts[name]),
    )


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What a booking can at most do with one kind of request."""

    decode: StepBound
    """One tick with all rows decoding at their mean length."""
    prefill: StepBound
    """One tick with one chunk of a prompt, at the prompt's mean."""
    mixed: StepBound
    """One tick in the steady state: each row draws a token while its share of new prompts is read."""
    ttft_s: float
    """One prompt alone."""
    ttft_serial_s: float
    token_s: float
    """Between two tokens of one stream while all rows decode: the stages one after another."""
    token_serial_s: float
    alone_token_s: float
    """The same for a single stream."""
    stream_tokens_per_s: float
    group_tokens_per_s: float
    """Output tokens of one replica in the steady state."""
    total_tokens_per_s: float
    """Of the whole booking."""
    total_serial_tokens_per_s: float
    rows: float


def bounds(
    sizes: ModelSizes,
    profile: Profile,
    layout: Layout,
    cluster: Cluster,
    *,
    rows: float,
    prompt_tokens: float,
    output_tokens: float,
    chunk_tokens: float,
) -> Bounds:
    """The bounds for `rows` sequences at once in each replica. A pipeline works on `stage` microbatches in turn."""
    ways = layout.data * layout.stage
    each = max(1.0, rows / ways) if rows else 1.0
    mean = prompt_tokens + output_tokens / 2
    decoding = Work(decode_rows=each, decode_context_tokens=mean, drawing_rows=each)
    decode = step(sizes, profile, layout, cluster, decoding)
    alone = step(sizes, profile, layout, cluster, Work(decode_rows=1, decode_context_tokens=mean, drawing_rows=1))
    chunk = min(chunk_tokens, prompt_tokens) or 1.0
    chunks = max(1.0, prompt_tokens / chunk)
    reading = Work(prefill_tokens=chunk, prefill_context_tokens=prompt_tokens / 2, prefill_read_tokens=prompt_tokens / 2, drawing_rows=1)
    prefill = step(sizes, profile, layout, cluster, reading)
    share = each * prompt_tokens / output_tokens
    mixed = step(
        sizes,
        profile,
        layout,
        cluster,
        Work(
            decode_rows=each,
            decode_context_tokens=mean,
            prefill_tokens=share,
            prefill_context_tokens=prompt_tokens / 2,
            drawing_rows=each,
        ),
    )
    ticks = chunks + layout.stage - 1
    group, serial = (each * layout.data / seconds for seconds in (mixed.seconds, mixed.serial_s))
    return Bounds(
        decode=decode,
        prefill=prefill,
        mixed=mixed,
        ttft_s=ticks * prefill.seconds,
        ttft_serial_s=ticks * prefill.serial_s,
        token_s=layout.stage * decode.seconds,
        token_serial_s=layout.stage * decode.serial_s,
        alone_token_s=layout.stage * alone.seconds,
        stream_tokens_per_s=1 / (layout.stage * decode.seconds),
        group_tokens_per_s=group,
        total_tokens_per_s=group * layout.replicas,
        total_serial_tokens_per_s=serial * layout.replicas,
        rows=each * ways,
    )


def _product(shape: tuple[int, ...]) -> float:
    result = 1.0
    for size in shape:
        result *= size
    return result
