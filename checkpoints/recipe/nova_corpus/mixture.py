"""The corpus: document `index` of seed `seed`, the same for ever, without a file.

A document is one conversation of several kinds of exchange, or bare text. It leaves here as messages with their weights
in the loss; the tokenizer and the chat template turn it into tokens.
Invariant: a document depends on (seed, index, max_exchanges, mixture) only.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from nova_corpus import arithmetic, jsons, stories, talk, tasks
from nova_corpus.base import TRAINING, Dialogue, Exchange, Generator, Split

COPYING: tuple[tuple[float, Generator], ...] = (
    (12.0, tasks.copy),
    (6.0, tasks.repeat),
    (10.0, arithmetic.add),
    (10.0, arithmetic.subtract),
    (5.0, arithmetic.times),
    (12.0, jsons.request),
    (4.0, talk.remember),
    (3.0, tasks.extract),
)
MAIN: tuple[tuple[float, Generator], ...] = (
    (16.0, arithmetic.add),
    (16.0, arithmetic.subtract),
    (10.0, arithmetic.times),
    (4.0, arithmetic.divide),
    (9.0, arithmetic.word_problem),
    (0.3, arithmetic.add3),
    (0.3, arithmetic.compare),
    (0.3, arithmetic.parity),
    (0.5, arithmetic.next_number),
    (20.0, jsons.request),
    (1.0, jsons.invented),
    (1.0, jsons.question),
    (4.0, stories.story),
    (0.5, stories.story_in_prompt),
    (0.4, stories.plain_story),
    (3.0, talk.greeting),
    (3.0, talk.identity),
    (1.0, talk.unknown),
    (12.0, talk.fact),
    (6.0, talk.remember),
    (2.0, tasks.copy),
    (3.0, tasks.repeat),
    (2.0, tasks.sort),
    (0.5, tasks.reverse),
    (0.3, tasks.spell),
    (1.0, tasks.name_some),
    (4.0, tasks.extract),
    (0.2, tasks.letters),
)
MIXTURES: dict[str, tuple[tuple[float, Generator], ...]] = {"copying": COPYING, "main": MAIN}
"""By name: a first lesson, short and rich in copying (the skill that everything else waits for), and the whole corpus."""
KINDS = MAIN
LOWERED = frozenset({"add", "add3", "subtract", "times", "divide", "greeting", "identity", "parity", "next_number"})
"""Kinds whose prompt may arrive in lower case without harm to the reply."""


@dataclass(frozen=True)
class Segment:
    """A message of a document and the weight of its tokens in the loss."""

    role: str
    text: str
    weight: float


def _roughen(exchange: Exchange, rng: random.Random) -> Exchange:
    """People write in lower case, drop the full stop, and say hello or please first."""
    user, pick = exchange.user, rng.random()
    if pick < 0.06 and exchange.kind in LOWERED:
        user = user.lower()
    elif pick < 0.12 and user.endswith((".", "?")) and "\n" not in user:
        user = user[:-1]
    elif pick < 0.16:
        user = f"{rng.choice(('Hi!', 'Hello!', 'Please help me.', 'Hey Nova,', 'Nova,', 'Ok.', 'Great.'))} {user}"
    elif pick < 0.19 and user[-1] in ".?" and user[0].isalpha():
        user = f"{user[:-1]}, please{user[-1]}" if exchange.kind != "recall" else user
    return Exchange(exchange.kind, user, exchange.assistant, exchange.answer, exchange.weight, exchange.free)


def dialogue(rng: random.Random, split: Split = TRAINING, max_exchanges: int = 4, mixture: str = "main") -> Dialogue:
    """One document: draws of the kinds joined into one conversation."""
    weights, generators = zip(*MIXTURES[mixture], strict=True)
    exchanges: list[Exchange] = []
    system = ""
    wanted = 1 if rng.random() < 0.35 else rng.randint(1, max_exchanges)
    while len(exchanges) < wanted:
        part = rng.choices(generators, weights)[0](rng, split)
        if part.plain:
            if not exchanges:
                return part
            continue
        if part.system and exchanges:
            continue
        system = system or part.system
        exchanges += [_roughen(e, rng) for e in part.exchanges]
        if part.system:
            break
    if not system and rng.random() < 0.08:
        system = rng.choice(
            ("You are Nova, a helpful assistant.", "You are a helpful assistant.", "You are a helpful assistant. Answer briefly.")
        )
    return Dialogue(tuple(exchanges), system=system)


def document(seed: int, index: int, max_exchanges: int = 4, mixture: str = "main", prompt_weight: float = 0.1) -> Sequence[Segment]:
    """Document `index` as segments: roles are "system", "user", "assistant" and, for bare text, "text"."""
    rng = random.Random(f"{seed}/{index}")
    made = dialogue(rng, TRAINING, max_exchanges, mixture)
    if made.plain:
        return (Segment("text", made.plain, 0.7),)
    segments = [Segment("system", made.system, prompt_weight)] if made.system else []
    for exchange in made.exchanges:
        segments += [Segment("user", exchange.user, prompt_weight), Segment("assistant", exchange.assistant, exchange.weight)]
    return segments
