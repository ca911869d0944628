"""GET /v1/models and /v1/models/{id}: the one model, under each of its names."""

from typing import Any

from litestar import Response, get
from litestar.di import NamedDependency
from litestar.params import FromPath

from novajax.core.types import ModelCard
from novajax.server.front import Front
from novajax.server.replies import ModelEntry, ModelList
from novajax.server.respond import json_reply


@get("/v1/models")
async def list_models(front: NamedDependency[Front]) -> Response[Any]:
    card = await front.card()
    return json_reply(ModelList([_entry(card, name) for name in front.names(card)]))


@get("/v1/models/{model_id:path}")
async def get_model(front: NamedDependency[Front], model_id: FromPath[str]) -> Response[Any]:
    """Names may hold slashes, as hub ids do."""
    card = await front.card()
    return json_reply(_entry(card, front.served_name(card, model_id.lstrip("/"))))


def _entry(card: ModelCard, name: str) -> ModelEntry:
    return ModelEntry(id=name, created=card.created, max_model_len=card.max_request_tokens, root=card.id)
