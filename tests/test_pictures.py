"""PNGs that remember their settings, names that are never taken twice, and contact sheets measured pixel by pixel."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFont

from latentfm.errors import InputError
from latentfm.pictures import LARGEST, PAPER, SMALLEST, cell, grid, read_settings, save_png, shortened, table, unaccented, wrapped

SETTINGS = {
    "prompt": "ein Bär, 熊 🐻\nsecond line", "seed": 2**63 - 1, "negative_prompt": "blur", "steps": 28, "guidance": 3.5,
    "width": 64, "height": 32, "model": "bundled", "model_fingerprint": "0123456789ab", "latentfm": "0.1.0", "own": [1, {"a": None}],
}  # fmt: skip


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 200, (height, width, 3), dtype=np.uint8))


def pixels(image):
    return np.asarray(image.convert("RGB"))


def test_a_picture_gives_its_settings_and_its_pixels_back(tmp_path):
    path = save_png(noise(64, 32), tmp_path / "new" / "folder", "bear", SETTINGS)
    assert path == tmp_path / "new" / "folder" / "bear.png"
    assert read_settings(path) == SETTINGS
    with Image.open(path) as image:
        assert (pixels(image) == pixels(noise(64, 32))).all()
        words = image.info["parameters"].splitlines()
    assert words[:3] == ["ein Bär, 熊 🐻", "second line", "Negative prompt: blur"]
    assert words[3] == (
        "Steps: 28, CFG scale: 3.5, Seed: 9223372036854775807, Size: 64x32, "
        "Model: bundled, Model hash: 0123456789ab, Version: latentfm 0.1.0"
    )


def no_hard_links(source, target):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
def test_no_file_is_overwritten(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_hard_links)
    (tmp_path / "a-2.png").write_bytes(b"the user's")
    paths = [save_png(noise(8, 8, seed), tmp_path, "a", {"seed": seed}) for seed in range(3)]
    assert [path.name for path in paths] == ["a.png", "a-3.png", "a-4.png"]
    assert [read_settings(path)["seed"] for path in paths] == [0, 1, 2]
    assert (tmp_path / "a-2.png").read_bytes() == b"the user's"
    assert len(list(tmp_path.iterdir())) == 4


def test_writers_at_the_same_time_get_a_file_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda seed: save_png(noise(8, 8, seed), tmp_path, "a", {"seed": seed}), range(24)))
    assert len(set(paths)) == 24
    assert sorted(read_settings(path)["seed"] for path in tmp_path.iterdir()) == list(range(24))


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, failure):
    def fail(descriptor):
        assert any(tmp_path.iterdir()), "the bytes were written already: this is the latest moment to fail"
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(failure)):
        save_png(noise(8, 8), tmp_path, "a", {})
    assert list(tmp_path.iterdir()) == []


def test_reading_settings_where_there_are_none(tmp_path):
    with pytest.raises(InputError, match="there is no picture"):
        read_settings(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        read_settings(tmp_path / "text.png")
    noise(8, 8).save(tmp_path / "plain.png")
    with pytest.raises(InputError, match="carries no settings"):
        read_settings(tmp_path / "plain.png")


def test_a_cell_enlarges_small_pictures_by_whole_factors_and_reduces_large_ones():
    small = noise(64, 40)
    factor = SMALLEST // 64
    assert (pixels(cell(small)) == pixels(small).repeat(factor, axis=0).repeat(factor, axis=1)).all()
    assert cell(noise(100, 30)).size == (200, 60)
    assert cell(noise(300, 200)).size == (300, 200)
    assert cell(Image.new("L", (4 * LARGEST, LARGEST), 9)).size == (LARGEST, LARGEST // 4)
    assert (pixels(cell(cell(small))) == pixels(cell(small))).all()


def test_the_sheet_holds_every_picture_at_its_place():
    images = [noise(200, 200, seed) for seed in range(5)]
    sheet = pixels(grid(images, columns=3, padding=10))
    assert sheet.shape == (2 * 210 + 10, 3 * 210 + 10, 3)
    for index, image in enumerate(images):
        left, top = 10 + index % 3 * 210, 10 + index // 3 * 210
        assert (sheet[top : top + 200, left : left + 200] == pixels(image)).all()
        sheet = sheet.copy()
        sheet[top : top + 200, left : left + 200] = PAPER
    assert (sheet == PAPER).all()


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (2, (1, 2)), (4, (2, 2)), (5, (2, 3)), (16, (4, 4))])
def test_the_sheet_is_near_square_unless_told(count, shape):
    rows, columns = shape
    assert grid([noise(200, 200)] * count, padding=0).size == (columns * 200, rows * 200)
    assert grid([noise(200, 200)] * count, columns=100, padding=0).size == (count * 200, 200)


def test_pictures_of_different_sizes_are_centred():
    wide, tall = noise(300, 200), noise(200, 400, 1)
    sheet = pixels(grid([wide, tall], columns=2, padding=0))
    assert sheet.shape == (400, 600, 3)
    assert (sheet[100:300, :300] == pixels(wide)).all()
    assert (sheet[:, 350:550] == pixels(tall)).all()


def test_labels_stand_under_their_pictures_and_stay_within_their_width():
    images = [noise(200, 200, seed) for seed in range(2)]
    words = " ".join(["a rather long prompt"] * 20)
    plain, labelled = pixels(grid(images, columns=2)), pixels(grid(images, columns=2, labels=[words, "W" * 300]))
    below = labelled[208:].copy()
    assert (labelled[:208] == plain[:208]).all()
    for left in (8, 216):
        assert (below[:, left : left + 200] != PAPER).any()
        below[:, left : left + 200] = PAPER
    assert (below == PAPER).all()


def test_a_shortened_label_says_so():
    font = ImageFont.load_default(13)
    assert wrapped("a red apple", font, 200) == ["a red apple"]
    assert wrapped("", font, 200) == [""]
    lines = wrapped("one two three four five six seven eight nine ten", font, 100)
    assert len(lines) == 2 and lines[0].startswith("one two") and lines[1].endswith("...")
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "one two three four five six seven eight nine ten".startswith(" ".join(lines).removesuffix("..."))
    cut = shortened("W" * 50, font, 100)
    assert cut.endswith("W...") and font.getlength(cut) <= 100 < font.getlength("W" + cut)


def test_labels_lose_the_accents_the_font_lacks():
    assert unaccented("ein Bär à côté, 熊") == "ein Bar a cote, 熊"
    assert (pixels(grid([noise(200, 200)], labels=["Bär"])) == pixels(grid([noise(200, 200)], labels=["Bar"]))).all()


def test_sheets_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="at least one picture"):
        grid([])
    with pytest.raises(ValueError, match="not 0"):
        grid([noise(8, 8)], columns=0)
    with pytest.raises(ValueError, match="1 labels for 2 pictures"):
        grid([noise(8, 8)] * 2, labels=["one"])


def test_a_table_has_each_picture_in_its_row_and_column():
    rows = [[noise(192, 96, 3 * row + column) for column in range(3)] for row in range(2)]
    sheet = table(rows, ["step 0", "step 1,000"], ["a red apple", "b", "the moon and seven stars above a dark sea " * 3])
    right, low = sheet.width - 8, sheet.height - 8
    for row in range(2):
        for column in range(3):
            corner = (right - (3 - column) * 200 + 8, low - (2 - row) * 104 + 8)
            assert (pixels(sheet.crop((*corner, corner[0] + 192, corner[1] + 96))) == pixels(rows[row][column])).all()
    left = right - 3 * 200 + 8
    assert (pixels(sheet)[-212:-8, :8] == PAPER[0]).all()
    for row in range(2):  # a label at the left of each row, one above each column
        assert (pixels(sheet)[sheet.height - (2 - row) * 104 :, 8 : left - 8][:96] < 200).any()
    above = sheet.height - 2 * 104
    assert all((pixels(sheet)[: above - 8, left + column * 200 :][:, :192] < 200).any() for column in range(3))


@pytest.mark.parametrize("rows, columns, error", [(2, 3, "labels"), (1, 2, "labels"), (0, 0, "at least one")])
def test_a_table_wants_a_label_a_row_and_a_column(rows, columns, error):
    with pytest.raises(ValueError, match=error):
        table([[noise(8, 8)] * 3] * min(rows, 1), ["a"] * rows, ["b"] * columns)
