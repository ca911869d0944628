"""Every error a user can meet, typed and named. The HTTP status lives here so that each front end tells the same story.

A message says what was wrong, with the numbers; it never holds prompt text, keys or private paths of other tenants.
"""

from novajax.core.types import Failure


class NovaError(Exception):
    """Base of all. `kind` is the stable machine name, `status` the HTTP status, `param` the field at fault."""

    kind = "internal_error"
    status = 500

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def failure(self) -> Failure:
        return Failure(self.kind, self.message, self.param, self.retry_after_s)


class InvalidRequest(NovaError):
    """The request cannot be served as written, by anyone."""

    kind, status = "invalid_request", 400


class ContextTooLong(InvalidRequest):
    """Prompt + max_tokens exceed the model's context or the KV pool; the message holds both numbers."""

    kind = "context_length_exceeded"


class Unsupported(InvalidRequest):
    """A known feature that this version does not have."""

    kind = "unsupported_parameter"


class Unauthorized(NovaError):
    kind, status = "invalid_api_key", 401


class Forbidden(NovaError):
    kind, status = "forbidden", 403


class NotFound(NovaError):
    kind, status = "not_found", 404


class ModelNotFound(NotFound):
    kind = "model_not_found"


class RequestTimeout(NovaError):
    kind, status = "request_timeout", 408


class Conflict(NovaError):
    kind, status = "conflict", 409


class TooLarge(NovaError):
    kind, status = "request_too_large", 413


class UnsupportedMediaType(NovaError):
    kind, status = "unsupported_media_type", 415


class RateLimited(NovaError):
    kind, status = "rate_limit_exceeded", 429


class Overloaded(NovaError):
    """The bounded queue is full; try again after retry_after_s."""

    kind, status = "overloaded", 429


class Unavailable(NovaError):
    """Not ready, draining or restarting."""

    kind, status = "unavailable", 503


class EngineFailed(NovaError):
    """The device or the engine process failed under this request."""

    kind, status = "engine_failed", 503


class InternalError(NovaError):
    """A fault of ours that hit one request only."""


class ConfigError(NovaError):
    """A configuration, flag or model description that is not understood. Ends a start, never a request."""

    kind, status = "config_error", 500


class WeightsError(ConfigError):
    """A weight file is missing, cut, corrupt or does not match the model; names the file and tensor."""

    kind = "weights_error"


class CapacityError(ConfigError):
    """What was asked for does not fit this machine; the message holds the arithmetic."""

    kind = "capacity_error"


def _kinds(root: type[NovaError]) -> dict[str, type[NovaError]]:
    table = {root.kind: root}
    for sub in root.__subclasses__():
        table |= _kinds(sub)
    return table


def from_failure(failure: Failure) -> NovaError:
    """The exception that `failure` describes; an unknown kind becomes InternalError."""
    cls = _kinds(NovaError).get(failure.kind, InternalError)
    return cls(failure.message, param=failure.param, retry_after_s=failure.retry_after_s)
