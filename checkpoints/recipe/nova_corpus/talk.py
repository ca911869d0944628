"""Talk: greetings, who the model is, facts about the small world, honest ignorance, and things remembered from earlier turns.

The key of a fact is the fact with its phrasing: evaluation asks known facts in words that training never used for that fact.
"""

import random

from nova_corpus import facts, world
from nova_corpus.base import Dialogue, Exchange, Split

IDENTITY = (
    (
        "Who are you?|What are you?|Tell me about yourself.|Introduce yourself.|who are you|What is Nova?",
        "I am Nova, a small language model that comes with NovaJAX.",
    ),
    ("What is your name?|What's your name?|What should I call you?|Do you have a name?|your name?", "My name is Nova."),
    (
        "What can you do?|How can you help me?|Help|help|What do you know?|What are you good at?|What can I ask you?",
        "I can tell short stories, answer simple questions, do small sums and write JSON.",
    ),
    (
        "Who made you?|Who trained you?|Where do you come from?|Who built you?",
        "I was trained by the NovaJAX project on text that its own program wrote.",
    ),
    ("Are you a human?|Are you a person?|Are you alive?|are you human", "No, I am Nova, a small language model."),
    (
        "How big are you?|Are you a big model?|How many parameters do you have?|Are you smart?",
        "I am very small. I have a few million parameters, so I can make mistakes.",
    ),
    (
        "What is NovaJAX?|What does NovaJAX do?|Tell me about NovaJAX.",
        "NovaJAX is an engine that serves language models with JAX. I am the small model inside it.",
    ),
    ("Do you speak other languages?|Can you speak French?|Do you speak German?", "I only know a little English."),
)
GREETINGS = (
    ("Hi|Hello|Hey|Hi!|Hello!|Hey there|hi|hello|Hi there!|Hello Nova|Hi Nova!|hey", "Hello! How can I help you?"),
    ("Good morning|Good morning!|Good morning, Nova.", "Good morning! How can I help you?"),
    ("Good evening|Good evening!", "Good evening! How can I help you?"),
    ("How are you?|How are you today?|How do you do?|how are you", "I am fine, thank you. How can I help you?"),
    ("Thank you|Thanks|Thank you!|Thanks a lot!|thanks|Thank you very much.|Great, thanks.", "You are welcome!"),
    ("Bye|Goodbye|Bye!|See you later.|Goodbye!|bye|Good night", "Goodbye! See you soon."),
    ("Sorry|I am sorry.|My mistake.", "That is all right."),
    ("You are great!|Well done!|Good job!|I like you.|You are nice.", "Thank you! I am glad that I could help."),
    ("Yes|No|Ok|Okay|yes|no|ok", "All right. What would you like to do next?"),
)
UNKNOWN = [
    ("What do you think about {x}?"),
    "Tell me about {x}.",
    "Explain {x}.",
    "What do you know about {x}?",
    "Can you explain {x} to me?",
    "I want to learn about {x}.",
    "Write an essay about {x}.",
    "Give me a summary of {x}.",
    "Teach me about {x}.",
]
DO_NOT_KNOW = "I do not know that. I am a small model and know only a few things."


def greeting(rng: random.Random, split: Split) -> Dialogue:
    """Hello, thanks, goodbye."""
    users, reply = rng.choice(GREETINGS)
    return Dialogue((Exchange("greeting", rng.choice(users.split("|")), reply, reply),))


def identity(rng: random.Random, split: Split) -> Dialogue:
    """Who the model is; a system turn may give it another name."""
    users, reply = rng.choice(IDENTITY)
    user = rng.choice(users.split("|"))
    system = ""
    if rng.random() < 0.25:
        system = rng.choice(
            ("You are Nova, a helpful assistant.", "You are a helpful assistant.", "You are Nova.", "Answer briefly.", "Be friendly.")
        )
    elif rng.random() < 0.25:
        name = world.any_name(rng)
        system = rng.choice((f"Your name is {name}.", f"You are {name}, a helpful assistant.", f"You are called {name}."))
        user, reply = rng.choice(
            (
                ("Who are you?", f"I am {name}, a small language model."),
                ("What is your name?", f"My name is {name}."),
                ("What's your name?", f"My name is {name}."),
                ("Hello, who are you?", f"I am {name}, a small language model."),
            )
        )
    return Dialogue((Exchange("identity", user, reply, reply),), system=system)


def unknown(rng: random.Random, split: Split) -> Dialogue:
    """Topics outside the small world get an honest answer."""

    def make() -> tuple[str, str]:
        user = rng.choice(UNKNOWN).format(x=rng.choice(facts.UNKNOWN_TOPICS) if rng.random() < 0.7 else world.synthetic_name(rng))
        return f"unknown {user}", user

    return Dialogue((Exchange("unknown", split.draw(make), DO_NOT_KNOW, DO_NOT_KNOW),))


