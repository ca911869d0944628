"""Judges a group by what its ranks complete: who stalls, who is stopped, who never starts. Pure: moments and states come in.

A rank's mark is all that can move: phase, detail, counts. Work to do and a mark that stands still for `stall_s` is a stall,
however lively the process is; silence for so long is one, too. While a rank starts, its phases and their progress are the mark.
"""

import msgspec

from novajax.cluster.settings import Alive, ClusterSettings, Reason

STOPPED_S = 2.0
"""A rank in the kernel's stopped state for so long is a fault, busy or not."""


class Verdict(msgspec.Struct, frozen=True):
    reason: Reason
    message: str
    certain: bool = True
    """False: an effect, whose cause may be heard of in a moment."""


class _Seen:
    __slots__ = ("alive", "heard_s", "moved_s", "state", "state_s")

    def __init__(self, now_s: float):
        self.alive = Alive("starting")
        self.heard_s = self.moved_s = self.state_s = now_s
        self.state = ""


class Watch:
    """Of one epoch; `ranks` counts from 0."""

    def __init__(self, ranks: int, settings: ClusterSettings, now_s: float):
        self._settings = settings
        self._seen = [_Seen(now_s) for _ in range(ranks)]

    def heard(self, rank: int, alive: Alive, now_s: float) -> None:
        seen = self._seen[rank]
        seen.heard_s = now_s
        before = seen.alive
        moved = msgspec.structs.replace(before, busy=alive.busy) != alive
        idle = alive.phase == "ready" and not (before.busy and alive.busy)
        if moved or idle:
            seen.moved_s = now_s
        seen.alive = alive

    def state(self, rank: int, letter: str, now_s: float) -> None:
        """The kernel's word on a rank's process (`process_state`)."""
        seen = self._seen[rank]
        if letter != seen.state:
            seen.state, seen.state_s = letter, now_s

    def alive(self, rank: int) -> Alive:
        return self._seen[rank].alive

    @property
    def ready(self) -> bool:
        return all(seen.alive.phase == "ready" for seen in self._seen)

    def suspects(self, now_s: float) -> list[int]:
        """Ranks that may be stuck: half of the bound is over."""
        return [rank for rank, seen in enumerate(self._seen) if self._late(seen, now_s, 0.5)]

    def verdict(self, now_s: float) -> Verdict | None:
        """Why the group must be started again, or None."""
        late = [rank for rank, seen in enumerate(self._seen) if self._late(seen, now_s, 1.0)]
        stopped = [rank for rank, seen in enumerate(self._seen) if seen.state == "T"]
        bound_s = min(STOPPED_S, self._settings.stall_s)
        if stopped and (late or any(now_s - self._seen[rank].state_s >= bound_s for rank in stopped)):
            return Verdict("stopped", f"rank {_listed(stopped)} is stopped by a signal")
        if not late:
            return None
        return Verdict("stall", self._culprit(late, now_s))

    def _late(self, seen: _Seen, now_s: float, share: float) -> bool:
        if seen.alive.phase != "ready":
            return now_s - seen.moved_s > share * self._settings.start_stall_s
        bound_s = share * self._settings.stall_s
        return now_s - seen.heard_s > bound_s or (seen.alive.busy and now_s - seen.moved_s > bound_s)

    def _culprit(self, late: list[int], now_s: float) -> str:
        """Names who holds the others up: the silent one, else the one that has completed or begun less than the others."""
        silent = [rank for rank in late if now_s - self._seen[rank].heard_s > self._settings.stall_s / 2]
        if silent:
            return f"rank {_listed(silent)} says nothing for {now_s - self._seen[silent[0]].heard_s:.1f} s"
        alive = [seen.alive for seen in self._seen]
        starting = [rank for rank in late if alive[rank].phase != "ready"]
        if starting:
            first = alive[starting[0]]
            where = f"{first.phase} {first.detail}".strip()
            return f"rank {_listed(starting)} gets no further than: {where}"
        for what, counts in (("completed", [a.completed for a in alive]), ("begun", [a.dispatched for a in alive])):
            least = min(counts)
            if least < max(counts):
                behind = [rank for rank, count in enumerate(counts) if count == least]
                return f"rank {_listed(behind)} has {what} {least} steps, others {max(counts)}, and nothing moves"
        seconds = now_s - min(self._seen[rank].moved_s for rank in late)
        return f"no rank completed step {alive[0].completed} within {seconds:.1f} s"


def _listed(ranks: list[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
