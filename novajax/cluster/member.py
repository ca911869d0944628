"""One rank of a group, from its assignment to its end: the same for every kind of engine, and for the fake one of tests.

A `Builder` knows devices and models; this knows the order of events: gather and compare, open the devices, compare those,
build the executor, wait until all are warm, lead or follow.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from novajax.cluster.follower import Follower, join, meet, present
from novajax.cluster.leader import Gathering, LeadingRunner
from novajax.cluster.plans import Warm
from novajax.cluster.preflight import Facts, facts
from novajax.cluster.progress import Reporter, Tally
from novajax.cluster.settings import Assignment
from novajax.cluster.wire import listen, split_address
from novajax.core.backend import Backend
from novajax.core.config import EngineConfig
from novajax.core.types import Phase
from novajax.engine.runner import Runner

Announce = Callable[[Phase, str], None]


class Built(Protocol):
    """A warm executor and the digest of its weights."""

    @property
    def runner(self) -> Runner: ...
    @property
    def weights_digest(self) -> str: ...


class Builder[B: Built](Protocol):
    """How an engine is built in one process."""

    def directory(self, config: EngineConfig) -> Path | None:
        """Where the weights lie, if on this host."""
        ...

    def open_devices(self, assignment: Assignment) -> tuple[int, str]:
        """Joins the group's devices; how many are here, and of which kind."""
        ...

    def open_executor(self, assignment: Assignment, announce: Announce, meet: Callable[[], None]) -> B:
        """Compiles, calls `meet`, then runs what it compiled."""
        ...

    def make_engine(self, config: EngineConfig, built: B, runner: Runner) -> tuple[Backend, Callable[[], bool]]:
        """The engine that leads with `runner`, and whether it is busy (asked from any thread)."""
        ...


def lead(assignment: Assignment, builder: Builder[Any], tally: Tally, reporter: Reporter, announce: Announce) -> Backend:
    """The ready engine of rank 0. Raises ConfigError for what cannot be, GroupFault or ChannelError for a rank that was lost."""
    config, settings = assignment.config, assignment.settings
    gathering = None
    if assignment.ranks > 1:
        host, port = split_address(assignment.plans)
        gathering = Gathering(listen(port, local=host == "127.0.0.1"), assignment)
        announce("starting", f"waiting for {assignment.ranks - 1} ranks")
        gathering.gather(lambda: facts(config, builder.directory(config)))
    count, kind = builder.open_devices(assignment)
    if gathering is not None:
        gathering.compare(_with_devices(facts(config, None), count, kind))
    built = builder.open_executor(assignment, announce, lambda: gathering.meet(settings.start_stall_s) if gathering else None)
    if gathering is not None:
        gathering.wait_warm(built.weights_digest, settings.start_stall_s)
    runner = LeadingRunner(built.runner, gathering.wires if gathering else {}, assignment, tally, reporter.fault)
    engine, tally.busy = builder.make_engine(config, built, runner)
    return engine


def follow(assignment: Assignment, builder: Builder[Any], tally: Tally, announce: Announce) -> None:
    """Runs the leader's plans until it ends them. Raises ConfigError if refused, else GroupFault or ChannelError."""
    config, settings = assignment.config, assignment.settings
    wire = join(assignment)
    present(wire, assignment, facts(config, builder.directory(config)), settings.gather_s)
    count, kind = builder.open_devices(assignment)
    present(wire, assignment, _with_devices(facts(config, None), count, kind), settings.gather_s)
    built = builder.open_executor(assignment, announce, lambda: meet(wire, settings.start_stall_s))
    wire.send(Warm(built.weights_digest))
    announce("ready", "")
    Follower(built.runner, wire, assignment, tally).run()


def _with_devices(found: Facts, count: int, kind: str) -> Facts:
    return msgspec.structs.replace(found, devices=count, device_kind=kind)
