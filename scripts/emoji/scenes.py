"""Composed pictures: one to four things of one style, counted, placed, sized, on a background, and what is said of them.
Used by build.py.

Things stand in fixed places (two halves, a triangle, four quarters), so that a caption has one answer. A scene is a function of
its number alone; scenes with a held-out combination (holdouts.combination) are drawn for the examination only.
"""

import os
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from pathlib import Path

import holdouts
from captions import words, write_rows
from english import article, countable, counted, listed, plural
from PIL import Image
from render import SIZE
from sets import PLAIN, Icon

COLOURS = {
    "red": (229, 72, 60), "orange": (255, 166, 64), "yellow": (255, 224, 80), "green": (92, 190, 100), "blue": (74, 134, 232),
    "purple": (150, 98, 205), "pink": (255, 166, 198), "brown": (150, 108, 76), "grey": (156, 156, 156), "black": (24, 24, 24),
    "light blue": (182, 222, 255), "dark green": (26, 94, 54),
}  # fmt: skip
PLACES = {  # (centre x, centre y, side) in pixels of a picture of 128
    "one": ((64, 64, 104),), "large": ((64, 64, 124),), "small": ((64, 64, 48),),
    "across": ((32, 64, 60), (96, 64, 60)), "down": ((64, 32, 60), (64, 96, 60)), "sizes": ((44, 64, 80), (106, 78, 38)),
    "three": ((64, 33, 60), (32, 95, 60), (96, 95, 60)), "four": ((32, 33, 60), (96, 33, 60), (32, 95, 60), (96, 95, 60)),
}  # fmt: skip
KINDS = {"count": 5, "left": 3, "above": 3, "and": 4, "mixed": 2, "sizes": 2, "one": 3, "large": 0.5, "small": 0.5}
EXAMINED = ("and", "left", "above", "count", "one")
COLOURED = 0.3  # of the scenes; of those with one thing as it is, all
PLAIN_SHARE = 0.6  # of the scenes are in the style of plain prompts, half of their captions without style words
MOST_BORDER = 0.5  # pictures whose border is filled beyond this are squares already, and no things to put somewhere
NOUN = re.compile(r"[a-z'-]+(?: [a-z'-]+){0,2}")
UNFIT = re.compile(
    r"thirty|o'clock|^(?:chart|locked|unlocked|foggy|camping|cooking|landslide|construction)|creasing| (?:of|with|in|on|at|behind) "
)
GROUPS = (3, 4, 5, 6, 7)  # animals, food, travel, activities, objects: what there can be several of
PHRASES = {
    "and": ("{a} and {b}", "{a} and {b}", "{a} next to {b}", "{a} beside {b}", "{a} with {b}"),
    "left": (
        "{a} to the left of {b}", "{a} left of {b}", "{b} to the right of {a}", "{b} right of {a}", "{a} on the left and {b} on the right",
    ),
    "above": ("{a} above {b}", "{b} below {a}", "{b} under {a}", "{a} at the top and {b} at the bottom", "{a} over {b}"),
    "sizes": ("a large {A} and a small {B}", "a big {A} and a little {B}", "a big {A} with a small {B}"),
    "large": ("a large {A}", "a big {A}", "a huge {A}"),
    "small": ("a small {A}", "a little {A}", "a tiny {A}"),
}  # fmt: skip
SENTENCES = ("{x}", "{x}", "{x}", "a picture of {x}", "draw {x}", "{x}, please", "an emoji of {x}", "show me {x}")
STYLED = ("{x}, {style} style", "{x} in {style} style", "{style} emoji of {x}", "{x}, {style}")
BACKGROUNDS = (" on {a} background", " on {colour}", ", {colour} background", " with {a} background", " in front of {colour}")
EACH = 2  # captions of a scene: each is kept encoded, and there are many scenes


