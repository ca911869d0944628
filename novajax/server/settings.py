"""What the HTTP front door can be told, and which bind addresses are safe without a key.

Keys are held as SHA-256 digests only, so that printing the settings shows none. It knows nothing of HTTP frameworks.
"""

import hashlib
import ipaddress
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from novajax.core.errors import ConfigError

_SHORTEST_KEY = 16
"""Characters; shorter keys can be guessed."""


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All bounds of the front door. Times are seconds."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """0: any free port."""
    key_digests: tuple[bytes, ...] = ()
    """SHA-256 of each API key (`read_keys`). Empty: open, which `refuse_open_bind` allows on loopback only."""
    model_names: tuple[str, ...] = ()
    """Names that requests may use, the first in answers. Empty: the model card's id."""
    metrics_open: bool = False
    """/metrics needs no key; allowed on loopback only."""

    max_body_bytes: Annotated[int, Meta(ge=1024)] = 8 << 20
    max_prompt_bytes: Annotated[int, Meta(ge=1)] | None = None
    """Longest text that is tokenized. None: 16 bytes for each token the engine can hold, within 64 KiB and 4 MiB."""
    max_sequences: Annotated[int, Meta(ge=1)] = 1024
    """Sequences (requests x prompts x n) that may be inside at once; more are refused with 429."""
    max_prompts: Annotated[int, Meta(ge=1)] = 256
    """Prompts in one completions request."""
    max_connections: Annotated[int, Meta(ge=1)] = 4096
    max_header_bytes: Annotated[int, Meta(ge=8192)] = 64 << 10
    """Request line and headers together."""

    header_timeout_s: Annotated[float, Meta(gt=0)] = 20.0
    """Also how long an idle connection is kept."""
    body_timeout_s: Annotated[float, Meta(gt=0)] = 20.0
    """A request's whole body must have arrived by then."""
    write_timeout_s: Annotated[float, Meta(gt=0)] = 30.0
    """A reader that takes nothing for so long is dropped."""
    keep_alive_s: Annotated[float, Meta(gt=0)] = 15.0
    """A silent stream sends an SSE comment this often."""
    drain_s: Annotated[float, Meta(ge=0)] = 30.0
    """How long running requests may go on after SIGTERM."""
    retry_after_s: Annotated[float, Meta(gt=0)] = 1.0
    """What a refused client is told to wait."""

    def prompt_bytes(self, max_request_tokens: int) -> int:
        """The longest prompt text, in bytes, for an engine that holds `max_request_tokens`."""
        if self.max_prompt_bytes is not None:
            return self.max_prompt_bytes
        return min(max(16 * max_request_tokens, 64 << 10), 4 << 20)


def digest(key: str | bytes) -> bytes:
    """How a key is stored and compared. [32 bytes]"""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


def read_keys(path: str | Path) -> tuple[bytes, ...]:
    """Digests of the keys in a file: one a line, empty lines and lines that begin with # left out.

    Raises ConfigError if the file cannot be read, holds no key, or a key is short or has characters no header can carry.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key file {path} cannot be read: {error}") from None
    digests: list[bytes] = []
    for number, line in enumerate(lines, start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{path}:{number}: a key is {_SHORTEST_KEY} or more printable ASCII characters without spaces")
        digests.append(digest(key))
    if not digests:
        raise ConfigError(f"the key file {path} holds no key")
    return tuple(dict.fromkeys(digests))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host` (an address or `localhost`; no name is looked up)."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def refuse_open_bind(settings: ServerSettings) -> None:
    """Raises ConfigError if others than this machine could use the server, or read its metrics, without a key."""
    if is_loopback(settings.host):
        return
    if not settings.key_digests:
        raise ConfigError(f"binding {settings.host} without an API key would serve everyone; give a key file, or bind 127.0.0.1")
    if settings.metrics_open:
        raise ConfigError(f"metrics without a key are for loopback binds, not for {settings.host}")
