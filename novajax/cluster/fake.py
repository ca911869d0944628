"""A Builder without devices: the real engine, scheduler and loop over an executor that computes tokens by checksum.

A token depends on every token before it and on the seed, as a model's does, so that a lost, doubled or misplaced one shows. Ranks
compute the same. It can be told to misbehave, for tests of the machinery around it.
"""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec

from novajax.cluster.member import Announce
from novajax.cluster.settings import Assignment
from novajax.core.backend import Backend
from novajax.core.clock import MonotonicClock
from novajax.core.config import EngineConfig
from novajax.core.types import ModelCard
from novajax.engine.engine import Engine
from novajax.engine.runner import Runner
from novajax.kv.manager import KVManager
from novajax.scheduler.admission import Limits
from novajax.scheduler.budget import Shapes
from novajax.scheduler.plan import ON_DEVICE, Draw, StepPlan, TokenResult
from novajax.scheduler.scheduler import Scheduler

VOCAB = 1000
_PAGES, _PAGE_TOKENS, _SLOTS = 512, 16, 8


class Misbehaviour(msgspec.Struct, frozen=True):
    """What one rank does wrong at one step; rank -1: nobody."""

    rank: int = -1
    step: int = 0
    what: str = ""
    """hang: never completes it. slow: is late from then on. token: draws another one. raise: fails."""


class FakeResult(msgspec.Struct, frozen=True):
    number: int
    tokens: dict[int, TokenResult]
    prompt_logprobs: dict[int, list[Any]] = {}


def next_token(tokens: list[int], draw: Draw) -> int:
    """The answer's next token after all of `tokens`."""
    return crc32(repr((tokens, draw.seed if draw.temperature > 0 else None)).encode()) % VOCAB


def expected(prompt: tuple[int, ...], draw: Draw, count: int) -> list[int]:
    """The whole answer, known in advance."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, draw))
    return tokens[len(prompt) :]


class FakeExecutor:
    """A Runner: what each slot holds is a list of tokens."""

    def __init__(self, rank: int, step_s: float, misbehaviour: Misbehaviour):
        self._step_s = step_s
        self._wrong = misbehaviour if misbehaviour.rank == rank else Misbehaviour()
        self._held: dict[int, list[int]] = {}
        self._last: dict[int, int] = {}

    def dispatch(self, plan: StepPlan) -> FakeResult | None:
        drawn: dict[int, TokenResult] = {}
        for row in plan.prefill:
            self._compute(row.slot, row.start, list(row.tokens), row.draw if row.last else None, drawn)
        for row in plan.decode:
            token = self._last[row.slot] if row.input == ON_DEVICE else row.input
            self._compute(row.slot, row.position, [token], row.draw if row.last else None, drawn)
        return None if plan.bubble else FakeResult(plan.number, drawn)

    def collect(self, pending: FakeResult) -> FakeResult:
        time.sleep(self._step_s)
        if not self._wrong.what or pending.number < self._wrong.step:
            return pending
        match self._wrong.what:
            case "hang":
                threading.Event().wait()
            case "slow":
                time.sleep(20 * self._step_s)
            case "raise":
                raise RuntimeError("told to fail")
            case "token":
                wrong = {slot: TokenResult(((result.tokens[0] + 1) % VOCAB,)) for slot, result in pending.tokens.items()}
                return FakeResult(pending.number, wrong)
        return pending

    def close(self) -> None:
        self._held.clear()

    def _compute(self, slot: int, start: int, tokens: list[int], draw: Draw | None, drawn: dict[int, TokenResult]) -> None:
        held = self._held.setdefault(slot, [])
        held[start:] = tokens
        if draw is not None:
            self._last[slot] = token = next_token(held, draw)
            drawn[slot] = TokenResult((token,))


class FakeBuilt(msgspec.Struct, frozen=True):
    runner: FakeExecutor
    weights_digest: str = "f" * 64


class _NothingCompiled:
    count = 0

    def close(self) -> None:
        return


class FakeBuilder:
    """See the module docstring. `start_s` is how long a start takes; `devices` what each rank finds."""

    def __init__(self, *, step_s: float = 0.005, start_s: float = 0.0, misbehaviour: Misbehaviour = Misbehaviour(), devices: int = 1):
        self._step_s, self._start_s, self._misbehaviour, self._devices = step_s, start_s, misbehaviour, devices

    def directory(self, config: EngineConfig) -> Path | None:
        return Path(config.model) if Path(config.model).is_dir() else None

    def open_devices(self, assignment: Assignment) -> tuple[int, str]:
        return self._devices, "fake"

    def open_executor(self, assignment: Assignment, announce: Announce, meet: Callable[[], None]) -> FakeBuilt:
        announce("loading", "nothing")
        time.sleep(self._start_s)
        meet()
        misbehaviour = self._misbehaviour if assignment.epoch == 1 else Misbehaviour()
        return FakeBuilt(FakeExecutor(assignment.rank, self._step_s, misbehaviour))

    def make_engine(self, config: EngineConfig, built: FakeBuilt, runner: Runner) -> tuple[Backend, Callable[[], bool]]:
        kv = KVManager(_PAGES, _PAGE_TOKENS, key=random.randbytes(32), weights_digest="f", kv_format="fake", prefix_cache=False)
        shapes = Shapes(decode=(0, 1, _SLOTS), prefill=((1, 64), (2, 64)), step_tokens=_SLOTS + 128)
        limits = Limits(vocab_size=VOCAB, max_context_tokens=1024, max_sequences=_SLOTS)
        card = ModelCard(
            id="fake",
            directory="",
            vocab_size=VOCAB,
            max_context_tokens=1024,
            max_request_tokens=1024,
            weights_digest=built.weights_digest,
            created=0,
        )
        engine = Engine(card, Scheduler(limits, shapes, [kv]), runner, MonotonicClock(), {}, _NothingCompiled())
        return engine, lambda: engine.busy
