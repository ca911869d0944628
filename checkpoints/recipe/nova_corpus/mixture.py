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

FIRST: tuple[tuple[float, Generator], ...] = (
    (14.0, arithmetic.add),
    (2.0, arithmetic.add3),
    (14.0, arithmetic.subtract),
    (8.0, arithmetic.times),
    (4.0, arithmetic.divide),
    (9.0, arithmetic.word_problem),
    (0.7, arithmetic.compare),
    (0.4, arithmetic.parity),
    (0.7, arithmetic.next_number),
    (18.0, jsons.request),
    (1.0, jsons.invented),
    (1.2, jsons.question),
    (6.0, stories.story),
    (0.7, stories.story_in_prompt),
    (0.6, stories.plain_story),
    (3.0, talk.greeting),
    (4.0, talk.identity),
    (1.5, talk.unknown),
    (18.0, talk.fact),
    (6.0, talk.remember),
    (4.0, tasks.repeat),
    (2.5, tasks.sort),
    (1.0, tasks.reverse),
    (0.7, tasks.spell),
    (1.2, tasks.name_some),
    (3.5, tasks.extract),
    (0.3, tasks.letters),
)
COPYING: dict[Generator, float] = {
    tasks.copy: 9.0,
    tasks.extract: 6.0,
    tasks.sort: 5.0,
    arithmetic.times: 14.0,
    arithmetic.divide: 6.0,
    stories.story: 5.0,
    talk.remember: 8.0,
}
KINDS = (*FIRST, (0.0, tasks.copy))
MIXTURES: dict[str, tuple[tuple[float, Generator], ...]] = {
    "first": FIRST,
    "copying": tuple((COPYING.get(generator, weight), generator) for weight, generator in KINDS),
}
"""By name: the first mixture, then one with more of what is learned late: copying words, the times table, sorting."""
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


def dialogue(rng: random.Random, split: Split = TRAINING, max_exchanges: int = 4, mixture: str = "first") -> Dialogue:
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


def document(seed: int, index: int, max_exchanges: int = 4, mixture: str = "first", prompt_weight: float = 0.1) -> Sequence[Segment]:
    """Document `index` as segments: roles are "system", "user", "assistant" and, for bare text, "text"."""
    rng = random.Random(f"{seed}/{index}")
    made = dialogue(rng, TRAINING, max_exchanges, mixture)
    if made.plain:
        return (Segment("text", made.plain, 0.7),)
    segments = [Segment("system", made.system, prompt_weight)] if made.system else []
    for exchange in made.exchanges:
        segments += [Segment("user", exchange.user, prompt_weight), Segment("assistant", exchange.assistant, exchange.weight)]
    return segments
