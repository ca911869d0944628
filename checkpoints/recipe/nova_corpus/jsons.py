"""JSON on request: a dozen shapes, the values given in the prompt and copied into valid JSON.

`answer` holds the expected JSON text; a reply is right when it parses to the same value. The key is the pair of main values.
"""

import json
import random
from collections.abc import Callable

from nova_corpus import facts, world
from nova_corpus.base import Dialogue, Exchange, Split, one

ASK = [
    ("Give me JSON for"),
    "Write JSON for",
    "Make a JSON object for",
    "JSON for",
    "Return JSON for",
    "Create a JSON object for",
    "I need JSON for",
    "Please give me JSON for",
    "Output JSON for",
]
ONLY = ("", "", "", " Reply with JSON only.", " Only JSON, please.", " JSON only.")
ADJECTIVES = [
    ("Last"),
    "First",
    "Long",
    "Silent",
    "Golden",
    "Lost",
    "Green",
    "Broken",
    "Little",
    "Secret",
    "Winter",
    "Red",
    "Blue",
    "Old",
    "Happy",
]
NOUNS = [
    ("Garden"),
    "River",
    "Winter",
    "Letter",
    "Tower",
    "Bird",
    "Forest",
    "Road",
    "Star",
    "King",
    "Ship",
    "Song",
    "Island",
    "Mirror",
    "House",
    "Dream",
]
KEYS = ["colour", "size", "shape", "weight", "price", "count", "title", "name", "city", "level", "score", "kind", "place", "year", "tag"]

Shape = Callable[[random.Random], tuple[str, object]]


def _person(rng: random.Random) -> tuple[str, object]:
    name, age, city = world.any_name(rng), rng.randint(1, 99), rng.choice(facts.CITIES) if rng.random() < 0.8 else world.synthetic_name(rng)
    text = rng.choice(
        (
            f"a person named {name}, age {age}, city {city}.",
            f"a person called {name} who is {age} years old and lives in {city}.",
            f"a person: name {name}, age {age}, city {city}.",
            f"{name}, {age}, from {city}, with the keys name, age and city.",
        )
    )
    return text, {"name": name, "age": age, "city": city}


def _person_short(rng: random.Random) -> tuple[str, object]:
    name, age = world.any_name(rng), rng.randint(1, 99)
    return rng.choice(
        (f"a person named {name}, age {age}.", f"a user called {name} who is {age} years old.", f"name {name} and age {age}.")
    ), {"name": name, "age": age}


def _book(rng: random.Random) -> tuple[str, object]:
    title, author, year = f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}", world.any_name(rng), rng.randint(1900, 2030)
    return rng.choice((f"a book: title {title}, author {author}, year {year}.", f"the book {title} by {author} from {year}.")), {
        "title": title,
        "author": author,
        "year": year,
    }


def _product(rng: random.Random) -> tuple[str, object]:
    name, price, stock = rng.choice(world.OBJECTS), rng.randint(1, 99), rng.random() < 0.5
    words = "in stock" if stock else "not in stock"
    return rng.choice((f"a product: {name}, price {price}, {words}.", f"{world.article(name)} that costs {price} and is {words}.")), {
        "product": name,
        "price": price,
        "in_stock": stock,
    }


def _pet(rng: random.Random) -> tuple[str, object]:
    animal, name, age = (
        rng.choice(world.ANIMALS),
        rng.choice(world.PET_NAMES) if rng.random() < 0.6 else world.synthetic_name(rng),
        rng.randint(1, 20),
    )
    return rng.choice((f"a pet: {animal} named {name}, age {age}.", f"{world.article(animal)} called {name} that is {age} years old.")), {
        "name": name,
        "animal": animal,
        "age": age,
    }


def _words(rng: random.Random) -> tuple[str, object]:
    pool = rng.choice((world.FRUITS, world.ANIMALS, world.COLOURS, world.OBJECTS, world.VEGETABLES))
    items = rng.sample(pool, rng.randint(2, 5))
    return rng.choice(
        (f"a list with {world.listing(items)}.", f"the list {', '.join(items)}.", f"an array of {world.listing(items)}.")
    ), items


def _numbers(rng: random.Random) -> tuple[str, object]:
    items = [rng.randint(0, 99) for _ in range(rng.randint(2, 6))]
    return rng.choice(
        (f"the numbers {world.listing([str(i) for i in items])}.", f"a list of the numbers {', '.join(map(str, items))}.")
    ), items


