"""A batch from end to end: every input line gets exactly one output record, whatever happens in between.

The order of safety: a record is written when its answer is whole; records are synced before the state that counts on them
is saved; a line without a record is simply asked again. So a killed run loses only answers that were under way, and a
power cut only what `sync_every_s` covers. A line that cannot be served fails alone; only a failing engine, a full disk or a
changed input stops the run, and the same command resumes it.
"""

import asyncio
import hashlib
import logging
import os
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from novajax.core.backend import Backend
from novajax.core.clock import Clock, MonotonicClock
from novajax.core.errors import Conflict, Overloaded, RateLimited
from novajax.offline.answer import Answerer, Reply
from novajax.offline.entry import BadLine, read_entry
from novajax.offline.feed import Feed
from novajax.offline.index import Line, LineIndex
from novajax.offline.output import BatchOutput
from novajax.offline.state import BatchState, load_state, save_state, state_path
from novajax.telemetry.progress import Report, Reporter, Silent

_log = logging.getLogger("novajax.batch")

_REPORT_EVERY_S = 0.5
_RETRY_S = 0.05
_LONGEST_RETRY_S = 0.5


class InputChanged(Conflict):
    """The input was written to while it was read: its answers belong to neither version."""


class BatchOptions(msgspec.Struct, frozen=True, kw_only=True):
    max_in_flight: Annotated[int, Meta(ge=1, le=65536)] = 64
    """Lines asked at once; a few times the engine's rows keeps it full."""
    max_line_bytes: Annotated[int, Meta(ge=2)] = 8 << 20
    sync_every_s: Annotated[float, Meta(gt=0)] = 5.0
    """How often records are forced to disk and the position is saved."""
    ordered: bool = False
    """At the end, rewrite the output in the order of the input."""


class BatchSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What `run_batch` returns. Lines of earlier runs are in `resumed`; times, tokens and rates are of this run."""

    lines: int
    resumed: int
    succeeded: int
    failed: int
    failed_in_output: int
    """Failed lines in the whole output, earlier runs included."""
    prompt_tokens: int
    output_tokens: int
    elapsed_s: float
    requests_per_s: float
    output_tokens_per_s: float


class _Record(msgspec.Struct, frozen=True):
    """One output line, in the shape of OpenAI's batch output plus the line number. `id` comes first: recovery looks for it."""

    id: str
    line: int
    custom_id: str | None
    response: "_Response | None"
    error: "_Error | None"


