"""The targets of the abuse tables: a served fake, the bundled model as a user launches it, any running server."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from abuse_world import Target

from bench.served import ServedModel
from novajax.core.fake import FakeBackend
from novajax.server.fake import ServedFake, fake_card
from novajax.server.settings import ServerSettings
from novajax.text.fake import write_byte_tokenizer
from novajax.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("abused")))


MODEL = Path(__file__).parents[2] / "checkpoints" / "nova-small"
SHORT_TIMES = "server: {header_timeout_s: 3, body_timeout_s: 3, write_timeout_s: 3}"


@pytest.fixture(scope="session", params=["fake", "launch", "url"])
def target(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    if request.param == "launch":
        config = tmp_path_factory.mktemp("launch") / "short.yaml"
        config.write_text(SHORT_TIMES)
        # Deterministic: the canary's log probabilities are compared to the last bit, whoever shares its batch.
        flags = [f"--config={config}", "--deterministic", "--max_rows=4", "--max_context_tokens=1024", "--max_waiting=64"]
        with ServedModel(str(MODEL), flags) as running:
            yield Target(running.url)
        return
    if request.param == "url":
        url = os.environ.get("NOVAJAX_TEST_URL")
        if not url:
            pytest.skip("NOVAJAX_TEST_URL names no running server")
        yield Target(url.rstrip("/"), os.environ.get("NOVAJAX_TEST_KEY"))
        return
    with ServedFake(tokenizer, FakeBackend(fake_card(tokenizer), step_s=0.002), ServerSettings(port=0)) as running:
        yield Target(running.url, fake=True)


@pytest.fixture(scope="session")
def impatient(target: Target, tokenizer: Tokenizer) -> Iterator[Target]:
    """The same, but a fake waits a second only, so that stalls are quick to test; a real launch has its own times."""
    if not target.fake:
        yield target
        return
    settings = ServerSettings(port=0, header_timeout_s=1, body_timeout_s=1, write_timeout_s=1)
    with ServedFake(tokenizer, FakeBackend(fake_card(tokenizer), step_s=0.002), settings) as running:
        yield Target(running.url)
