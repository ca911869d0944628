"""POST /tokenize and /detokenize, in vLLM's shapes."""

from typing import Any

from litestar import Request, Response, post
from litestar.di import NamedDependency

from novajax.core.errors import Forbidden, InvalidRequest, Unsupported
from novajax.server.body import read_json
from novajax.server.front import Front
from novajax.server.leaving import unless_gone
from novajax.server.messages import prompt_of
from novajax.server.replies import DetokenizeReply, TokenizeReply
from novajax.server.respond import enter, json_reply
from novajax.server.schemas import DetokenizeRequest, TokenizeRequest
from novajax.text.tokenizer import check_bytes


@post("/tokenize", status_code=200)
async def tokenize(request: Request[Any, Any, Any], front: NamedDependency[Front]) -> Response[Any]:
    with await enter(request, front):
        body = await read_json(request, TokenizeRequest, front.settings)
        return await unless_gone(request.receive, _tokenize(front, body))


@post("/detokenize", status_code=200)
async def detokenize(request: Request[Any, Any, Any], front: NamedDependency[Front]) -> Response[Any]:
    with await enter(request, front):
        body = await read_json(request, DetokenizeRequest, front.settings)
        card = await front.card()
        front.served_name(card, body.model)
        if len(body.tokens) > card.max_context_tokens:
            raise InvalidRequest(f"{len(body.tokens)} tokens; the model's context has {card.max_context_tokens}", param="tokens")
        if max(body.tokens, default=0) >= card.vocab_size:
            raise InvalidRequest(f"tokens: {max(body.tokens)} is not below the vocabulary's {card.vocab_size}", param="tokens")
        return json_reply(DetokenizeReply(front.tokenizer.decode(body.tokens, skip_special=False)))


async def _tokenize(front: Front, body: TokenizeRequest) -> Response[Any]:
    card = await front.card()
    front.served_name(card, body.model)
    if body.chat_template is not None:
        raise Forbidden("chat templates from requests are not run; the server's own is used", param="chat_template")
    if body.tools:
        raise Unsupported("tools is not supported by this version", param="tools")
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("send either prompt or messages")
    if body.prompt is not None:
        check_bytes([body.prompt], front.settings.prompt_bytes(card.max_request_tokens), "prompt")
        ids = await front.tokenizer.encode_async(body.prompt, add_special=body.add_special_tokens is not False)
    else:
        ids = await prompt_of(front, card, body)
    texts = [front.tokenizer.token_text(token) for token in ids] if body.return_token_strs else None
    return json_reply(TokenizeReply(count=len(ids), max_model_len=card.max_request_tokens, tokens=ids, token_strs=texts))