class _Response(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _Error(msgspec.Struct, frozen=True):
    code: str
    message: str
    line: int


async def run_batch(
    backend: Backend,
    answerer: Answerer,
    input_path: Path,
    output_path: Path,
    options: BatchOptions,
    *,
    report: Report = Silent,
    clock: Clock | None = None,
) -> BatchSummary:
    """Answers every line of the input that has no record yet; `report` shows first the reading, then the answering.

    Raises ConfigError or Conflict before anything is written (unreadable input, an output of something else, another
    writer), OutputStopped when the disk refuses, EngineFailed or Unavailable when the backend does, InputChanged when the
    input does. After each of these, and after cancellation, what was written is synced and can be resumed.
    """
    index = await asyncio.to_thread(_read_index, input_path, options.max_line_bytes, report)
    output = None
    try:
        card = await backend.card()
        run_id = "batch_" + hashlib.sha256(f"{index.sha256}/{card.weights_digest}".encode()).hexdigest()[:16]
        state = _usable_state(index, card.weights_digest, output_path, run_id)
        output = await asyncio.to_thread(BatchOutput, output_path, run_id, len(index), state.synced_bytes if state else None)
        batch = _Batch(index, output, answerer, options, clock or MonotonicClock(), card.weights_digest)
        if state:
            batch.feed.fast_forward(state.first_open_line, state.iterator)
        return await batch.run(report)
    finally:
        index.close()
        if output is not None:
            output.close()


def _read_index(path: Path, max_line_bytes: int, report: Report) -> LineIndex:
    total_bytes = path.stat().st_size if path.is_file() else None
    with report(total_bytes, "B", "read input") as progress:
        return LineIndex(path, max_line_bytes, progress.advance)


def _usable_state(index: LineIndex, weights_digest: str, output_path: Path, run_id: str) -> BatchState | None:
    """The saved state if it belongs to the output there is. Raises Conflict, saying what differs, if that output is not of this run."""
    if not output_path.exists():
        return None
    if os.path.samefile(output_path, index.path):
        raise Conflict(f"input and output are the same file, {output_path}", param="output")
    if not output_path.stat().st_size:
        return None
    state = load_state(state_path(output_path))
    if state is None or state.run_id == run_id:
        return state
    if state.input_sha256 != index.sha256:
        was = f"{state.input_bytes} bytes, sha256 {state.input_sha256[:12]}"
        now = f"{index.size_bytes} bytes, sha256 {index.sha256[:12]}"
        raise Conflict(f"the input changed since {output_path} was begun (was {was}; is {now}): give a new --output", param="input")
    if state.weights_digest != weights_digest:
        raise Conflict(f"{output_path} was begun with another model's weights: give a new --output", param="model")
    return None


class _Batch:
    """One run: workers that take lines and write records, and one task that reports and syncs."""

    def __init__(
        self,
        index: LineIndex,
        output: BatchOutput,
        answerer: Answerer,
        options: BatchOptions,
        clock: Clock,
        weights_digest: str,
    ):
        self.feed = Feed(index, output.done)
        self._index = index
        self._output = output
        self._answerer = answerer
        self._options = options
        self._clock = clock
        self._weights_digest = weights_digest
        self._begun_s = clock.now_s()
        self._resumed = int(output.done.sum())
        self._succeeded = self._failed = self._prompt_tokens = self._output_tokens = 0

    async def run(self, report: Report) -> BatchSummary:
        await self._checkpoint()
        try:
            with report(len(self._index) - self._resumed, "lines", "answer") as progress:
                async with asyncio.TaskGroup() as group:
                    ticker = group.create_task(self._tick(progress))
                    workers = min(self._options.max_in_flight, len(self._index) - self._resumed)
                    await asyncio.gather(*(group.create_task(self._work(progress)) for _ in range(workers)))
                    ticker.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            await asyncio.shield(self._checkpoint())
        if self._index.changed():
            raise InputChanged(f"the input {self._index.path} changed while it was read: start again with a new --output", param="input")
        if self._options.ordered:
            await asyncio.to_thread(self._output.sort_by_line)
        return self._summary()

    async def _work(self, progress: Reporter) -> None:
        while (line := self.feed.take()) is not None:
            record, failed = await self._record(line)
            self._output.append(line.number, record, failed=failed)
            self.feed.finish(line.number)
            self._succeeded += not failed
            self._failed += failed
            progress.advance()
            await asyncio.sleep(0)  # lines that fail at once must not keep the others waiting

    async def _record(self, line: Line) -> tuple[bytes, bool]:
        record_id = self._output.record_id(line.number)
        try:
            entry = read_entry(line, self._index)
        except BadLine as bad:
            error = _Error(bad.code, bad.message, line.number)
            return msgspec.json.encode(_Record(record_id, line.number, bad.custom_id, None, error)), True
        wait_s = _RETRY_S
        while True:
            try:
                reply = await self._answerer.answer(entry, record_id)
                break
            except (Overloaded, RateLimited):
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_RETRY_S)
        self._count(reply)
        response = _Response(reply.status, record_id, msgspec.Raw(reply.body))
        return msgspec.json.encode(_Record(record_id, line.number, entry.custom_id, response, None)), reply.status != 200

    def _count(self, reply: Reply) -> None:
        self._prompt_tokens += reply.prompt_tokens
        self._output_tokens += reply.output_tokens

    async def _tick(self, progress: Reporter) -> None:
        synced_s = self._clock.now_s()
        while True:
            await asyncio.sleep(_REPORT_EVERY_S)
            now = self._summary()
            progress.note(f"{now.failed} failed, {self.feed.in_flight} in flight, {now.output_tokens_per_s:.1f} tokens/s")
            if self._clock.now_s() - synced_s >= self._options.sync_every_s:
                await self._checkpoint()
                synced_s = self._clock.now_s()

    async def _checkpoint(self) -> None:
        """Records first, then the state that counts on them."""
        first_open_line, iterator = self.feed.position()
        state = BatchState(
            run_id=self._output.run_id,
            input_sha256=self._index.sha256,
            input_bytes=self._index.size_bytes,
            weights_digest=self._weights_digest,
            synced_bytes=self._output.size_bytes,
            first_open_line=first_open_line,
            iterator=iterator,
        )
        await asyncio.to_thread(self._output.sync)
        try:
            await asyncio.to_thread(save_state, state_path(self._output.path), state)
        except OSError as error:
            _log.warning("the position of the batch was not saved: %s", error.strerror)  # only a fast-forward is lost

    def _summary(self) -> BatchSummary:
        elapsed_s = self._clock.now_s() - self._begun_s
        per_s = 1 / elapsed_s if elapsed_s else 0.0
        return BatchSummary(
            lines=len(self._index),
            resumed=self._resumed,
            succeeded=self._succeeded,
            failed=self._failed,
            failed_in_output=self._output.failed,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            elapsed_s=elapsed_s,
            requests_per_s=(self._succeeded + self._failed) * per_s,
            output_tokens_per_s=self._output_tokens * per_s,
        )


def _first(group: BaseExceptionGroup) -> BaseException:
    """The first single exception inside: one failure stops the run, and the others are its echo."""
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
