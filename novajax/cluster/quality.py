"""Watching quality in service: a sampled share of answers is scored again, off the hot path, by the served engine and a more precise one.

`QualityWatch` is a Backend over two. Both engines score prompt + answer as a prompt, one request at a time and at low priority. From
the likeliest tokens that both name, and one bucket for all others, comes a lower bound of KL(reference || served): joining outcomes
never makes it larger (the data-processing inequality). Beyond the bound that is set there is an alert, and where it is wished new
requests go to the reference until the figure is well below the bound again. It knows no text and no metrics.
"""

import asyncio
import math
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, NoReturn

import msgspec
import structlog
from msgspec import Meta

from novajax.core.backend import Backend
from novajax.core.config import EngineConfig, MeshConfig
from novajax.core.errors import ConfigError, NovaError
from novajax.core.types import MAX_TOP_LOGPROBS, ModelCard, Quality, Request, SamplingParams, Stats, TokenLogprobs, Update

WINDOW = 64
"""Scored answers that a figure is the mean of."""
ENOUGH = 8
"""Scored answers before anybody is alarmed."""
WAITING = 16
"""Sampled answers that may wait to be scored; one more is not."""
CALM = 0.8
"""Share of the bound below which an alert ends."""
REFERENCE = "float"
"""The more precise engine's name among a card's variants."""
_LEAST = 1e-9


class QualitySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is watched, and what follows."""

    share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Of answers that are scored again; 0: none, and no second engine is started."""
    bound: Annotated[float, Meta(gt=0)] | None = None
    """Nats per token beyond which there is an alert."""
    switch: bool = False
    """While there is one, new requests go to the reference."""
    reference: str = ""
    """Its model; empty: the served one's float weights."""
    platform: str = "cpu"
    """Where it runs (JAX_PLATFORMS); empty: where the served one does."""
    max_rows: Annotated[int, Meta(ge=1)] = 2
    """Of the reference; as many as it shall serve at once if it is switched to."""


def reference_config(served: EngineConfig, settings: QualitySettings) -> EngineConfig:
    """The engine to compare with: one device, nothing rounded. Raises ConfigError where it would be the served one again."""
    model = settings.reference or served.model
    if model == served.model and not served.quantization and served.kv_cache_dtype in ("auto", "model"):
        raise ConfigError(
            "quality.share: nothing is quantized here, so there is nothing to compare; name quality.reference", param="quality"
        )
    return msgspec.structs.replace(
        served,
        model=model,
        quantization="",
        kv_cache_dtype="model",
        dtype="auto",
        mesh=MeshConfig(),
        max_rows=settings.max_rows,
        kv_bytes=None,
    )


class QualityWatch:
    """See the module docstring. Owns neither engine's process; `run` must be kept running for anything to be scored."""

    def __init__(self, served: Backend, reference: Backend, settings: QualitySettings, chance: Callable[[], float] = random.random):
        self._served, self._reference, self._settings, self._chance = served, reference, settings, chance
        self._sampled: asyncio.Queue[tuple[int, tuple[int, ...]]] = asyncio.Queue(WAITING)
        self._window: deque[tuple[int, float, int]] = deque(maxlen=WINDOW)
        self._scored = 0
        self._alert = False

    async def run(self) -> NoReturn:
        """Scores what was sampled, for ever."""
        number = 0
        while True:
            prompt_tokens, tokens = await self._sampled.get()
            number += 1
            asked = Request(
                id=f"quality-{number}",
                prompt=tokens,
                sampling=SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=MAX_TOP_LOGPROBS),
                priority="low",
            )
            try:
                reference, served = [await _scores(backend, asked, prompt_tokens) for backend in (self._reference, self._served)]
            except NovaError as error:  # overloaded, draining, restarting: another answer will do
                structlog.get_logger().info("an answer was not scored again", error=error.message)
                continue
            if len(reference) == len(served) > 0:
                self._take(reference, served)

    def _take(self, reference: Sequence[TokenLogprobs], served: Sequence[TokenLogprobs]) -> None:
        pairs = list(zip(reference, served, strict=True))
        agreed = sum(one.top[0][0] == other.top[0][0] for one, other in pairs)
        self._window.append((len(pairs), math.fsum(divergence(one, other) for one, other in pairs), agreed))
        self._scored += 1
        quality, bound = self.quality, self._settings.bound
        if bound is None or quality is None or len(self._window) < ENOUGH:
            return
        if not self._alert and quality.kl > bound:
            self._alert = True
            structlog.get_logger().error("quality is beyond its bound", kl=quality.kl, bound=bound, switched=self._settings.switch)
        elif self._alert and quality.kl < CALM * bound:
            self._alert = False
            structlog.get_logger().info("quality is within its bound again", kl=quality.kl, bound=bound)

    @property
    def quality(self) -> Quality | None:
        """None: nothing was scored yet."""
        tokens = sum(count for count, _, _ in self._window)
        if not tokens:
            return None
        kl = math.fsum(total for _, total, _ in self._window) / tokens
        agreement = sum(agreed for _, _, agreed in self._window) / tokens
        switched = self._alert and self._settings.switch
        return Quality(scored=self._scored, kl=kl, top1_agreement=agreement, score=math.exp(-kl), alert=self._alert, switched=switched)

    # --- Backend

    async def card(self) -> ModelCard:
        card = await self._served.card()
        return msgspec.structs.replace(card, variants=(*card.variants, REFERENCE))

    async def submit(self, request: Request) -> AsyncIterator[Update]:
        backend = self._served
        switched = self._alert and self._settings.switch and not request.variant
        if request.variant == REFERENCE or (switched and (await self._reference.stats()).phase == "ready"):
            backend = self._reference
        sampled = self._chance() < self._settings.share
        answer: list[int] = []
        updates = backend.submit(request)
        try:
            async for update in updates:
                answer += update.tokens if sampled else ()
                if update.finish_reason in ("stop", "length") and answer and not self._sampled.full():
                    self._sampled.put_nowait((len(request.prompt), (*request.prompt, *answer)))
                yield update
        finally:
            await updates.aclose()  # type: ignore[attr-defined]

    async def abort(self, request_id: str) -> None:
        await asyncio.gather(self._served.abort(request_id), self._reference.abort(request_id))

    async def stats(self) -> Stats:
        return msgspec.structs.replace(await self._served.stats(), quality=self.quality)

    async def drain(self, grace_s: float) -> None:
        await asyncio.gather(self._served.drain(grace_s), self._reference.drain(grace_s))

    async def close(self) -> None:
        await asyncio.gather(self._served.close(), self._reference.close())


def divergence(reference: TokenLogprobs, served: TokenLogprobs) -> float:
    """Nats: KL(reference || served) over the tokens that both have among their likeliest, and one outcome for all the others."""
    p, q = dict(reference.top), dict(served.top)
    both = p.keys() & q.keys()
    total = math.fsum(math.exp(p[token]) * (p[token] - q[token]) for token in both)
    rest_p, rest_q = (max(_LEAST, 1 - math.fsum(math.exp(of[token]) for token in both)) for of in (p, q))
    return max(0.0, total + rest_p * math.log(rest_p / rest_q))


async def _scores(backend: Backend, asked: Request, skip: int) -> list[TokenLogprobs]:
    """Of the tokens behind the first `skip`. Raises the request's own failure."""
    found: list[TokenLogprobs] = []
    async for update in backend.submit(asked):
        if update.failure is not None:
            raise NovaError(update.failure.message)
        found += [entry for entry in (update.prompt_logprobs or ())[skip:] if entry is not None]
    return found
