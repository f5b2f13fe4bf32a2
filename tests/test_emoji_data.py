"""The bundled model's data: what is held out stays out, captions say what is drawn, every set's licence is looked at."""

import json
import random
import re
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts" / "emoji"))
import captions
import english
import holdouts
import scenes
import sets
from render import SIZE
from scenes import Scene, Thing

CODES = [f"{number:X}" for number in range(0x1F300, 0x1F300 + 1000)]


# What is held out


def test_what_is_held_out_never_changes() -> None:
    """By name: a changed hash would make a trained model's examination worthless."""
    styles = list(sets.STYLES)
    lost = {code: holdouts.held_out_style(code, styles, "noto") for code in CODES[:12]}
    assert {code: style for code, style in lost.items() if style} == {"1F300": "blob", "1F302": "emojione", "1F308": "fxemoji"}
    assert [code for code in CODES[:60] if holdouts.synonym(code, "word")] == ["1F302", "1F30F", "1F312", "1F31B", "1F332", "1F336"]
    assert [code for code in CODES[:60] if holdouts.combination("and", code, "1F355")] == [
        "1F302",
        "1F308",
        "1F31B",
        "1F31D",
        "1F321",
        "1F32C",
    ]


def test_the_shares_held_out_are_those_said() -> None:
    styles = list(sets.STYLES)
    lost = [holdouts.held_out_style(code, styles, "noto") for code in CODES]
    pairs = sum(style is not None for style in lost) / (len(CODES) * len(styles))
    assert "noto" not in lost and set(lost) == {None, *styles} - {"noto"}
    assert pairs == pytest.approx(holdouts.PAIR_SHARE, rel=0.15)
    combinations = [holdouts.combination("left", a, b) for a, b in product(CODES[:60], CODES[60:120])]
    assert np.mean(combinations) == pytest.approx(holdouts.COMBINATION_SHARE, rel=0.15)
    assert np.mean([holdouts.synonym(code, "word") for code in CODES]) == pytest.approx(holdouts.SYNONYM_SHARE, rel=0.2)


def test_a_concept_of_one_style_keeps_it() -> None:
    assert not any(holdouts.held_out_style(code, ["noto"], "noto") for code in CODES)


def test_the_same_relation_said_the_other_way_round_is_as_much_held_out() -> None:
    for a, b in product(CODES[:30], CODES[30:60]):
        assert holdouts.combination("left", a, b) == holdouts.combination("right", b, a)
        assert holdouts.combination("above", a, b) == holdouts.combination("below", b, a)
        assert holdouts.combination("and", a, b) == holdouts.combination("and", b, a)


# English


@pytest.mark.parametrize(("noun", "one", "three"), [
    ("cat", "a cat", "three cats"), ("apple", "an apple", "three apples"), ("unicorn", "a unicorn", "three unicorns"),
    ("umbrella", "an umbrella", "three umbrellas"), ("slice of pizza", "a slice of pizza", "three slices of pizza"),
    ("kitchen knife", "a kitchen knife", "three kitchen knives"), ("cherry", "a cherry", "three cherries"),
    ("monkey", "a monkey", "three monkeys"),
    ("box", "a box", "three boxes"), ("tomato", "a tomato", "three tomatoes"), ("mouse", "a mouse", "three mice"),
    ("bus", "a bus", "three buses"), ("hot dog", "a hot dog", "three hot dogs"),
])  # fmt: skip
def test_one_and_three(noun, one, three) -> None:
    assert english.countable(noun) and (english.counted(noun, 1), english.counted(noun, 3)) == (one, three)


@pytest.mark.parametrize("noun", ["bread", "cherries", "sunglasses", "green salad", "musical notes", "hammer and wrench"])
def test_what_cannot_be_counted(noun) -> None:
    assert not english.countable(noun) and (english.article(noun) == noun or " and " in noun)


