"""Bytes on the fullest device, by kind: weights by component, KV pages, sampling state, activations, the runtime's share.

`plan_memory` either returns a split that fits or raises CapacityError with the numbers. Every rule is the engine's own:
layers over stage (rounded up to whole pattern periods), matrices over tensor x query, vocabulary over stage too, KV heads over tensor,
pages over data, tokens of a page over context, sampling state over data only.
"""

import math

import msgspec

from novajax.core.errors import CapacityError
from novajax.parallel.axes import slots_per_stage
from novajax.planner.formats import Profile, array_bytes, item_bytes, kv_bytes
from novajax.planner.hardware import USABLE_SHARE, Cluster
from novajax.planner.layout import Layout, local_shape, stage_kinds
from novajax.planner.sizes import ModelSizes

SAMPLING_BYTES = 4 + 1 + 4
"""A slot's counts (int32), seen (bool) and bias (float32), for each entry of the vocabulary."""
MOST_ROWS = 1024
"""EngineConfig.max_rows allows no more in one program."""


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be served by each replica. Tokens, and rows of sequences."""

    rows: int | None = None
    """Sequences at once in one replica; None: what the memory holds."""
    context_tokens: int = 8192
    """The longest request: prompt and output."""
    prompt_tokens: int = 2048
    output_tokens: int = 512
    chunk_tokens: int = 512
    """Prompt tokens of one sequence in one step."""
    page_tokens: int = 16


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """One device's bytes and what they buy."""

    hbm_bytes: int
    weights_bytes: dict[str, int]
    """By component; the fullest device."""
    padding_bytes: int
    """Zero weights of masked layers, in `weights_bytes`; on the last stage."""
    masked_layers: int
    """In the whole program."""
    sampling_bytes: int
    activation_bytes: int
    runtime_bytes: int
    page_bytes: int
    """One page of one device: all its layers, keys and values."""
    pages: int
    page_tokens: int
    """Tokens of a logical page: context x the tokens on one device."""
    kv_tokens: int
    """The replica's pool."""
    rows: int
    """Sequences of prompt + output tokens that are held at once, by the replica."""

    all_weights_bytes: int
    kv_pool_bytes: int
    free_bytes: int


def layer_weights_bytes(sizes: ModelSizes, profile: Profile, layout: Layout) -> dict[str, int]:
    """Bytes of one stage's layers on one device, masked ones included, by component. Raises ConfigError for what does not divide."""
    total: dict[str, int] = {}
    for count, kind in zip(stage_kinds(sizes, layout.stage), sizes.kinds, strict=True):
        for array in kind.arrays:
            piece = array_bytes(array, local_shape(array, layout), profile.weight_format(array.component))
            total[array.component] = total.get(array.component, 0) + count * piece
    return total


def weights_bytes(sizes: ModelSizes, profile: Profile, layout: Layout) -> dict[str, int]:
    """All weights of the fullest device, by component. With tied embeddings the head's format wins. Raises ConfigError."""
    total = layer_weights_bytes(sizes, profile, layout)
    for array in sizes.ends:
        form = profile.head if sizes.tied and array.component == "embedding" else profile.weight_format(array.component)
        total[array.component] = total.get(array.component, 0) + array_bytes(array, local_shape(array, layout), form)
    return total


def model_bytes(sizes: ModelSizes, profile: Profile) -> int:
    """The whole model once, without padding: what a checkpoint of that profile weighs."""
    return sum(weights_bytes(sizes, profile, Layout()).values())


def kv_token_bytes(sizes: ModelSizes, profile: Profile) -> int:
    """Bytes of one token's keys and values in all layers of the model."""
    each = kv_bytes(profile.keys, sizes.kv_heads, sizes.head_dim) + kv_bytes(profile.values, sizes.kv_heads, sizes.head_dim)
    return math.ceil(len(sizes.layers) * each)


def device_kv_token_bytes(sizes: ModelSizes, profile: Profile, layout: Layout) -> float:
    """Bytes of one token on the device that holds it: its stage's layers, masked ones too, its KV heads."""
    heads = sizes.kv_heads // layout.tensor
    each = kv_bytes(profile.keys, heads, sizes.head_dim) + kv_bytes(profile.values, heads, sizes.head_dim)
    return slots_per_stage(sizes.layers, layout.stage) * each


