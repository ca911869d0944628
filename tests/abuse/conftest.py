"""The two targets of the abuse tables."""

import os
from collections.abc import Iterator

import pytest
from abuse_world import Target

from novajax.core.fake import FakeBackend
from novajax.server.fake import ServedFake, fake_card
from novajax.server.settings import ServerSettings
from novajax.text.fake import write_byte_tokenizer
from novajax.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("abused")))


@pytest.fixture(scope="session", params=["fake", "url"])
def target(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Iterator[Target]:
    if request.param == "url":
        url = os.environ.get("NOVAJAX_TEST_URL")
        if not url:
            pytest.skip("NOVAJAX_TEST_URL names no running server")
        yield Target(url.rstrip("/"), os.environ.get("NOVAJAX_TEST_KEY"))
        return
    with ServedFake(tokenizer, FakeBackend(fake_card(tokenizer), step_s=0.002), ServerSettings(port=0)) as running:
        yield Target(running.url)


@pytest.fixture(scope="session")
def impatient(target: Target, tokenizer: Tokenizer) -> Iterator[Target]:
    """The same, but a fake waits a second only, so that stalls are quick to test; a real launch has its own times."""
    if target.url == os.environ.get("NOVAJAX_TEST_URL", "").rstrip("/"):
        yield target
        return
    settings = ServerSettings(port=0, header_timeout_s=1, body_timeout_s=1, write_timeout_s=1)
    with ServedFake(tokenizer, FakeBackend(fake_card(tokenizer), step_s=0.002), settings) as running:
        yield Target(running.url)
