"""Serves the app with granian inside this process's event loop, and takes it down without cutting anyone off.

Granian bounds the request line, the headers, their time and idle connections; `body` bounds bodies, `streams` writers. What neither
can do (a limit per address, TLS policy, bare line feeds) is a proxy's: see launch/nginx.conf.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import granian.net
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server
from litestar import Litestar

from novajax.core.errors import ConfigError, NovaError
from novajax.server.front import Front
from novajax.server.leaving import end
from novajax.server.settings import ServerSettings

_BACKLOG = 1024
_FLUSH_S = 5.0
"""How long the last bytes may take, once the engine is idle and again once nobody listens."""
_log = logging.getLogger("novajax.server")


def listen(settings: ServerSettings) -> socket.socket:
    """A listening socket on settings.host and port; ConfigError if it is taken.

    Made here because granian's own shares its port (two servers would start and split the traffic without a word), and because
    connections inherit TCP_USER_TIMEOUT from it, which ends those whose reader stopped reading.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {settings.host}:{settings.port}: {error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.write_timeout_s * 1000))
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {settings.host}:{settings.port}: {error}") from None
    return listener


async def serve(
    app: Litestar,
    settings: ServerSettings,
    *,
    listener: socket.socket | None = None,
    stop: asyncio.Event | None = None,
    signals: bool | None = None,
    on_serving: Callable[[int], Any] | None = None,
) -> None:
    """Serves until `stop` is set, or SIGTERM or SIGINT comes; then drains: new requests get 503, running ones have drain_s.

    A second signal ends the drain. on_serving is called with the port. The backend is drained, not closed. Call it in the main thread
    unless `stop` is given (then signals are the caller's, or not, as `signals` says).
    """
    front: Front = app.state.front
    listener = listener or listen(settings)
    port: int = listener.getsockname()[1]
    server = _Server(app, settings, listener)
    serving = asyncio.create_task(server.serve())
    stopping, hurry = stop or asyncio.Event(), asyncio.Event()
    with _Signals(stopping, hurry, handle=stop is None if signals is None else signals):
        if on_serving is not None:
            on_serving(port)
        waiting = asyncio.create_task(stopping.wait())
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not serving.done():
            await _drain(front, hurry)
            server.stop()
            await asyncio.wait({serving}, timeout=_FLUSH_S)
    if not serving.done():
        _log.warning("connections that did not end are cut")
        serving.cancel()
        return
    await serving


async def _drain(front: Front, hurry: asyncio.Event) -> None:
    """Nobody new; the engine finishes what it has, or at the second signal drops it, and the last bytes go out."""
    front.gate.close()
    grace_s = front.settings.drain_s
    _log.info("draining: %d sequences inside, %g s at most", front.gate.inside, grace_s)
    draining = asyncio.create_task(front.backend.drain(grace_s))
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait({draining, hurried}, return_when=asyncio.FIRST_COMPLETED)
    await end(hurried)
    if not draining.done():
        await end(draining)
        with suppress(TimeoutError, NovaError):
            async with asyncio.timeout(_FLUSH_S):
                await front.backend.drain(0)
    elif error := draining.exception():
        _log.warning("the backend did not drain: %s", type(error).__name__)
    await front.gate.empty(_FLUSH_S)


class _Signals:
    """While entered, the first SIGTERM or SIGINT sets `stopping`, the next `hurry`."""

    def __init__(self, stopping: asyncio.Event, hurry: asyncio.Event, *, handle: bool):
        self._stopping = stopping
        self._hurry = hurry
        self._numbers = (signal.SIGTERM, signal.SIGINT) if handle else ()
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> None:
        for number in self._numbers:
            self._loop.add_signal_handler(number, self._received)

    def __exit__(self, *_: object) -> None:
        for number in self._numbers:
            self._loop.remove_signal_handler(number)

    def _received(self) -> None:
        (self._hurry if self._stopping.is_set() else self._stopping).set()


class _Server(Server):
    """Granian's embedded server on a socket that is already listening."""

    def __init__(self, app: Litestar, settings: ServerSettings, listener: socket.socket):
        self._listener = listener
        super().__init__(
            app,
            address=settings.host,
            port=settings.port,
            interface=Interfaces.ASGI,
            http=HTTPModes.http1,
            websockets=False,
            backlog=_BACKLOG,
            backpressure=settings.max_connections,
            http1_settings=HTTP1Settings(
                header_read_timeout=int(settings.header_timeout_s * 1000), max_buffer_size=settings.max_header_bytes
            ),
            log_level=LogLevels.error,
            log_access=False,
        )

    def _init_shared_socket(self) -> None:
        # The file descriptor is granian's from here on, which closes it.
        # The stub of SocketHolder lists no constructor.
        make_holder: Any = vars(granian.net)["SocketHolder"]
        self._shd = make_holder(self._listener.detach(), False, _BACKLOG)
