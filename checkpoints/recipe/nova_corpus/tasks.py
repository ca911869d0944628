"""Small jobs on text given in the prompt: repeat, list, sort, count, spell, and answer questions about a short paragraph.

The key is the material of the job, so that held-out prompts carry material that training never showed.
"""

import random

from nova_corpus import facts, world
from nova_corpus.base import Dialogue, Exchange, Split, one

WORDS = sorted(
    {
        *world.ANIMALS,
        *world.OBJECTS,
        *world.FRUITS,
        *world.VEGETABLES,
        *world.COLOURS,
        *world.TOOLS,
        *world.CLOTHES,
        *facts.OPPOSITES,
        *facts.OPPOSITES.values(),
    }
)


def repeat(rng: random.Random, split: Split) -> Dialogue:
    """Say the given words."""

    def make() -> tuple[str, str]:
        words = [rng.choice(WORDS) if rng.random() < 0.75 else world.synthetic_name(rng) for _ in range(rng.randint(1, 7))]
        text = " ".join(words)
        return f"repeat {text}", text

    text = split.draw(make)
    user = rng.choice(
        (
            f"Repeat: {text}",
            f"Say: {text}",
            f"Repeat after me: {text}",
            f'Repeat "{text}".',
            f"Please repeat this: {text}",
            f'Say "{text}".',
        )
    )
    return one(Exchange("repeat", user, text, text))


def copy(rng: random.Random, split: Split) -> Dialogue:
    """Say many words, most of them unrelated: copying in its densest form."""

    def make() -> tuple[str, str]:
        words = [rng.choice(WORDS) if rng.random() < 0.7 else world.any_name(rng) for _ in range(rng.randint(4, 30))]
        text = rng.choice((" ", ", ")).join(words)
        return f"repeat {text}", text

    text = split.draw(make)
    return one(Exchange("repeat", rng.choice(("Repeat: ", "Say: ", "Copy this text: ")) + text, text, text))


def sort(rng: random.Random, split: Split) -> Dialogue:
    """Sort a few numbers or words."""

    def make() -> tuple[str, tuple[list[str], list[str], str]]:
        if rng.random() < 0.6:
            numbers = rng.sample(range(100), rng.randint(3, 5))
            down = rng.random() < 0.25
            return f"sort {numbers}", (
                [str(n) for n in numbers],
                [str(n) for n in sorted(numbers, reverse=down)],
                "from largest to smallest" if down else "from smallest to largest",
            )
        words = rng.sample(rng.choice((world.ANIMALS, world.FRUITS, world.COLOURS, world.VEGETABLES)), rng.randint(3, 4))
        return f"sort {words}", (words, sorted(words), "by the alphabet")

    given, result, how = split.draw(make)
    user = rng.choice((f"Sort {', '.join(given)} {how}.", f"Sort these {how}: {', '.join(given)}"))
    if how == "from smallest to largest" and rng.random() < 0.5:
        user = rng.choice(
            (f"Sort the numbers {', '.join(given)}.", f"Sort: {', '.join(given)}", f"Put these numbers in order: {', '.join(given)}")
        )
    return one(Exchange("sort", user, ", ".join(result), ", ".join(result), 1.5))


def reverse(rng: random.Random, split: Split) -> Dialogue:
    """A list of words backwards, or its first or last entry."""

    def make() -> tuple[str, list[str]]:
        words = rng.sample(WORDS, rng.randint(3, 5))
        return f"reverse {words}", words

    words = split.draw(make)
    pick = rng.random()
    if pick < 0.4:
        return one(
            Exchange(
                "list",
                rng.choice((f"Reverse this list: {', '.join(words)}", f"Reverse the list {', '.join(words)}.")),
                ", ".join(words[::-1]),
                ", ".join(words[::-1]),
            )
        )
    if pick < 0.6:
        return one(
            Exchange(
                "list", f"What is the first word in this list: {', '.join(words)}?", f"The first word is {words[0]}.", f"is {words[0]}"
            )
        )
    if pick < 0.8:
        return one(
            Exchange(
                "list", f"What is the last word in this list: {', '.join(words)}?", f"The last word is {words[-1]}.", f"is {words[-1]}"
            )
        )
    return one(
        Exchange(
            "list",
            f"How many words are in this list: {', '.join(words)}?",
            f"There are {facts.NUMBER_WORDS[len(words)]} words in the list.",
            facts.NUMBER_WORDS[len(words)],
        )
    )


