"""Which prompts go into a step's prefill block, and in which shape. A pure choice over the running sequences of all partitions."""

from collections.abc import Sequence as Listed

import msgspec

from novajax.scheduler import policy
from novajax.scheduler.budget import Shapes
from novajax.scheduler.partition import Partition
from novajax.scheduler.sequence import Sequence, State


class Block(msgspec.Struct, frozen=True):
    """What one step prefills."""

    sequences: list[Sequence]
    """Partition by partition, seniors first; at most R of one partition."""
    shape: tuple[int, int]
    """(R, C) in each partition."""
    scoring: bool
    """It holds one sequence, whose prompt is scored."""


def choose(partitions: Listed[Partition], shapes: Shapes, decode_rows: int, *, scored_last: bool) -> Block | None:
    """The next block beside `decode_rows`, None if no prompt waits to be computed.

    Scoring takes a step's whole prefill block; while others have prompts to compute, it takes every other one.
    """
    prompts = [[s for s in partition.running if s.state is State.PREFILL and not s.leaving] for partition in partitions]
    first = min((part[0] for part in prompts if part), key=policy.seniority, default=None)
    if first is None:
        return None
    plain = [[sequence for sequence in part if not sequence.to_score] for part in prompts]
    if shapes.score is not None and (not any(plain) or (first.to_score and not scored_last)):
        return Block([first], shapes.score, True)
    shape = shapes.prefill_shape([[s.prefill_tokens - s.planned_tokens for s in part] for part in plain], decode_rows)
    return Block([sequence for part in plain for sequence in part[: shape[0]]], shape, False)
