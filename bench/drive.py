"""Drives a Backend directly, in process: what the engine does without HTTP, text or a network.

Random token ids that share no prefix, end tokens ignored, so that the work is exactly what was asked. Knows nothing of how the
Backend was made.
"""

import asyncio
import random
import time
from collections.abc import Sequence

import msgspec

from bench.traffic import Lengths
from novajax.core.backend import Backend
from novajax.core.errors import InternalError, Overloaded, from_failure
from novajax.core.types import ModelCard, Request, SamplingParams

_RETRY_S = 0.05


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence on the perf_counter clock."""

    prompt_tokens: int
    output_tokens: int
    sent_s: float
    first_s: float
    """When its first update with tokens came."""
    last_s: float


def random_requests(card: ModelCard, lengths: Sequence[Lengths], *, seed: int, temperature: float = 0.0) -> list[Request]:
    """One request per length, `ignore_eos`, prompts drawn from the whole vocabulary but its first ids."""
    draw = random.Random(seed)
    low = min(256, card.vocab_size // 2)
    requests = []
    for index, item in enumerate(lengths):
        sampling = SamplingParams(temperature=temperature, seed=index, max_tokens=item.output_tokens, ignore_eos=True)
        prompt = tuple(draw.randrange(low, card.vocab_size) for _ in range(item.prompt_tokens))
        requests.append(Request(id=f"bench-{seed}-{index}", prompt=prompt, sampling=sampling))
    return requests


async def run(backend: Backend, requests: Sequence[Request], *, concurrency: int) -> list[Timed]:
    """All requests, at most `concurrency` at once, in the order given. Raises the NovaError of the first that fails."""
    rest = iter(requests)
    results: dict[str, Timed] = {}

    async def client() -> None:
        for request in rest:
            results[request.id] = await _one(backend, request)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(requests))):
            group.create_task(client())
    return [results[request.id] for request in requests]


async def _one(backend: Backend, request: Request) -> Timed:
    sent_s = time.perf_counter()
    while True:
        try:
            return await _stream(backend, request, sent_s)
        except Overloaded:
            await asyncio.sleep(_RETRY_S)


async def _stream(backend: Backend, request: Request, sent_s: float) -> Timed:
    first_s, output_tokens = None, 0
    async for update in backend.submit(request):
        if update.failure is not None:
            raise from_failure(update.failure)
        if update.tokens and first_s is None:
            first_s = time.perf_counter()
        output_tokens += len(update.tokens)
    if first_s is None or output_tokens != request.sampling.max_tokens:
        raise InternalError(f"{request.id} gave {output_tokens} of {request.sampling.max_tokens} tokens")
    return Timed(prompt_tokens=len(request.prompt), output_tokens=output_tokens, sent_s=sent_s, first_s=first_s, last_s=time.perf_counter())


def prefill_tokens_per_s(timed: Sequence[Timed]) -> float:
    """Prompt tokens over the time from the first request sent to the last first token."""
    span_s = max(item.first_s for item in timed) - min(item.sent_s for item in timed)
    return sum(item.prompt_tokens for item in timed) / span_s


def decode_tokens_per_s(timed: Sequence[Timed]) -> float:
    """Tokens after each sequence's first, over the time from the first first token to the last token."""
    span_s = max(item.last_s for item in timed) - min(item.first_s for item in timed)
    return sum(item.output_tokens - 1 for item in timed) / span_s


def total_output_tokens_per_s(timed: Sequence[Timed]) -> float:
    """All output tokens over the whole span, prefill included."""
    span_s = max(item.last_s for item in timed) - min(item.sent_s for item in timed)
    return sum(item.output_tokens for item in timed) / span_s