def activation_bytes(sizes: ModelSizes, profile: Profile, layout: Layout, demand: Demand, rows: int) -> int:
    """A bound on one step's temporaries and outputs, doubled because the next step is enqueued while one runs.

    `engine.capacity.step_reserve_bytes` for the largest buckets: gathered pages with scores and activations, or logits with filters, those
    of a whole chunk in a step that scores it. A tick of a pipeline has its share of the rows.
    """
    item, cut = item_bytes(profile.activations), layout.tensor_parallel
    decode = max(1, -(-rows // (layout.data * layout.stage)))
    chunk = min(demand.chunk_tokens, demand.context_tokens)
    several = (min(4, decode), min(64, chunk))
    prefill = [(1, chunk)] if layout.stage > 1 else [(1, chunk), several]
    scored = chunk if layout.stage > 1 else min(chunk, 64)
    keys = -(-demand.context_tokens // (demand.page_tokens * layout.context)) * demand.page_tokens
    wide = [
        array.shape[-1] * kind.experts_per_token
        for kind in sizes.kinds
        for array in kind.arrays
        if array.component == "mlp" and array.axes[-1] == "mlp" and len(array.axes) > 1
    ]
    width = 3 * max(wide, default=0) + 3 * sizes.heads * sizes.head_dim
    logits = 4 * 6 * sizes.vocab * (decode + 1 + decode + scored)
    worst = logits
    for count, tokens in prefill:
        gathered = 2 * (decode + count) * keys * -(-sizes.kv_heads // cut) * sizes.head_dim * item
        scores = 4 * 4 * -(-sizes.heads // cut) * keys * max(decode, count * tokens)
        activations = 4 * (decode + count * tokens) * (4 * sizes.embed + width // cut)
        worst = max(worst, gathered + scores + activations)
    return 2 * worst


def plan_memory(sizes: ModelSizes, profile: Profile, layout: Layout, cluster: Cluster, demand: Demand) -> Memory:
    """Splits one device's memory. Raises ConfigError for what does not divide, CapacityError for what does not fit."""
    weights = weights_bytes(sizes, profile, layout)
    hbm = cluster.chip.hbm_bytes
    runtime = hbm - int(hbm * USABLE_SHARE)
    page = math.ceil(device_kv_token_bytes(sizes, profile, layout) * demand.page_tokens)
    logical = demand.page_tokens * layout.context
    step = layout.data * layout.stage
    widest, mean = (-(-tokens // logical) for tokens in (demand.context_tokens, demand.prompt_tokens + demand.output_tokens))

    def split(rows: int) -> tuple[int, int, int]:
        """(sampling, activations, bytes left for pages)"""
        sampling = -(-rows // layout.data) * sizes.vocab * SAMPLING_BYTES
        activations = activation_bytes(sizes, profile, layout, demand, rows)
        return sampling, activations, hbm - runtime - sum(weights.values()) - sampling - activations

    def held(rows: int) -> int:
        """Of `rows`, how many the pool holds at their mean length."""
        return min(rows, max(0, split(rows)[2]) // page // mean * layout.data)

    most = MOST_ROWS if demand.rows is None else demand.rows
    rows = max(step, most // step * step)
    while demand.rows is None and rows > step and held(rows) < rows:
        rows = max(step, min(rows - step, (held(rows) + rows) // 2 // step * step))
    sampling, activations, left = split(rows)
    pages = min(max(left, 0) // page, -(-rows // layout.data) * widest)
    if pages < widest:
        kept = f"weights {gib(sum(weights.values()))} + sampling {gib(sampling)} + activations {gib(activations)} + runtime {gib(runtime)}"
        room = f"leave {gib(left)}" if left > 0 else f"exceed it by {gib(-left)}"
        raise CapacityError(
            f"{kept} of {gib(hbm)} {room}; one context of {demand.context_tokens:,} tokens needs {gib(widest * page)}", param="layout"
        )
    slots = slots_per_stage(sizes.layers, layout.stage)
    masked = slots * layout.stage - len(sizes.layers)
    in_layers = sum(layer_weights_bytes(sizes, profile, layout).values())
    return Memory(
        hbm_bytes=hbm,
        weights_bytes=weights,
        padding_bytes=in_layers // slots * min(masked, slots),
        masked_layers=masked,
        sampling_bytes=sampling,
        activation_bytes=activations,
        runtime_bytes=runtime,
        page_bytes=page,
        pages=pages,
        page_tokens=logical,
        kv_tokens=pages * logical * layout.data,
        rows=min(rows, pages // mean * layout.data),
        all_weights_bytes=sum(weights.values()),
        kv_pool_bytes=pages * page,
        free_bytes=left - pages * page,
    )


def gib(count: float) -> str:
    """For people."""
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 2**28 else f"{count / 2**20:.1f} MiB"