@dataclass(frozen=True)
class Thing:
    """A concept as scenes use it: its code, and the nouns it goes by, its own first."""

    code: str
    nouns: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """Things (one a place, repeated where counted) in a style, on a colour or on white."""

    kind: str
    style: str
    things: tuple[Thing, ...]
    places: str
    colour: str | None

    @property
    def counts(self) -> list[tuple[Thing, int]]:
        return [(thing, self.things.count(thing)) for thing in dict.fromkeys(self.things)]

    def combinations(self) -> Iterator[tuple]:
        """Everything about the scene that may be held out."""
        counts = self.counts
        relation = self.kind if self.kind in ("left", "above", "sizes") else "and"
        yield from ((relation, a.code, b.code) for i, (a, _) in enumerate(counts) for b, _ in counts[i + 1 :])
        yield from (("count", thing.code, count) for thing, count in counts if count > 1)
        yield from (("background", thing.code, self.colour) for thing, _ in counts if self.colour)

    def held_out(self) -> bool:
        return any(holdouts.combination(*each) for each in self.combinations())

    def examines(self) -> bool:
        """Whether what the scene's kind is about is held out."""
        about = {"one": "background"}.get(self.kind, self.kind)
        return any(holdouts.combination(*each) for each in self.combinations() if each[0] == about)


def sample(rng: random.Random, kind: str, style: str, things: list[Thing], coloured: bool) -> Scene:
    """A scene of `kind`, drawn from `things`. Those of which there can be no two are not counted or sized."""
    several = kind in ("count", "mixed", "sizes", "large", "small")
    chosen = rng.sample([thing for thing in things if countable(thing.nouns[0])] if several else things, 4)
    colour = rng.choice(sorted(COLOURS)) if coloured else None
    if kind == "count":
        number = rng.choice((2, 3, 4))
        members = (chosen[0],) * number
    elif kind == "mixed":
        members = tuple(rng.choice(((chosen[0],) * 2 + (chosen[1],), (chosen[0],) * 2 + (chosen[1],) * 2, (chosen[0],) * 3 + (chosen[1],))))
    elif kind == "and":
        members = tuple(chosen[: rng.choice((2, 2, 2, 3, 4))])
    else:
        members = tuple(chosen[: 1 if kind in ("one", "large", "small") else 2])
    places = {"above": "down", "sizes": "sizes", "large": "large", "small": "small"}.get(kind)
    return Scene(kind, style, members, places or {1: "one", 2: "across", 3: "three", 4: "four"}[len(members)], colour)


def phrase(scene: Scene, rng: random.Random) -> str:
    """What is there, in words: "three cats", "a fox to the left of a pear on a blue background"."""
    counts = scene.counts
    nouns = [usual(thing, count, scene, rng) for thing, count in counts]
    forms = PHRASES.get(scene.kind)
    if forms and len(counts) <= 2:
        a, b = (nouns + nouns)[:2]
        found = rng.choice(forms).format(a=article(a), b=article(b), A=a, B=b)
    else:
        found = listed([counted(noun, count) for noun, (_, count) in zip(nouns, counts, strict=True)])
        if scene.kind == "count" and rng.random() < 0.2:
            ((thing, count),) = counts
            found = f"{count} {plural(nouns[0])}"
    return found + (rng.choice(BACKGROUNDS).format(colour=scene.colour, a=article(scene.colour)) if scene.colour else "")


def usual(thing: Thing, count: int, scene: Scene, rng: random.Random) -> str:
    """One of a thing's nouns, its own three times of four; one that can be counted where it is."""
    nouns = [noun for noun in thing.nouns if countable(noun)] if count > 1 or scene.kind in ("sizes", "large", "small") else thing.nouns
    return nouns[0] if rng.random() < 0.75 else rng.choice(nouns)


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """EACH captions or somewhat fewer: half without style words in the plain style, in any other all with them."""
    found = []
    for number in range(EACH):
        told = phrase(scene, rng)
        styled = number % 2 if scene.style == PLAIN else True
        found.append(rng.choice(STYLED if styled else SENTENCES).format(x=told, style=scene.style))
    return list(dict.fromkeys(found))


