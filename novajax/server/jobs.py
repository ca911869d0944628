"""A checked request on its way to the backend: sampling parameters from a body, prompts as token ids, and the two ways to run them.

Everything that can be refused from the card alone is refused here, with the numbers, before the backend sees it.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec

from novajax.core.errors import ContextTooLong, InvalidRequest, Unavailable, Unsupported, from_failure
from novajax.core.types import ModelCard, Priority, SamplingParams
from novajax.server.front import Front
from novajax.server.schemas import Generation, refuse_unsupported
from novajax.text.alternative import Piece
from novajax.text.completion import Completion, gather, generate
from novajax.text.stop import check_stops

_SEQUENCES_AT_ONCE = 64
"""Of one request: more would let a single client fill the engine's queue and be refused by itself."""
_COLDEST = 1e-4
"""Logits over a smaller temperature overflow float32; below it the draw is greedy, which is the limit anyway."""
_PASSED_ON = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_FLOATS = ("fp32", "float32", "fp16", "float16", "bf16", "bfloat16")
_PRIORITIES: tuple[Priority, ...] = ("high", "medium", "low")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request's work: every prompt continued `sampling.n` times."""

    id: str
    began_s: float
    """When the request came, on the front's clock."""
    prompts: list[list[int]]
    sampling: SamplingParams
    priority: Priority
    cache_salt: str
    variant: str
    include_stop: bool
    skip_special: bool

    @property
    def sequences(self) -> int:
        return len(self.prompts) * self.sampling.n


def sampling_of(
    body: Generation, card: ModelCard, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """The body's sampling fields over the model's defaults. Raises InvalidRequest or Unsupported, naming the field."""
    refuse_unsupported(body)
    values: dict[str, Any] = {name: card.default_sampling[name] for name in _PASSED_ON if name in card.default_sampling}
    values |= {name: value for name in _PASSED_ON if (value := getattr(body, name)) is not None}
    if values.get("temperature", 1.0) < _COLDEST:
        values["temperature"] = 0.0
    values["top_k"] = max(0, int(values.get("top_k", 0)))
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    stop_ids, bias = body.stop_token_ids or [], body.logit_bias or {}
    for name, ids in (("stop_token_ids", stop_ids), ("logit_bias", bias)):
        _check_ids(list(ids), card, name)
    min_tokens = body.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens {min_tokens} exceeds max_tokens {max_tokens}", param="min_tokens")
    return SamplingParams(
        **values,
        n=body.n or 1,
        seed=body.seed,
        stop=check_stops(stop),
        stop_token_ids=tuple(stop_ids),
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        ignore_eos=body.ignore_eos,
        logit_bias=bias,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def priority_of(priority: int | Priority | None) -> Priority:
    """The class of a vLLM number (smaller is sooner) or of our name for it."""
    if isinstance(priority, str):
        return priority
    return _PRIORITIES[1 + ((priority or 0) > 0) - ((priority or 0) < 0)]


def variant_of(body: Generation, card: ModelCard) -> str:
    """What `Request.variant` is for the body's fields. Raises Unsupported for a precision that is not loaded, with those that are."""
    wanted = body.quantization
    if wanted is None or wanted == "auto":
        return card.variants[-1] if body.quality_preference == "quality" else ""
    wanted = "float" if wanted in _FLOATS else wanted
    if wanted not in card.variants:
        raise Unsupported(f"quantization {body.quantization!r} is not loaded; loaded: {', '.join(card.variants)}", param="quantization")
    return wanted


def check_prompts(prompts: Sequence[list[int]], card: ModelCard, param: str) -> None:
    """Raises InvalidRequest for an empty prompt or an id the model does not have, ContextTooLong for one that leaves no room."""
    for prompt in prompts:
        if not prompt:
            raise InvalidRequest("the prompt is empty", param=param)
        if len(prompt) > card.max_request_tokens:
            raise ContextTooLong(
                f"the prompt has {len(prompt)} tokens; prompt and output together may have {card.max_request_tokens}", param=param
            )
        _check_ids(prompt, card, param)


def sources(front: Front, job: Job) -> list[AsyncGenerator[Piece, None]]:
    """One stream of pieces for each prompt; nothing starts before it is iterated."""
    return [_watched(front, job, number) for number in range(len(job.prompts))]


async def collect(front: Front, job: Job) -> list[list[Completion]]:
    """All answers, by prompt and alternative. The first error ends everything and is raised."""
    turns = asyncio.Semaphore(at_once(job))

    async def one(pieces: AsyncGenerator[Piece, None]) -> list[Completion]:
        async with turns:
            return await gather(pieces)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(pieces)) for pieces in sources(front, job)]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    answers = [task.result() for task in tasks]
    if any(choice.finish_reason == "abort" for answer in answers for choice in answer):
        raise aborted(front)
    return answers


def at_once(job: Job) -> int:
    """Prompts of the job that run at the same time."""
    return max(1, _SEQUENCES_AT_ONCE // job.sampling.n)


def check_piece(front: Front, piece: Piece) -> None:
    """Raises the piece's failure, or Unavailable for one that was cut off by a drain."""
    if piece.failure is not None:
        raise from_failure(piece.failure)
    if piece.finish_reason == "abort":
        raise aborted(front)


def aborted(front: Front) -> Unavailable:
    return Unavailable("the engine ended this request", retry_after_s=front.settings.retry_after_s)


async def _watched(front: Front, job: Job, number: int) -> AsyncGenerator[Piece, None]:
    """The pieces of one prompt, seen by the metrics on their way."""
    metrics, started = front.metrics, False
    pieces = generate(
        front.backend,
        front.tokenizer,
        job.id if len(job.prompts) == 1 else f"{job.id}-p{number}",
        job.prompts[number],
        job.sampling,
        priority=job.priority,
        cache_salt=job.cache_salt,
        variant=job.variant,
        include_stop=job.include_stop,
        skip_special_tokens=job.skip_special,
    )
    try:
        async for piece in pieces:
            after_s = front.clock.now_s() - job.began_s
            if piece.tokens and not started:
                started = True
                metrics.first_token(after_s)
            if piece.finish_reason is not None and piece.usage is not None:
                metrics.finished(piece.finish_reason, piece.usage, piece.timing, after_s)
            yield piece
    finally:
        await pieces.aclose()


def _check_ids(ids: Sequence[int], card: ModelCard, param: str) -> None:
    if ids and max(ids) >= card.vocab_size:
        raise InvalidRequest(f"{param}: token id {max(ids)} is not below the vocabulary's {card.vocab_size}", param=param)
