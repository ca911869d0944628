"""Joins a Backend and text: one user request becomes n sequences, tokens become text, stop strings end them.

`generate` streams Pieces, `gather` collects them. Invariants: each alternative ends with exactly one piece that has a
finish_reason; text and tokens come out together, never a part of a stop string; after a piece with a failure nothing
follows; closing or cancelling the generator closes every backend stream before it returns, and leaves no task. Errors of the
backend (refused, engine dead) are raised as they are. It knows nothing of HTTP shapes.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import anyio
import msgspec

from novajax.core.backend import Backend
from novajax.core.errors import NovaError, from_failure
from novajax.core.types import Failure, FinishReason, Priority, Request, SamplingParams, Timing, Update, Usage
from novajax.text.alternative import Alternative, Piece, TextLogprob
from novajax.text.tokenizer import Tokenizer

_QUEUED_PIECES_PER_ALTERNATIVE = 2


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """One finished alternative: the sum of its pieces."""

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TextLogprob, ...]
    prompt_logprobs: tuple[TextLogprob | None, ...] | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    usage: Usage
    timing: Timing | None
    seed: int | None


async def generate(
    backend: Backend,
    tokenizer: Tokenizer,
    request_id: str,
    prompt_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    priority: Priority = "medium",
    cache_salt: str = "",
    adapter: str = "",
    variant: str = "",
    include_stop: bool = False,
    skip_special_tokens: bool = True,
) -> AsyncGenerator[Piece, None]:
    """The pieces of all `sampling.n` alternatives as they come.

    Alternative i draws with seed + i; alternatives after the first start with the first one's first token, so that they
    find the prompt's KV in the prefix cache. include_stop: the stop string is part of the text. Close it (aclose) to abort.
    """
    like = Request(id=request_id, prompt=tuple(prompt_ids), priority=priority, cache_salt=cache_salt, adapter=adapter, variant=variant)
    requests = _requests(like, sampling)
    alternatives = [
        Alternative(tokenizer, prompt_ids, sampling, index, include_stop=include_stop, skip_special=skip_special_tokens)
        for index in range(len(requests))
    ]
    pieces = _one(backend, requests[0], alternatives[0]) if len(requests) == 1 else _merged(backend, requests, alternatives)
    try:
        async for piece in pieces:
            yield piece
            if piece.failure is not None:
                return
    finally:
        await _close(pieces)


async def gather(pieces: AsyncGenerator[Piece, None]) -> list[Completion]:
    """All alternatives of `generate(...)`, in order. The failure of one is raised as its typed error, and the others are aborted."""
    collected: dict[int, list[Piece]] = {}
    try:
        async for piece in pieces:
            if piece.failure is not None:
                raise from_failure(piece.failure)
            collected.setdefault(piece.index, []).append(piece)
    finally:
        await _close(pieces)
    return [_summed(collected[index]) for index in sorted(collected)]


def _summed(parts: list[Piece]) -> Completion:
    last = parts[-1]
    if last.finish_reason is None or last.usage is None:
        raise from_failure(Failure("internal_error", f"alternative {last.index} ended without a finish reason"))
    return Completion(
        index=last.index,
        text="".join(part.text for part in parts),
        tokens=tuple(token for part in parts for token in part.tokens),
        logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
        prompt_logprobs=next((part.prompt_logprobs for part in parts if part.prompt_logprobs is not None), None),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        usage=last.usage,
        timing=last.timing,
        seed=last.seed,
    )


def _requests(like: Request, sampling: SamplingParams) -> list[Request]:
    """One Request for each alternative: stop strings stay here, seeds are consecutive, only the first scores the prompt."""
    base = sampling.seed
    if base is None and sampling.n > 1:
        base = secrets.randbelow(2**63)
    requests: list[Request] = []
    for index in range(sampling.n):
        own = msgspec.structs.replace(
            sampling,
            n=1,
            stop=(),
            seed=None if base is None else (base + index) % 2**63,
            prompt_logprobs=sampling.prompt_logprobs if index == 0 else None,
        )
        own_id = like.id if sampling.n == 1 else f"{like.id}-{index}"
        requests.append(msgspec.structs.replace(like, id=own_id, sampling=own))
    return requests


async def _one(backend: Backend, request: Request, alternative: Alternative) -> AsyncGenerator[Piece, None]:
    updates = backend.submit(request)
    try:
        async for update in updates:
            piece = alternative.absorb(update)
            if piece is not None:
                yield piece
            if alternative.stopped_by is not None:
                yield alternative.ended(update if update.finish_reason is not None else await _last_word(backend, request.id, updates))
                return
            if alternative.finished:
                return
    finally:
        await _close(updates)


async def _last_word(backend: Backend, request_id: str, updates: AsyncIterator[Update]) -> Update | None:
    """Aborts a sequence whose text has ended, and returns its last update, which holds the cached tokens and the timing."""
    try:
        await backend.abort(request_id)
        async for update in updates:
            if update.finish_reason is not None:
                return update
    except NovaError:
        # The answer is complete already; an engine that dies now does not spoil it.
        return None
    return None


async def _merged(backend: Backend, requests: list[Request], alternatives: list[Alternative]) -> AsyncGenerator[Piece, None]:
    """Each alternative in a task of its own, all of them ended before this returns. `room` bounds the pieces in the queue, so a
    slow reader holds the tasks back; a task itself joins the queue when it is done, for whatever reason."""
    queue: asyncio.Queue[Piece | asyncio.Task[None]] = asyncio.Queue()
    room = asyncio.Semaphore(_QUEUED_PIECES_PER_ALTERNATIVE * len(requests))
    under_way = asyncio.Event()

    async def run(index: int) -> None:
        if index:
            await under_way.wait()
        pieces = _one(backend, requests[index], alternatives[index])
        try:
            async for piece in pieces:
                under_way.set()
                await room.acquire()
                queue.put_nowait(piece)
        finally:
            under_way.set()
            await _close(pieces)

    tasks = [asyncio.create_task(run(index)) for index in range(len(requests))]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Piece):
                room.release()
                yield item
            else:
                running -= 1
                item.result()
    finally:
        for task in tasks:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*tasks, return_exceptions=True)


async def _close(stream: AsyncIterator) -> None:
    """Closes an async generator even where the caller is being cancelled."""
    close = getattr(stream, "aclose", None)
    if close is not None:
        with anyio.CancelScope(shield=True):
            await close()
