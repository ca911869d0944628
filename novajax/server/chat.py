"""POST /v1/chat/completions."""

import time
from typing import Any

from litestar import Request, Response, post
from litestar.di import NamedDependency

from novajax.core.errors import InvalidRequest, Unsupported
from novajax.server.accounts import Account
from novajax.server.body import read_json
from novajax.server.chat_writer import ChatWriter
from novajax.server.front import Front, fingerprint, private_salt
from novajax.server.gate import Pass
from novajax.server.jobs import Job, check_prompts, priority_of, sampling_of, variant_of
from novajax.server.leaving import unless_gone
from novajax.server.messages import prompt_of
from novajax.server.respond import check_streaming, enter, new_id, respond
from novajax.server.schemas import ChatRequest


@post("/v1/chat/completions", status_code=200)
async def chat_completions(request: Request[Any, Any, Any], front: NamedDependency[Front]) -> Response[Any]:
    began_s = front.clock.now_s()
    with await enter(request, front) as taken:
        body = await read_json(request, ChatRequest, front.settings)
        return await unless_gone(request.receive, _answer(request, front, taken, body, began_s))


async def _answer(request: Request[Any, Any, Any], front: Front, taken: Pass, body: ChatRequest, began_s: float) -> Response[Any]:
    card = await front.card()
    model = front.served_name(card, body.model)
    check_streaming(body)
    if body.echo:
        raise Unsupported("echo is for completions", param="echo")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs=true", param="top_logprobs")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if max_tokens == 0:
        raise InvalidRequest("max_tokens must be 1 or more", param="max_tokens")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = sampling_of(body, card, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=body.prompt_logprobs)
    prompts = [await prompt_of(front, card, body)]
    check_prompts(prompts, card, "messages")
    job = Job(
        id=new_id("chatcmpl"),
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
    writer = ChatWriter(body, account, id=job.id, created=int(time.time()), model=model, fingerprint=fingerprint(card))
    return await respond(front, taken, job, account, writer, stream=bool(body.stream))
