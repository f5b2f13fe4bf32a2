"""As much English as captions need: articles, plurals, numbers. Used by captions.py and scenes.py."""

import re

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
MASS = {
    "bacon", "badminton", "baggage", "baguette", "beer", "bowling", "bread", "broccoli", "butter", "camping", "champagne", "clothes",
    "coffee", "construction", "cooking", "coral", "corn", "custard", "cutlery", "dna", "falafel", "fire", "flatbread", "fog",
    "fondue", "food", "football", "garlic", "ginger", "hockey", "honey", "ice", "lacrosse", "landslide", "lettuce", "lightning",
    "luggage", "mail", "maize", "mate", "meat", "milk", "money", "paper", "pasta", "pong", "popcorn", "rain", "rice", "sake", "salad",
    "salt", "snow", "soap", "spaghetti", "sushi", "tea", "tennis", "thread", "wood", "yarn",
}  # fmt: skip
PLURAL = {
    "briefs", "bubbles", "chopsticks", "dice", "glasses", "gloves", "goggles", "jeans", "maracas", "scissors", "shorts", "skis",
    "socks", "sparkles", "sunglasses",
}  # fmt: skip
SINGULAR_IN_S = {
    "abacus", "bus", "cactus", "chess", "compass", "cross", "dress", "glass", "hibiscus", "lotus", "minibus", "octopus", "rhinoceros",
    "tennis", "trolleybus", "walrus",
}  # fmt: skip
IRREGULAR = {
    "mouse": "mice", "goose": "geese", "ox": "oxen", "fish": "fish", "sheep": "sheep", "deer": "deer", "moose": "moose", "bison": "bison",
    "wolf": "wolves", "leaf": "leaves", "knife": "knives", "scarf": "scarves", "tooth": "teeth", "foot": "feet", "man": "men",
    "woman": "women", "child": "children", "squid": "squid", "shrimp": "shrimp", "blowfish": "blowfish", "jellyfish": "jellyfish",
    "cactus": "cacti", "die": "dice", "sauropod": "sauropods", "piano": "pianos", "banjo": "banjos", "burrito": "burritos", "taco": "tacos",
    "yo-yo": "yo-yos", "dodo": "dodos", "radio": "radios", "avocado": "avocados", "flamingo": "flamingos", "photo": "photos",
    "dango": "dango", "mango": "mangos", "kangaroo": "kangaroos", "rhino": "rhinos", "hippo": "hippos", "logo": "logos",
}  # fmt: skip
PREPOSITION = re.compile(r" (?:of|with|in|on|at|behind|without|over|for|showing|tilted) ")


def head(noun: str) -> str:
    """The word that a name turns on: "slice of pizza" -> "slice", "hot dog" -> "dog"."""
    return PREPOSITION.split(noun)[0].split()[-1]


def is_plural(noun: str) -> bool:
    """Whether the name is many things already: "cherries", "musical notes"."""
    word = head(noun)
    return word in PLURAL or (word.endswith("s") and word not in SINGULAR_IN_S and not word.endswith(("ss", "us", "is", "'s")))


def is_mass(noun: str) -> bool:
    """Whether the name takes neither "a" nor a number: "bread"."""
    return head(noun) in MASS


def countable(noun: str) -> bool:
    """Whether there can be two of it: one thing, with a plural."""
    return not is_plural(noun) and not is_mass(noun) and " and " not in noun and bool(re.fullmatch(r"[a-z' -]+", noun))


def article(noun: str) -> str:
    """The name with "a" or "an" where it takes one."""
    if is_plural(noun) or is_mass(noun):
        return noun
    vowel = noun[0] in "aeiou" and not re.match(r"(?:uni|use|euro|one\b|one-)", noun)
    return f"an {noun}" if vowel else f"a {noun}"


def plural(noun: str) -> str:
    """The plural of a countable name, at its head: "slices of pizza"."""
    word = head(noun)
    at = noun.index(word, len(PREPOSITION.split(noun)[0]) - len(word))
    if word in IRREGULAR:
        many = IRREGULAR[word]
    elif word.endswith(("s", "x", "z", "ch", "sh")) or re.search(r"[^aeiou]o$", word):
        many = word + "es"
    elif re.search(r"[^aeiou]y$", word):
        many = word[:-1] + "ies"
    else:
        many = word + "s"
    return noun[:at] + many + noun[at + len(word) :]


def counted(noun: str, count: int) -> str:
    """ "a cat", "three cats"."""
    return article(noun) if count == 1 else f"{NUMBERS[count]} {plural(noun)}"


def listed(phrases: list[str]) -> str:
    """ "a cat", "a cat and a dog", "a cat, a dog and a pear"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
