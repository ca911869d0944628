"""A follower: runs the leader's plans in order and says what it drew. It has no scheduler and decides nothing.

One thread takes plans off the wire and dispatches them, another waits for their results, so that a follower runs ahead
as the leader does. It refuses a plan of another epoch, out of order, or that decodes to another digest.
"""

import queue
import threading
import time
from typing import Any

import msgspec

from novajax.cluster import plans
from novajax.cluster.channel import ChannelError
from novajax.cluster.leader import PURPOSE, GroupFault, disagreement
from novajax.cluster.plans import Compiled, Disagree, Done, End, Plan, Present, Proceed, Refuse, ToFollower
from novajax.cluster.preflight import Facts
from novajax.cluster.progress import Tally
from novajax.cluster.settings import Assignment
from novajax.cluster.wire import Wire, connect, split_address
from novajax.core.errors import ConfigError
from novajax.engine.runner import Runner
from novajax.scheduler.plan import StepPlan


def join(assignment: Assignment) -> Wire:
    """A connection to the leader of this epoch."""
    settings = assignment.settings
    return connect(
        split_address(assignment.plans),
        assignment.secret,
        PURPOSE,
        ToFollower,
        deadline_s=time.monotonic() + settings.gather_s,
        send_s=settings.stall_s,
    )


def present(wire: Wire, assignment: Assignment, facts: Facts, within_s: float) -> None:
    """Tells the leader what is here and waits for its word. Raises ConfigError if the group differs."""
    wire.send(Present(assignment.rank, assignment.epoch, facts))
    verdict = wire.receive(within_s)
    if isinstance(verdict, Refuse):
        raise ConfigError(f"the leader refused the group: {verdict.message}")
    if not isinstance(verdict, Proceed):
        raise GroupFault(f"the leader sent {type(verdict).__name__} where its verdict was due")


def meet(wire: Wire, within_s: float) -> None:
    """Tells the leader that this rank has compiled, and waits until all have."""
    wire.send(Compiled())
    if not isinstance(verdict := wire.receive(within_s), Proceed):
        raise GroupFault(f"the leader sent {type(verdict).__name__} where it should let us go on")


class Follower:
    """Runs plans until the leader ends it. Owns two threads' worth of work, not the wire."""

    def __init__(self, executor: Runner, wire: Wire, assignment: Assignment, tally: Tally):
        self._executor = executor
        self._wire = wire
        self._rank = assignment.rank
        self._epoch = assignment.epoch
        self._tally = tally
        self._decoder = msgspec.msgpack.Decoder(StepPlan)
        self._digests: dict[int, bytes] = {}
        self._pending: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._collected: Exception | None = None
        tally.busy = lambda: bool(self._digests)

    def run(self) -> None:
        """Returns at the leader's End. Raises GroupFault or ChannelError, or what the executor raised."""
        collector = threading.Thread(target=self._collect, name="collector", daemon=True)
        collector.start()
        expected = 0
        try:
            while not isinstance(message := self._wire.receive(), End):
                if not isinstance(message, Plan):
                    raise GroupFault(f"rank {self._rank} was sent {type(message).__name__} where a plan was due")
                plan = self._accept(message, expected)
                expected += 1
                if not plan.bubble:
                    self._digests[plan.number] = message.digest
                self._tally.dispatched += 1
                if (pending := self._executor.dispatch(plan)) is not None:
                    self._pending.put(pending)
        except ChannelError:
            if self._collected is not None:
                raise self._collected from None
            raise
        finally:
            self._pending.put(None)
        collector.join()

    def _accept(self, message: Plan, expected: int) -> StepPlan:
        problem = ""
        if message.epoch != self._epoch:
            problem = f"step {message.number}: rank {self._rank} is of epoch {self._epoch}, the plan of epoch {message.epoch}"
        elif message.number != expected:
            problem = f"step {message.number}: rank {self._rank} expected step {expected}"
        else:
            try:
                plan = self._decoder.decode(message.body)
            except (msgspec.DecodeError, RecursionError) as error:
                problem = f"step {message.number}: rank {self._rank} cannot read the plan: {error}"
            else:
                mine = plan.digest()
                if mine == message.digest and plan.number == message.number:
                    return plan
                problem = disagreement(message.number, self._rank, mine, message.digest)
        self._wire.send(Disagree(problem))
        raise GroupFault(problem)

    def _collect(self) -> None:
        try:
            while (pending := self._pending.get()) is not None:
                landed = self._executor.collect(pending)
                digest = self._digests.pop(landed.number)
                self._tally.completed += 1
                self._wire.send(Done(landed.number, digest, plans.drawn(landed)))
        except Exception as error:
            self._collected = error
            self._wire.close()  # wakes the other thread