def draw(scene: Scene, picture: Callable[[str, str], Image.Image]) -> Image.Image:
    """The scene in RGB, SIZE pixels; `picture(style, code)` is a thing alone, RGBA."""
    canvas = Image.new("RGBA", (SIZE, SIZE), (*(COLOURS[scene.colour] if scene.colour else (255, 255, 255)), 255))
    for thing, (x, y, side) in zip(scene.things, PLACES[scene.places], strict=True):
        x, y, side = (round(value * SIZE / 128) for value in (x, y, side))
        # with colours multiplied by alpha, the see-through pixels' colours do not bleed into the edges
        small = picture(scene.style, thing.code).convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
        canvas.alpha_composite(small, (x - side // 2, y - side // 2))
    return canvas.convert("RGB")


def fit_for_scenes(image: Image.Image) -> bool:
    """Whether an RGBA picture is a thing with space around it."""
    alpha, last = image.getchannel("A"), image.width - 1
    border = [alpha.getpixel(at) for i in range(0, image.width, 4) for at in ((i, 0), (i, last), (0, i), (last, i))]
    return sum(value > 128 for value in border) <= MOST_BORDER * len(border)


def vocabulary(icons: list[Icon], large: Path) -> dict[str, list[Thing]]:
    """style -> the things that scenes in it may have: nouns of up to three words that are drawn as things, not held out."""
    found: dict[str, list[Thing]] = {}
    for icon in icons:
        if icon.held_out or icon.group not in GROUPS or not NOUN.fullmatch(icon.label) or UNFIT.search(icon.label):
            continue
        if fit_for_scenes(Image.open(large / f"{icon.stem}.png")):
            names, _ = words(icon)
            found.setdefault(icon.style, []).append(Thing(icon.code, (icon.label, *names)))
    return found


def scene_of(number: int, things: dict[str, list[Thing]]) -> Scene:
    """Training scene `number`: the first without a held-out combination of an endless draw of its own."""
    rng = random.Random(f"scene/{number}")
    while True:
        style = PLAIN if rng.random() < PLAIN_SHARE else rng.choice(sorted(things))
        (kind,) = rng.choices(list(KINDS), weights=list(KINDS.values()))
        scene = sample(rng, kind, style, things[style], kind == "one" or rng.random() < COLOURED)
        if not scene.held_out():
            return scene


def examined(number: int, kind: str, things: dict[str, list[Thing]]) -> Scene:
    """Scene `number` of the examination of `kind`: a combination that is in no training scene, in the plain style."""
    rng = random.Random(f"examined/{kind}/{number}")
    while True:
        scene = sample(rng, kind, PLAIN, things[PLAIN], kind == "one")
        if scene.examines() and len(scene.counts) <= 2:
            return scene


@lru_cache(maxsize=1500)
def picture(large: Path, style: str, code: str) -> Image.Image:
    with Image.open(large / f"{style}-{code.lower()}.png") as image:
        return image.convert("RGBA")


def write_scene(name: str, scene: Scene, folder: Path) -> dict:
    """The row of a scene's metadata, once its picture is in `folder`, beside large/."""
    if not (folder / name).exists():
        partial = folder / f"{name}.partial"
        draw(scene, lambda style, code: picture(folder.parent / "large", style, code)).save(partial, "PNG")
        partial.rename(folder / name)
    rng = random.Random(f"captions/{name}")
    text = captions(scene, rng) if folder.name == "scenes" else [phrase(scene, rng)]
    counts = [{"code": thing.code, "label": thing.nouns[0], "count": count} for thing, count in scene.counts]
    said = {"style": scene.style, "kind": scene.kind, "colour": scene.colour, "places": scene.places, "things": counts}
    return {"file_name": name, "text": text} | said


def write_scenes(icons: list[Icon], pictures: Path, number: int, each_examined: int) -> None:
    """Write scenes/ (`number` of them) and composed_held_out/ with their captions. Goes on where it was interrupted."""
    things = vocabulary(icons, pictures / "large")
    exam = {f"{kind}-{i:04d}.png": (kind, i) for kind in EXAMINED for i in range(each_examined)}
    scenes = {"composed_held_out": {name: examined(i, kind, things) for name, (kind, i) in exam.items()}}
    scenes["scenes"] = {f"{i:06d}.png": scene_of(i, things) for i in range(number)}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for part, wanted in scenes.items():
            (pictures / part).mkdir(exist_ok=True)
            rows = pool.map(write_scene, wanted, wanted.values(), repeat(pictures / part), chunksize=64)
            write_rows(pictures / part, list(rows))


def scene_from(row: dict) -> Scene:
    """The scene of a row of metadata by `write_scene`."""
    things = tuple(Thing(each["code"], (each["label"],)) for each in row["things"] for _ in range(each["count"]))
    return Scene(row["kind"], row["style"], things, row["places"], row["colour"])
