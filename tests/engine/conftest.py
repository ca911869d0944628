"""Engines for tests, opened once a module, and the optional shared data."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served

from novajax.core.config import EngineConfig


@pytest.fixture(scope="session")
def shared() -> Path:
    path = Path(os.environ.get("NOVAJAX_SHARED", Path(__file__).parents[3] / "shared"))
    if not path.exists():
        pytest.skip(f"the optional shared data is not at {path} (set NOVAJAX_SHARED)")
    return path


@pytest.fixture(scope="module")
def open_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A function from config fields to a Served; all are closed at the end of the module."""
    opened: list[Served] = []

    def open_one(**fields) -> Served:
        served = Served(EngineConfig(**fields))
        opened.append(served)
        return served

    yield open_one
    for served in opened:
        served.close()
