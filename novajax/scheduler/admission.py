"""Checks a request against the limits before it costs anything. Pure functions; every refusal names the field and both numbers."""

import msgspec

from novajax.core.errors import ContextTooLong, InvalidRequest, Overloaded, Unsupported
from novajax.core.types import Request
from novajax.scheduler.budget import Shapes


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine takes on."""

    vocab_size: int
    max_context_tokens: int
    max_sequences: int
    """Slots on the device: sequences that run at one time, the same number in each data partition."""
    max_waiting: int = 256
    """Requests that may wait beyond those that free slots will take."""
    max_waiting_tokens: int = 1 << 20
    stages: int = 1
    """Pipeline stages: ticks from a plan to its results, and to the use of a token it draws."""
    in_flight: int = 2
    """Plans from the oldest uncommitted one on, bubbles included: `stages` synchronous, one more for each plan of run-ahead."""
    age_plans: int = 512
    """Plans after which a waiting sequence counts as one class higher."""


def _outside(ids, vocab_size: int) -> int | None:
    """The first id that is not in 0 .. vocab_size-1."""
    if min(ids) >= 0 and max(ids) < vocab_size:
        return None
    return next(i for i in ids if not 0 <= i < vocab_size)


def check_tokens(request: Request, limits: Limits, shapes: Shapes) -> None:
    """Raises InvalidRequest for ids outside the vocabulary or an empty prompt, Unsupported for a missing feature."""
    if not request.prompt:
        raise InvalidRequest("the prompt is empty", param="prompt")
    sampling = request.sampling
    for param, ids in (
        ("prompt", request.prompt),
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", sampling.logit_bias),
        ("resumed", request.resumed),
    ):
        if ids and (bad := _outside(ids, limits.vocab_size)) is not None:
            raise InvalidRequest(f"token id {bad} in {param} is not in 0..{limits.vocab_size - 1}", param=param)
    if sampling.prompt_logprobs is not None and shapes.score is None:
        raise Unsupported("this engine was started without prompt_logprobs", param="prompt_logprobs")


def resolve_max_tokens(request: Request, limits: Limits, capacity_tokens: int) -> int:
    """The most output tokens of this request. Raises ContextTooLong or InvalidRequest."""
    limit = min(limits.max_context_tokens, capacity_tokens)
    what = "the model's context" if limit == limits.max_context_tokens else "this engine's KV pool"
    prompt, sampling = len(request.prompt), request.sampling
    wanted = sampling.max_tokens
    if wanted is None:
        wanted = limit - prompt
        if wanted < 1:
            raise ContextTooLong(f"{prompt} prompt tokens leave no room for output in {what} of {limit} tokens", param="prompt")
    elif prompt + wanted > limit:
        message = f"{prompt} prompt tokens + {wanted} max_tokens = {prompt + wanted} exceed {what} of {limit} tokens"
        raise ContextTooLong(message, param="max_tokens" if prompt <= limit else "prompt")
    if request.resumed and (len(request.resumed) >= wanted or sampling.prompt_logprobs is not None):
        message = (
            f"{len(request.resumed)} tokens are delivered of {wanted}: such a request cannot go on, nor one that wants its prompt scored"
        )
        raise InvalidRequest(message, param="resumed")
    if sampling.min_tokens > wanted:
        raise InvalidRequest(f"min_tokens={sampling.min_tokens} exceeds the {wanted} tokens that may be generated", param="min_tokens")
    return wanted


def check_queue(request: Request, limits: Limits, waiting: int, waiting_tokens: int, free_slots: int, retry_after_s: float) -> None:
    """Raises Overloaded when the queue is full. A prompt larger than the token bound is taken when nothing else waits."""
    if waiting >= limits.max_waiting + free_slots:
        raise Overloaded(f"{waiting} requests are waiting, the limit is {limits.max_waiting}", retry_after_s=retry_after_s)
    tokens = waiting_tokens + len(request.prompt)
    if waiting and tokens > limits.max_waiting_tokens:
        message = f"{tokens} prompt tokens would be waiting, the limit is {limits.max_waiting_tokens}"
        raise Overloaded(message, retry_after_s=retry_after_s)
