"""What the corpus knows to be so: capitals, opposites, sounds, colours, counts, definitions. Data only."""

from nova_corpus.world import ANIMALS, COLOURS, FRUITS, INSTRUMENTS, TOOLS, VEGETABLES

CAPITALS = dict(
    pair.split(":")
    for pair in [
        ("France:Paris"),
        "Italy:Rome",
        "Spain:Madrid",
        "Germany:Berlin",
        "Portugal:Lisbon",
        "Greece:Athens",
        "Austria:Vienna",
        "Poland:Warsaw",
        "Norway:Oslo",
        "Sweden:Stockholm",
        "Denmark:Copenhagen",
        "Finland:Helsinki",
        "Ireland:Dublin",
        "Hungary:Budapest",
        "Japan:Tokyo",
        "China:Beijing",
        "India:Delhi",
        "Egypt:Cairo",
        "Kenya:Nairobi",
        "Peru:Lima",
        "Chile:Santiago",
        "Canada:Ottawa",
        "Cuba:Havana",
        "Turkey:Ankara",
        "Russia:Moscow",
        "Belgium:Brussels",
        "England:London",
        "Scotland:Edinburgh",
        "Ukraine:Kyiv",
        "Thailand:Bangkok",
    ]
)
CITIES = sorted(CAPITALS.values())
OPPOSITES = dict(
    pair.split(":")
    for pair in [
        ("hot:cold"),
        "big:small",
        "up:down",
        "day:night",
        "black:white",
        "happy:sad",
        "fast:slow",
        "old:new",
        "tall:short",
        "hard:soft",
        "wet:dry",
        "full:empty",
        "open:closed",
        "early:late",
        "light:dark",
        "loud:quiet",
        "rich:poor",
        "strong:weak",
        "thick:thin",
        "wide:narrow",
        "deep:shallow",
        "heavy:light",
        "left:right",
        "clean:dirty",
        "first:last",
        "good:bad",
        "high:low",
        "inside:outside",
        "long:short",
        "near:far",
        "push:pull",
        "true:false",
        "sweet:sour",
        "young:old",
        "above:below",
        "before:after",
        "buy:sell",
        "win:lose",
        "love:hate",
        "begin:end",
    ]
)
OPPOSITE_QUESTIONS = tuple(
    (word, other)
    for pair in OPPOSITES.items()
    for word, other in (pair, pair[::-1])
    if sum(word in both for both in OPPOSITES.items()) == 1  # "light" has two opposites: not asked for
)
SOUNDS = dict(
    pair.split(":")
    for pair in [
        ("dog:barks"),
        "cat:meows",
        "cow:moos",
        "sheep:bleats",
        "pig:grunts",
        "duck:quacks",
        "owl:hoots",
        "lion:roars",
        "horse:neighs",
        "frog:croaks",
        "wolf:howls",
        "bee:buzzes",
        "hen:clucks",
        "crow:caws",
        "mouse:squeaks",
    ]
)
YOUNG = dict(
    pair.split(":")
    for pair in [
        "dog:puppy",
        "cat:kitten",
        "cow:calf",
        "sheep:lamb",
        "horse:foal",
        "duck:duckling",
        "hen:chick",
        "frog:tadpole",
        "bear:cub",
        "lion:cub",
        "wolf:pup",
        "goat:kid",
        "deer:fawn",
        "pig:piglet",
        "goose:gosling",
    ]
)
LEGS = {
    **{a: 4 for a in ["dog", "cat", "cow", "horse", "sheep", "fox", "wolf", "bear", "lion", "mouse", "frog", "goat"]},
    "spider": 8,
    "ant": 6,
    "bee": 6,
    "duck": 2,
    "hen": 2,
    "owl": 2,
    "snake": 0,
    "fish": 0,
}
COLOUR_OF = dict(
    pair.split(":")
    for pair in [
        ("grass:green"),
        "snow:white",
        "coal:black",
        "blood:red",
        "lemon:yellow",
        "banana:yellow",
        "strawberry:red",
        "carrot:orange",
        "sky:blue",
        "sea:blue",
        "milk:white",
        "chocolate:brown",
        "night:black",
        "pumpkin:orange",
        "frog:green",
        "flamingo:pink",
        "cherry:red",
        "sun:yellow",
        "tomato:red",
        "crow:black",
    ]
)
HOMES = dict(
    pair.split(":")
    for pair in [
        ("bird:nest"),
        "bee:hive",
        "fish:water",
        "dog:kennel",
        "horse:stable",
        "spider:web",
        "fox:den",
        "ant:anthill",
        "cow:barn",
        "hen:coop",
        "rabbit:burrow",
        "bear:cave",
        "pig:sty",
        "king:castle",
    ]
)
JOBS = dict(
    pair.split(":")
    for pair in [
        ("baker:bakes bread"),
        "farmer:grows food",
        "teacher:teaches children",
        "doctor:helps sick people",
        "pilot:flies planes",
        "sailor:sails ships",
        "writer:writes books",
        "painter:paints pictures",
        "cook:prepares meals",
        "singer:sings songs",
        "gardener:looks after plants",
        "builder:builds houses",
        "tailor:makes clothes",
        "miller:grinds flour",
        "judge:decides cases",
        "fisher:catches fish",
    ]
)
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
SEASONS = ["spring", "summer", "autumn", "winter"]
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
COUNTS = {
    "days are in a week": ("a week", 7, "days"),
    "months are in a year": ("a year", 12, "months"),
    "hours are in a day": ("a day", 24, "hours"),
    "minutes are in an hour": ("an hour", 60, "minutes"),
    "seconds are in a minute": ("a minute", 60, "seconds"),
    "sides does a triangle have": ("a triangle", 3, "sides"),
    "sides does a square have": ("a square", 4, "sides"),
    "wheels does a bicycle have": ("a bicycle", 2, "wheels"),
    "wheels does a car have": ("a car", 4, "wheels"),
    "fingers are on one hand": ("one hand", 5, "fingers"),
    "seasons are in a year": ("a year", 4, "seasons"),
    "letters are in the alphabet": ("the alphabet", 26, "letters"),
    "strings does a violin have": ("a violin", 4, "strings"),
    "cents are in a dollar": ("a dollar", 100, "cents"),
    "eggs are in a dozen": ("a dozen", 12, "eggs"),
}
CATEGORIES = {
    "animal": ANIMALS[:24],
    "fruit": FRUITS,
    "vegetable": VEGETABLES,
    "colour": COLOURS,
    "tool": TOOLS,
    "musical instrument": INSTRUMENTS,
    "day": DAYS,
    "month": MONTHS,
    "city": CITIES,
}
PLURAL_CATEGORY = {
    "animal": "animals",
    "fruit": "fruits",
    "vegetable": "vegetables",
    "colour": "colours",
    "tool": "tools",
    "musical instrument": "musical instruments",
    "day": "days",
    "month": "months",
    "city": "cities",
}
COUNTABLE = [
    ("apples"),
    "pears",
    "coins",
    "books",
    "eggs",
    "stones",
    "balls",
    "cards",
    "stamps",
    "marbles",
    "shells",
    "candles",
    "flowers",
    "pencils",
    "cookies",
    "stickers",
]
DEFINITIONS = {
    "a friend": "a person you like and trust",
    "a map": "a drawing that shows where places are",
    "a river": "a long stream of water that flows to the sea",
    "a desert": "a dry place with very little rain",
    "an island": "land with water all around it",
    "a library": "a place where books are kept and lent",
    "a mountain": "a very high hill of rock",
    "a computer": "a machine that works with information",
    "rain": "water that falls from the clouds",
    "ice": "water that has frozen hard",
    "a token": "a small piece of text that a language model reads or writes",
    "a language model": "a program that learns from text to write the next piece of text",
    "JSON": "a text format for data with names and values",
    "JAX": "a library for fast numerical programs on many devices",
    "a prime number": "a whole number above 1 that only 1 and itself divide",
    "the moon": "the round body that travels around the Earth",
    "the sun": "the star that gives the Earth light and warmth",
    "a garden": "a piece of ground where plants are grown",
    "honey": "the sweet food that bees make",
    "a clock": "a machine that shows the time",
}
UNKNOWN_TOPICS = [
    ("the price of gold"),
    "the winner of the last election",
    "the population of Brazil",
    "quantum physics",
    "the stock market",
    "the weather today",
    "the news",
    "my bank account",
    "the history of Rome",
    "the best phone to buy",
    "the rules of cricket",
    "how engines work",
    "the meaning of life",
    "organic chemistry",
    "the latest film",
    "tax law",
    "how to cure a cold",
    "the speed of light",
    "black holes",
    "football results",
    "Shakespeare",
    "the Roman emperors",
    "how to write a compiler",
    "the human brain",
    "who painted the Mona Lisa",
    "the deepest ocean",
    "modern art",
    "the height of Everest",
    "the French Revolution",
    "dinosaurs",
]
