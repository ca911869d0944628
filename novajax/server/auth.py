"""Who is asking: one guard for all routes, deny by default.

A route is open only if it says `opt={"public": True}` (or "metrics", which the settings may open). A key comes as
`Authorization: Bearer KEY` or `x-api-key: KEY`, once, never in the URL. Comparison takes the same time for every key.
"""

import hmac
import re
from collections.abc import Iterable

import msgspec
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from novajax.core.errors import Forbidden, InvalidRequest, Unauthorized
from novajax.server.settings import ServerSettings, digest, is_loopback

_PORT = re.compile(rb":\d{1,5}$")


class Principal(msgspec.Struct, frozen=True):
    """Whoever sent a request; `name` is safe in a log."""

    name: str


ANONYMOUS = Principal("")


class Guard:
    """The guard of the whole app. Puts a Principal into the connection's state."""

    def __init__(self, settings: ServerSettings):
        self._settings = settings

    def __call__(self, connection: ASGIConnection, handler: BaseRouteHandler) -> None:
        """Raises InvalidRequest (hosts), Forbidden or Unauthorized."""
        headers = connection.scope["headers"]
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not hosts[0]:
            raise InvalidRequest("a request has exactly one Host header")
        if handler.opt.get("public") or (handler.opt.get("metrics") and self._settings.metrics_open):
            return
        if not self._settings.key_digests:
            # Without keys the only fence is loopback, and a page on the web can point its own name there (DNS rebinding).
            if is_loopback(self._settings.host) and not is_loopback(_PORT.sub(b"", hosts[0]).decode("latin-1")):
                raise Forbidden("without an API key this server answers only to the names of this machine")
            connection.scope["state"]["principal"] = ANONYMOUS
            return
        connection.scope["state"]["principal"] = self._identify(headers)

    def _identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Principal:
        offered = [_bearer(value) for name, value in headers if name == b"authorization"]
        offered += [value for name, value in headers if name == b"x-api-key"]
        if len(offered) != 1:
            raise Unauthorized("send one API key, as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")
        given, known = digest(offered[0]), False
        for key in self._settings.key_digests:
            known |= hmac.compare_digest(given, key)
        if not known or not offered[0]:
            raise Unauthorized("this API key is not known")
        return Principal(f"key-{given.hex()[:12]}")


def _bearer(value: bytes) -> bytes:
    scheme, _, key = value.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""
