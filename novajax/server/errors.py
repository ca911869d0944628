"""The one error mapper: whatever was raised, the client gets OpenAI's error object and the right status.

Invariant: no traceback, no text of a prompt and no exception message of an unexpected error leaves the process.
"""

import logging
import math
import traceback
from collections.abc import Callable
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException

from novajax.core.errors import (
    EngineFailed,
    InternalError,
    InvalidRequest,
    NotFound,
    NovaError,
    Overloaded,
    RateLimited,
    TooLarge,
    Unavailable,
)

_log = logging.getLogger("novajax.server")

_TYPES = {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 429: "rate_limit_error"}
_LONGEST_MESSAGE = 500
"""Characters; a message may quote a field of the request, and a field may be large."""


class MethodNotAllowed(NovaError):
    kind, status = "method_not_allowed", 405


class ErrorObject(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct, frozen=True):
    error: ErrorObject


def as_nova_error(error: BaseException) -> NovaError:
    """`error` as one of ours. Unexpected ones are logged by name and place and become an InternalError that tells nothing."""
    match error:
        case NovaError():
            return error
        case BaseExceptionGroup() if len(error.exceptions) == 1:
            return as_nova_error(error.exceptions[0])
        case msgspec.ValidationError():
            return _invalid_field(str(error))
        case msgspec.DecodeError() | UnicodeDecodeError():
            return InvalidRequest(f"the body is not valid JSON: {error}")
        case RecursionError():
            return InvalidRequest("the body is nested too deeply")
        case NotFoundException():
            return NotFound("there is no such route")
        case MethodNotAllowedException():
            return MethodNotAllowed("this route does not have that method")
        case HTTPException(status_code=413):
            return TooLarge("the body is too large")
        case HTTPException() if 400 <= error.status_code < 500:
            return InvalidRequest(str(error.detail))
        case _:
            where = "".join(traceback.format_tb(error.__traceback__))
            _log.error("unexpected %s\n%s", type(error).__name__, where)
            return InternalError("an unexpected error hit this request")


def reply_of(error: NovaError) -> ErrorReply:
    """OpenAI's error object."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    message = error.message if len(error.message) <= _LONGEST_MESSAGE else error.message[:_LONGEST_MESSAGE] + "..."
    return ErrorReply(ErrorObject(message, kind, error.param, error.kind))


def headers_of(error: NovaError) -> dict[str, str]:
    """Retry-After where trying again can help, and what 401 demands."""
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded | RateLimited | Unavailable | EngineFailed):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 1)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def handler(rejected: Callable[[str], None]) -> Callable[[Request[Any, Any, Any], Exception], Response[bytes]]:
    """Litestar's exception handler for everything. `rejected` is told the kind of each error."""

    def handle(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
        nova = as_nova_error(error)
        rejected(nova.kind)
        body = msgspec.json.encode(reply_of(nova))
        headers = headers_of(nova)
        if isinstance(error, MethodNotAllowedException):
            headers |= error.headers or {}
        return Response(body, status_code=nova.status, media_type="application/json", headers=headers)

    return handle


def _invalid_field(text: str) -> InvalidRequest:
    """msgspec says '... - at `$.messages[0].role`'; the path becomes `param`."""
    message, mark, path = text.rpartition(" - at `")
    if not mark:
        return InvalidRequest(text)
    param = path.rstrip("`").removeprefix("$").lstrip(".")
    return InvalidRequest(f"{param}: {message}" if param else message, param=param or None)