def _fact(rng: random.Random) -> tuple[str, str, str]:
    """(question, reply, the word that must be in the reply)."""
    pick = rng.randint(0, 13)
    if pick <= 1:
        country, city = rng.choice(list(facts.CAPITALS.items()))
        if rng.random() < 0.7:
            q = rng.choice(
                (
                    f"What is the capital of {country}?",
                    f"Which city is the capital of {country}?",
                    f"capital of {country}?",
                    f"Name the capital of {country}.",
                    f"Tell me the capital of {country}.",
                )
            )
            return q, f"The capital of {country} is {city}.", city
        return (
            rng.choice((f"In which country is {city}?", f"Where is {city}?", f"{city} is the capital of which country?")),
            f"{city} is in {country}.",
            country,
        )
    if pick <= 3:
        word, other = rng.choice(facts.OPPOSITE_QUESTIONS)
        q = rng.choice(
            (
                f"What is the opposite of {word}?",
                f"opposite of {word}?",
                f"Give me the opposite of {word}.",
                f"Which word is the opposite of {word}?",
                f'What is the opposite of "{word}"?',
            )
        )
        return q, f"The opposite of {word} is {other}.", other
    if pick == 4:
        animal, sound = rng.choice(list(facts.SOUNDS.items()))
        return (
            rng.choice(
                (
                    f"What sound does {world.article(animal)} make?",
                    f"What does {world.article(animal)} do to make a sound?",
                    f"Which sound does {world.article(animal)} make?",
                )
            ),
            f"{world.article(animal).capitalize()} {sound}.",
            sound,
        )
    if pick == 5:
        animal, young = rng.choice(list(facts.YOUNG.items()))
        return (
            rng.choice(
                (
                    f"What is a young {animal} called?",
                    f"What is a baby {animal} called?",
                    f"What do you call a young {animal}?",
                    f"What is the name for a baby {animal}?",
                )
            ),
            f"A young {animal} is called {world.article(young)}.",
            young,
        )
    if pick == 6:
        animal, legs = rng.choice(list(facts.LEGS.items()))
        word = "no" if legs == 0 else facts.NUMBER_WORDS[legs]
        return (
            rng.choice(
                (
                    f"How many legs does {world.article(animal)} have?",
                    f"{world.article(animal)}, how many legs?",
                    f"Tell me how many legs {world.article(animal)} has.",
                )
            ),
            f"{world.article(animal).capitalize()} has {word} legs.",
            f"{word} legs",
        )
    if pick == 7:
        thing, colour = rng.choice(list(facts.COLOUR_OF.items()))
        return (
            rng.choice(
                (
                    f"What colour is {thing}?",
                    f"Tell me the colour of {thing}.",
                    f"What is the colour of {thing}?",
                    f"What color is {thing}?",
                )
            ),
            f"The colour of {thing} is {colour}.",
            colour,
        )
    if pick == 8:
        animal, home = rng.choice(list(facts.HOMES.items()))
        place = home if home == "water" else world.article(home)
        return (
            rng.choice(
                (
                    f"Where does {world.article(animal)} live?",
                    f"What is the home of {world.article(animal)}?",
                    f"What does {world.article(animal)} live in?",
                )
            ),
            f"{world.article(animal).capitalize()} lives in {place}.",
            home,
        )
    if pick == 9:
        job, work = rng.choice(list(facts.JOBS.items()))
        if rng.random() < 0.5:
            return (
                rng.choice((f"What does a {job} do?", f"What is the work of a {job}?", f"What is the job of a {job}?")),
                f"A {job} {work}.",
                work,
            )
        return rng.choice((f"Who {work}?", f"Which person {work}?")), f"A {job} {work}.", job
    if pick == 10:
        names, word = rng.choice(((facts.DAYS, "day"), (facts.MONTHS, "month"), (facts.SEASONS, "season")))
        i = rng.randrange(len(names))
        if rng.random() < 0.6:
            return (
                rng.choice(
                    (f"What {word} comes after {names[i]}?", f"Which {word} follows {names[i]}?", f"What is the {word} after {names[i]}?")
                ),
                f"{names[(i + 1) % len(names)]} comes after {names[i]}.",
                names[(i + 1) % len(names)] + " comes",
            )
        return (
            rng.choice(
                (f"What {word} comes before {names[i]}?", f"Which {word} is before {names[i]}?", f"What is the {word} before {names[i]}?")
            ),
            f"{names[i - 1]} comes before {names[i]}.",
            names[i - 1] + " comes",
        )
    if pick == 11:
        tail, (place, number, what) = rng.choice(list(facts.COUNTS.items()))
        return (
            rng.choice((f"How many {tail}?", f"Do you know how many {tail}?", f"how many {tail}")),
            f"{place.capitalize()} has {number} {what}.",
            str(number),
        )
    if pick == 12:
        thing, text = rng.choice(list(facts.DEFINITIONS.items()))
        return (
            rng.choice((f"What is {thing}?", f"what is {thing}", f"Can you tell me what {thing} is?", f"Define {thing}.")),
            f"{thing[0].upper() + thing[1:]} is {text}.",
            text,
        )
    category = rng.choice([c for c in facts.CATEGORIES if c != "musical instrument"])
    thing = rng.choice(facts.CATEGORIES[category])
    right = rng.random() < 0.5
    other = category if right else rng.choice([c for c in facts.CATEGORIES if thing not in facts.CATEGORIES[c]])
    q = f"Is {thing if category in ('colour', 'day', 'month', 'city') else world.article(thing)} {world.article(other)}?"
    if right:
        return q, f"Yes, {thing} is {world.article(category)}.", "Yes"
    return q, f"No, {thing} is {world.article(category)}.", "No"


