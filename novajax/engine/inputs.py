"""One step's numbers as ONE int32 upload, and the same numbers taken apart again on the device.

`fields(bucket)` is the only description of the layout; `pack` (host) and `unpack` (device) both read it. Floats travel
as their bits.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from novajax.engine.buckets import Bucket
from novajax.scheduler.plan import DecodeRow, Draw, PrefillRow, StepPlan, by_partition

PADDING = -1
"""Position of a row or token that does not exist."""

DRAW_INTS = ("slot", "position", "top_k", "seed_low", "seed_high", "ban_ends")
DRAW_FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
DRAW_COLUMNS = len(DRAW_INTS) + len(DRAW_FLOATS)


def fields(bucket: Bucket) -> dict[str, tuple[int, ...]]:
    """Name -> shape, in the order of the upload."""
    s, r, c, w = bucket.decode_rows, bucket.prefill_rows, bucket.chunk_tokens, bucket.table_pages
    layout: dict[str, tuple[int, ...]] = {
        "decode_slot": (s,),
        "decode_token": (s,),  # negative: the slot's last token, which is still on the device
        "decode_position": (s,),
        "decode_table": (s, w),
        "draws": (s + r, DRAW_COLUMNS),
    }
    if r:
        layout |= {"prefill_start": (r,), "prefill_length": (r,), "prefill_tokens": (r, c), "prefill_table": (r, w)}
    if bucket.score:
        layout |= {"targets": (r * c,)}
    return layout


def size(bucket: Bucket) -> int:
    """int32 words of the upload."""
    return sum(int(np.prod(shape)) for shape in fields(bucket).values())


def unpack(packed: jax.Array, bucket: Bucket) -> dict[str, jax.Array]:
    """The named arrays of a packed upload, all int32."""
    out, at = {}, 0
    for name, shape in fields(bucket).items():
        words = int(np.prod(shape))
        out[name] = lax.slice(packed, (at,), (at + words,)).reshape(shape)
        at += words
    return out


def unpack_draws(draws: jax.Array) -> dict[str, jax.Array]:
    """[X, DRAW_COLUMNS] -> one [X] array per column, floats as floats."""
    ints = {name: draws[:, i] for i, name in enumerate(DRAW_INTS)}
    floats = {name: lax.bitcast_convert_type(draws[:, len(DRAW_INTS) + i], jnp.float32) for i, name in enumerate(DRAW_FLOATS)}
    return ints | floats


def pack(plan: StepPlan | None, bucket: Bucket, partitions: int, slots: int) -> np.ndarray:
    """The upload for `plan` (None: a step of padding only). i32[partitions, size(bucket)]

    `slots` is the number of slots of one partition: a row that draws nothing gets it as its slot, where writes are dropped.
    """
    packed = np.zeros((partitions, size(bucket)), np.int32)
    decode = by_partition(() if plan is None else plan.decode, slots, partitions)
    prefill = by_partition(() if plan is None else plan.prefill, slots, partitions)
    for partition in range(partitions):
        _pack_one(packed[partition], bucket, slots, decode[partition], prefill[partition])
    return packed


def _pack_one(packed: np.ndarray, bucket: Bucket, slots: int, decode: Sequence[DecodeRow], prefill: Sequence[PrefillRow]) -> None:
    views, at = {}, 0
    for name, shape in fields(bucket).items():
        words = int(np.prod(shape))
        views[name] = packed[at : at + words].reshape(shape)
        at += words
    views["decode_position"][:] = PADDING
    views["decode_slot"][:] = slots
    views["draws"][:, DRAW_INTS.index("slot")] = slots
    for i, row in enumerate(decode):
        slot = row.slot % slots
        views["decode_slot"][i] = slot
        views["decode_token"][i] = row.input
        views["decode_position"][i] = row.position
        views["decode_table"][i, : len(row.pages)] = row.pages
        if row.last:
            _set_draw(views["draws"], i, slot, row.position + 1, row.draw, row.ban_ends)
    for i, row in enumerate(prefill):
        count = len(row.tokens)
        views["prefill_start"][i] = row.start
        views["prefill_length"][i] = count
        views["prefill_tokens"][i, :count] = row.tokens
        views["prefill_table"][i, : len(row.pages)] = row.pages
        if row.last:
            _set_draw(views["draws"], bucket.decode_rows + i, row.slot % slots, row.start + count, row.draw, row.ban_ends)
        if bucket.score:
            views["targets"][i * bucket.chunk_tokens : i * bucket.chunk_tokens + count] = (*row.tokens[1:], row.following)


def _set_draw(draws: Any, row: int, slot: int, position: int, draw: Draw, ban_ends: bool) -> None:
    draws[row, : len(DRAW_INTS)] = (
        slot,
        position,
        draw.top_k,
        np.uint32(draw.seed & 0xFFFFFFFF).view(np.int32),
        np.uint32(draw.seed >> 32).view(np.int32),
        ban_ends,
    )
    draws[row, len(DRAW_INTS) :] = np.array(
        (
            draw.temperature,
            draw.top_p,
            draw.min_p,
            draw.repetition_penalty,
            draw.presence_penalty,
            draw.frequency_penalty,
        ),
        np.float32,
    ).view(np.int32)
