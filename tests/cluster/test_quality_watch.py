"""Answers scored again by a more precise engine: the figure, the alert, the switch, and that nothing of it reaches a client."""

import asyncio
import math
from collections.abc import AsyncIterator

import msgspec
import pytest

from novajax.cluster.quality import ENOUGH, WAITING, QualitySettings, QualityWatch, divergence, reference_config
from novajax.core.config import EngineConfig, MeshConfig
from novajax.core.errors import ConfigError, Overloaded
from novajax.core.fake import FakeBackend
from novajax.core.types import ModelCard, Request, SamplingParams, TokenLogprobs, Update

CARD = ModelCard(id="m", directory="", vocab_size=64, max_context_tokens=64, max_request_tokens=64, weights_digest="", created=0)


class Scorer(FakeBackend):
    """Gives the next token the probability `chance`, and one other the rest."""

    def __init__(self, chance: float):
        super().__init__(CARD)
        self.chance, self.asked, self.refuses = chance, 0, False

    async def submit(self, request: Request) -> AsyncIterator[Update]:
        self.asked += 1
        if request.sampling.prompt_logprobs is None:
            async for update in super().submit(request):
                yield update
            return
        if self.refuses:
            raise Overloaded("full")
        top = sorted(((1, math.log(self.chance)), (2, math.log(1 - self.chance))), key=lambda pair: -pair[1])
        scores = tuple(TokenLogprobs(token, -1.0, 1, tuple(top)) for token in request.prompt[1:])
        yield Update(request_id=request.id, prompt_logprobs=(None, *scores), finish_reason="length")


def request(number: int) -> Request:
    return Request(id=f"r{number}", prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=4, ignore_eos=True))


async def ask(watch: QualityWatch, count: int, first: int = 0) -> None:
    """One after the other, each scored before the next."""
    for number in range(first, first + count):
        before = watch.quality
        updates = [update async for update in watch.submit(request(number))]
        assert sum(len(update.tokens) for update in updates) == 4
        for _ in range(50):
            await asyncio.sleep(0)
            if watch.quality is not before and (before is None or watch.quality is None or watch.quality.scored > before.scored):
                break


async def running(watch: QualityWatch, work) -> None:
    task = asyncio.create_task(watch.run())
    try:
        await work
    finally:
        task.cancel()


def test_divergence_is_that_of_the_joined_outcomes():
    def scored(*top: tuple[int, float]) -> TokenLogprobs:
        return TokenLogprobs(0, 0.0, 1, tuple((token, math.log(p)) for token, p in top))

    one, other = scored((1, 0.6), (2, 0.3)), scored((1, 0.5), (2, 0.25), (3, 0.2))
    wanted = 0.6 * math.log(0.6 / 0.5) + 0.3 * math.log(0.3 / 0.25) + 0.1 * math.log(0.1 / 0.25)
    assert divergence(one, other) == pytest.approx(wanted)
    assert divergence(one, one) == pytest.approx(0)
    assert divergence(scored((1, 1.0)), scored((2, 1.0))) == pytest.approx(0)  # nothing in common: all is one outcome


def test_the_figure_the_alert_and_the_way_back():
    async def work() -> None:
        served, reference = Scorer(0.5), Scorer(0.8)
        watch = QualityWatch(served, reference, QualitySettings(share=1, bound=0.1, switch=True))
        kl = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)

        async def story() -> None:
            assert (await watch.stats()).quality is None
            await ask(watch, ENOUGH - 1)
            quality = (await watch.stats()).quality
            assert quality is not None
            assert quality.kl == pytest.approx(kl)
            assert quality.score == pytest.approx(math.exp(-kl))
            assert (quality.scored, quality.top1_agreement, quality.alert) == (ENOUGH - 1, 1.0, False)
            await ask(watch, 1, ENOUGH)
            alarmed = watch.quality
            assert alarmed is not None
            assert alarmed.alert
            assert alarmed.switched
            before = reference.generated
            await ask(watch, 1, 50)
            assert reference.generated == before + 4
            served.chance = 0.8
            await ask(watch, 40, 100)
            calm = watch.quality
            assert calm is not None
            assert not calm.alert
            before = served.generated
            await ask(watch, 1, 200)
            assert served.generated == before + 4

        await running(watch, story())

    asyncio.run(work())


def test_a_refused_score_costs_nothing_and_a_full_queue_drops():
    async def work() -> None:
        served, reference = Scorer(0.5), Scorer(0.8)
        reference.refuses = True
        watch = QualityWatch(served, reference, QualitySettings(share=1))
        for number in range(WAITING + 5):
            assert [update async for update in watch.submit(request(number))][-1].finish_reason == "length"

        async def story() -> None:
            await asyncio.sleep(0.05)
            assert watch.quality is None
            reference.refuses = False
            await ask(watch, 1, 99)
            assert watch.quality is not None

        await running(watch, story())

    asyncio.run(work())


def test_only_the_share_is_scored():
    async def work() -> None:
        draws = iter([0.9, 0.1, 0.9])
        served = Scorer(0.5)
        watch = QualityWatch(served, Scorer(0.5), QualitySettings(share=0.5), chance=lambda: next(draws))

        async def story() -> None:
            await ask(watch, 3)
            assert served.asked == 4

        await running(watch, story())

    asyncio.run(work())


def test_a_request_may_ask_for_the_precise_one():
    async def work() -> None:
        served, reference = Scorer(0.5), Scorer(0.8)
        served_card = msgspec.structs.replace(CARD, variants=("int8",))
        watch = QualityWatch(FakeBackend(served_card), reference, QualitySettings())
        assert (await watch.card()).variants == ("int8", "float")
        asked = msgspec.structs.replace(request(1), variant="float")
        assert len([update async for update in watch.submit(asked)]) == 5
        assert (served.generated, reference.generated) == (0, 4)

    asyncio.run(work())


def test_the_reference_is_the_float_model_alone():
    served = EngineConfig(model="m", quantization="int8", mesh=MeshConfig(data=2), max_rows=16)
    config = reference_config(served, QualitySettings(share=0.1))
    assert (config.quantization, config.kv_cache_dtype, config.mesh, config.max_rows) == ("", "model", MeshConfig(), 2)
    with pytest.raises(ConfigError, match="nothing is quantized"):
        reference_config(EngineConfig(model="m"), QualitySettings(share=0.1))