def test_lists() -> None:
    assert [english.listed(["a", "b", "c"][:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


# Captions of one thing


def icon(style: str, code: str, label: str, names=(), tags=(), held_out=False) -> sets.Icon:
    return sets.Icon(style, code, label, tuple(names), tuple(tags), 3, "<svg/>", held_out)


def test_captions_say_the_style_or_none() -> None:
    every = re.compile(rf"\b({'|'.join(sets.STYLES)})\b")
    for style, code in product(("noto", "outlined"), CODES[:20]):
        fox = icon(style, code, "fox", ["vixen"], ["animal", "clever", "red"])
        shared = {"animal": 90, "clever": 2, "red": 9}
        told = captions.captions(fox, shared, plain=False)
        assert told and all(every.findall(text) == [style] for text in told)
        assert not any(every.search(text) for text in captions.captions(fox, shared, plain=True))
        assert captions.captions(fox, shared, plain=True)[0] == "a fox"


def test_no_caption_says_a_held_out_synonym() -> None:
    said, unsaid = 0, 0
    for code in CODES[:200]:
        fox = icon("noto", code, "fox", ["vixen", "reynard"], ["clever"])
        text = " ".join(captions.captions(fox, {"clever": 1}, plain=True))
        for word in ("vixen", "reynard", "clever"):
            assert not (holdouts.synonym(code, word) and word in text)
            said, unsaid = said + (word in text), unsaid + holdouts.synonym(code, word)
    assert said > 400 and unsaid > 30


# Scenes

COUNTS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "2": 2, "3": 3, "4": 4}
NOUNS = ("fox", "apple", "drum", "owl", "kite", "lemon")
COLOURS = "|".join(sorted(scenes.COLOURS, key=len, reverse=True))
THINGS = [Thing(f"1F9{i}", (noun,)) for i, noun in enumerate(NOUNS)]
SHADES = {thing.code: (250, 40 * i + 20, 130) for i, thing in enumerate(THINGS)}  # none of them a background's


def square(style: str, code: str) -> Image.Image:
    return Image.new("RGBA", (SIZE, SIZE), (*SHADES[code], 255))


def seen(picture: Image.Image, code: str) -> list[tuple[float, float, int]]:
    """(x, y, area) of each patch in the shade of a thing."""
    mask = (np.asarray(picture) == SHADES[code]).all(axis=-1)
    patches, number = ndimage.label(mask)
    centres = ndimage.center_of_mass(mask, patches, range(1, number + 1))
    return [(x, y, int((patches == i + 1).sum())) for i, (y, x) in enumerate(centres)]


def examine(text: str, picture: Image.Image) -> None:
    """Reads a caption as a stranger would, and looks whether the picture is so."""
    bare = re.sub(r"^(a picture of|draw|an emoji of|show me|noto emoji of) |, please$|(,| in) noto( style)?$", "", text)
    colour = re.search(rf"(?: on(?: an?)?| with an?| in front of|,) ({COLOURS})(?: background)?$", bare)
    corner = picture.getpixel((1, SIZE // 2))
    assert corner == (scenes.COLOURS[colour[1]] if colour else (255, 255, 255))
    bare = bare[: colour.start()] if colour else bare
    found = {}
    for word, noun in re.findall(rf"(\w+) (?:(?:large|big|huge|small|little|tiny) )?({'|'.join(NOUNS)})e?s?\b", bare):
        found[noun] = seen(picture, THINGS[NOUNS.index(noun)].code)
        counted = COUNTS.get(word) or 1
        assert len(found[noun]) == counted, text
    assert sum(bool(seen(picture, thing.code)) for thing in THINGS) == len(found), text
    first, *rest = ((patches[0], noun) for noun, patches in found.items())
    if rest and (order := re.search(r"left of|right of|on the left|above|below|under|over|at the top", bare)):
        (x, y, _), (other_x, other_y, _) = first[0], rest[0][0]
        assert {
            "left of": x < other_x, "on the left": x < other_x, "right of": x > other_x, "above": y < other_y, "over": y < other_y,
            "at the top": y < other_y, "below": y > other_y, "under": y > other_y,
        }[order[0]], text  # fmt: skip
    if rest and re.match(r"a (large|big)", bare):
        assert first[0][2] > 2 * rest[0][0][2], text
    elif re.match(r"a (large|big|huge)", bare):
        assert first[0][2] > 110**2, text
    elif re.match(r"a (small|little|tiny)", bare):
        assert first[0][2] < 60**2, text


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_captions_say_what_is_drawn(kind) -> None:
    for number in range(30):
        rng = random.Random(f"{kind}/{number}")
        scene = scenes.sample(rng, kind, "noto", THINGS, coloured=number % 2 == 0)
        picture = scenes.draw(scene, square)
        for text in scenes.captions(scene, rng):
            examine(text, picture)


def test_a_wrong_caption_is_noticed() -> None:
    scene = Scene("left", "noto", (THINGS[0], THINGS[1]), "across", None)
    picture = scenes.draw(scene, square)
    examine("a fox to the left of an apple", picture)
    for wrong in ("an apple to the left of a fox", "two foxes and an apple", "a fox and an owl", "a fox and an apple on blue"):
        with pytest.raises(AssertionError):
            examine(wrong, picture)


def test_no_training_scene_has_a_held_out_combination_and_every_examined_one_has() -> None:
    things = {"noto": THINGS, "flat": THINGS[:5]}
    trained = [scenes.scene_of(number, things) for number in range(400)]
    assert trained == [scenes.scene_of(number, things) for number in range(400)]
    assert {scene.kind for scene in trained} == set(scenes.KINDS) and {scene.style for scene in trained} == {"noto", "flat"}
    learnt = {each for scene in trained for each in scene.combinations()}
    assert not any(holdouts.combination(*each) for each in learnt)
    for kind in ("one", "left"):
        asked = scenes.examined(0, kind, things)
        assert any(holdouts.combination(*each) for each in asked.combinations()) and not set(asked.combinations()) <= learnt


def test_half_of_the_plain_styles_scene_captions_name_it_and_all_of_the_others() -> None:
    for style, least, most in (("noto", 0.4, 0.6), ("flat", 1, 1)):
        told = [scenes.captions(scenes.sample(random.Random(i), "and", style, THINGS, False), random.Random(i)) for i in range(50)]
        share = np.mean([style in text for texts in told for text in texts])
        assert least <= share <= most


# The sets


def test_every_set_is_free_to_use_and_names_its_maker() -> None:
    for each in (*sets.SETS.values(), sets.PICTOGRAMS):
        assert (
            each.licence in sets.ALLOWED_LICENCES and each.credit and re.fullmatch(r"@iconify-json/[a-z0-9-]+@\d+\.\d+\.\d+", each.package)
        )
        assert "openmoji" not in each.package  # the outside test
    assert not {"CC-BY-SA-4.0", "CC-BY-NC-4.0"} & set(sets.ALLOWED_LICENCES)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Packages of three concepts: two sets that tell codes, one that goes by names alone, the others empty."""

    def put(name: str, **files) -> None:
        for file, content in files.items():
            path = tmp_path / name / file.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")

    entries = [
        {"hexcode": "1F98A", "label": "fox", "tags": ["clever"], "group": 3},
        {"hexcode": "1F1E9", "label": "flag: X", "group": 9},
        {"hexcode": "2600-FE0F", "label": "sun’s face", "tags": [], "group": 5},
        {"hexcode": "1F983", "label": "turkey", "tags": [], "group": 3},
    ]
    drawn = {"width": 32, "icons": {name: {"body": f"<{name}/>"} for name in ("fox", "suns-face", "turkey", "flag-x")}}
    codes = {"1f98a": "fox", "2600": "suns-face", "1f983": "turkey", "1f1e9": "flag-x"}
    for style, each in (sets.SETS | {"pictograms": sets.PICTOGRAMS}).items():
        icons, chars = (drawn, codes) if style in ("noto", "flat") else (drawn, {}) if style == "outlined" else ({"icons": {}}, {})
        put(style, **{"icons.json": icons, "chars.json": chars, "info.json": {"license": {"spdx": each.licence}}, "package.json": {}})
    put("pictograms", **{"icons.json": {"icons": {"google": {"body": "<g/>"}, "idea": {"body": "<i/>"}}}})
    put("emojibase", **{"package.json": {}, "en__data.json": entries})
    put(
        "emojibase",
        **{f"en__shortcodes__{kind}.json": {} for kind in ("cldr", "emojibase", "emojibase-legacy", "iamcal", "joypixels", "github")},
    )
    put("wordnet", **{"package.json": {}, "dict__index.noun": "  1 notice\nfox n 1 0 1 1 00000001\nvixen n 1 0 1 1 00000001  \n"})
    put("wordnet", **{"dict__data.noun": "  1 notice\n00000001 05 n 03 fox 0 vixen 0 Vulpes 0 000 | an animal\n"})
    return tmp_path


def test_the_catalogue(packages: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(holdouts, "PAIR_SHARE", 1)  # every concept loses a style
    icons = sets.catalogue(packages)
    assert [(each.label, each.style) for each in icons] == [
        ("fox", "noto"), ("fox", "flat"), ("fox", "outlined"), ("sun's face", "noto"), ("sun's face", "flat"), ("sun's face", "outlined"),
        ("turkey", "noto"), ("turkey", "flat"),  # the third set's "turkey" is a flag
    ]  # fmt: skip
    assert icons[0].names == ("vixen",) and 'viewBox="0 0 32 16"' in icons[0].svg and "<fox/>" in icons[0].svg
    assert [each.label for each in icons if each.held_out] == ["fox", "sun's face", "turkey"]
    assert not any(each.held_out for each in icons if each.style == sets.PLAIN)
    sets.write_catalogue(packages, tmp_path / "all.gz")
    assert sets.read_catalogue(tmp_path / "all.gz") == (icons, {"idea": sets.svg_of({"icons": {"idea": {"body": "<i/>"}}}, "idea")})


def test_a_set_whose_licence_changed_is_refused(packages: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: name)
    sets.fetch(packages)
    (packages / "blob" / "info.json").write_text('{"license": {"spdx": "CC-BY-SA-4.0"}}')
    with pytest.raises(SystemExit, match="noto-v1.* is CC-BY-SA-4.0, not Apache-2.0"):
        sets.fetch(packages)


def test_the_vae_is_trained_by_options_that_there_are(tmp_path):
    import build

    from latentfm.config import load_config
    from latentfm.training.vae.checks import data_plan
    from latentfm.training.vae.options import VAEConfig

    config = load_config(None, build.vae_command(tmp_path, "data.workers=5")[4:], VAEConfig)
    size, plan = data_plan(config)
    assert size == (64, 64) and plan.factor == 8 and config.model.latent_channels == 16 and config.output.dtype == "float16"
    assert Path(config.output.folder) == tmp_path / "vae" and config.data.workers == 5 and build.resumed(tmp_path / "vae") == []


def test_the_network_is_trained_on_the_frozen_models_and_each_later_stage_goes_on_with_it(tmp_path, monkeypatch):
    import build

    from latentfm.config import load_config

    found = {}

    def run(command, **more):
        config = load_config(command[command.index("--config") + 1], command[command.index("--config") + 2 :])
        found[Path(config.output.folder).name] = config

    monkeypatch.setattr("subprocess.run", run)
    for part in ("plain", "styled", "scenes"):
        (tmp_path / "pictures" / part).mkdir(parents=True)
        build.write_rows(tmp_path / "pictures" / part, [{"file_name": "0.png", "text": ["a", "b"]}])
        (tmp_path / "pictures" / part / "0.png").touch()
    for stage in ("mmdit", "further", "styles", "long"):
        getattr(build, stage)(tmp_path)
    whole, further, styles, long = (found[stage] for stage in ("mmdit", "further", "styles", "long"))
    assert Path(whole.model.pipeline) == tmp_path / "base" and whole.model.preset == "emoji"
    assert Path(further.model.pipeline) == tmp_path / "mmdit" / "model" and further.model.preset is None
    assert Path(styles.model.pipeline) == tmp_path / "further" / "model" and styles.model.preset is None
    assert Path(long.model.pipeline) == tmp_path / "styles" / "model" and long.model.preset is None
    weights = {name: [(Path(source.path).name, source.weight) for source in config.data.sources] for name, config in found.items()}
    assert weights.pop("further") == [("plain", 1.4), ("styled", 0.8), ("scenes", 0.2)]
    assert weights.pop("styles") == [("plain", 1.43), ("styled", 1.2), ("scenes", 0.15)]
    assert weights == {"mmdit": [("plain", 8), ("styled", 1.4), ("scenes", 0.2)], "long": [("long", 1)]}
    for each, steps, seed in ((further, 4000, 1), (styles, 3000, 2)):
        assert (each.train.decay, each.train.batch_size, each.train.steps, each.train.seed) == ("wsd", 128, steps, seed)
        assert each.data.t5_lengths == {24: 1}
    assert whole.data.t5_lengths == {24: 1} and set(long.data.t5_lengths) == {24, 256}
    assert (whole.train.decay, long.train.decay) == ("wsd", "cosine") and long.train.steps < whole.train.steps
