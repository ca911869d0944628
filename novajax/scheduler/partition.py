"""Owns one data partition: its slots, its pages, the running sequences in order of seniority, and those that leave.

A sequence gives its slot and pages back only when no uncommitted plan names it; until then it is `leaving`, whether it ended or
was preempted. Slot ids are global, page ids are the partition's own. It knows nothing of the waiting ones, of other partitions or
of what a plan holds.
"""

from bisect import insort
from collections.abc import Sequence as Listed

from novajax.core.errors import ConfigError, InternalError
from novajax.kv.manager import KVManager, Lease
from novajax.scheduler.plan import Seat
from novajax.scheduler.policy import seniority
from novajax.scheduler.sequence import Sequence


class Partition:
    def __init__(self, slots: range, kv: KVManager):
        self.kv = kv
        self.running: list[Sequence] = []
        """Most senior first; includes those preempted while in flight."""
        self.leaving: set[Sequence] = set()
        """Their slots and pages come free when their plans in flight are committed."""
        self.slot_violations = 0
        self._slots = slots
        self._free = list(reversed(slots))
        self._seated: set[int] = set()  # slots whose state on the device is not neutral

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def available_pages(self) -> int:
        """Pages that a lease can get at once."""
        return self.kv.free + self.kv.cached

    def admit(self, sequence: Sequence, lease: Lease, prefill_tokens: int, plan_number: int, now_s: float) -> None:
        """Needs a free slot. `sequence.rank` must be set: it decides the seniority."""
        sequence.admit(self._free.pop(), lease, prefill_tokens, plan_number, now_s)
        insort(self.running, sequence, key=seniority)

    def seat(self, sequence: Sequence) -> list[Seat]:
        """For its first row: the state its slot needs on the device, or a neutral one if the slot's last owner left some."""
        slot = sequence.slot
        if sequence.draw.seated:
            self._seated.add(slot)
            return [sequence.seat()]
        if slot in self._seated:
            self._seated.remove(slot)
            return [Seat(slot, (), (), {}, ())]
        return []

    def leave(self, sequence: Sequence) -> bool:
        """The sequence is preempted (it still runs) or has ended. True: preempted and vacated now, so it waits again."""
        if not sequence.running:
            self.running.remove(sequence)
        sequence.leaving = True
        self.leaving.add(sequence)
        return self.settle(sequence)

    def settle(self, sequence: Sequence) -> bool:
        """Vacates a leaving sequence once nothing of it is in flight. True: it was preempted, so it waits again."""
        if sequence.in_flight:
            return False
        lease = sequence.lease
        if lease is None:
            raise InternalError("a sequence has a slot and no pages")
        self.leaving.remove(sequence)
        self.kv.release(lease)
        self._free.append(sequence.slot)
        preempted = sequence.running
        if preempted:
            self.running.remove(sequence)
        sequence.vacate()
        return preempted

    def check(self) -> list[str]:
        """Recounts pages and slots. Returns violations in words; they are counted, those of pages repaired."""
        found = []
        taken = sorted(sequence.slot for sequence in {*self.running, *self.leaving})
        if sorted(taken + self._free) != list(self._slots):
            found.append(f"slots {taken} are taken and {sorted(self._free)} are free, of {len(self._slots)}")
        if not taken and self.kv.held:
            found.append(f"{self.kv.held} pages are held while nothing runs")
        self.slot_violations += len(found)
        return self.kv.check() + found


def deal(slots: int, kvs: Listed[KVManager]) -> list[Partition]:
    """One partition for each manager, with equal runs of the slots. Raises ConfigError if that is impossible or the managers differ: a
    sequence may come back in another partition than it left."""
    each = slots // len(kvs)
    if each * len(kvs) != slots:
        raise ConfigError(f"{slots} slots cannot be dealt out to {len(kvs)} partitions evenly")
    if len({(kv.page_tokens, kv.total, kv.chain("", "").root) for kv in kvs}) != 1:
        raise ConfigError("the partitions differ in page size, pages, key, weights or KV format")
    return [Partition(range(i * each, (i + 1) * each), kv) for i, kv in enumerate(kvs)]


def totals(partitions: Listed[Partition]) -> dict[str, int]:
    """The sums that `core.types.Stats` wants. O(partitions)."""
    kvs = [partition.kv for partition in partitions]
    return {
        "requests_running": sum(len(partition.running) for partition in partitions),
        "kv_pages_free": sum(kv.free for kv in kvs),
        "kv_pages_cached": sum(kv.cached for kv in kvs),
        "kv_pages_held": sum(kv.held for kv in kvs),
        "kv_pages_total": sum(kv.total for kv in kvs),
        "prefix_query_tokens": sum(kv.query_tokens for kv in kvs),
        "prefix_hit_tokens": sum(kv.hit_tokens for kv in kvs),
        "identity_violations": sum(kv.violations for kv in kvs) + sum(partition.slot_violations for partition in partitions),
    }
