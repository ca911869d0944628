"""Answers one batch entry exactly as the HTTP front door would: by asking its app, in this process, without a socket.

So a line has the checks, defaults, error objects and bytes of the same request over HTTP, and there is no second translation
to keep true. Errors that are the engine's and not the line's are raised instead of answered.
"""

import asyncio
from typing import Any

import msgspec

from novajax.core.backend import Backend
from novajax.core.errors import Unsupported, from_failure
from novajax.core.types import Failure
from novajax.offline.entry import Entry
from novajax.server.app import create_app
from novajax.server.errors import ErrorReply, reply_of
from novajax.server.settings import ServerSettings
from novajax.text.template import ChatTemplate
from novajax.text.tokenizer import Tokenizer

_MOST_SEQUENCES = 2**31
"""The run bounds what is in flight; the door need not."""
_RAISED = (429, 503)


class Reply(msgspec.Struct, frozen=True):
    """A status and the JSON text that goes with it; the tokens are what its usage says."""

    status: int
    body: bytes
    prompt_tokens: int = 0
    output_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Answered(msgspec.Struct):
    usage: _Usage


class _Asked(msgspec.Struct):
    stream: Any = None


class Answerer:
    """`answer` may be called by many tasks at once. It neither starts nor closes the backend."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        model_names: tuple[str, ...] = (),
        ignore_model: bool = False,
        max_line_bytes: int = 8 << 20,
    ):
        """`model_names`: what a body's `model` may be; empty: the model's id. `ignore_model`: whatever it is, it is left out."""
        settings = ServerSettings(
            model_names=model_names, max_body_bytes=max(1024, max_line_bytes), max_sequences=_MOST_SEQUENCES, body_timeout_s=3600
        )
        self._app = create_app(backend, tokenizer, template, settings)
        self._ignore_model = ignore_model

    async def answer(self, entry: Entry, request_id: str) -> Reply:
        """The reply to the entry's request; a refusal is a reply too.

        Raises Overloaded or RateLimited when the same line can be asked again later, EngineFailed or Unavailable when the
        engine cannot answer anyone.
        """
        body = entry.body
        if _asks_to_stream(body):
            return _refusal(Unsupported("a batch line has one answer; leave stream out", param="stream"))
        if self._ignore_model:
            body = _without_model(body)
        status, reply = await self._ask(entry.url, body, request_id)
        if status in _RAISED:
            error = msgspec.json.decode(reply, type=ErrorReply).error
            raise from_failure(Failure(error.code or "unavailable", error.message, error.param))
        if status != 200:
            return Reply(status, reply)
        usage = msgspec.json.decode(reply, type=_Answered).usage
        return Reply(status, reply, usage.prompt_tokens, usage.completion_tokens)

    async def _ask(self, url: str, body: bytes, request_id: str) -> tuple[int, bytes]:
        """One ASGI exchange."""
        status, reply, sent = 500, bytearray(), False

        async def receive() -> Any:
            nonlocal sent
            if sent:
                await asyncio.Event().wait()  # this client never leaves
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                reply.extend(message.get("body", b""))

        headers = {"content-type": "application/json", "content-length": str(len(body)), "host": "localhost", "x-request-id": request_id}
        scope: Any = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": url,
            "raw_path": url.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 0),
            "state": {},
        }
        await self._app(scope, receive, send)
        return status, bytes(reply)


def _asks_to_stream(body: bytes) -> bool:
    try:
        return bool(msgspec.json.decode(body, type=_Asked).stream)
    except (msgspec.DecodeError, RecursionError):
        return False  # the front door says what is wrong with it


def _without_model(body: bytes) -> bytes:
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return body
    if isinstance(fields, dict):
        fields.pop("model", None)
    return msgspec.json.encode(fields)


def _refusal(error: Unsupported) -> Reply:
    return Reply(error.status, msgspec.json.encode(reply_of(error)))
