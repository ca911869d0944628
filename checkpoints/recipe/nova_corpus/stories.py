"""Short stories from a small grammar, requests for them, and questions about them.

A story is drawn as a Plot first (who, where, what, who helps); every sentence reads the same Plot, so that names,
pronouns and objects agree.
The key is hero, animal and object together: held-out stories ask for combinations that training never tells.
"""

import random
from dataclasses import dataclass

from nova_corpus import world
from nova_corpus.base import Dialogue, Exchange, Split


@dataclass(frozen=True)
class Plot:
    """Everything that a story must keep consistent."""

    animal: str
    name: str
    he: str
    his: str
    trait: str
    home: str
    hobby: str
    thing: str
    friend_animal: str
    friend: str
    first: str
    second: str
    found: str
    time: str
    kind: str

    @property
    def him(self) -> str:
        return "him" if self.he == "he" else "her"

    @property
    def He(self) -> str:
        return self.he.capitalize()


KINDS = ("lost", "lost", "gift", "help", "storm", "wish")


def draw_plot(rng: random.Random, split: Split) -> Plot:
    """A plot of this split."""

    def make() -> tuple[str, Plot]:
        he, his = rng.choice((("he", "his"), ("she", "her")))
        animal, friend_animal = rng.sample(world.ANIMALS, 2)
        pool = world.PET_NAMES + (list(world.BOYS if he == "he" else world.GIRLS))
        name, friend = rng.sample(pool, 2)
        if rng.random() < 0.15:
            name = world.synthetic_name(rng)
        first, second, found = rng.sample(world.SPOTS, 3)
        plot = Plot(
            animal,
            name,
            he,
            his,
            rng.choice(world.TRAITS),
            rng.choice(world.PLACES_TO_LIVE),
            rng.choice(world.HOBBIES),
            rng.choice(world.OBJECTS),
            friend_animal,
            friend,
            first,
            second,
            found,
            rng.choice(world.TIMES),
            rng.choice(KINDS),
        )
        return f"story {plot.name} {plot.animal} {plot.thing}", plot

    return split.draw(make)


def opening(p: Plot, rng: random.Random) -> str:
    """Who and where."""
    a_trait = world.article(p.trait)
    return rng.choice(
        (
            f"Once upon a time, {a_trait} {p.animal} named {p.name} lived {p.home}. {p.He} loved to {p.hobby}.",
            f"There once was {a_trait} {p.animal} called {p.name}. {p.He} lived {p.home} and loved to {p.hobby}.",
            f"{p.name} was {a_trait} {p.animal} who lived {p.home}. Every day {p.he} liked to {p.hobby}.",
        )
    )


def lost(p: Plot, rng: random.Random) -> list[str]:
    """Something is lost and found together."""
    return [
        f"{p.time}, {p.name} could not find {p.his} {p.thing}.",
        f"{p.He} looked {p.first}, but the {p.thing} was not there. {p.He} looked {p.second}, but it was not there either.",
        f'{p.friend} the {p.friend_animal} came by and asked, "Why are you so sad?"',
        f'"I have lost my {p.thing}," said {p.name}. "Then we will look together," said {p.friend}.',
        f"They looked for a long time, and at last {p.friend} found the {p.thing} {p.found}.",
        rng.choice(
            (
                f"{p.name} was so happy that {p.he} gave {p.friend} a big hug.",
                f'"Thank you, {p.friend}!" said {p.name}, and they laughed all the way home.',
            )
        ),
    ]


def gift(p: Plot, rng: random.Random) -> list[str]:
    """A present for a friend."""
    return [
        f"{p.time}, {p.name} heard that it was the birthday of {p.friend} the {p.friend_animal}.",
        f"{p.name} wanted to give {p.friend} a {p.thing}, but {p.he} had no money.",
        f"So {p.he} worked hard all day {p.first}, and in the evening {p.he} had made a {p.thing} with {p.his} own hands.",
        f'{p.name} carried it to {p.friend} and said, "Happy birthday!"',
        rng.choice(
            (
                f'"It is the best {p.thing} in the world," said {p.friend}.',
                f'{p.friend} smiled and said, "I will keep this {p.thing} for ever."',
            )
        ),
        "That night they shared a cake and watched the stars.",
    ]


def help_(p: Plot, rng: random.Random) -> list[str]:
    """A stranger in need."""
    return [
        f"{p.time}, {p.name} went for a walk and heard someone cry {p.first}.",
        f'It was a little {p.friend_animal} named {p.friend}. "I cannot find my way home," said {p.friend}.',
        f'"Do not be afraid," said {p.name}. "I will help you."',
        f"{p.He} took {p.his} {p.thing}, and they walked until they saw a small house.",
        f"The family of {p.friend} was waiting at the door. They thanked {p.name} and gave {p.him} warm soup.",
        rng.choice((f"From that day on, {p.name} and {p.friend} were good friends.", f"{p.name} walked home with a smile.")),
    ]


def storm(p: Plot, rng: random.Random) -> list[str]:
    """Shelter in a storm."""
    return [
        f"{p.time}, dark clouds came and a strong wind began to blow.",
        f"The wind took the {p.thing} of {p.name} and carried it away. {p.He} ran after it in the rain.",
        f'{p.friend} the {p.friend_animal} saw {p.him} and called, "Come inside! You can stay with me."',
        "They sat by the fire, drank hot tea and told each other stories until the storm was over.",
        f"In the morning the sun was shining, and the {p.thing} was lying {p.found}.",
        rng.choice((f'"What a lucky day," said {p.name}.', f"{p.name} thanked {p.friend} and went home happy.")),
    ]


