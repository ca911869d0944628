"""Reading a request's body: bounded in bytes and time before anything is parsed, then decoded straight into a Struct.

Nothing is trusted: not the declared length (the stream is counted), not the content type (it must be JSON, because a
browser may send anything else across sites without asking), not an encoding (none is accepted, so nothing inflates).
"""

import asyncio
from contextlib import suppress
from typing import Any

import msgspec
from litestar import Request

from novajax.core.errors import InvalidRequest, RequestTimeout, TooLarge, UnsupportedMediaType
from novajax.server.leaving import ClientGone
from novajax.server.settings import ServerSettings

_DISCARD_S = 0.5


async def read_json[T](request: Request[Any, Any, Any], kind: type[T], settings: ServerSettings) -> T:
    """The body as a `kind`. Raises InvalidRequest, TooLarge, RequestTimeout, UnsupportedMediaType, and msgspec's errors."""
    # The body first: a client that is refused while it still sends may lose the reply, and the connection with it.
    body = await _read(request, settings)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("the body must be application/json")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnsupportedMediaType("the body must not have a content encoding")
    return msgspec.json.decode(body, type=kind)


async def discard(request: Request[Any, Any, Any], settings: ServerSettings) -> None:
    """Takes in, for a moment and within the bounds, the body of a request that is refused unread."""
    taken = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            while taken <= settings.max_body_bytes:
                message = await request.receive()
                taken += len(message.get("body", b""))
                if not message.get("more_body"):
                    return


async def _read(request: Request[Any, Any, Any], settings: ServerSettings) -> bytes:
    declared = request.headers.get("content-length", "0")
    if not (declared.isascii() and declared.isdigit()):
        raise InvalidRequest("Content-Length must be a number")
    limit = settings.max_body_bytes
    too_large = TooLarge(f"the body has more than {limit} bytes")
    if len(declared) > 18 or int(declared) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            while True:
                message = await request.receive()
                if message["type"] != "http.request":
                    raise ClientGone("the client left before its request was complete")
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {settings.body_timeout_s:g} s") from None
