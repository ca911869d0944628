"""The leader's side of the plan channel: it gathers the followers, sends every plan before it runs it, and compares what all drew.

Invariants: every follower gets every plan, in number order; nobody waits for a follower's answer, which another thread reads;
a follower that disagrees, falls behind or goes away is named once to `fault`, and no further plan is dispatched.
"""

import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from novajax.cluster import plans
from novajax.cluster.channel import ChannelError
from novajax.cluster.plans import Compiled, Disagree, Done, End, Plan, Present, Proceed, Refuse, ToLeader, Warm
from novajax.cluster.preflight import Facts, differences
from novajax.cluster.progress import Tally
from novajax.cluster.settings import LOST, Assignment, Fault
from novajax.cluster.wire import Wire, accept
from novajax.core.errors import ConfigError, EngineFailed
from novajax.engine.runner import Landed, Runner
from novajax.scheduler.plan import StepPlan

PURPOSE = "plan channel"


class GroupFault(EngineFailed):
    """Ranks of a group do not agree or do not answer; the message names the rank."""

    kind = "group_fault"


class Gathering:
    """The followers' connections of one epoch, from the first greeting until they are warm."""

    def __init__(self, listener: socket.socket, assignment: Assignment):
        self._listener = listener
        self._assignment = assignment
        self._deadline_s = time.monotonic() + assignment.settings.gather_s
        self.wires: dict[int, Wire] = {}

    def gather(self, mine: Callable[[], Facts]) -> None:
        """Waits until every follower is here and agrees. Raises ConfigError with all differences, ChannelError after the time."""
        epoch, ranks = self._assignment.epoch, self._assignment.ranks
        found: dict[int, Facts] = {}
        while len(self.wires) < ranks - 1:
            try:
                wire = accept(
                    self._listener,
                    self._assignment.secret,
                    PURPOSE,
                    ToLeader,
                    deadline_s=self._deadline_s,
                    send_s=self._assignment.settings.stall_s,
                )
                present = wire.receive(5.0)
            except ChannelError as error:
                if time.monotonic() < self._deadline_s:
                    continue
                missing = ", ".join(str(rank) for rank in range(1, ranks) if rank not in self.wires)
                raise ChannelError(f"rank {missing} did not come within {self._assignment.settings.gather_s:g} s: {error}") from None
            if not isinstance(present, Present) or present.epoch != epoch or not 0 < present.rank < ranks or present.rank in self.wires:
                wire.close()  # of an old epoch, or no follower at all
                continue
            self.wires[present.rank], found[present.rank] = wire, _at(present.facts, present.facts.clock_s - time.time())
        self._listener.close()
        self._decide({0: _at(mine(), 0.0)} | found)

    def compare(self, mine: Facts) -> None:
        """The same once more, with the devices."""
        found = {0: _at(mine, 0.0)}
        for rank, wire in self.wires.items():
            found[rank] = _at(self._expect(rank, wire, Present).facts, 0.0)  # it may have waited here: its clock tells nothing
        self._decide(found)

    def meet(self, within_s: float) -> None:
        """Until every follower has compiled; then all go on together."""
        self._deadline_s = time.monotonic() + within_s
        for rank, wire in self.wires.items():
            self._expect(rank, wire, Compiled)
        for wire in self.wires.values():
            wire.send(Proceed())

    def wait_warm(self, digest: str, within_s: float) -> None:
        """Until every follower is warm, with the weights of this digest. Raises ConfigError if one has others."""
        self._deadline_s = time.monotonic() + within_s
        for rank, wire in self.wires.items():
            warm = self._expect(rank, wire, Warm)
            if warm.weights_digest != digest:
                raise ConfigError(f"rank {rank} loaded weights {warm.weights_digest[:12]}, rank 0 {digest[:12]}")

    def _expect[Kind](self, rank: int, wire: Wire, kind: type[Kind]) -> Kind:
        try:
            message = wire.receive(max(0.01, self._deadline_s - time.monotonic()))
        except ChannelError as error:
            raise GroupFault(f"rank {rank} was lost while starting: {error.message}") from None
        if not isinstance(message, kind):
            raise GroupFault(f"rank {rank} sent {type(message).__name__} where {kind.__name__} was due")
        return message

    def _decide(self, found: Mapping[int, Facts]) -> None:
        lines = differences(found)
        verdict = Refuse("; ".join(lines)) if lines else Proceed()
        for wire in self.wires.values():
            wire.send(verdict)
        if lines:
            raise ConfigError("the processes of this group differ: " + "; ".join(lines))


class _Owed:
    """A plan that not all have completed."""

    __slots__ = ("digest", "drawn", "landed_s", "waiting")

    def __init__(self, digest: bytes, ranks: set[int]):
        self.digest = digest
        self.waiting = ranks
        self.drawn: dict[int, bytes] = {}
        self.landed_s: float | None = None


