"""What every route needs, in one object: the backend, the text tools, the limits. Made once by `create_app`.

It knows no wire format.
"""

import hashlib
from typing import Any

from litestar import Request

from novajax.core.backend import Backend
from novajax.core.clock import Clock
from novajax.core.errors import ModelNotFound, Unavailable
from novajax.core.types import ModelCard
from novajax.server.auth import Principal
from novajax.server.gate import Gate
from novajax.server.settings import ServerSettings
from novajax.telemetry.metrics import Metrics
from novajax.text.template import ChatTemplate
from novajax.text.tokenizer import Tokenizer


class Front:
    """Owned by the app; used on one event loop."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer, template: ChatTemplate, settings: ServerSettings, clock: Clock):
        self.backend = backend
        self.tokenizer = tokenizer
        self.template = template
        self.settings = settings
        self.clock = clock
        self.gate = Gate(settings.max_sequences, settings.retry_after_s)
        self.metrics = Metrics(settings.model_names[0] if settings.model_names else tokenizer.directory.name)

    async def card(self) -> ModelCard:
        """The model now served; Unavailable while there is none, without waiting for it."""
        stats = await self.backend.stats()
        if stats.phase != "ready":
            raise Unavailable(f"the engine is {stats.phase}", retry_after_s=self.settings.retry_after_s)
        return await self.backend.card()

    def names(self, card: ModelCard) -> tuple[str, ...]:
        """The names a request may use for the model."""
        return self.settings.model_names or (card.id,)

    def served_name(self, card: ModelCard, asked: str | None) -> str:
        """The name for the answer; ModelNotFound if another model was asked for."""
        names = self.names(card)
        if asked is None or asked == "":
            return names[0]
        if asked not in names:
            raise ModelNotFound(f"the model does not exist; served here: {', '.join(names)}", param="model")
        return asked


def fingerprint(card: ModelCard) -> str:
    """OpenAI's system_fingerprint: changes with the weights."""
    return f"fp_{card.weights_digest[:12]}"


def private_salt(request: Request[Any, Any, Any], salt: str | None) -> str:
    """The prefix cache's salt: requests share cached pages only with requests of the same key and salt.

    Hashed, so that a salt of any length or content is a short harmless name.
    """
    principal: Principal = request.scope["state"]["principal"]
    if not principal.name and salt is None:
        return ""
    return hashlib.sha256(f"{principal.name}\0{salt or ''}".encode("utf-8", "surrogatepass")).hexdigest()[:32]
