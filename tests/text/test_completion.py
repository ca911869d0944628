import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import anyio
import pytest

from novajax.core.errors import ContextTooLong, EngineFailed, InvalidRequest, Overloaded
from novajax.core.fake import FakeBackend
from novajax.core.types import FinishReason, ModelCard, Request, SamplingParams, Timing, TokenLogprobs, Update, Usage
from novajax.text.alternative import Piece
from novajax.text.completion import gather, generate
from novajax.text.tokenizer import Tokenizer


def fake(tokenizer: Tokenizer, step_s: float = 0.0, max_waiting: int = 64, fail_on: int | None = None) -> FakeBackend:
    card = ModelCard(
        id="m",
        directory="",
        vocab_size=tokenizer.size,
        max_context_tokens=64,
        max_request_tokens=64,
        weights_digest="",
        created=0,
        end_token_ids=(258,),
    )
    return FakeBackend(card, step_s=step_s, max_waiting=max_waiting, fail_on=fail_on)


class Scripted(FakeBackend):
    """Plays the same updates for every request and remembers what it was asked."""

    def __init__(self, tokenizer: Tokenizer, updates: Sequence[Update | Exception]):
        super().__init__(fake(tokenizer)._card)
        self.updates = updates
        self.requests: list[Request] = []
        self.aborts: list[str] = []
        self.delivered_before: list[int] = []
        self._delivered = 0

    async def submit(self, request: Request) -> AsyncIterator[Update]:
        self.requests.append(request)
        self.delivered_before.append(self._delivered)
        self.live.add(request.id)
        try:
            for update in self.updates:
                await asyncio.sleep(0)
                if isinstance(update, Exception):
                    raise update
                self._delivered += 1
                yield update
        finally:
            await asyncio.sleep(0)
            self.live.discard(request.id)

    async def abort(self, request_id: str) -> None:
        self.aborts.append(request_id)


def last(start: int, reason: FinishReason = "length", cached: int = 0) -> Update:
    return Update(
        request_id="r",
        start=start,
        finish_reason=reason,
        usage=Usage(3, start, cached),
        timing=Timing(0.1, 0.2, 0.3),
    )


def run[T](backend: FakeBackend, work: Callable[[], Awaitable[T]]) -> T:
    """The work's result; afterwards nothing may be live in the backend, and no task be left."""

    async def checked() -> T:
        try:
            return await asyncio.wait_for(work(), 20)
        finally:
            assert backend.live == set()
            for _ in range(3):  # the interpreter closes inner generators of the fake in tasks of its own
                await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    return asyncio.run(checked())


def pieces_of(backend: FakeBackend, tokenizer: Tokenizer, prompt: str, sampling: SamplingParams, **options: Any) -> list[Piece]:
    async def work() -> list[Piece]:
        return [piece async for piece in generate(backend, tokenizer, "r", tokenizer.encode(prompt), sampling, **options)]

    return run(backend, work)


def text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_one_answer(byte_tokenizer: Tokenizer):
    pieces = pieces_of(fake(byte_tokenizer), byte_tokenizer, "abc", SamplingParams(max_tokens=4, seed=7))
    assert [piece.text for piece in pieces] == ["d", "e", "f", "g", ""]
    assert [piece.finish_reason for piece in pieces] == [None] * 4 + ["length"]
    assert (pieces[-1].usage, pieces[-1].seed) == (Usage(3, 4), 7)


@pytest.mark.parametrize(("include", "expected"), [(False, "de"), (True, "defgh")])
def test_a_stop_string_across_tokens(byte_tokenizer: Tokenizer, include: bool, expected: str):
    backend = fake(byte_tokenizer)
    sampling = SamplingParams(max_tokens=20, stop=("zz", "fgh"), logprobs=1)
    pieces = pieces_of(backend, byte_tokenizer, "abc", sampling, include_stop=include)
    assert text(pieces) == expected
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", "fgh")
    assert pieces[-1].usage == Usage(3, 5)
    tokens = [token for piece in pieces for token in piece.tokens]
    assert byte_tokenizer.decode(tokens) == expected
    assert [entry.offset for piece in pieces for entry in piece.logprobs] == list(range(len(expected)))
    assert backend.generated <= 6


