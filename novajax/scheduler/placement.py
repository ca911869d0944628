"""Where a waiting sequence can go: the order of partitions, its lease there, and who would have to give way. Pure choices; the
scheduler carries them out.
"""

from collections.abc import Sequence as Listed

from novajax.kv.manager import Lease
from novajax.scheduler import policy
from novajax.scheduler.budget import Shapes
from novajax.scheduler.partition import Partition
from novajax.scheduler.sequence import Sequence


def prefill_tokens(sequence: Sequence, shapes: Shapes) -> int:
    """After a preemption the output is prefilled like a prompt; with fixed shapes it is replayed token by token, for the same bits."""
    return sequence.prompt_tokens if shapes.fixed else len(sequence.tokens)


def by_preference(partitions: Listed[Partition], sequence: Sequence, shapes: Shapes) -> list[Partition]:
    """Those with a free slot or someone to preempt do not differ here: the longest cached prefix first, then most available pages, then
    most free slots."""
    if len(partitions) == 1:
        return list(partitions)
    most, multiple = _cacheable_tokens(sequence, shapes), _cached_multiple(shapes)

    def merit(partition: Partition) -> tuple[int, int, int]:
        cached = partition.kv.cached_tokens(sequence.tokens, sequence.chain, most, cached_multiple=multiple)
        return cached, partition.available_pages, partition.free_slots

    return sorted(partitions, key=merit, reverse=True)  # stable: of equals the first


def lease(partition: Partition, sequence: Sequence, shapes: Shapes) -> Lease | None:
    """Pages for a sequence that is to take a slot; None if there is no slot or there are too few pages."""
    if not partition.free_slots:
        return None
    return partition.kv.lease(
        sequence.tokens,
        sequence.chain,
        _cacheable_tokens(sequence, shapes),
        cached_multiple=_cached_multiple(shapes),
        spare_pages=len(partition.running),  # each may need a page soon: admitting now to preempt at once helps nobody
        counted=sequence.cached_tokens is None,
    )


def victims(partition: Partition, sequence: Sequence) -> list[Sequence]:
    """Those of a lower class to preempt so that `sequence` fits, as few as will do; none if that cannot help."""
    juniors = policy.victims_for_admission(partition.running, sequence)
    missing = partition.kv.pages_for(len(sequence.tokens)) + len(partition.running) - partition.available_pages
    chosen: list[Sequence] = []
    for junior in juniors:
        if chosen and missing <= 0:
            break
        chosen.append(junior)
        missing -= len(junior.lease.pages) if junior.lease else 0
    return chosen if missing <= 0 else []


def _cacheable_tokens(sequence: Sequence, shapes: Shapes) -> int:
    return 0 if sequence.to_score else prefill_tokens(sequence, shapes) - 1


def _cached_multiple(shapes: Shapes) -> int:
    """With fixed shapes every chunk begins at a multiple of C, so only whole chunks are shared."""
    return shapes.prefill[0][1] if shapes.fixed else 1
