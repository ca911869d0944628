"""A front door over a counting FakeBackend, on a real socket and a free port, in a thread of its own: for tests and demonstrations."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Self

import msgspec

from novajax.core.errors import InternalError
from novajax.core.fake import FakeBackend
from novajax.core.types import ModelCard
from novajax.server.app import create_app
from novajax.server.front import Front
from novajax.server.serve import listen, serve
from novajax.server.settings import ServerSettings
from novajax.text.template import ChatTemplate
from novajax.text.tokenizer import Tokenizer

_START_S = 30.0


def fake_card(tokenizer: Tokenizer, **changes: Any) -> ModelCard:
    """A card for a FakeBackend: 2,048 tokens, the tokenizer's own vocabulary and end."""
    card = ModelCard(
        id="fake",
        directory=str(tokenizer.directory),
        vocab_size=tokenizer.size,
        max_context_tokens=2048,
        max_request_tokens=2048,
        weights_digest="f" * 64,
        created=1_700_000_000,
        end_token_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
    )
    return msgspec.structs.replace(card, **changes)


class ServedFake:
    """Serves while entered. `url` has no slash at the end; `front` and `backend` belong to the server's loop: see `call`."""

    def __init__(self, tokenizer: Tokenizer, backend: FakeBackend | None = None, settings: ServerSettings | None = None):
        self.backend = backend or FakeBackend(fake_card(tokenizer))
        self._settings = settings or ServerSettings(port=0)
        app = create_app(self.backend, tokenizer, ChatTemplate(tokenizer), self._settings)
        self.front: Front = app.state.front
        self.port = 0
        self._app = app
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._serving = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call[T](self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the server's loop and waits for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def stop(self) -> None:
        """Starts the drain, as SIGTERM would, and returns at once."""
        self._loop.call_soon_threadsafe(self._stop.set)

    def join(self) -> None:
        """Waits until the server has ended."""
        self._thread.join()

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._serving.wait(_START_S) or not self.port:
            raise InternalError("the fake server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.stop()
            self.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._serving.set()
            self._loop.close()

    async def _serve(self) -> None:
        def serving(port: int) -> None:
            self.port = port
            self._serving.set()

        await serve(self._app, self._settings, listener=listen(self._settings), stop=self._stop, on_serving=serving)
