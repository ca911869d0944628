"""What devices say to each other in a step: the collectives of a layout, and a lower bound on the time of each.

The bound lets switches add (NVLink SHARP, network SHARP), so that in an all-reduce a device sends its contribution once; a ring sends
almost twice that. Between hosts, the devices of one host share the load of their network ports evenly. Nothing overlaps
less than it must, and the smallest message takes one hop.
"""

from typing import Literal

import msgspec

from novajax.parallel.axes import CUT_AXES
from novajax.planner.hardware import HOP_S, Cluster
from novajax.planner.layout import Layout, Span, span
from novajax.planner.sizes import ModelSizes

PARTIAL_BYTES = 4
"""Partial products are added between devices as they were accumulated, in float32."""
Kind = Literal["all-reduce", "all-gather", "collective-permute"]


class Collective(msgspec.Struct, frozen=True, kw_only=True):
    """One collective of a step, `count` times. `bytes` is the result's size on one device."""

    kind: Kind
    what: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    link: str
    """'nvlink' or 'network over N hosts'."""
    bytes_per_s: float
    """Of the slowest link, as one device has it."""
    seconds: float
    """All of them, one after another."""


class Tokens(msgspec.Struct, frozen=True):
    """What one step of one microbatch carries on one data partition."""

    decode_rows: float
    prefill_tokens: float
    drawing_rows: float
    """Rows whose logits are made."""


def collectives(sizes: ModelSizes, layout: Layout, cluster: Cluster, layers: int, tokens: Tokens, item: int) -> tuple[Collective, ...]:
    """All of one step, as the engine makes them. `layers`: of one stage, masked ones included; `item`: bytes of a number."""
    local = tokens.decode_rows + tokens.prefill_tokens / layout.context  # T of one device: only prompts are cut over context
    hidden = local * sizes.embed * item
    heads = sizes.heads // layout.tensor_parallel
    partial, drawn = local * sizes.embed * PARTIAL_BYTES, tokens.drawing_rows
    found: list[Collective | None] = [
        _make("all-reduce", "embedding", CUT_AXES, 1, hidden, layout, cluster),
        _make("all-reduce", "embedding, over stages", ("stage",), 1, hidden, layout, cluster),
        _make("all-reduce", "attention output", CUT_AXES, layers, partial, layout, cluster),
        _make("all-reduce", "mlp output", CUT_AXES, layers, partial, layout, cluster),
        _make("all-reduce", "rows that draw, from the last stage", ("stage",), 1, drawn * sizes.embed * item, layout, cluster),
        _make("all-gather", "logits", CUT_AXES, 1, drawn * sizes.vocab / layout.stage * 4, layout, cluster),
        _make("all-gather", "logits, over stages", ("stage",), 1, drawn * sizes.vocab * 4, layout, cluster),
        _make("collective-permute", "hidden states to the next stage", ("stage",), 1, hidden, layout, cluster),
    ]
    ring = layout.context
    if ring > 1 and tokens.prefill_tokens:
        chunk = tokens.prefill_tokens / ring
        around = layers * (ring - 1)
        keys = chunk * sizes.kv_heads // layout.tensor * sizes.head_dim * item
        queries = chunk * heads * sizes.head_dim * item
        sums = chunk * heads * 4  # log-sum-exp in float32, as the partial results are
        found += [
            _make("collective-permute", "keys, then values, round the ring", ("context",), 2 * around, keys, layout, cluster),
            _make("collective-permute", "queries round the ring", ("context",), around, queries, layout, cluster),
            _make("collective-permute", "their results so far", ("context",), around, sums * sizes.head_dim, layout, cluster),
            _make("collective-permute", "their log-sum-exp", ("context",), around, sums, layout, cluster),
            _make("collective-permute", "results home", ("context",), layers, queries, layout, cluster),
            _make("all-reduce", "the chunk's last token", ("context",), 1, sizes.embed * item, layout, cluster),
        ]
    if ring > 1 and tokens.decode_rows:
        weights = tokens.decode_rows * heads * 4
        found += [
            _make("all-reduce", "largest log-sum-exp, and the sum", ("context",), 2 * layers, weights, layout, cluster),
            _make("all-reduce", "partial attention", ("context",), layers, weights * sizes.head_dim, layout, cluster),
        ]
    return tuple(one for one in found if one is not None)


def _make(kind: Kind, what: str, axes: tuple[str, ...], count: int, size: float, layout: Layout, cluster: Cluster) -> Collective | None:
    """None when the group is one device or nothing is said."""
    if layout.size(axes) == 1 or not size:
        return None
    where = span(layout, axes, cluster.gpus_per_host)
    far = where.hosts > 1
    return Collective(
        kind=kind,
        what=what,
        axes=axes,
        count=count,
        bytes=round(size),
        link=f"network over {where.hosts} hosts" if far else "nvlink",
        bytes_per_s=cluster.network_bytes_per_s if far else cluster.chip.nvlink_bytes_per_s,
        seconds=count * _seconds(kind, size, where, cluster),
    )


def _seconds(kind: Kind, size: float, where: Span, cluster: Cluster) -> float:
    """A lower bound on one collective whose result on each device is `size` bytes."""
    near = size / cluster.chip.nvlink_bytes_per_s if where.per_host > 1 or where.hosts == 1 else 0.0
    if kind == "collective-permute":
        far = size / cluster.network_bytes_per_s
        near = size / cluster.chip.nvlink_bytes_per_s
        return HOP_S["network"] + far if where.hosts > 1 else HOP_S["nvlink"] + near
    far = size / (where.per_host * cluster.network_bytes_per_s)
    if kind == "all-gather":
        near, far = near * (where.members - 1) / where.members, far * (where.hosts - 1) / where.hosts
    hops = (HOP_S["nvlink"] if near else 0.0) + (HOP_S["network"] if where.hosts > 1 else 0.0)
    return hops + max(near, far if where.hosts > 1 else 0.0)
