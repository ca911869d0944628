"""Reading a request's body: bounded in bytes and time before anything is parsed, then decoded straight into a Struct.

Nothing is trusted: not the declared length (the stream is counted), not the content type (it must be JSON, because a
browser may send anything else across sites without asking), not an encoding (none is accepted, so nothing inflates).
"""

import asyncio
from typing import Any

import msgspec
from litestar import Request

from novajax.core.errors import InvalidRequest, RequestTimeout, TooLarge, UnsupportedMediaType
from novajax.server.leaving import ClientGone
from novajax.server.settings import ServerSettings


async def read_json[T](request: Request[Any, Any, Any], kind: type[T], settings: ServerSettings) -> T:
    """The body as a `kind`. Raises InvalidRequest, TooLarge, RequestTimeout, UnsupportedMediaType, and msgspec's errors."""
    body = await _read(request, settings)
    return msgspec.json.decode(body, type=kind)


async def _read(request: Request[Any, Any, Any], settings: ServerSettings) -> bytes:
    headers = request.headers
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise UnsupportedMediaType("the body must be application/json")
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnsupportedMediaType("the body must not have a content encoding")
    declared = headers.get("content-length", "0")
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
