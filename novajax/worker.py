"""One rank of an engine: the child of a supervisor, which gives it an assignment as one line of JSON on standard input.

Exit codes: `novajax.cluster.rank`.
"""

import os
from collections.abc import Callable
from pathlib import Path

import jax
import msgspec
from absl import app, flags

from novajax.cluster import rank
from novajax.cluster.member import Announce
from novajax.cluster.settings import Assignment
from novajax.core.backend import Backend
from novajax.core.config import EngineConfig
from novajax.core.heap import bound_arenas
from novajax.engine.build import Prepared, make_engine, open_executor
from novajax.engine.runner import Runner
from novajax.parallel import distributed
from novajax.telemetry.logging import configure as configure_logging

_REPORTS = flags.DEFINE_integer("report_fd", None, "descriptor of the pipe for progress reports")


class Built(msgspec.Struct, frozen=True):
    """What `engine.build` prepared, as a group sees it."""

    prepared: Prepared

    @property
    def runner(self) -> Runner:
        return self.prepared.executor

    @property
    def weights_digest(self) -> str:
        return self.prepared.loaded.digest


class JaxBuilder:
    """Builds the real engine."""

    def directory(self, config: EngineConfig) -> Path | None:
        path = Path(config.model)
        return path if path.is_dir() else None

    def open_devices(self, assignment: Assignment) -> tuple[int, str]:
        if assignment.settings.devices_per_process is not None:
            distributed.use_virtual_devices(assignment.settings.devices_per_process)
        if assignment.ranks > 1:
            distributed.join(
                rank=assignment.rank, ranks=assignment.ranks, coordinator=assignment.coordinator, within_s=assignment.settings.gather_s
            )
        devices = jax.local_devices()
        return len(devices), devices[0].device_kind

    def open_executor(self, assignment: Assignment, announce: Announce, meet: Callable[[], None]) -> Built:
        return Built(open_executor(assignment.config, announce, meet))

    def make_engine(self, config: EngineConfig, built: Built, runner: Runner) -> tuple[Backend, Callable[[], bool]]:
        engine = make_engine(config, built.prepared, runner)
        return engine, lambda: engine.busy


def main(_: list[str]) -> int:
    bound_arenas(os.environ)
    configure_logging()
    return rank.run(JaxBuilder(), _REPORTS.value)


if __name__ == "__main__":
    app.run(main)