class LeadingRunner:
    """A Runner that has its plans run by the followers, too. One thread dispatches and collects; `close` ends the followers."""

    def __init__(
        self, executor: Runner, followers: Mapping[int, Wire], assignment: Assignment, tally: Tally, fault: Callable[[Fault], None]
    ):
        self._executor = executor
        self._wires = dict(followers)
        self._epoch = assignment.epoch
        self._settings = assignment.settings
        self._tally = tally
        self._report = fault
        self._lock = threading.Lock()
        self._owed: dict[int, _Owed] = {}
        self._next = dict.fromkeys(self._wires, 0)
        self._fault: GroupFault | None = None
        self._closing = False
        for rank in self._wires:
            threading.Thread(target=self._read, args=(rank,), name=f"rank-{rank}", daemon=True).start()

    def dispatch(self, plan: StepPlan) -> Any:
        self._check()
        if self._wires:
            self._send(plans.packed(self._epoch, plan), brings_results=not plan.bubble)
        self._tally.dispatched += 1
        return self._executor.dispatch(plan)

    def collect(self, pending: Any) -> Landed:
        landed = self._executor.collect(pending)
        self._tally.completed += 1
        if self._wires:
            self._landed(0, landed.number, plans.drawn(landed))
            self._check()
        return landed

    def close(self) -> None:
        self._closing = True
        for wire in self._wires.values():
            try:
                wire.send(End())
            except ChannelError:
                continue  # it is gone already
        self._executor.close()

    def _send(self, plan: Plan, *, brings_results: bool) -> None:
        if brings_results:
            with self._lock:
                self._owed[plan.number] = _Owed(plan.digest, set(self._wires) | {0})
        body = msgspec.msgpack.encode(plan)
        for rank, wire in self._wires.items():
            try:
                wire.send_body(body)
            except ChannelError as error:
                self._failed(f"rank {rank} takes no plans any more: {error.message}", LOST)
                self._check()

    def _check(self) -> None:
        """Raises the fault that was seen; looks for followers that are behind."""
        if self._fault is None and self._wires:
            with self._lock:
                oldest = next(iter(self._owed.items()), None)
                owed = len(self._owed)
            if oldest is not None:
                number, plan = oldest
                late_s = 0.0 if plan.landed_s is None else time.monotonic() - plan.landed_s
                if late_s > self._settings.stall_s or owed > self._settings.behind_plans:
                    ranks = ", ".join(str(rank) for rank in sorted(plan.waiting - {0}))
                    self._failed(f"step {number}: rank {ranks} is behind: {owed} plans owed, this one done here {late_s:.1f} s ago")
        if self._fault is not None:
            raise self._fault

    def _read(self, rank: int) -> None:
        wire = self._wires[rank]
        try:
            while True:
                message = wire.receive()
                if isinstance(message, Done):
                    self._done(rank, message)
                else:
                    text = message.message if isinstance(message, Disagree) else f"rank {rank} sent {type(message).__name__}"
                    self._failed(text)
                    return
        except ChannelError as error:
            self._failed(f"rank {rank} left the plan channel: {error.message}", LOST)

    def _done(self, rank: int, done: Done) -> None:
        with self._lock:
            owed = self._owed.get(done.number)
        if owed is None or rank not in owed.waiting or done.number < self._next[rank]:
            self._failed(f"step {done.number}: rank {rank} completed a plan that is not due")
        elif done.digest != owed.digest:
            self._failed(disagreement(done.number, rank, done.digest, owed.digest))
        else:
            self._next[rank] = done.number + 1
            self._landed(rank, done.number, done.drawn)

    def _landed(self, rank: int, number: int, drawn: bytes) -> None:
        with self._lock:
            owed = self._owed.get(number)
            if owed is None:
                return
            owed.waiting.discard(rank)
            owed.drawn[rank] = drawn
            if rank == 0:
                owed.landed_s = time.monotonic()
            if not owed.waiting:
                del self._owed[number]
            mine = owed.drawn.get(0)
            others = [] if mine is None else [r for r, theirs in owed.drawn.items() if theirs != mine]
        if mine is not None and others:
            self._failed(f"step {number}: rank {others[0]} drew tokens {owed.drawn[others[0]].hex()[:8]} instead of {mine.hex()[:8]}")

    def _failed(self, message: str, reason: str = "fault") -> None:
        if self._fault is None and not self._closing:
            self._fault = GroupFault(message)
            self._report(Fault(message, reason))


def disagreement(number: int, rank: int, theirs: bytes, mine: bytes) -> str:
    return f"step {number}: rank {rank} has batch digest {theirs.hex()[:8]} instead of {mine.hex()[:8]}"


def _at(facts: Facts, clock_s: float) -> Facts:
    """The facts with the sender's clock as its deviation from mine."""
    return msgspec.structs.replace(facts, clock_s=clock_s)
