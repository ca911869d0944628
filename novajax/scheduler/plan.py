"""The values a step consists of: what the scheduler tells the device to do, and what comes back.

All are frozen and serializable, so that followers can execute what the leader planned and compare digests. Positions count
from 0; a row at position p writes the KV of the token at p and its logits are those of the token at p + 1. The draw of
that token uses the key fold_in(key(seed), p + 1) or any other function of p, but of nothing else.

Rows of all data partitions stand in one flat tuple: a row's slot tells its partition, and its pages are ids of that
partition. The shapes (S, R, C) are those of each partition.
"""

from collections.abc import Iterable
from hashlib import blake2b

import msgspec

from novajax.core.types import TokenLogprobs

ON_DEVICE = -1
"""As a row's input: the token sampled last for this slot, which the host does not know yet."""


class Draw(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How tokens of one sequence are drawn; made once per sequence. Fields as in `core.types.SamplingParams`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int = -1
    """Alternatives to report beside the drawn token; -1: report nothing."""
    prompt_logprobs: int = -1
    seated: bool = False
    """Whether its slot's state on the device (its Seat) matters to it; if not, that state is neutral."""


class DecodeRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One token of one sequence, and guesses of the next ones."""

    slot: int
    position: int
    pages: tuple[int, ...]
    """Covers positions 0 .. position + len(drafts); ids of its partition. The same object as in the slot's last row unless the page table
    changed."""
    draw: Draw
    ban_ends: int
    """How many of its draws, from the first one, may not be one of the seat's `ends`."""
    input: int
    """Token id at `position`, or ON_DEVICE."""
    last: bool = True
    """Its sample is the sequence's next token. False only when known output is replayed after a preemption (fixed shapes)."""
    drafts: tuple[int, ...] = ()
    """Guesses of the tokens at the positions behind it; ON_DEVICE: the draft model's. The row draws a token after its input and one after
    each guess, as if they were its inputs; those up to the first one that contradicts the next guess are the sequence's."""


class PrefillRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A chunk of one sequence: tokens at positions start .. start + len(tokens) - 1."""

    slot: int
    start: int
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    last: bool
    """The sample at its last token is the sequence's next token; otherwise nothing is sampled."""
    score: bool
    """Logits of all its rows are wanted: row i scores tokens[i + 1], the last one scores `following`."""
    following: int
    """The known token behind the chunk, -1 if there is none. A score row yields len(tokens) results, less one if this is -1."""
    draw: Draw
    ban_ends: bool


class Seat(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Sampling state of a slot on the device. Comes in the plan with a sequence's first row, to be applied before the plan
    runs, and replaces all older state of the slot: for a sequence that needs state, and an empty one for the next
    sequence in the same slot that needs none."""

    slot: int
    prompt: tuple[int, ...]
    """For repetition_penalty."""
    output: tuple[int, ...]
    """Generated before a preemption; for all three penalties."""
    logit_bias: dict[int, float]
    """By token id, ascending, so that equal seats have equal bytes."""
    ends: tuple[int, ...]
    """Token ids that a row with ban_ends may not draw."""


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    number: int
    decode: tuple[DecodeRow, ...]
    prefill: tuple[PrefillRow, ...]
    seats: tuple[Seat, ...]
    decode_rows: int
    """S: rows of each partition's decode block, padding included."""
    prefill_shape: tuple[int, int] | None
    """(R, C) of each partition's prefill block; None: the step has none."""

    @property
    def bubble(self) -> bool:
        """Holds no row: it only pushes the pipeline on, brings no results and is not committed."""
        return not self.decode and not self.prefill

    def digest(self) -> bytes:
        """16 bytes that two hosts compare before they run the plan."""
        return blake2b(msgspec.msgpack.encode(self), digest_size=16).digest()


class TokenResult(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one sampled row brought home: one token, and one more for each of its guesses that proved right."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token, if they were asked for."""


def by_partition[Row: (DecodeRow, PrefillRow)](rows: Iterable[Row], slots_per_partition: int, partitions: int = 1) -> list[list[Row]]:
    """The rows of each partition, in the order of the plan; at least `partitions` lists, some may be empty."""
    groups: list[list[Row]] = [[] for _ in range(partitions)]
    for row in rows:
        partition = row.slot // slots_per_partition
        while len(groups) <= partition:
            groups.append([])
        groups[partition].append(row)
    return groups