def test_the_engines_last_word_is_waited_for(byte_tokenizer: Tokenizer):
    """After a stop string the usage counts the tokens up to it, with the cached tokens and the timing the engine knows."""
    ids = byte_tokenizer.encode("no STOP more")
    backend = Scripted(byte_tokenizer, [Update(request_id="r", tokens=tuple(ids)), Update(request_id="r", start=12), last(12, "abort", 2)])
    pieces = pieces_of(backend, byte_tokenizer, "abc", SamplingParams(stop=("STOP",)))
    assert text(pieces) == "no "
    assert (pieces[-1].usage, pieces[-1].timing, pieces[-1].finish_reason) == (Usage(3, 7, 2), Timing(0.1, 0.2, 0.3), "stop")
    assert backend.aborts == ["r"]


@pytest.mark.parametrize("end", [[], [EngineFailed("gone")]])
def test_an_engine_that_dies_after_the_stop_string_spoils_nothing(byte_tokenizer: Tokenizer, end: list[Exception]):
    backend = Scripted(byte_tokenizer, [Update(request_id="r", tokens=(65, 66)), *end])
    pieces = pieces_of(backend, byte_tokenizer, "abc", SamplingParams(stop=(byte_tokenizer.decode([66]),)))
    assert (pieces[-1].finish_reason, pieces[-1].usage) == ("stop", Usage(3, 2))


def test_a_stop_string_in_the_last_update(byte_tokenizer: Tokenizer):
    ids = tuple(byte_tokenizer.encode("a#b"))
    final = Update(request_id="r", tokens=ids, finish_reason="length", usage=Usage(3, 3, 1))
    backend = Scripted(byte_tokenizer, [final])
    pieces = pieces_of(backend, byte_tokenizer, "abc", SamplingParams(stop=("#",)))
    assert text(pieces) == "a"
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason, pieces[-1].usage) == ("stop", "#", Usage(3, 2, 1))
    assert backend.aborts == []


def test_text_that_was_held_back_comes_at_the_end(byte_tokenizer: Tokenizer):
    pieces = pieces_of(fake(byte_tokenizer), byte_tokenizer, "abc", SamplingParams(max_tokens=3, stop=("efgh",)))
    assert [(piece.text, len(piece.tokens)) for piece in pieces] == [("d", 1), ("ef", 2)]
    assert pieces[-1].finish_reason == "length"


def test_stop_strings_are_not_looked_for_before_min_tokens(byte_tokenizer: Tokenizer):
    sampling = SamplingParams(max_tokens=6, min_tokens=3, stop=("e", "h"))
    pieces = pieces_of(fake(byte_tokenizer), byte_tokenizer, "abc", sampling)
    assert (text(pieces), pieces[-1].stop_reason) == ("defg", "h")


def test_end_tokens_and_stop_tokens(byte_tokenizer: Tokenizer):
    stop = byte_tokenizer.encode("f")[0]
    pieces = pieces_of(fake(byte_tokenizer), byte_tokenizer, "abc", SamplingParams(stop_token_ids=(stop,)))
    assert (text(pieces), pieces[-1].finish_reason, pieces[-1].stop_reason) == ("de", "stop", stop)

    async def work() -> list[Piece]:
        return [piece async for piece in generate(backend, byte_tokenizer, "r", [256], SamplingParams())]

    backend = fake(byte_tokenizer)
    pieces = run(backend, work)  # 257, then the end token 258
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason, pieces[-1].usage) == ("stop", None, Usage(1, 1))


@pytest.mark.parametrize(("skip", "expected"), [(True, ""), (False, "<|im_start|>")])
def test_special_tokens_in_the_answer(byte_tokenizer: Tokenizer, skip: bool, expected: str):
    backend = Scripted(byte_tokenizer, [Update(request_id="r", tokens=(257,)), last(1)])
    pieces = pieces_of(backend, byte_tokenizer, "abc", SamplingParams(), skip_special_tokens=skip)
    assert text(pieces) == expected
    assert pieces[0].tokens == (257,)


def test_logprobs_carry_exact_bytes(byte_tokenizer: Tokenizer):
    ids = byte_tokenizer.encode("é!")
    entries = tuple(TokenLogprobs(token, -1.0, 1, ((token, -1.0), (ids[2], -2.0))) for token in ids)
    backend = Scripted(byte_tokenizer, [Update(request_id="r", tokens=tuple(ids), logprobs=entries), last(3)])
    pieces = pieces_of(backend, byte_tokenizer, "abc", SamplingParams(logprobs=2))
    found = [entry for piece in pieces for entry in piece.logprobs]
    assert [(entry.data, entry.text, entry.offset) for entry in found] == [(b"\xc3", "\ufffd", 0), (b"\xa9", "\ufffd", 0), (b"!", "!", 1)]
    assert [(top.data, top.logprob) for top in found[0].top] == [(b"\xc3", -1.0), (b"!", -2.0)]


