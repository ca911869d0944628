"""Small arithmetic: sums and differences of two-digit numbers, a few three-digit sums, the times table to 12 and exact division.

A reply to a sum with two-digit numbers shows its work, column by column with the carry, as at school: (
    "47 + 38: 7 + 8 = 15, 4 + 3 + 1 = 8. So 47 + 38 = 85"
).
Small sums and the times table are answered at once: (
    "7 x 8 = 56"
). Whatever the wording was, the form is the same. The key of a sum is its unordered operand pair, of a
difference its ordered pair: a held-out pair appears in no phrasing and in neither order. The times table has only 144 entries, so there the
key is the entry together with its phrasing.
"""

import random

from nova_corpus import facts, world
from nova_corpus.base import Dialogue, Exchange, Split, one

ADD = [
    ("What is {a} + {b}?"),
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} =",
    "{a}+{b}=?",
    "Add {a} and {b}.",
    "What is {a} plus {b}?",
    "How much is {a} + {b}?",
    "Calculate {a} + {b}.",
    "What is the sum of {a} and {b}?",
    "Compute {a} plus {b}.",
    "How much is {a} plus {b}?",
    "Please add {b} to {a}.",
    "what's {a}+{b}",
    "Can you add {a} and {b}?",
]
SUBTRACT = [
    ("What is {a} - {b}?"),
    "{a} - {b}",
    "{a}-{b}",
    "{a} - {b} =",
    "{a}-{b}=?",
    "Subtract {b} from {a}.",
    "What is {a} minus {b}?",
    "How much is {a} - {b}?",
    "Calculate {a} - {b}.",
    "Take {b} away from {a}.",
    "Compute {a} minus {b}.",
    "How much is {a} minus {b}?",
    "What is the difference of {a} and {b}?",
    "what's {a}-{b}",
    "Can you subtract {b} from {a}?",
]
TIMES = [
    ("What is {a} x {b}?"),
    "{a} x {b}",
    "{a} * {b}",
    "{a}*{b}",
    "What is {a} times {b}?",
    "How much is {a} times {b}?",
    "Multiply {a} by {b}.",
    "Calculate {a} * {b}.",
    "what's {a} x {b}",
    "Multiply {a} and {b}.",
]
DIVIDE = ["What is {a} / {b}?", "{a} / {b}", "{a}/{b}", "Divide {a} by {b}.", "What is {a} divided by {b}?", "How much is {a} / {b}?"]
MORE = [
    ("{n} has {a} {t}. {P} gets {b} more. How many {t} does {n} have now?"),
    "{n} has {a} {t} and finds {b} more. How many {t} does {p} have?",
    "{n} has {a} {t}. A friend gives {n} {b} {t}. How many {t} are there?",
    "There are {a} {t} in a box. {n} puts in {b} more. How many {t} are in the box?",
]
LESS = [
    ("{n} has {a} {t}. {P} gives away {b}. How many {t} are left?"),
    "{n} has {a} {t} and loses {b}. How many {t} does {p} have now?",
    "There are {a} {t} on the table. {n} takes {b}. How many {t} are left?",
    "{n} had {a} {t} and sold {b} of them. How many are left?",
]
EACH = [
    ("{n} has {a} boxes with {b} {t} in each. How many {t} is that?"),
    "There are {a} bags. Each bag holds {b} {t}. How many {t} are there?",
]


def worked(a: int, sign: str, b: int) -> str:
    """The reply to a + b or a - b (a >= b): the columns from the right with carries, then the result; below 10 the result only."""
    result = a + b if sign == "+" else a - b
    end = f"{a} {sign} {b} = {result}"
    if max(a, b) < 10:
        return end
    columns, carry = [], 0
    upper, lower = str(a)[::-1], str(b)[::-1]
    for place in range(max(len(upper), len(lower))):
        x, y = (int(digits[place]) if place < len(digits) else 0 for digits in (upper, lower))
        if sign == "+":
            total = x + y + carry
            columns.append(f"{x} + {y}{' + 1' if carry else ''} = {total}")
            carry = total // 10
        else:
            low = x - carry - y < 0
            shown = x + 10 if low else x
            columns.append(f"{shown} - {y}{' - 1' if carry else ''} = {shown - y - carry}")
            carry = int(low)
    return f"{a} {sign} {b}: {', '.join(columns)}. So {end}"


def _two_digits(rng: random.Random) -> int:
    """Small operands come up more often than the uniform draw would give them."""
    return rng.randint(0, 20) if rng.random() < 0.25 else rng.randint(0, 99)


def _sum(rng: random.Random, split: Split, big: bool = False) -> tuple[int, int]:
    def make() -> tuple[str, tuple[int, int]]:
        a, b = (rng.randint(100, 999), rng.randint(10, 999)) if big else (_two_digits(rng), _two_digits(rng))
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return f"add {min(a, b)} {max(a, b)}", (a, b)

    return split.draw(make)


def _difference(rng: random.Random, split: Split) -> tuple[int, int]:
    def make() -> tuple[str, tuple[int, int]]:
        a, b = sorted((_two_digits(rng), _two_digits(rng)), reverse=True)
        return f"subtract {a} {b}", (a, b)

    return split.draw(make)


