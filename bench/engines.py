"""The engine under measurement, in this process, from flags that `bench.latency` and `bench.throughput` share."""

from typing import Any

import msgspec
from absl import app, flags

from bench import common
from novajax import options
from novajax.core.backend import Backend
from novajax.core.errors import ConfigError
from novajax.core.types import Phase

FLAGS = flags.FLAGS

_MAX_WAITING = 100_000


def define_flags() -> None:
    """Declares the engine's flags."""
    options.define_engine_flags()


def open_backend(**fields: Any) -> Backend:
    """The ready engine that the flags describe, but for `fields`. Raises UsageError with what the engine refuses."""
    from novajax.engine.build import open_engine  # jax starts only when an engine does

    try:
        config = options.engine_config(FLAGS, options.read_config(FLAGS))
        return open_engine(msgspec.structs.replace(config, max_waiting=_MAX_WAITING, **fields), _announce)
    except ConfigError as error:
        raise app.UsageError(error.message, exitcode=2) from error


def settings() -> dict[str, Any]:
    """The engine's part of a report's settings."""
    return common.settings(options.__name__)


def _announce(phase: Phase, detail: str) -> None:
    common.say(f"{phase}: {detail}")
