"""POST /v1/completions: text or token ids continued, or only scored (`echo` with max_tokens 0)."""

import time
from typing import Any

from litestar import Request, Response, post
from litestar.di import NamedDependency

from novajax.core.errors import InvalidRequest
from novajax.core.types import ModelCard
from novajax.server.accounts import Account
from novajax.server.body import read_json
from novajax.server.front import Front, fingerprint, private_salt
from novajax.server.gate import Pass
from novajax.server.jobs import Job, check_prompts, priority_of, sampling_of, variant_of
from novajax.server.leaving import unless_gone
from novajax.server.respond import check_streaming, enter, new_id, respond
from novajax.server.schemas import CompletionRequest, prompts_of
from novajax.server.text_writer import Echo, TextWriter
from novajax.text.tokenizer import check_bytes

_DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


@post("/v1/completions", status_code=200)
async def completions(request: Request[Any, Any, Any], front: NamedDependency[Front]) -> Response[Any]:
    began_s = front.clock.now_s()
    with await enter(request, front) as taken:
        body = await read_json(request, CompletionRequest, front.settings)
        return await unless_gone(request.receive, _answer(request, front, taken, body, began_s))


async def _answer(request: Request[Any, Any, Any], front: Front, taken: Pass, body: CompletionRequest, began_s: float) -> Response[Any]:
    card = await front.card()
    model = front.served_name(card, body.model)
    check_streaming(body)
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    scored = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        scored = max(body.logprobs, scored or 0)
    if max_tokens == 0 and not body.echo and scored is None:
        raise InvalidRequest("max_tokens 0 leaves nothing to answer without echo or prompt_logprobs", param="max_tokens")
    sampling = sampling_of(body, card, max_tokens=max_tokens, logprobs=body.logprobs, prompt_logprobs=scored)
    prompts = await _token_ids(front, card, body)
    check_prompts(prompts, card, "prompt")
    job = Job(
        id=new_id("cmpl"),
        began_s=began_s,
        prompts=prompts,
        sampling=sampling,
        priority=priority_of(body.priority),
        cache_salt=private_salt(request, body.cache_salt),
        variant=variant_of(body, card),
        include_stop=body.include_stop_str_in_output,
        skip_special=body.skip_special_tokens,
    )
    account = Account(prompts)
    echoes = [_echo(front, prompt, body.skip_special_tokens) for prompt in prompts] if body.echo else []
    writer = TextWriter(body, account, echoes, id=job.id, created=int(time.time()), model=model, fingerprint=fingerprint(card))
    return await respond(front, taken, job, account, writer, stream=bool(body.stream))


async def _token_ids(front: Front, card: ModelCard, body: CompletionRequest) -> list[list[int]]:
    prompts = prompts_of(body.prompt, front.settings.max_prompts)
    ids: list[list[int]] = []
    texts: list[str] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            texts.append(prompt)
        else:
            ids.append(prompt)
    if not texts:
        return ids
    if not all(texts):
        raise InvalidRequest("the prompt is empty", param="prompt")
    for text in texts:
        check_bytes([text], front.settings.prompt_bytes(card.max_request_tokens), "prompt")
    return await front.tokenizer.encode_batch_async(texts, add_special=body.add_special_tokens)


def _echo(front: Front, prompt: list[int], skip_special: bool) -> Echo:
    return Echo(front.tokenizer.decode(prompt, skip_special=skip_special), front.tokenizer.token_text(prompt[0]))
