"""Logs: structlog for our own lines, and the standard library's loggers through the same pipe.

On a terminal lines are coloured text, elsewhere one JSON object each. Keys never appear: fields that hold one and bearer
tokens in text are redacted. What users wrote appears only where the operator asked for it. A line break in a value
cannot fake a second line. Entry points call `configure` once; nothing else changes logging.
"""

import io
import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, Processor

from novajax.core.errors import ConfigError

REDACTED = "[redacted]"

_SECRETS = frozenset(
    ("authorization", "proxy-authorization", "x-api-key", "api_key", "api-key", "cookie", "set-cookie", "token", "password", "secret")
)
_WRITTEN_BY_USERS = frozenset(("prompt", "prompts", "messages", "content", "text", "completion", "body"))
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[^\s\"',;]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(
    level: str = "info", *, stream: TextIO | None = None, json: bool | None = None, colors: bool = True, log_prompts: bool = False
) -> None:
    """Sends every log line of the process to `stream` (stderr). json: None means unless it is a terminal.
    colors: on a terminal only. Raises ConfigError for an unknown level."""
    if level not in _LEVELS:
        raise ConfigError(f"log level {level!r} is not one of {', '.join(_LEVELS)}")
    out: TextIO = stream or sys.stderr
    terminal = out.isatty()
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        Redactor(log_prompts=log_prompts),
    ]
    if json or (json is None and not terminal):
        last: list[Processor] = [structlog.processors.format_exc_info, _redact_traceback, structlog.processors.JSONRenderer()]
    else:
        last = [structlog.dev.ConsoleRenderer(colors=colors and terminal, exception_formatter=_write_traceback)]
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared[:3], *shared[4:]],  # the standard library has formatted its arguments itself
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(_LEVELS[level])
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


class Redactor:
    """A structlog processor: secrets out, users' text out unless `log_prompts`, control characters escaped."""

    def __init__(self, *, log_prompts: bool = False):
        self._hidden = _SECRETS if log_prompts else _SECRETS | _WRITTEN_BY_USERS

    def __call__(self, logger: Any, method: str, event: EventDict) -> MutableMapping[str, Any]:
        # `exc_info` and the underscored entries belong to structlog; the renderer shows no more than their traceback.
        return {key: value if key == "exc_info" or key.startswith("_") else self._clean(key, value) for key, value in event.items()}

    def _clean(self, key: str, value: Any) -> Any:
        if key.lower() in self._hidden:
            return REDACTED
        if isinstance(value, Mapping):
            return {str(name): self._clean(str(name), inner) for name, inner in value.items()}
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if isinstance(value, str):
            return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", redact(value))
        if isinstance(value, (list, tuple)):
            return [self._clean(key, inner) for inner in value]
        return value


def redact(text: str) -> str:
    """The text without bearer tokens."""
    return _BEARER.sub(lambda match: f"{match[1]} {REDACTED}", text)


def _write_traceback(out: TextIO, exc_info: ExcInfo) -> None:
    plain = io.StringIO()
    structlog.dev.plain_traceback(plain, exc_info)
    out.write(redact(plain.getvalue()))


def _redact_traceback(logger: Any, method: str, event: EventDict) -> EventDict:
    if "exception" in event:
        event["exception"] = redact(event["exception"])
    return event
