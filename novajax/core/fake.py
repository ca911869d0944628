"""A Backend whose answers can be computed by hand: every next token is the last one plus one, modulo the vocabulary.

It honours queue bounds, max_tokens, end and stop tokens, logprobs, aborts and drain, waits `step_s` per token, and
counts what is live, so that front-end tests can prove that nothing leaks. It knows nothing of real models.
"""

import asyncio
import os
from collections.abc import AsyncIterator

from novajax.core.errors import ContextTooLong, InvalidRequest, Overloaded, Unavailable
from novajax.core.types import FinishReason, ModelCard, Phase, Request, Stats, Timing, TokenLogprobs, Update, Usage


class FakeBackend:
    """See the module docstring. `fail_on` makes a request with that token in its prompt raise inside its stream."""

    def __init__(self, card: ModelCard, *, step_s: float = 0.0, max_waiting: int = 64, fail_on: int | None = None):
        self._card = card
        self._step_s = step_s
        self._max_waiting = max_waiting
        self._fail_on = fail_on
        self._aborted: set[str] = set()
        self.live: set[str] = set()
        self.phase: Phase = "ready"
        self.generated = 0

    async def card(self) -> ModelCard:
        return self._card

    async def submit(self, request: Request) -> AsyncIterator[Update]:
        if self.phase != "ready":
            raise Unavailable(f"the engine is {self.phase}", retry_after_s=1)
        if len(self.live) >= self._max_waiting:
            raise Overloaded(f"{len(self.live)} requests are waiting", retry_after_s=1)
        if not request.prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        sampling, prompt = request.sampling, request.prompt
        room = self._card.max_request_tokens - len(prompt)
        wanted = room if sampling.max_tokens is None else sampling.max_tokens
        if wanted > room or room < 1:
            raise ContextTooLong(f"{len(prompt)} prompt tokens + {wanted} exceed {self._card.max_request_tokens}", param="max_tokens")
        self.live.add(request.id)
        try:
            async for update in self._generate(request, wanted):
                yield update
        finally:
            self.live.discard(request.id)
            self._aborted.discard(request.id)

    async def _generate(self, request: Request, wanted: int) -> AsyncIterator[Update]:
        sampling, token, count = request.sampling, request.prompt[-1], 0
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(self._card.end_token_ids))
        finish: FinishReason = "length"
        stop_token = None
        prompt_logprobs = None
        if sampling.prompt_logprobs is not None:
            rest = (TokenLogprobs(t, -1.0, 1, ((t, -1.0),) if sampling.prompt_logprobs else ()) for t in request.prompt[1:])
            prompt_logprobs = (None, *rest)
        while count < wanted:
            await asyncio.sleep(self._step_s)
            if request.id in self._aborted:
                finish = "abort"
                break
            if self._fail_on in request.prompt:
                failure = InvalidRequest("this prompt was told to fail").failure()
                usage = Usage(len(request.prompt), count)
                yield Update(request_id=request.id, start=count, finish_reason="error", failure=failure, usage=usage)
                return
            token = (token + 1) % self._card.vocab_size
            if token in ends and count >= sampling.min_tokens:
                finish, stop_token = "stop", token
                break
            logprobs = ()
            if sampling.logprobs is not None:
                logprobs = (TokenLogprobs(token, -0.5, 1, tuple((token + i, -0.5 - i) for i in range(sampling.logprobs))),)
            yield Update(request_id=request.id, start=count, tokens=(token,), logprobs=logprobs, prompt_logprobs=prompt_logprobs)
            prompt_logprobs = None
            count += 1
            self.generated += 1
        yield Update(
            request_id=request.id,
            start=count,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish,
            stop_token=stop_token,
            usage=Usage(len(request.prompt), count),
            timing=Timing(0.0, 0.0, 0.0),
            seed=sampling.seed,
        )

    async def abort(self, request_id: str) -> None:
        if request_id in self.live:
            self._aborted.add(request_id)

    async def stats(self) -> Stats:
        return Stats(phase=self.phase, requests_running=len(self.live), generation_tokens=self.generated, pid=os.getpid())

    async def drain(self, grace_s: float) -> None:
        self.phase = "draining"
        waited = 0.0
        while self.live and waited < grace_s:
            await asyncio.sleep(0.01)
            waited += 0.01
        self._aborted |= self.live

    async def close(self) -> None:
        self.phase = "failed"
        self._aborted |= self.live
