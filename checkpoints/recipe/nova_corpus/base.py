"""What a generator gives back, and the split between training and held-out prompts.

An Exchange is one question and its reference answer. `answer` is what a check looks for in the reply: a number, a JSON value, a word or the
whole text. Held-out keys (one in ten, by hash) never appear in training; every generator draws its key through `Split.draw`.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Exchange:
    """One user turn and one assistant turn; `weight` scales the training loss of the reply."""

    kind: str
    user: str
    assistant: str
    answer: str = ""
    weight: float = 1.0
    free: bool = False
    """True when many replies would be right (stories), so that no exact check applies."""


@dataclass(frozen=True)
class Dialogue:
    """Exchanges in order, with an optional system turn; `plain` text without turns is a document of its own."""

    exchanges: tuple[Exchange, ...]
    system: str = ""
    plain: str = ""


def is_held_out(key: str) -> bool:
    """Whether this key belongs to the evaluation and never to training."""
    return hashlib.blake2s(key.encode(), digest_size=4).digest()[0] % 10 == 0


@dataclass(frozen=True)
class Split:
    """Which half of the keys a generator may use."""

    held_out: bool = False

    def draw[X](self, make: Callable[[], tuple[str, X]], tries: int = 400) -> X:
        """Call `make` -> (key, value) until the key lies in this split.

        Raises: ValueError when `tries` draws gave no key of this split.
        """
        key = ""
        for _ in range(tries):
            key, value = make()
            if is_held_out(key) == self.held_out:
                return value
        raise ValueError(f"no key of the split held_out={self.held_out} in {tries} draws; last key {key!r}")


TRAINING = Split(held_out=False)
HELD_OUT = Split(held_out=True)

Generator = Callable[[random.Random, Split], Dialogue]


def one(exchange: Exchange) -> Dialogue:
    """A dialogue of one exchange."""
    return Dialogue((exchange,))
