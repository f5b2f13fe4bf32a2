"""The figures of a set of pictures: of composed ones, whose truth is known, by a detector that reads it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from latentfm.errors import InputError
from latentfm.evaluation import distances
from latentfm.evaluation.detection import Detection
from latentfm.evaluation.geneval import Asked, Thing
from latentfm.evaluation.measuring import Instruments, Known, Measured, compare, figures, packed, unpacked
from latentfm.evaluation.plots import plot, ticks
from latentfm.evaluation.report import page

FILLS = {"red": (220, 40, 40), "blue": (40, 60, 220)}
ASKED = [
    *(Asked(f"a {colour} disc", "colors", (Thing("disc", 1, colour),)) for colour in FILLS for _ in range(6)),
    *(Asked("two discs", "counting", (Thing("disc", 2),), (Thing("disc", 3),)) for _ in range(6)),
]


def picture(colour: str, places: list[int]) -> Image.Image:
    image = Image.new("RGB", (64, 32), (255, 255, 255))
    for x in places:
        ImageDraw.Draw(image).ellipse((x, 10, x + 11, 21), fill=FILLS[colour])
    return image


class ByColour:
    """Finds discs where the pixels of the middle row have a disc's colour: right about every picture here."""

    name, tells_colours = "by colour", True

    def check(self, classes) -> None:
        pass

    def detect(self, pictures, classes) -> list[list[Detection]]:
        found = []
        for image in pictures:
            row = np.asarray(image)[16].astype(int)
            things = []
            for colour, fill in FILLS.items():
                filled = (np.abs(row - fill).max(axis=1) == 0).astype(int)
                starts = np.flatnonzero(np.diff(np.concatenate([[0], filled])) == 1)
                things += [Detection("disc", (x, 10, x + 12, 22), 1.0, colour) for x in starts.tolist()]
            found.append(things)
        return found


class Means:
    """The mean colour of nine parts of a picture, as a feature space."""

    name = "means"

    def features(self, pictures) -> torch.Tensor:
        rows = [np.asarray(image.resize((3, 3), Image.Resampling.BOX), np.float32).ravel() for image in pictures]
        return torch.from_numpy(np.stack(rows)) / 255 - 1


def measured(folder: Path, wrong: int, name: str = "it") -> Measured:
    """Two pictures of each prompt, of which the first `wrong` prompts' are of another colour or number."""
    folder.mkdir()
    rows, paths, draws = [], [], np.random.default_rng(wrong)
    for number, asked in enumerate(ASKED):
        for seed in range(2):
            colour, many = asked.include[0].colour or "red", asked.include[0].count
            if number % 6 < wrong:
                colour, many = (colour, 3) if many == 2 else ("blue" if colour == "red" else "red", 1)
            path = folder / f"{number}-{seed}.png"
            picture(colour, [int(draws.integers(0, 8)) + 20 * place for place in range(many)]).save(path)
            paths.append((path, asked))
            rows.append({"prompt": number, "seed": 2 * number + seed, "file": path.name})
    found = Instruments(ByColour(), None, Means()).rows(paths, ["disc"], lambda count: None)
    rows = [row | more for row, more in zip(rows, found, strict=True)]
    return Measured(name, {"steps": 2}, [each.prompt for each in ASKED], rows, unpacked(rows, "features"), None)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Measured:
    return measured(tmp_path_factory.mktemp("good") / "pictures", 0)


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Measured:
    return measured(tmp_path_factory.mktemp("bad") / "pictures", 4, "other")


@pytest.fixture
def known(good) -> Known:
    return Known([f"{number}.png" for number in range(36)], good.features + 0.01, None)


def test_what_is_drawn_as_asked_is_right_and_what_is_not_is_counted(good, bad):
    assert {name: each["value"] for name, each in figures(good, ASKED, None).items() if name != "diversity"} == {
        "overall": 1.0, "colors": 1.0, "counting": 1.0,
    }  # fmt: skip
    found = figures(bad, ASKED, None)
    assert found["colors"]["value"] == found["counting"]["value"] == found["overall"]["value"] == pytest.approx(1 / 3)
    assert found["counting"]["low"] < 1 / 3 < found["counting"]["high"] and found["colors"]["of"] == 24
    assert bad.rows[0]["wrong"] == "disc blue, not red" and bad.rows[24]["wrong"] == "3 disc, not below 3"


