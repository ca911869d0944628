"""The Litestar app: routes, one guard, one error mapper. `create_app` builds the object graph of the front door.

Invariants: every route goes through the guard; every error leaves as an OpenAI error object; every response names its request.
"""

import asyncio
import os
import re
import secrets
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from anyio import to_thread
from litestar import Litestar
from litestar.datastructures import State
from litestar.di import Provide
from litestar.types import Message, Scope

from novajax.core.backend import Backend
from novajax.core.clock import MonotonicClock
from novajax.server.auth import Guard
from novajax.server.chat import chat_completions
from novajax.server.completions import completions
from novajax.server.errors import handler
from novajax.server.front import Front
from novajax.server.health import health, metrics, ready, version
from novajax.server.leaving import end
from novajax.server.models import get_model, list_models
from novajax.server.page import page_route, read_page
from novajax.server.rest import keep_small
from novajax.server.settings import ServerSettings, refuse_open_bind
from novajax.server.tokenize import detokenize, tokenize
from novajax.text.template import ChatTemplate
from novajax.text.tokenizer import Tokenizer

_SAFE_ID = re.compile(rb"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")


def create_app(backend: Backend, tokenizer: Tokenizer, template: ChatTemplate | None, settings: ServerSettings) -> Litestar:
    """The front door of `backend`. Raises ConfigError for a bind that would be open to others; `state.front` is its `Front`.

    The app neither starts nor closes the backend. template: None is the one in the tokenizer's directory.
    """
    refuse_open_bind(settings)
    front = Front(backend, tokenizer, template or ChatTemplate(tokenizer), settings, MonotonicClock())

    @asynccontextmanager
    async def minding(_: Litestar) -> AsyncGenerator[None, None]:
        to_thread.current_default_thread_limiter().total_tokens = _text_threads()
        tasks = [asyncio.create_task(work) for work in (front.metrics.watch_loop(front.clock), keep_small(front.gate))]
        try:
            yield
        finally:
            for task in tasks:
                await end(task)

    routes = [chat_completions, completions, list_models, get_model, tokenize, detokenize, health, ready, metrics, version]
    return Litestar(
        route_handlers=[*routes, page_route(read_page())],
        guards=[Guard(settings)],
        exception_handlers={Exception: handler(front.metrics.rejected)},
        dependencies={"front": Provide(lambda: front, sync_to_thread=False)},
        before_send=[_name_request],
        lifespan=[minding],
        state=State({"front": front}),
        request_max_body_size=None,
        openapi_config=None,
        logging_config=None,
    )


def _text_threads() -> int:
    """Threads that tokenize: more than cores make nothing sooner, and each keeps memory. A few, so that a long prompt holds up nobody."""
    return max(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


async def _name_request(message: Message, scope: Scope) -> None:
    """x-request-id on every response: the client's own if it is harmless, else a new one."""
    if message["type"] != "http.response.start":
        return
    offered = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    name = offered if _SAFE_ID.fullmatch(offered) else b"req-" + secrets.token_hex(12).encode()
    message["headers"] = [*message.get("headers", []), (b"x-request-id", name), (b"x-content-type-options", b"nosniff")]
