"""A served fake for each module, and the optional shared data."""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from novajax.core.fake import FakeBackend
from novajax.server.fake import ServedFake, fake_card
from novajax.text.fake import write_byte_tokenizer
from novajax.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def shared() -> Path:
    path = Path(os.environ.get("NOVAJAX_SHARED", Path(__file__).parents[3] / "shared"))
    if not path.exists():
        pytest.skip(f"the optional shared data is not at {path} (set NOVAJAX_SHARED)")
    return path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer) -> Iterator[ServedFake]:
    """Answers at once: the next token is the last one plus one."""
    with ServedFake(tokenizer) as running:
        yield running


@pytest.fixture(scope="module")
def slow(tokenizer: Tokenizer) -> Iterator[ServedFake]:
    """20 ms a token."""
    with ServedFake(tokenizer, FakeBackend(fake_card(tokenizer), step_s=0.02)) as running:
        yield running


@pytest.fixture
def http(served: ServedFake) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=30) as client:
        yield client