def test_a_worse_model_is_told_from_a_better_one_and_one_from_itself_is_not(good, bad, known):
    apart = compare(good, bad, ASKED, known)
    assert apart["overall"]["value"] == pytest.approx(-2 / 3) and apart["overall"]["p"] < 0.01
    assert apart["overall"]["high"] < 0 and apart["fid"]["value"] > 0
    same = compare(good, good, ASKED, known)
    assert all(each["value"] == 0 and each["p"] == 1 for each in same.values())
    others = Measured("others", {}, ["else"], [], None, None)
    with pytest.raises(InputError, match="others was evaluated on other prompts than it"):
        compare(good, others, ASKED, None)


def test_distances_and_the_nearest_known_picture(good, known):
    found = figures(good, ASKED, known)
    expected = distances.frechet(distances.gaussian(good.features + 0.01), distances.gaussian(good.features))
    assert found["fid"]["value"] == pytest.approx(expected) and found["fid"]["of"] == 36 and "mmd" in found
    assert good.rows[7]["nearest"][0] in known.paths and found["diversity"]["of"] == 18
    assert found["nearest"]["value"] == pytest.approx(np.mean([row["nearest"][1] for row in good.rows]))


def test_copies_of_known_pictures_are_counted_and_named():
    draws = torch.Generator().manual_seed(0)
    known = Known([f"{number}.png" for number in range(600)], torch.randn(600, 8, generator=draws), None)
    features = torch.cat([known.features[:10] + 1e-3, torch.randn(90, 8, generator=draws)])
    rows = [{"prompt": number // 2, "seed": number, "file": f"{number}.png"} for number in range(100)]
    drawn = Measured("it", {}, ["text"] * 50, rows, features, None)
    found = figures(drawn, [Asked("text")] * 50, known)
    assert 0.1 <= found["copies"]["value"] < 0.25 and [row["nearest"][0] for row in rows[:10]] == known.paths[:10]


def test_an_evaluation_is_read_again(good, tmp_path):
    good.save(tmp_path)
    report = {"prompts": [{"prompt": text} for text in good.prompts], "models": [{"name": "it", "told": good.told, "pictures": good.rows}]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    again, read = Measured.load(tmp_path)
    assert read == json.loads(json.dumps(report)) and again.rows == read["models"][0]["pictures"] and again.prompts == good.prompts
    assert torch.equal(again.features, good.features) and again.clip is None
    (tmp_path / "features.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(InputError, match="features.safetensors"):
        Measured.load(tmp_path)


def test_numbers_go_into_rows_and_come_out():
    values = torch.randn(3, 5)
    rows = [{"features": packed(each)} for each in values]
    assert torch.equal(unpacked(rows, "features"), values) and rows == [{}, {}, {}]
    assert unpacked([{}], "features") is None


def test_a_page_that_obeys_nothing_that_comes_from_files(good, tmp_path):
    good.figures = figures(good, ASKED, None)
    evil = "<script>alert(1)</script>"
    model = {"name": evil, "told": {"model": evil}, "figures": good.figures, "pictures": good.rows}
    record = {
        "prompts_file": evil, "prompts": [{"prompt": evil, "task": each.task} for each in ASKED], "number": 2, "seeds": [0, 35],
        "detector": evil, "space": evil, "clip": None, "validation": None, "real": None, "models": [model], "comparison": None,
        "sweeps": [{"option": "solver", "values": [evil], "figures": [good.figures]}], "losses": [],
    }  # fmt: skip
    made = page(record, tmp_path)
    assert "<script" not in made and made.count("&lt;script&gt;") > 10 and made.count("the picture is gone") >= 36


def test_a_plots_points_are_where_they_should_be():
    flat = [{"value": value, "low": value, "high": value} for value in (0.0, 10.0, 5.0)]
    made = plot("x", ["a", "b", "c"], [flat])
    heights = [float(part.split('"')[1]) for part in made.split("cy=")[1:]]
    assert heights[1] < heights[2] < heights[0] and heights[2] == pytest.approx((heights[0] + heights[1]) / 2, abs=0.11)
    assert "nan" not in plot("x", ["a"], [[{"value": 3.0, "low": float("-inf"), "high": float("inf")}]])
    lost = {"value": float("nan"), "low": float("nan"), "high": float("nan")}
    assert "nan" not in plot("x", ["a"], [[lost]]) and plot("x", ["a", "b"], [[lost, flat[0]]]).count("<circle") == 1
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0]) or len(ticks(0, 1)) <= 6