def wish(p: Plot, rng: random.Random) -> list[str]:
    """A wish that needs patience."""
    return [
        f"More than anything, {p.name} wanted a {p.thing}.",
        f"{p.time}, {p.he} met {p.friend}, an old {p.friend_animal} who knew many things.",
        f'"Plant this seed and wait," said {p.friend}. {p.name} planted the seed {p.first} and gave it water every day.',
        f"Days went by and nothing happened, but {p.name} did not give up.",
        f"Then a tall flower grew, and inside it lay a shining {p.thing}.",
        rng.choice((f"{p.name} learned that good things take time.", f'"It was worth the wait," said {p.name}.')),
    ]


PARTS = {"lost": lost, "gift": gift, "help": help_, "storm": storm, "wish": wish}
SUMMARY = {
    "lost": "{n} the {a} lost {his} {t}, and {f} the {fa} found it {found}.",
    "gift": "{n} the {a} made a {t} as a birthday present for {f} the {fa}.",
    "help": "{n} the {a} helped {f}, a little {fa}, to find the way home.",
    "storm": "{n} the {a} lost {his} {t} in a storm and stayed with {f} the {fa}.",
    "wish": "{n} the {a} wanted a {t} and got it by being patient.",
}


def tell(p: Plot, rng: random.Random) -> str:
    """The whole story, one paragraph."""
    return " ".join([opening(p, rng), *PARTS[p.kind](p, rng)])


def summary(p: Plot) -> str:
    """One sentence."""
    return SUMMARY[p.kind].format(n=p.name, a=p.animal, his=p.his, t=p.thing, f=p.friend, fa=p.friend_animal, found=p.found)


def ask(p: Plot, rng: random.Random) -> str:
    """A request that names some parts of the plot."""
    a = world.article(p.animal)
    options = [
        f"Tell me a story about {a}.",
        f"Tell me a story about {a}.",
        f"Tell me a short story about {a}.",
        f"Write a short story about {a}.",
        f"Tell me a story about {a} named {p.name}.",
        f"Tell me a story about {p.name} the {p.animal}.",
        f"Write a story about {a} and {world.article(p.thing)}.",
        f"Tell me a story about {a} and {world.article(p.friend_animal)}.",
        f"Tell me a story about {world.article(p.trait)} {p.animal}.",
        f"Can you tell me a story with {a} called {p.name} and {world.article(p.thing)}?",
        "Tell me a story.",
        f"Tell me a story about {world.article(p.thing)}.",
        f"I would like a story about {a}.",
    ]
    return rng.choice(options)


def questions(p: Plot, rng: random.Random) -> list[Exchange]:
    """One question about the story that its text answers."""
    options = [
        Exchange(
            "story_question",
            rng.choice((f"What was the name of the {p.animal}?", f"What was the {p.animal} called?")),
            f"The {p.animal} was called {p.name}.",
            p.name,
        ),
        Exchange("story_question", f"Where did {p.name} live?", f"{p.name} lived {p.home}.", p.home),
        Exchange(
            "story_question",
            rng.choice((f"What did {p.name} love to do?", f"What did {p.name} like to do?")),
            f"{p.name} loved to {p.hobby}.",
            p.hobby,
        ),
        Exchange("story_question", f"Who was {p.friend}?", f"{p.friend} was {world.article(p.friend_animal)}.", p.friend_animal),
        Exchange(
            "story_summary",
            rng.choice(
                ("Sum up the story in one sentence.", "Give me a one sentence summary.", "What is the story about?", "Summarise the story.")
            ),
            summary(p),
            summary(p),
        ),
    ]
    if p.kind == "lost":
        options.append(Exchange("story_question", f"Where was the {p.thing}?", f"The {p.thing} was {p.found}.", p.found))
        options.append(Exchange("story_question", f"What did {p.name} lose?", f"{p.name} lost {p.his} {p.thing}.", p.thing))
    return rng.sample(options, rng.choice((1, 1, 2)))


def story(rng: random.Random, split: Split) -> Dialogue:
    """A story on request, sometimes with questions after it."""
    p = draw_plot(rng, split)
    first = Exchange("story", ask(p, rng), tell(p, rng), p.animal, 0.7, free=True)
    return Dialogue((first, *(questions(p, rng) if rng.random() < 0.5 else ())))


def story_in_prompt(rng: random.Random, split: Split) -> Dialogue:
    """The story stands in the prompt; the reply sums it up or answers a question about it."""
    p = draw_plot(rng, split)
    q = questions(p, rng)[0]
    form = rng.choice(("Read this story: {s}\n{q}", "{s}\n\n{q}", "{q}\n\n{s}"))
    return Dialogue((Exchange(q.kind, form.format(s=tell(p, rng), q=q.user), q.assistant, q.answer),))


def plain_story(rng: random.Random, split: Split) -> Dialogue:
    """A story as bare text, for plain completion."""
    return Dialogue((), plain=tell(draw_plot(rng, split), rng))
