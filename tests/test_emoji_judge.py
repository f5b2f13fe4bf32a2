"""The judge of composed pictures: what is drawn as asked is right, anything else is not, and it says in what."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts" / "emoji"))
import scenes
from judge import Judge
from scenes import EXAMINED, Scene, Thing, draw

NOUNS = ("fox", "apple", "drum", "owl", "kite", "lemon")
THINGS = [Thing(noun.upper(), (noun,)) for noun in NOUNS]


def thing(number: int) -> Image.Image:
    """A disc, a bar, a ring ... in a shade of its own, with nothing around it."""
    image = Image.new("RGBA", (128, 128))
    pen, shade = ImageDraw.Draw(image), (40 * number, 200 - 30 * number, 255 - 45 * number, 255)
    shapes = (pen.ellipse, pen.rectangle)
    shapes[number % 2]((12 + 6 * number, 30 - 4 * number, 100, 90 + 6 * number), fill=shade)
    return image


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge({each.code: thing(number) for number, each in enumerate(THINGS)})


def drawn(judge: Judge, scene: Scene) -> Image.Image:
    return draw(scene, lambda style, code: judge.things[code])


@pytest.mark.parametrize("kind", EXAMINED)
def test_what_is_drawn_as_asked_is_right(judge, kind) -> None:
    for number in range(12):
        scene = scenes.sample(random.Random(number), kind, "noto", THINGS, coloured=number % 2 == 0)
        assert judge.verdict(drawn(judge, scene), scene) == {"things": True, "arranged": True, "ground": True, "all": True}


def test_what_is_wrong_is_named(judge) -> None:
    fox, apple, owl = THINGS[0], THINGS[1], THINGS[3]
    asked = Scene("left", "noto", (fox, apple), "across", "blue")
    for other, wrong in (
        (replace(asked, things=(apple, fox)), {"things", "arranged"}),
        (replace(asked, places="down"), {"things", "arranged"}),
        (replace(asked, things=(fox, owl)), {"things"}),
        (replace(asked, colour="black"), {"ground"}),
    ):
        said = judge.verdict(drawn(judge, other), asked)
        assert not said["all"] and wrong <= {name for name, right in said.items() if not right}
    three = Scene("count", "noto", (fox,) * 3, "three", None)
    for number, places in ((1, "one"), (2, "across"), (4, "four")):
        said = judge.verdict(drawn(judge, Scene("count", "noto", (fox,) * number, places, None)), three)
        assert not said["arranged"] and not said["all"]


def test_scenes_of_another_style_are_not_judged(judge) -> None:
    scene = Scene("one", "flat", (THINGS[0],), "one", None)
    with pytest.raises(ValueError, match="noto style at 128 pixels, not flat"):
        judge.verdict(drawn(judge, scene), scene)