def _point(rng: random.Random) -> tuple[str, object]:
    x, y = rng.randint(0, 99), rng.randint(0, 99)
    return rng.choice((f"a point with x {x} and y {y}.", f"a point at x = {x}, y = {y}.")), {"x": x, "y": y}


def _order(rng: random.Random) -> tuple[str, object]:
    name, items, total = world.any_name(rng), rng.sample(world.FRUITS + world.OBJECTS, rng.randint(1, 4)), rng.randint(1, 99)
    return (
        rng.choice(
            (
                f"an order by {name}: items {world.listing(items)}, total {total}.",
                f"an order: customer {name}, items {', '.join(items)}, total {total}.",
            )
        ),
        {"customer": name, "items": items, "total": total},
    )


def _address(rng: random.Random) -> tuple[str, object]:
    name, country = world.any_name(rng), rng.choice(sorted(facts.CAPITALS))
    city = facts.CAPITALS[country]
    return f"a person named {name} with an address in {city}, {country}.", {"name": name, "address": {"city": city, "country": country}}


def _task(rng: random.Random) -> tuple[str, object]:
    job, done = (
        rng.choice(
            ("wash the car", "buy bread", "call Ana", "feed the cat", "read a book", "water the plants", "clean the room", "write a letter")
        ),
        rng.random() < 0.5,
    )
    return f"a task: {job}, {'done' if done else 'not done'}.", {"task": job, "done": done}


def _free(rng: random.Random) -> tuple[str, object]:
    value: dict[str, object] = {}
    for key in rng.sample(KEYS, rng.randint(2, 4)):
        value[key] = rng.randint(0, 999) if rng.random() < 0.5 else rng.choice((*world.COLOURS, *world.OBJECTS, world.synthetic_name(rng)))
    return f"{'these values' if rng.random() < 0.5 else 'an object'}: {', '.join(f'{k} {v}' for k, v in value.items())}.", value


def _team(rng: random.Random) -> tuple[str, object]:
    people = [world.any_name(rng) for _ in range(rng.randint(2, 3))]
    rows = [{"name": name, "age": rng.randint(1, 99)} for name in people]
    return f"a list of people: {world.listing([f'{r["name"]} is {r["age"]}' for r in rows])}.", rows


SHAPES: tuple[Shape, ...] = (
    _person,
    _person,
    _person_short,
    _book,
    _product,
    _pet,
    _words,
    _numbers,
    _point,
    _order,
    _address,
    _task,
    _free,
    _team,
)


def request(rng: random.Random, split: Split) -> Dialogue:
    """A request whose values are all given."""

    def make() -> tuple[str, tuple[str, object]]:
        text, value = rng.choice(SHAPES)(rng)
        return f"json {json.dumps(value)}", (text, value)

    text, value = split.draw(make)
    user = f"{rng.choice(ASK)} {text}{rng.choice(ONLY)}"
    target = json.dumps(value)
    return one(Exchange("json", user, target, target, 1.5))


def invented(rng: random.Random, split: Split) -> Dialogue:
    """A request that leaves the values to the model: any valid JSON of the shape is right."""
    name, shape = rng.choice((("person", _person), ("pet", _pet), ("book", _book), ("product", _product)))
    user = rng.choice(
        (
            f"Give me JSON for a {name}.",
            f"Write a JSON object for any {name}.",
            f"Make up a {name} and write it as JSON.",
            f"Give me an example of a {name} in JSON.",
        )
    )
    return one(Exchange("json_free", user, json.dumps(shape(rng)[1]), free=True))


def question(rng: random.Random, split: Split) -> Dialogue:
    """JSON first, then a question about one of its values."""

    def make() -> tuple[str, dict[str, object]]:
        value = rng.choice((_person, _pet, _book))(rng)[1]
        return f"json {json.dumps(value)}", value  # type: ignore[return-value]

    value = split.draw(make)
    key = rng.choice(sorted(value))
    user = rng.choice(
        (
            f"What is the {key} in {json.dumps(value)}?",
            f"{json.dumps(value)}\nWhat is the {key}?",
            f"Read this JSON: {json.dumps(value)} What is the value of {key}?",
        )
    )
    return one(Exchange("json_read", user, f"The {key} is {value[key]}.", str(value[key])))