def spell(rng: random.Random, split: Split) -> Dialogue:
    """Letters of a word; every word of the list is learned, in most phrasings."""

    def make() -> tuple[str, tuple[str, str]]:
        word = rng.choice(WORDS)
        user = rng.choice((f"Spell {word}.", f"Spell the word {word}.", f'How do you spell "{word}"?', f"How do you spell {word}?"))
        return f"spell {user}", (user, word)

    user, word = split.draw(make)
    return one(Exchange("spell", user, "-".join(word), "-".join(word)))


def name_some(rng: random.Random, split: Split) -> Dialogue:
    """Name N things of a kind: any right ones in any order."""
    category = rng.choice(sorted(facts.CATEGORIES))
    count = rng.randint(2, 5)
    items = rng.sample(facts.CATEGORIES[category], count)
    number = rng.choice((str(count), facts.NUMBER_WORDS[count]))
    user = rng.choice(("Name {n} {c}.", "List {n} {c}.", "Give me {n} {c}.", "Tell me {n} {c}.", "Can you name {n} {c}?")).format(
        n=number, c=facts.PLURAL_CATEGORY[category]
    )
    if category in ("day", "month") and rng.random() < 0.5:
        names = facts.DAYS if category == "day" else facts.MONTHS
        period = "week" if category == "day" else "year"
        text = ", ".join(names)
        return one(
            Exchange(
                "name_all",
                rng.choice(
                    (
                        f"Name the {category}s of the {period}.",
                        f"List all {category}s of the {period}.",
                        f"What are the {category}s of the {period}?",
                    )
                ),
                text,
                text,
            )
        )
    if rng.random() < 0.3:
        lines = "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
        return one(Exchange("name_some", user.rstrip(".?") + " as a numbered list.", lines, category, free=True))
    return one(Exchange("name_some", user, ", ".join(items), category, free=True))


def extract(rng: random.Random, split: Split) -> Dialogue:
    """Who has what: the answer stands in the paragraph."""

    def make() -> tuple[str, list[tuple[str, str, str]]]:
        rows: list[tuple[str, str, str]] = []
        things = rng.sample(world.OBJECTS + world.FRUITS, 4)
        colours = rng.sample(world.COLOURS, 4)
        while len(rows) < rng.randint(2, 4):
            name = world.any_name(rng)
            if name not in [r[0] for r in rows]:
                rows.append((name, colours[len(rows)], things[len(rows)]))
        return f"extract {rows}", rows

    rows = split.draw(make)
    text = " ".join(f"{name} has {world.article(colour)} {thing}." for name, colour, thing in rows)
    name, colour, thing = rng.choice(rows)
    question, reply, answer = rng.choice(
        (
            (f"What does {name} have?", f"{name} has {world.article(colour)} {thing}.", f"{colour} {thing}"),
            (f"Who has the {thing}?", f"{name} has the {thing}.", name),
            (f"What colour is the {thing}?", f"The {thing} is {colour}.", colour),
        )
    )
    form = rng.choice(("{t} {q}", "Read this: {t}\n{q}", "{t}\nQuestion: {q}", "Text: {t} {q}"))
    return one(Exchange("extract", form.format(t=text, q=question), reply, answer))


def letters(rng: random.Random, split: Split) -> Dialogue:
    """First letter, last letter, or upper case of a word."""

    def make() -> tuple[str, tuple[str, str, str]]:
        word = rng.choice(WORDS)
        question, reply, answer = rng.choice(
            (
                (f"What is the first letter of {word}?", f"The first letter of {word} is {word[0]}.", f"is {word[0]}"),
                (f"What is the last letter of {word}?", f"The last letter of {word} is {word[-1]}.", f"is {word[-1]}"),
                (f"Write {word} in capital letters.", word.upper(), word.upper()),
            )
        )
        return f"letters {question}", (question, reply, answer)

    question, reply, answer = split.draw(make)
    return one(Exchange("letters", question, reply, answer))
