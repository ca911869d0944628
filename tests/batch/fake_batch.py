"""The program `novajax.batch` with a fake in place of the engine, for tests of its flags, signals and exit codes."""

import sys
import types
from pathlib import Path

from absl import app
from batch_world import make_card

from novajax.core.config import EngineConfig
from novajax.core.fake import FakeBackend


def open_engine(config: EngineConfig, _: object) -> FakeBackend:
    return FakeBackend(make_card(Path(config.model)), step_s=0.02)


if __name__ == "__main__":
    build = types.ModuleType("novajax.engine.build")
    build.open_engine = open_engine  # type: ignore[attr-defined]
    sys.modules[build.__name__] = build

    from novajax import batch

    batch.define_flags()
    app.run(batch.main)
