"""A batch without a model: byte tokenizer, counting backend, and what must hold of every finished output."""

import asyncio
import json
from pathlib import Path
from typing import Any

from novajax.core.fake import FakeBackend
from novajax.core.types import ModelCard
from novajax.offline.answer import Answerer
from novajax.offline.run import BatchOptions, BatchSummary, run_batch
from novajax.text.fake import SIZE, write_byte_tokenizer
from novajax.text.template import ChatTemplate
from novajax.text.tokenizer import Tokenizer


def make_card(directory: Path, digest: str = "d" * 64) -> ModelCard:
    return ModelCard(
        id="fake",
        directory=str(directory),
        vocab_size=SIZE,
        max_context_tokens=512,
        max_request_tokens=512,
        weights_digest=digest,
        created=0,
        end_token_ids=(SIZE - 1,),
    )


class World:
    """Paths and tools of one test. `backend` is made anew for each run, so that its counts are of that run."""

    def __init__(self, directory: Path):
        (directory / "model").mkdir(exist_ok=True)
        self.directory = directory
        self.input = directory / "in.jsonl"
        self.output = directory / "out.jsonl"
        self.tokenizer = Tokenizer(write_byte_tokenizer(directory / "model"))
        self.template = ChatTemplate(self.tokenizer)
        self.backend = FakeBackend(make_card(directory / "model"))

    def write(self, *lines: Any) -> None:
        """Each a JSON value, or bytes taken as they are."""
        whole = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        self.input.write_bytes(b"".join(line + b"\n" for line in whole))

    def append(self, data: bytes) -> None:
        with open(self.input, "ab") as file:
            file.write(data)

    async def generated(self, tokens: int) -> None:
        """Returns when the backend has made so many."""
        while self.backend.generated < tokens:  # noqa: ASYNC110 - the fake has no event for it
            await asyncio.sleep(0.001)

    def run(self, *, digest: str = "d" * 64, step_s: float = 0.0, max_waiting: int = 1000, **options: Any) -> BatchSummary:
        self.backend = FakeBackend(make_card(self.directory / "model", digest), step_s=step_s, max_waiting=max_waiting)
        return asyncio.run(self.run_async(**options))

    async def run_async(self, **options: Any) -> BatchSummary:
        settings = BatchOptions(**options)
        answerer = Answerer(self.backend, self.tokenizer, self.template, max_line_bytes=settings.max_line_bytes)
        return await run_batch(self.backend, answerer, self.input, self.output, settings)

    def records(self) -> list[dict[str, Any]]:
        """The output, in its order; every line must be whole."""
        data = self.output.read_bytes()
        assert not data or data.endswith(b"\n")
        return [json.loads(line) for line in data.splitlines()]

    def by_line(self) -> dict[int, dict[str, Any]]:
        """The output by line number; each line exactly once, ids unique."""
        records = self.records()
        assert len({record["id"] for record in records}) == len(records)
        found = {record["line"]: record for record in records}
        assert len(found) == len(records)
        return found


def completion_line(number: int, **body: Any) -> dict[str, Any]:
    """In batch form; the answer of the fake starts after the last byte of the prompt."""
    asked = {"model": "fake", "prompt": f"line {number}", "max_tokens": 4, "temperature": 0} | body
    return {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/completions", "body": asked}