def fact(rng: random.Random, split: Split) -> Dialogue:
    """A question about the small world."""

    def make() -> tuple[str, tuple[str, str, str]]:
        value = _fact(rng)
        return f"fact {value[0]}", value

    q, reply, answer = split.draw(make)
    return Dialogue((Exchange("fact", q, reply, answer),))


def remember(rng: random.Random, split: Split) -> Dialogue:
    """The user says something about himself; a later turn asks for it."""
    name = world.any_name(rng)
    told: list[tuple[str, str, list[tuple[str, str, str]]]] = []
    told.append(
        (
            rng.choice(
                (
                    f"My name is {name}.",
                    f"I am {name}.",
                    f"Hi, I am {name}.",
                    f"Hello! My name is {name}.",
                    f"You can call me {name}.",
                    f"my name is {name}",
                )
            ),
            f"Hello {name}! How can I help you?",
            [
                (
                    rng.choice(("What is my name?", "What's my name?", "Who am I?", "Do you remember my name?", "what is my name")),
                    f"Your name is {name}.",
                    name,
                )
            ],
        )
    )
    colour = rng.choice(world.COLOURS)
    told.append(
        (
            rng.choice((f"My favourite colour is {colour}.", f"I like the colour {colour}.", f"I love {colour}.")),
            f"{colour.capitalize()} is a lovely colour.",
            [
                (
                    rng.choice(("What is my favourite colour?", "Which colour do I like?", "What colour do I like?")),
                    f"Your favourite colour is {colour}.",
                    colour,
                )
            ],
        )
    )
    animal, pet = rng.choice(world.ANIMALS[8:]), rng.choice(world.PET_NAMES) if rng.random() < 0.6 else world.synthetic_name(rng)
    told.append(
        (
            rng.choice((f"I have a {animal} named {pet}.", f"I have a {animal} called {pet}.", f"My {animal} is called {pet}."))
            if animal[0] not in "aeiou"
            else f"I have an {animal} named {pet}.",
            f"{pet} is a nice name for {world.article(animal)}.",
            [
                (rng.choice((f"What is my {animal} called?", f"What is the name of my {animal}?")), f"Your {animal} is called {pet}.", pet),
                (rng.choice(("What animal do I have?", "Which pet do I have?")), f"You have {world.article(animal)} named {pet}.", animal),
            ],
        )
    )
    city = rng.choice(facts.CITIES) if rng.random() < 0.7 else world.synthetic_name(rng)
    told.append(
        (
            rng.choice((f"I live in {city}.", f"I am from {city}.", f"My home is in {city}.")),
            f"{city} sounds like a nice place.",
            [(rng.choice(("Where do I live?", "In which city do I live?", "Where am I from?")), f"You live in {city}.", city)],
        )
    )
    age = rng.randint(5, 99)
    told.append(
        (
            rng.choice((f"I am {age} years old.", f"My age is {age}.")),
            f"{age} is a good age.",
            [(rng.choice(("How old am I?", "What is my age?")), f"You are {age} years old.", str(age))],
        )
    )
    chosen = rng.sample(told, rng.choice((1, 1, 2, 2, 3)))
    if rng.random() < 0.2:  # everything in one message
        question = rng.choice(chosen[0][2])
        return Dialogue((Exchange("remember", f"{chosen[0][0]} {question[0]}", question[1], question[2]),))
    exchanges = [Exchange("remember", user, reply, reply) for user, reply, _ in chosen]
    rng.shuffle(exchanges)
    if rng.random() < 0.4:
        exchanges += (fact if rng.random() < 0.6 else greeting)(rng, split).exchanges
    for _, _, asks in rng.sample(chosen, len(chosen)):
        question, reply, answer = rng.choice(asks)
        exchanges.append(Exchange("recall", question, reply, answer))
    return Dialogue(tuple(exchanges))
