"""The small world that the bundled model learns: names, things and facts, all as plain data.

Owns the word lists. Invariant: every fact here has one answer. Knows nothing of phrasing, chats or tokens.
"""

import random

GIRLS = [
    ("Ana"),
    "Mira",
    "Clara",
    "Ella",
    "Nina",
    "Lucy",
    "Sara",
    "Maya",
    "Ruth",
    "Alice",
    "Emma",
    "Julia",
    "Rosa",
    "Vera",
    "Iris",
    "Lena",
    "Nora",
    "Olga",
    "Zoe",
    "Ivy",
    "Amina",
    "Priya",
    "Mei",
    "Yuki",
    "Fatima",
    "Leila",
    "Sofia",
    "Hanna",
    "Greta",
    "Marta",
]
BOYS = [
    "Tom",
    "Ben",
    "Leo",
    "Max",
    "Sam",
    "Jack",
    "Paul",
    "Omar",
    "Ivan",
    "Hugo",
    "Felix",
    "Oscar",
    "Noah",
    "Adam",
    "David",
    "Peter",
    "Karl",
    "Luis",
    "Marco",
    "Ravi",
    "Kenji",
    "Ali",
    "Yusuf",
    "Anton",
    "Erik",
    "Oleg",
    "Hans",
    "Diego",
    "Pablo",
    "Theo",
]
PET_NAMES = [
    ("Rill"),
    "Bram",
    "Pip",
    "Tansy",
    "Moss",
    "Fern",
    "Bobbin",
    "Dusty",
    "Hazel",
    "Juniper",
    "Biscuit",
    "Clover",
    "Nettle",
    "Puddle",
    "Sorrel",
    "Tumble",
    "Willow",
    "Ember",
    "Flint",
    "Thistle",
    "Acorn",
    "Barley",
    "Maple",
    "Misty",
]
SYLLABLES = [
    ("ba"),
    "be",
    "bo",
    "da",
    "de",
    "di",
    "do",
    "fa",
    "fi",
    "ga",
    "go",
    "ha",
    "hi",
    "ja",
    "jo",
    "ka",
    "ke",
    "ki",
    "ko",
    "la",
    "le",
    "li",
    "lo",
    "lu",
    "ma",
    "me",
    "mi",
    "mo",
    "na",
    "ne",
    "ni",
    "no",
    "pa",
    "pe",
    "pi",
    "ra",
    "re",
    "ri",
    "ro",
    "sa",
    "se",
    "si",
    "ta",
    "te",
    "ti",
    "to",
    "va",
    "ve",
    "vi",
    "wa",
    "za",
    "ze",
    "zo",
]
FINALS = ("", "", "", "n", "r", "s", "l", "x", "th", "na", "lda", "ck")

ANIMALS = [
    "fox",
    "rabbit",
    "owl",
    "badger",
    "mouse",
    "bear",
    "squirrel",
    "hedgehog",
    "cat",
    "dog",
    "frog",
    "duck",
    "goat",
    "horse",
    "turtle",
    "wolf",
    "deer",
    "otter",
    "hen",
    "sheep",
    "pig",
    "cow",
    "crow",
    "beaver",
    "lion",
    "tiger",
    "monkey",
    "elephant",
    "penguin",
    "dragon",
]
OBJECTS = [
    "lantern",
    "kite",
    "bell",
    "drum",
    "hat",
    "scarf",
    "key",
    "map",
    "basket",
    "boat",
    "ball",
    "book",
    "ring",
    "flute",
    "cup",
    "umbrella",
    "button",
    "mirror",
    "blanket",
    "coat",
    "spoon",
    "whistle",
    "ribbon",
    "candle",
    "box",
]
FRUITS = ["apple", "pear", "plum", "cherry", "lemon", "orange", "banana", "peach", "grape", "melon", "mango", "strawberry"]
VEGETABLES = ["carrot", "onion", "potato", "cabbage", "pea", "bean", "leek", "turnip", "pumpkin", "spinach"]
COLOURS = ["red", "blue", "green", "yellow", "orange", "purple", "brown", "black", "white", "grey", "pink"]
TOOLS = ["hammer", "saw", "rake", "shovel", "ladder", "needle", "axe", "broom", "brush", "drill"]
CLOTHES = ["hat", "coat", "scarf", "shirt", "shoe", "sock", "glove", "boot", "jacket", "dress"]
INSTRUMENTS = ["drum", "flute", "violin", "piano", "trumpet", "guitar", "harp", "bell"]
PLACES_TO_LIVE = [
    ("in a hollow oak"),
    "near a quiet lake",
    "at the edge of the forest",
    "on a green hill",
    "in an old mill",
    "beside a small river",
    "under a stone bridge",
    "in a warm barn",
    "in a cosy cave",
    "by the sea",
    "in a little village",
    "behind the mountain",
]
SPOTS = [
    "under the bed",
    "behind the door",
    "in the tall grass",
    "under a big leaf",
    "near the well",
    "beside the gate",
    "on top of a rock",
    "in the garden",
    "inside an old log",
    "by the pond",
    "under the apple tree",
    "in the barn",
    "at the market",
    "on the bridge",
]
TRAITS = [
    ("brave"),
    "shy",
    "clever",
    "kind",
    "curious",
    "gentle",
    "lazy",
    "cheerful",
    "quiet",
    "hungry",
    "proud",
    "tiny",
    "careful",
    "sleepy",
    "friendly",
]
HOBBIES = [
    ("sing in the morning"),
    "count the stars",
    "swim in the pond",
    "collect smooth stones",
    "bake bread",
    "climb trees",
    "read old books",
    "dance in the rain",
    "paint pictures",
    "plant flowers",
    "watch the clouds",
    "tell jokes",
]
TIMES = [
    ("One morning"),
    "One evening",
    "One day",
    "One cold day",
    "One sunny afternoon",
    "One windy night",
    "One quiet Sunday",
    "On the first day of spring",
]


def synthetic_name(rng: random.Random) -> str:
    """A made-up name, so that copying a name is learned as copying and not as a choice from a list."""
    return ("".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3)))) + rng.choice(FINALS)).capitalize()


def person(rng: random.Random) -> tuple[str, str, str]:
    """(name, "he" or "she", "his" or "her"); a made-up name is either."""
    if rng.random() < 0.5:
        return (rng.choice(GIRLS) if rng.random() < 0.6 else synthetic_name(rng)), "she", "her"
    return (rng.choice(BOYS) if rng.random() < 0.6 else synthetic_name(rng)), "he", "his"


def any_name(rng: random.Random) -> str:
    """A name from the lists, or a made-up one."""
    return synthetic_name(rng) if rng.random() < 0.4 else rng.choice(GIRLS + BOYS)


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def listing(items: list[str]) -> str:
    """ "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