def add(rng: random.Random, split: Split, big: bool = False) -> Dialogue:
    """A sum of two numbers below 100, or with one or two of three digits when `big`."""
    a, b = _sum(rng, split, big)
    return one(Exchange("add3" if big else "add", rng.choice(ADD).format(a=a, b=b), worked(a, "+", b), str(a + b), 1.2))


def add3(rng: random.Random, split: Split) -> Dialogue:
    """A sum with three-digit operands."""
    return add(rng, split, big=True)


def subtract(rng: random.Random, split: Split) -> Dialogue:
    """A difference of two numbers below 100 that is not negative."""
    a, b = _difference(rng, split)
    return one(Exchange("subtract", rng.choice(SUBTRACT).format(a=a, b=b), worked(a, "-", b), str(a - b), 1.2))


def times(rng: random.Random, split: Split) -> Dialogue:
    """An entry of the times table."""

    def make() -> tuple[str, tuple[int, int, str]]:
        a, b, phrase = rng.randint(0, 12), rng.randint(0, 12), rng.choice(TIMES)
        return f"times {a} {b} {phrase}", (a, b, phrase)

    a, b, phrase = split.draw(make)
    return one(Exchange("times", phrase.format(a=a, b=b), f"{a} x {b} = {a * b}", str(a * b), 2.0))


def divide(rng: random.Random, split: Split) -> Dialogue:
    """A division that leaves no rest, inside the times table."""

    def make() -> tuple[str, tuple[int, int, str]]:
        b, c, phrase = rng.randint(1, 12), rng.randint(1, 12), rng.choice(DIVIDE)
        return f"divide {b * c} {b} {phrase}", (b * c, b, phrase)

    a, b, phrase = split.draw(make)
    return one(Exchange("divide", phrase.format(a=a, b=b), f"{a} / {b} = {a // b}", str(a // b), 2.0))


def word_problem(rng: random.Random, split: Split) -> Dialogue:
    """A sum, difference or product told as a small situation."""
    name, pronoun, _ = world.person(rng)
    things = rng.choice(facts.COUNTABLE)
    pick = rng.random()
    if pick < 0.45:
        (a, b), sign, phrases = _sum(rng, split), "+", MORE
        result = a + b
    elif pick < 0.9:
        (a, b), sign, phrases = _difference(rng, split), "-", LESS
        result = a - b
    else:
        phrase = rng.choice(EACH)

        def make() -> tuple[str, tuple[int, int]]:
            a, b = rng.randint(2, 12), rng.randint(2, 12)
            return f"times {a} {b} {phrase}", (a, b)

        (a, b), sign, phrases = split.draw(make), "x", [phrase]
        result = a * b
    text = rng.choice(phrases).format(n=name, p=pronoun, P=pronoun.capitalize(), a=a, b=b, t=things)
    return one(
        Exchange("word_problem", text, f"{worked(a, sign, b) if sign in '+-' else f'{a} {sign} {b} = {result}'} {things}", str(result), 1.2)
    )


def compare(rng: random.Random, split: Split) -> Dialogue:
    """Which of two numbers is larger or smaller."""

    def make() -> tuple[str, tuple[int, int]]:
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        return f"compare {min(a, b)} {max(a, b)}", (a, b if b != a else a + 1)

    a, b = split.draw(make)
    larger = rng.random() < 0.6
    word = rng.choice(("larger", "bigger", "greater")) if larger else "smaller"
    best, other = (max(a, b), min(a, b)) if larger else (min(a, b), max(a, b))
    return one(Exchange("compare", f"Which is {word}, {a} or {b}?", f"{best} is {word} than {other}.", f"{best} is", 1.5))


def parity(rng: random.Random, split: Split) -> Dialogue:
    """Even or odd."""

    def make() -> tuple[str, int]:
        a = rng.randint(0, 199)
        return f"parity {a}", a

    a = split.draw(make)
    word = "even" if a % 2 == 0 else "odd"
    return one(
        Exchange("parity", rng.choice((f"Is {a} even or odd?", f"Is {a} an even number or an odd number?")), f"{a} is {word}.", word)
    )


def next_number(rng: random.Random, split: Split) -> Dialogue:
    """The number after or before another, or a count up to a limit."""

    def make() -> tuple[str, int]:
        a = rng.randint(1, 199)
        return f"next {a}", a

    a = split.draw(make)
    pick = rng.random()
    if pick < 0.4:
        return one(Exchange("next_number", f"What number comes after {a}?", f"{a + 1} comes after {a}.", f"{a + 1} comes"))
    if pick < 0.7:
        return one(Exchange("next_number", f"What number comes before {a}?", f"{a - 1} comes before {a}.", f"{a - 1} comes"))
    start, length = rng.randint(1, 30), rng.randint(3, 10)
    start = 1 if rng.random() < 0.6 else start
    count = ", ".join(str(i) for i in range(start, start + length))
    return one(Exchange("next_number", f"Count from {start} to {start + length - 1}.", count, count))
