"""An engine for tests, driven from one event loop."""

import asyncio

import msgspec

from novajax.core.config import EngineConfig
from novajax.core.types import Request, SamplingParams, Stats, TokenLogprobs, Update
from novajax.engine.build import open_engine


class Answer(msgspec.Struct):
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    last: Update


class Served:
    """One engine and the loop it is driven from."""

    def __init__(self, config: EngineConfig):
        self._runner = asyncio.Runner()
        self._engine = open_engine(config)

    def ask(self, prompts: list[tuple[int, ...]], samplings: list[SamplingParams], *, salt: str = "") -> list[Answer]:
        """All prompts at once."""

        async def one(number: int) -> Answer:
            answer = None
            tokens: list[int] = []
            logprobs: list[TokenLogprobs] = []
            asked = Request(id=f"r{number}", prompt=prompts[number], sampling=samplings[number], cache_salt=salt)
            async for update in self._engine.submit(asked):
                tokens += update.tokens
                logprobs += update.logprobs
                answer = Answer(tokens, logprobs, update)
            if answer is None:
                raise AssertionError("a request ended without an update")
            return answer

        async def crowd() -> list[Answer]:
            return await asyncio.gather(*(one(number) for number in range(len(prompts))))

        return self._runner.run(crowd())

    def stats(self) -> Stats:
        return self._runner.run(self._engine.stats())

    def close(self) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()
