"""One suite for everything that claims to be a Backend: the fake, the engine in this process, and both behind a socket."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from novajax.cluster.child import EngineProcess
from novajax.cluster.quality import QualitySettings, QualityWatch
from novajax.cluster.remote import BackendServer, RemoteBackend
from novajax.core.backend import Backend
from novajax.core.config import EngineConfig
from novajax.core.errors import ContextTooLong, InvalidRequest, NovaError, Overloaded, Unavailable
from novajax.core.fake import FakeBackend
from novajax.core.types import ModelCard, Request, SamplingParams, Update
from novajax.engine.build import open_engine

NANO = Path(__file__).parents[1] / "data" / "nano" / "llama2"
MAX_WAITING = 4


def config() -> EngineConfig:
    """The smallest engine: one row keeps others waiting, so that a full queue is easy to make."""
    return EngineConfig(model=str(NANO), served_name="nano", max_rows=1, chunk_tokens=16, max_waiting=MAX_WAITING)


@asynccontextmanager
async def fake() -> AsyncIterator[Backend]:
    card = ModelCard(id="nano", directory="", vocab_size=128, max_context_tokens=128, max_request_tokens=128, weights_digest="", created=0)
    backend = FakeBackend(card, step_s=0.002, max_waiting=MAX_WAITING + 1)
    yield backend
    await backend.close()


@asynccontextmanager
async def in_process() -> AsyncIterator[Backend]:
    engine = await asyncio.to_thread(open_engine, config())
    yield engine
    await engine.close()


@asynccontextmanager
async def behind_a_socket(tmp_path: Path) -> AsyncIterator[Backend]:
    async with fake() as inner:
        server = BackendServer()
        await server.listen(str(tmp_path / "s"))
        await server.offer(inner)
        remote = RemoteBackend()
        await remote.connect(str(tmp_path / "s"))
        await remote.card()
        yield remote
        await remote.close()
        await server.close()


@asynccontextmanager
async def watched() -> AsyncIterator[Backend]:
    async with fake() as served, fake() as reference:
        watch = QualityWatch(served, reference, QualitySettings())
        running = asyncio.create_task(watch.run())
        yield watch
        running.cancel()


@asynccontextmanager
async def child_process() -> AsyncIterator[Backend]:
    process = EngineProcess(config())
    running = asyncio.create_task(process.run())
    await process.backend.card()
    yield process.backend
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await process.close()


def request(name: str, prompt: tuple[int, ...] = (1, 5, 9), **sampling) -> Request:
    return Request(
        id=name, prompt=prompt, sampling=SamplingParams(**({"temperature": 0.0, "max_tokens": 6, "ignore_eos": True} | sampling))
    )


async def collect(backend: Backend, asked: Request) -> list[Update]:
    return [update async for update in backend.submit(asked)]


async def settled(backend: Backend) -> None:
    """Waits until nothing runs; a step may still be on its way after an abort."""
    for _ in range(500):
        stats = await backend.stats()
        if stats.requests_running + stats.requests_waiting == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still busy: {await backend.stats()}")


async def refused(backend: Backend, asked: Request, kind: type[NovaError]) -> NovaError:
    with pytest.raises(kind) as caught:
        await collect(backend, asked)
    return caught.value


async def card_is_complete(backend: Backend) -> None:
    card = await backend.card()
    assert card.id == "nano"
    assert 0 < card.max_request_tokens <= card.max_context_tokens
    assert (await backend.stats()).phase == "ready"


async def updates_tell_one_story(backend: Backend) -> None:
    updates = await collect(backend, request("a", seed=7))
    tokens = [token for update in updates for token in update.tokens]
    assert len(tokens) == 6
    at = 0
    for update in updates:
        assert update.request_id == "a"
        assert not update.tokens or update.start == at
        at += len(update.tokens)
    assert [update.finish_reason for update in updates[:-1]] == [None] * (len(updates) - 1)
    last = updates[-1]
    assert last.finish_reason == "length"
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 6)
    assert last.seed == 7


async def the_same_request_gives_the_same_tokens(backend: Backend) -> None:
    first, second = await collect(backend, request("b")), await collect(backend, request("c"))
    assert [u.tokens for u in first if u.tokens] == [u.tokens for u in second if u.tokens]


async def stop_tokens_end_it(backend: Backend) -> None:
    tokens = [token for update in await collect(backend, request("d")) for token in update.tokens]
    stop = tokens[3]
    expected = tokens[: tokens.index(stop)]
    updates = await collect(backend, request("e", stop_token_ids=(stop,)))
    assert [token for update in updates for token in update.tokens] == expected
    assert (updates[-1].finish_reason, updates[-1].stop_token) == ("stop", stop)


async def logprobs_come_with_tokens(backend: Backend) -> None:
    updates = await collect(backend, request("f", logprobs=3, prompt_logprobs=2))
    scored = [entry for update in updates for entry in update.logprobs]
    assert [entry.token for entry in scored] == [token for update in updates for token in update.tokens]
    assert all(entry.logprob <= 0 and len(entry.top) == 3 for entry in scored)
    prompts = [update.prompt_logprobs for update in updates if update.prompt_logprobs is not None]
    assert len(prompts) == 1
    assert prompts[0] is not None
    assert prompts[0][0] is None
    assert [entry.token for entry in prompts[0][1:] if entry is not None] == [5, 9]


async def bad_requests_fail_alone(backend: Backend) -> None:
    neighbour = asyncio.create_task(collect(backend, request("g", max_tokens=20)))
    limit = (await backend.card()).max_request_tokens
    assert "empty" in (await refused(backend, request("h", prompt=()), InvalidRequest)).message
    error = await refused(backend, request("i", max_tokens=limit), ContextTooLong)
    assert str(limit) in error.message
    assert sum(len(update.tokens) for update in await neighbour) == 20


async def closing_the_stream_aborts(backend: Backend) -> None:
    stream = backend.submit(request("j", max_tokens=55))
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    await settled(backend)


async def abort_is_final_and_harmless(backend: Backend) -> None:
    """On a busy machine the answer may end before the abort arrives; then it is whole, and we try again."""
    for attempt in range(20):
        name = f"k{attempt}"
        stream = backend.submit(request(name, max_tokens=55))
        first = await anext(stream)
        await backend.abort(name)
        await backend.abort(name)
        await backend.abort("nobody")
        rest = [first] + [update async for update in stream]
        tokens = sum(len(update.tokens) for update in rest)
        if rest[-1].finish_reason == "abort":
            assert tokens < 55
            return
        assert (rest[-1].finish_reason, tokens) == ("length", 55)
    raise AssertionError("no abort of 20 came in time")
    await settled(backend)


async def a_full_queue_refuses(backend: Backend) -> None:
    async def one(number: int) -> bool:
        try:
            await collect(backend, request(f"l{number}", max_tokens=30))
        except Overloaded as error:
            return error.retry_after_s is None
        return True

    served = await asyncio.gather(*(one(number) for number in range(4 * MAX_WAITING)))
    assert MAX_WAITING <= sum(served) <= 2 * MAX_WAITING
    assert (await backend.stats()).phase == "ready"
    await settled(backend)


async def drain_finishes_and_refuses(backend: Backend) -> None:
    running = asyncio.create_task(collect(backend, request("m", max_tokens=30)))
    await asyncio.sleep(0.05)
    draining = asyncio.create_task(backend.drain(20))
    await asyncio.sleep(0.02)
    await refused(backend, request("n"), Unavailable)
    assert (await running)[-1].finish_reason == "length"
    await asyncio.wait_for(draining, 20)


async def close_ends_everything(backend: Backend) -> None:
    await backend.close()
    await backend.close()
    assert (await backend.stats()).phase == "failed"
    await refused(backend, request("o"), Unavailable)


PROMISES: list[Callable[[Backend], Awaitable[None]]] = [
    card_is_complete,
    updates_tell_one_story,
    the_same_request_gives_the_same_tokens,
    stop_tokens_end_it,
    logprobs_come_with_tokens,
    bad_requests_fail_alone,
    closing_the_stream_aborts,
    abort_is_final_and_harmless,
    a_full_queue_refuses,
    drain_finishes_and_refuses,
    close_ends_everything,
]
"""In this order on one backend: the last two end it."""


@pytest.mark.parametrize("kind", ["fake", "in_process", "behind_a_socket", "child_process", "watched"])
def test_every_backend_keeps_the_promises(kind: str, tmp_path: Path):
    backends = {
        "fake": fake,
        "in_process": in_process,
        "behind_a_socket": lambda: behind_a_socket(tmp_path),
        "child_process": child_process,
        "watched": watched,
    }

    async def run() -> None:
        async with backends[kind]() as backend:
            for promise in PROMISES:
                try:
                    await asyncio.wait_for(promise(backend), 60)
                except Exception as error:
                    error.add_note(f"promise: {promise.__name__}")
                    raise

    asyncio.run(run())
