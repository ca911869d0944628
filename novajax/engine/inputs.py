"""One step's numbers as ONE int32 upload, and the same numbers taken apart again on the device.

`fields(bucket)` is the only description of the layout; `pack` (host) and `unpack` (device) both read it. Floats travel
as their bits.
"""

import math
from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from novajax.engine.buckets import Bucket
from novajax.scheduler.plan import DecodeRow, Draw, PrefillRow, StepPlan, by_partition

PADDING = -1
"""Position of a row or token that does not exist."""

DRAW_INTS = ("slot", "position", "top_k", "seed_low", "seed_high", "ban_ends", "guess")
"""guess: the token that the row before must have drawn for this one to count; negative: it counts anyway. The step writes it: a draft
model's guesses never leave the device."""
GUESS_COLUMN = DRAW_INTS.index("guess")
NO_GUESS = -1
DRAW_FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
DRAW_COLUMNS = len(DRAW_INTS) + len(DRAW_FLOATS)


def fields(bucket: Bucket) -> dict[str, tuple[int, ...]]:
    """Name -> shape, in the order of the upload."""
    s, r, c, w = bucket.decode_rows, bucket.prefill_rows, bucket.chunk_tokens, bucket.table_pages
    y = 1 + bucket.drafts
    layout: dict[str, tuple[int, ...]] = {
        "decode_slot": (s,),
        "decode_token": (s, y),  # negative: the slot's last token, and guesses behind it, which are still on the device
        "decode_position": (s, y),
        "decode_table": (s, w),
        "draws": (s * y + r, DRAW_COLUMNS),
    }
    if r:
        layout |= {"prefill_start": (r,), "prefill_length": (r,), "prefill_tokens": (r, c), "prefill_table": (r, w)}
    if bucket.score:
        layout |= {"targets": (r * c,)}
    return layout


def size(bucket: Bucket) -> int:
    """int32 words of the upload."""
    return _places(bucket)[-1][2]


def unpack(packed: jax.Array, bucket: Bucket) -> dict[str, jax.Array]:
    """The named arrays of a packed upload, all int32."""
    return {name: lax.slice(packed, (start,), (end,)).reshape(shape) for name, start, end, shape in _places(bucket)}


@cache
def _places(bucket: Bucket) -> tuple[tuple[str, int, int, tuple[int, ...]], ...]:
    """(name, first word, word behind the last, shape) of each field."""
    places, at = [], 0
    for name, shape in fields(bucket).items():
        places.append((name, at, at + math.prod(shape), shape))
        at += math.prod(shape)
    return tuple(places)


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
    views = {name: packed[start:end].reshape(shape) for name, start, end, shape in _places(bucket)}
    views["decode_position"][:] = PADDING
    views["decode_slot"][:] = slots
    views["draws"][:, DRAW_INTS.index("slot")] = slots
    views["draws"][:, GUESS_COLUMN] = NO_GUESS
    if decode:
        held = len(decode)
        views["decode_slot"][:held] = [row.slot % slots for row in decode]
        views["decode_token"][:held, 0] = [row.input for row in decode]
        views["decode_position"][:held, 0] = [row.position for row in decode]
        for i, row in enumerate(decode):
            views["decode_table"][i, : len(row.pages)] = row.pages
            if count := len(row.drafts):
                views["decode_token"][i, 1 : 1 + count] = row.drafts
                views["decode_position"][i, 1 : 1 + count] = range(row.position + 1, row.position + 1 + count)
    for i, row in enumerate(prefill):
        count = len(row.tokens)
        views["prefill_start"][i] = row.start
        views["prefill_length"][i] = count
        views["prefill_tokens"][i, :count] = row.tokens
        views["prefill_table"][i, : len(row.pages)] = row.pages
        if bucket.score:
            views["targets"][i * bucket.chunk_tokens : i * bucket.chunk_tokens + count] = (*row.tokens[1:], row.following)
    drawing = [
        (i * (1 + bucket.drafts) + j, row, row.position + 1 + j, row.ban_ends > j)
        for i, row in enumerate(decode)
        if row.last
        for j in range(1 + len(row.drafts))
    ]
    drawing += [(bucket.decode_tokens + i, row, row.start + len(row.tokens), row.ban_ends > 0) for i, row in enumerate(prefill) if row.last]
    if drawing:
        at = [i for i, *_ in drawing]
        ints = [_draw_ints(row.draw, row.slot % slots, *rest) for _, row, *rest in drawing]
        floats = np.array([_draw_floats(row.draw) for _, row, *_ in drawing], np.float32)
        views["draws"][at] = np.concatenate([np.array(ints, np.int32), floats.view(np.int32)], axis=1)


def _draw_ints(draw: Draw, slot: int, position: int, ban_ends: int) -> tuple[int, ...]:
    """In the order of DRAW_INTS; the halves of the seed as signed words."""
    seed = draw.seed
    low, high = (seed & 0xFFFFFFFF ^ 0x80000000) - 0x80000000, (seed >> 32 & 0xFFFFFFFF ^ 0x80000000) - 0x80000000
    return (slot, position, draw.top_k, low, high, ban_ends, NO_GUESS)


def _draw_floats(draw: Draw) -> tuple[float, ...]:
    """In the order of DRAW_FLOATS."""
    return (draw.temperature, draw.top_p, draw.min_p, draw.repetition_penalty, draw.presence_penalty, draw.frequency_penalty)
