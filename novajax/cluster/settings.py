"""What a group of processes is told: by the user (settings, place), by its supervisor (assignment), and what it says of itself (reports).

All frozen and serializable: they cross process borders as JSON lines on pipes between parent and child.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from novajax.core.config import EngineConfig
from novajax.core.types import Component, Phase


class ClusterSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the engine's processes are started and watched. Times are seconds."""

    processes: Annotated[int, Meta(ge=1, le=64)] = 1
    """Engine processes on each host."""
    devices_per_process: Annotated[int, Meta(ge=1, le=256)] | None = None
    """Virtual CPU devices of each. None: the devices that are there."""
    stall_s: Annotated[float, Meta(gt=0)] = 10.0
    """With work to do and no step completed for so long, the group is started again."""
    start_stall_s: Annotated[float, Meta(gt=0)] = 600.0
    """The same while it starts: no phase, load or compile progress for so long."""
    gather_s: Annotated[float, Meta(gt=0)] = 120.0
    """How long the processes of a group wait for each other at a start."""
    behind_plans: Annotated[int, Meta(ge=1)] = 512
    """A follower that owes so many completed plans is a fault."""
    max_starts: Annotated[int, Meta(ge=1)] = 3
    """Failed starts in a row before a group that never served is given up."""
    replay_wait_s: Annotated[float, Meta(ge=0)] = 120.0
    """How long a request in flight waits for the engine to come back."""
    max_replays: Annotated[int, Meta(ge=0)] = 8
    """Restarts that one request may live through: it might be the cause."""
    max_waiting_replays: Annotated[int, Meta(ge=0)] = 4096
    """Requests that may wait for the engine to come back."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where this launch stands among the hosts of a group."""

    index: int = 0
    count: int = 1
    coordinator: str = ""
    """host:port of the head's supervisor; needed when count > 1."""
    source: str = "alone"
    """What told: flags, LeaderWorkerSet, JobSet, Slurm, Open MPI."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a supervisor keeps running."""

    config: EngineConfig
    settings: ClusterSettings
    place: Place
    secret: bytes
    directory: str
    """For the leaders' sockets; only this user can read it."""
    first_epoch: int = 1
    served_before: bool = False
    """An earlier supervisor's group served: what it was told is known to work."""
    command: tuple[str, ...] = ("-m", "novajax.worker")
    """The program of a rank, for the interpreter that runs this."""
    environment: dict[str, str] = {}
    """Set for every rank, over the inherited one."""


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's part in one epoch."""

    config: EngineConfig
    settings: ClusterSettings = ClusterSettings()
    epoch: int = 1
    rank: int = 0
    ranks: int = 1
    secret: bytes = b""
    socket: str = ""
    """Path of the Unix socket on which the leader serves its front end."""
    plans: str = ""
    """host:port of the leader's plan channel; empty with one rank."""
    coordinator: str = ""
    """host:port of jax.distributed, on the leader's host; empty with one rank."""


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """A rank's progress. Counts are of this epoch and only grow; a rank is judged by them, not by the fact that it speaks."""

    phase: Phase
    detail: str = ""
    dispatched: int = 0
    completed: int = 0
    busy: bool = False


LOST = "lost"
"""Reason of a fault that is only the effect of another rank's: its connection ended."""


class Fault(msgspec.Struct, frozen=True, tag="fault"):
    """A rank saw that the group cannot go on, and why."""

    message: str
    reason: str = "fault"


Report = Alive | Fault

Reason = Literal["exit", "stall", "stopped", "fault", "host", "config", "supervisor"]


class GroupStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a supervisor tells the front end, on every change and about once a second."""

    epoch: int
    phase: Phase
    detail: str = ""
    socket: str = ""
    """The leader's, of this epoch."""
    components: tuple[Component, ...] = ()
    restarts: dict[str, int] = {}
    """Group restarts by reason."""
    recovery_s: float | None = None
    """From the last fault's detection to a leader that served again."""
    fatal: str = ""
    """Why it gave up; it ends after saying so."""
