"""What a load generator sends and when: arrivals, lengths, and which clients misbehave. Pure data from a seed, no network.

A Plan is decided completely before the first request leaves, so that the same seed loads every server alike.
"""

import csv
import datetime
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

Vanish = Literal["body", "queued", "stream"]
"""A client that leaves: after half its request body, after the whole body, or after a few pieces of the answer."""
VANISH_PHASES: tuple[Vanish, ...] = ("body", "queued", "stream")


class Lengths(msgspec.Struct, frozen=True):
    """Tokens in and out of one request."""

    prompt_tokens: int
    output_tokens: int


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """One request to be sent."""

    index: int
    at_s: float
    """Seconds after the start; 0 in a closed loop, which sends as soon as a client is free."""
    lengths: Lengths
    vanish: Vanish | None = None
    vanish_after: int = 0
    """With vanish 'stream': pieces of the answer read before leaving."""
    bad: int | None = None
    """Index into the table of malformed requests."""


def read_trace(path: Path) -> tuple[list[float], list[Lengths]]:
    """(seconds since the first request, lengths) of an Azure LLM inference trace: TIMESTAMP,ContextTokens,GeneratedTokens.

    Raises ValueError naming the line that is not such a row.
    """
    times_s: list[float] = []
    lengths: list[Lengths] = []
    with open(path, newline="") as file:
        rows = csv.DictReader(file)
        if not {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{path}: the header must name TIMESTAMP, ContextTokens and GeneratedTokens")
        for row in rows:
            try:
                moment = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26])
                lengths.append(Lengths(max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"]))))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} line {rows.line_num}: {error}") from error
            times_s.append(moment.timestamp())
    if not times_s:
        raise ValueError(f"{path} holds no request")
    return [time_s - times_s[0] for time_s in times_s], lengths


def scale_lengths(lengths: Sequence[Lengths], context_tokens: int) -> list[Lengths]:
    """All lengths times one factor, so that the longest request fits the context. Shorter ones never grow."""
    longest = max(item.prompt_tokens + item.output_tokens for item in lengths)
    factor = min(1.0, context_tokens / longest)
    scaled = []
    for item in lengths:
        output_tokens = max(1, min(int(item.output_tokens * factor), context_tokens - 1))
        prompt_tokens = max(1, min(int(item.prompt_tokens * factor), context_tokens - output_tokens))
        scaled.append(Lengths(prompt_tokens, output_tokens))
    return scaled


def poisson_times_s(rate_per_s: float, count: int, draw: random.Random) -> list[float]:
    times_s, now_s = [], 0.0
    for _ in range(count):
        times_s.append(now_s)
        now_s += draw.expovariate(rate_per_s)
    return times_s


def make_plan(
    times_s: Sequence[float], lengths: Sequence[Lengths], *, vanish_share: float, bad_share: float, bad_kinds: int, seed: int
) -> list[Planned]:
    """Joins arrivals and lengths (cycled if fewer) and deals out misbehaviour by independent draws."""
    draw = random.Random(seed)
    plan = []
    for index, at_s in enumerate(times_s):
        kind, phase, after, bad = draw.random(), draw.choice(VANISH_PHASES), draw.randint(1, 8), draw.randrange(max(1, bad_kinds))
        plan.append(
            Planned(
                index=index,
                at_s=at_s,
                lengths=lengths[index % len(lengths)],
                vanish=phase if kind < vanish_share else None,
                vanish_after=after,
                bad=bad if vanish_share <= kind < vanish_share + bad_share else None,
            )
        )
    return plan


class Prompts:
    """Prompts of wanted lengths that share no beginning, unless `shared_tokens` asks for one.

    Token ids are exact. Words are calibrated by `tokens_per_word`; the reply's usage tells what they really were.
    """

    def __init__(self, *, seed: int, vocab: int | None, tokens_per_word: float, shared_tokens: int = 0):
        """`vocab`: send ids below it; None: send words."""
        self._seed = seed
        self._vocab = vocab
        self._tokens_per_word = tokens_per_word
        self._shared_tokens = shared_tokens

    def make(self, index: int, tokens: int) -> str | list[int]:
        shared = min(self._shared_tokens, tokens - 1)
        if self._vocab is not None:
            return [*self._ids(-1, shared, self._vocab), *self._ids(index, tokens - shared, self._vocab)]
        return " ".join([*self._words(-1, shared), *self._words(index, tokens - shared)])

    def _ids(self, stream: int, count: int, vocab: int) -> Iterator[int]:
        draw = random.Random(f"{self._seed}/{stream}")
        low = min(256, vocab // 2)  # special tokens and raw bytes come first in most vocabularies
        return (draw.randrange(low, vocab) for _ in range(count))

    def _words(self, stream: int, tokens: int) -> Iterator[str]:
        draw = random.Random(f"{self._seed}/{stream}")
        return (draw.choice(WORDS) for _ in range(round(tokens / self._tokens_per_word)))


_TEXT = """
the a one two red blue green small big old new dog cat bird tree house river hill stone boat day night sun moon rain boy girl
man woman friend went saw found took gave made said asked ran sat ate slept happy sad kind quick quiet and then so but with from
under over near into after before because when where who what very little more
"""
WORDS = tuple(_TEXT.split())
