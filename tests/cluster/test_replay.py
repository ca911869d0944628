"""Requests that outlive their engine: exactly once by index, the same seed, and one error at each bound."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from novajax.cluster.fake import FakeBuilder, FakeExecutor, Misbehaviour
from novajax.cluster.replay import ReplayingBackend, after, resumed
from novajax.cluster.settings import Assignment, ClusterSettings
from novajax.core.backend import Backend
from novajax.core.config import EngineConfig
from novajax.core.errors import EngineFailed, InternalError, InvalidRequest, NovaError, Overloaded, Unavailable
from novajax.core.fake import FakeBackend
from novajax.core.types import ModelCard, Request, SamplingParams, TokenLogprobs, Update
from tests.cluster.group_world import answer, request

CARD = ModelCard(id="a", directory="", vocab_size=1000, max_context_tokens=999, max_request_tokens=999, weights_digest="", created=0)
LOST = EngineFailed("lost")


class Scripted(FakeBackend):
    """Each submission takes the next step of the script: an error before anything, or after so many updates; None plays on."""

    def __init__(self, *script: tuple[int, NovaError] | None):
        super().__init__(CARD)
        self.script = list(script)
        self.asked: list[Request] = []
        self.was_ready, self.given_up = True, False
        self.back = asyncio.Event()
        self.back.set()

    async def until_ready(self) -> None:
        await self.back.wait()

    async def submit(self, request: Request) -> AsyncIterator[Update]:
        self.asked.append(request)
        step = self.script.pop(0) if self.script else None
        count = 0
        prompt = (*request.prompt, *request.resumed)  # the fake counts on from the last token
        wanted = (request.sampling.max_tokens or 0) - len(request.resumed)
        inner = msgspec.structs.replace(
            request, prompt=prompt, resumed=(), sampling=msgspec.structs.replace(request.sampling, max_tokens=wanted)
        )
        async for update in super().submit(inner):
            if step is not None and count == step[0]:
                raise step[1]
            count += 1
            yield msgspec.structs.replace(update, start=update.start + len(request.resumed))


def play(work: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))


async def collect(backend: Backend, asked: Request) -> tuple[list[int], Update]:
    tokens, last = [], None
    async for update in backend.submit(asked):
        assert not update.tokens or update.start == len(tokens)
        tokens += update.tokens
        last = update
    assert last is not None
    return tokens, last


async def waits(backend: Backend) -> None:
    """Until a request of it waits for the engine."""
    while (await backend.stats()).requests_waiting == 0:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def test_an_answer_goes_on_behind_what_was_delivered():
    async def work() -> None:
        inner = Scripted((3, LOST), (0, LOST), (2, Unavailable("restarting")))
        tokens, last = await collect(ReplayingBackend(inner, ClusterSettings()), request(10, prompt=(5,), temperature=1.0))
        assert tokens == list(range(6, 16))
        assert last.finish_reason == "length"
        assert [asked.resumed for asked in inner.asked] == [(), (6, 7, 8), (6, 7, 8), (6, 7, 8, 9, 10)]
        seeds = {asked.sampling.seed for asked in inner.asked}
        assert len(seeds) == 1
        assert last.seed in seeds

    play(work)


@pytest.mark.parametrize("error", [InvalidRequest("no"), Overloaded("full"), InternalError("alone")])
def test_what_is_refused_or_fails_alone_is_not_repeated(error: NovaError):
    async def work() -> None:
        inner = Scripted((0, error))
        with pytest.raises(type(error)):
            await collect(ReplayingBackend(inner, ClusterSettings()), request(5))
        assert len(inner.asked) == 1

    play(work)


def test_a_full_queue_is_tried_again_by_who_was_inside():
    async def work() -> None:
        inner = Scripted((2, LOST), (0, Overloaded("full")), (0, Overloaded("full")))
        assert len((await collect(ReplayingBackend(inner, ClusterSettings()), request(5)))[0]) == 5

    play(work)


def test_the_bounds_give_one_error_each():
    async def work() -> None:
        often = ReplayingBackend(Scripted(*[(0, LOST)] * 9), ClusterSettings(max_replays=2))
        with pytest.raises(EngineFailed, match="lost 3 times"):
            await collect(often, request(5))
        for settings, words in (
            (ClusterSettings(replay_wait_s=0.05), "did not come back"),
            (ClusterSettings(max_waiting_replays=0), "wait for the engine already"),
        ):
            inner = Scripted((1, LOST))
            inner.back.clear()
            with pytest.raises(EngineFailed, match=words):
                await collect(ReplayingBackend(inner, settings), request(5))
        inner = Scripted((1, LOST))
        inner.given_up = True
        with pytest.raises(EngineFailed):
            await collect(ReplayingBackend(inner, ClusterSettings()), request(5))

    play(work)


def test_an_abort_ends_the_wait():
    async def work() -> None:
        inner = Scripted((2, LOST))
        inner.back.clear()
        backend, asked = ReplayingBackend(inner, ClusterSettings()), request(5)
        running = asyncio.create_task(collect(backend, asked))
        await waits(backend)
        await backend.abort(asked.id)
        tokens, last = await running
        assert (len(tokens), last.finish_reason) == (2, "abort")

    play(work)


def test_a_drain_waits_for_replays():
    async def work() -> None:
        inner = Scripted((2, LOST))
        inner.back.clear()
        backend = ReplayingBackend(inner, ClusterSettings())
        running = asyncio.create_task(collect(backend, request(5)))
        await waits(backend)
        draining = asyncio.create_task(backend.drain(20))
        await asyncio.sleep(0.01)
        with pytest.raises(Unavailable):
            await collect(backend, request(5))
        inner.back.set()
        assert len((await running)[0]) == 5
        await draining

    play(work)


def test_updates_are_cut_where_they_were_delivered():
    scores = tuple(TokenLogprobs(token, -1.0, 1) for token in (7, 8, 9))
    update = Update(request_id="a", start=4, tokens=(7, 8, 9), logprobs=scores)
    assert after(update, 4) is update
    rest = after(update, 6)
    assert rest is not None
    assert (rest.start, rest.tokens, rest.logprobs) == (6, (9,), scores[2:])
    assert after(update, 7) is None
    final = after(msgspec.structs.replace(update, finish_reason="length"), 7)
    assert final is not None
    assert (final.start, final.tokens) == (7, ())
    with pytest.raises(InternalError, match="3 to 3"):
        after(update, 3)


def test_a_prompt_is_scored_once():
    asked = request(5, prompt_logprobs=1, logprobs=1)
    assert resumed(asked, ()) is asked
    again = resumed(asked, (4,))
    assert (again.resumed, again.sampling.prompt_logprobs, again.sampling.logprobs) == ((4,), None, 1)


def test_the_engine_takes_up_an_answer_in_the_middle():
    async def work() -> None:
        config = EngineConfig(model="fake")
        builder = FakeBuilder(step_s=0.0)
        built = builder.open_executor(Assignment(config=config), lambda phase, detail: None, lambda: None)
        engine, _ = builder.make_engine(config, built, FakeExecutor(0, 0.0, Misbehaviour()))
        asked = request(40, temperature=0.5, seed=3, presence_penalty=0.5)
        whole = answer(asked)
        for count in (1, 17, 39):
            again = Request(id=f"again{count}", prompt=asked.prompt, sampling=asked.sampling, resumed=tuple(whole[:count]))
            updates = [update async for update in engine.submit(again)]
            assert updates[0].start == count
            assert [token for update in updates for token in update.tokens] == whole[count:]
            usage = updates[-1].usage
            assert usage is not None
            assert (usage.prompt_tokens, usage.completion_tokens) == (3, 40)
        for bad, sampling in (
            ((1001,), asked.sampling),
            (tuple(whole), asked.sampling),
            ((1,), SamplingParams(max_tokens=9, prompt_logprobs=0)),
        ):
            with pytest.raises(NovaError):
                await collect(engine, Request(id="bad", prompt=(1,), sampling=sampling, resumed=bad))
        await engine.close()

    play(work)