def test_prompt_logprobs_come_once(byte_tokenizer: Tokenizer):
    sampling = SamplingParams(max_tokens=2, prompt_logprobs=1, n=2)
    pieces = pieces_of(fake(byte_tokenizer), byte_tokenizer, "aéc", sampling)
    carrying = [piece for piece in pieces if piece.prompt_logprobs is not None]
    assert [piece.index for piece in carrying] == [0]
    entries = list(carrying[0].prompt_logprobs or ())
    assert entries[0] is None
    assert [(entry.text, entry.offset) for entry in entries[1:] if entry] == [("\ufffd", 1), ("\ufffd", 1), ("c", 2)]


def test_scoring_a_prompt_only(byte_tokenizer: Tokenizer):
    pieces = pieces_of(fake(byte_tokenizer), byte_tokenizer, "abc", SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert len(pieces) == 1
    assert (pieces[0].finish_reason, len(pieces[0].prompt_logprobs or ())) == ("length", 3)


def test_repeated_tokens_of_a_replayed_stream_are_dropped(byte_tokenizer: Tokenizer):
    a, b, c = byte_tokenizer.encode("xyz")
    updates = [Update(request_id="r", tokens=(a, b)), Update(request_id="r", start=1, tokens=(b, c)), last(3)]
    assert text(pieces_of(Scripted(byte_tokenizer, updates), byte_tokenizer, "abc", SamplingParams())) == "xyz"


def test_alternatives(byte_tokenizer: Tokenizer):
    backend = Scripted(byte_tokenizer, [Update(request_id="r", tokens=(65,)), Update(request_id="r", start=1, tokens=(66,)), last(2)])

    async def work() -> list[Piece]:
        pieces = generate(backend, byte_tokenizer, "r", (1, 2, 3), SamplingParams(n=4, seed=2**63 - 2, stop=("nope",)), cache_salt="s")
        return [piece async for piece in pieces]

    pieces = run(backend, work)
    assert backend.delivered_before == [0, 1, 1, 1]  # the siblings waited for the first one's first token
    assert [request.sampling.seed for request in backend.requests] == [2**63 - 2, 2**63 - 1, 0, 1]
    assert {(request.sampling.n, request.sampling.stop, request.cache_salt) for request in backend.requests} == {(1, (), "s")}
    assert len({request.id for request in backend.requests}) == 4
    for index in range(4):
        own = [piece for piece in pieces if piece.index == index]
        assert text(own) == byte_tokenizer.decode([65, 66])
        assert [piece.finish_reason is not None for piece in own] == [False] * (len(own) - 1) + [True]


def test_alternatives_without_a_seed_draw_one(byte_tokenizer: Tokenizer):
    backend = Scripted(byte_tokenizer, [last(0)])
    pieces_of(backend, byte_tokenizer, "abc", SamplingParams(n=3))
    seeds = [request.sampling.seed or 0 for request in backend.requests]
    assert [(seed - seeds[0]) % 2**63 for seed in seeds] == [0, 1, 2]
    pieces_of(backend, byte_tokenizer, "abc", SamplingParams())
    assert backend.requests[-1].sampling.seed is None


def test_gather(byte_tokenizer: Tokenizer):
    backend = fake(byte_tokenizer)
    sampling = SamplingParams(n=3, max_tokens=5, logprobs=0, stop=("h",))
    answers = run(backend, lambda: gather(generate(backend, byte_tokenizer, "r", byte_tokenizer.encode("abc"), sampling)))
    assert [answer.index for answer in answers] == [0, 1, 2]
    for answer in answers:
        assert (answer.text, answer.finish_reason, answer.stop_reason, answer.usage) == ("defg", "stop", "h", Usage(3, 5))
        assert byte_tokenizer.decode(answer.tokens) == "".join(entry.text for entry in answer.logprobs) == "defg"


@pytest.mark.parametrize("n", [1, 3])
def test_a_failure_is_the_last_piece_and_a_typed_error(byte_tokenizer: Tokenizer, n: int):
    backend = fake(byte_tokenizer, fail_on=byte_tokenizer.encode("b")[0])
    pieces = pieces_of(backend, byte_tokenizer, "abc", SamplingParams(n=n))
    assert [piece.finish_reason for piece in pieces] == ["error"]
    assert pieces[0].failure is not None
    assert pieces[0].usage == Usage(3, 0)
    with pytest.raises(InvalidRequest, match="told to fail"):
        run(backend, lambda: gather(generate(backend, byte_tokenizer, "r", byte_tokenizer.encode("abc"), SamplingParams(n=n))))


@pytest.mark.parametrize("n", [1, 3])
def test_refusals_and_a_dying_engine_are_raised(byte_tokenizer: Tokenizer, n: int):
    with pytest.raises(ContextTooLong):
        pieces_of(fake(byte_tokenizer), byte_tokenizer, "abc", SamplingParams(n=n, max_tokens=100))
    with pytest.raises(EngineFailed):
        pieces_of(
            Scripted(byte_tokenizer, [Update(request_id="r", tokens=(65,)), EngineFailed("x")]), byte_tokenizer, "a", SamplingParams(n=n)
        )


def test_a_refused_sibling_ends_the_request(byte_tokenizer: Tokenizer):
    with pytest.raises(Overloaded):
        pieces_of(fake(byte_tokenizer, max_waiting=2), byte_tokenizer, "abc", SamplingParams(n=4))


def test_lost_tokens_are_an_error(byte_tokenizer: Tokenizer):
    with pytest.raises(Exception, match="were lost"):
        pieces_of(Scripted(byte_tokenizer, [Update(request_id="r", start=2, tokens=(65,))]), byte_tokenizer, "a", SamplingParams())


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("taken", [0, 1, 3, 9])
def test_closing_early_aborts_everything(byte_tokenizer: Tokenizer, n: int, taken: int):
    backend = fake(byte_tokenizer)

    async def work() -> None:
        pieces = generate(backend, byte_tokenizer, "r", byte_tokenizer.encode("a"), SamplingParams(n=n))
        for _ in range(taken):
            await anext(pieces)
        assert len(backend.live) <= n
        await pieces.aclose()
        assert backend.live == set()

    run(backend, work)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("turns", range(0, 24, 3))
def test_cancelling_at_any_moment_leaves_nothing(byte_tokenizer: Tokenizer, n: int, turns: int):
    backend = fake(byte_tokenizer)
    sampling = SamplingParams(n=n, stop=("q",))

    async def work() -> None:
        task = asyncio.create_task(gather(generate(backend, byte_tokenizer, "r", byte_tokenizer.encode("a"), sampling)))
        for _ in range(turns):
            await asyncio.sleep(0)
        finished = not task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() is not finished
        assert backend.live == set()

    run(backend, work)


@pytest.mark.parametrize("n", [1, 3])
def test_a_cancelled_scope_still_closes_everything(byte_tokenizer: Tokenizer, n: int):
    """Inside a cancelled anyio scope every wait is cancelled again; closing must not be."""
    backend = Scripted(byte_tokenizer, [Update(request_id="r", start=i, tokens=(65,)) for i in range(50)])

    async def work() -> None:
        with anyio.CancelScope() as scope:
            async with aclosing(generate(backend, byte_tokenizer, "r", (1, 2), SamplingParams(n=n))) as pieces:
                async for _ in pieces:
                    scope.cancel()
                    await asyncio.sleep(0)
        assert backend.live == set()

    run(backend, work)


def test_a_slow_reader_holds_the_alternatives_back(byte_tokenizer: Tokenizer):
    backend = fake(byte_tokenizer)

    async def work() -> None:
        pieces = generate(backend, byte_tokenizer, "r", byte_tokenizer.encode("a"), SamplingParams(n=2, max_tokens=60))
        await anext(pieces)
        for _ in range(500):
            await asyncio.sleep(0)
        assert backend.generated < 12
        await pieces.aclose()

    run(backend, work)


def test_many_requests_at_once_do_not_mix(byte_tokenizer: Tokenizer):
    backend = fake(byte_tokenizer, max_waiting=200)

    async def work() -> list[str]:
        prompts = [byte_tokenizer.encode(chr(97 + i)) for i in range(20)]
        answers = await asyncio.gather(
            *(gather(generate(backend, byte_tokenizer, f"r{i}", ids, SamplingParams(n=3, max_tokens=3))) for i, ids in enumerate(prompts))
        )
        return [answer.text for answer, _, _ in answers]

    assert run(backend, work) == [chr(98 + i) + chr(99 + i) + chr(100 + i) for i in range(20)]
