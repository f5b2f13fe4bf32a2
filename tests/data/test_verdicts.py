"""What is remembered of a picture that could not be read, and for how long; and what is said once of all captions."""

import logging
import re

import numpy as np
import pytest
import torch
from data.cache.filling import drop
from data.preparing import data_of
from PIL import Image, ImageFile

from latentfm.config import DataOptions, ModelOptions, SourceOptions
from latentfm.data import images
from latentfm.data.from_options import open_dataset
from latentfm.data.loader import Dropout
from latentfm.data.sources import read_folder
from latentfm.errors import InputError
from latentfm.training.models import load_models
from latentfm.training.records.progress import Progress


@pytest.fixture(scope="module")
def models(tiny_folder):
    return load_models(ModelOptions(pipeline=str(tiny_folder)), weights=False)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(4):
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"thing {index}")
    return folder


@pytest.fixture
def filled(models, tmp_path, pictures):
    """A function that fills the cache of the pictures; the dataset afterwards. `made` are the keys of pictures that were encoded."""

    def fill(**options):
        given = DataOptions(folder=str(pictures), cache=str(tmp_path / "cache"), **options)
        data = data_of(read_folder(pictures), models, given, (8,))
        data.made = data.prepare(Progress(False))
        return data

    return fill


def pictures_made(data):
    return len(data.made.get("moments", [])) + len(data.made.get("checks", []))


both_ways = pytest.mark.parametrize("options", [{}, {"online": True}], ids=["cached", "online"])


def failing(monkeypatch, error, name="2.png", times=10**9):
    """Has the decoder raise `error` for one picture, so many times; returns how often it was asked for it."""
    asked, decoded = [], images.decoded

    def decode(path, data, take, *how):
        if path.name == name:
            asked.append(path)
            take(32 * 32)
            if len(asked) <= times:
                raise error
        return decoded(path, data, take, *how)

    monkeypatch.setattr(images, "decoded", decode)
    return asked


LACKS = [MemoryError(), images.UnreadableImage("broken data stream")]


@both_ways
@pytest.mark.parametrize("error", LACKS, ids=["told", "called broken"])
def test_a_lack_of_memory_ends_the_run_by_name_and_is_forgotten(filled, monkeypatch, options, error):
    with monkeypatch.context() as lack:
        failing(lack, error)
        lack.setattr(images, "lacks", lambda amount: True)
        with pytest.raises(MemoryError, match=r"2\.png" if str(error) else None):
            filled(**options)
    data = filled(**options)
    assert len(data.samples) == 4 and not data.inventory.unreadable


@pytest.mark.parametrize("error", LACKS, ids=["told", "called broken"])
def test_a_picture_that_fails_beside_others_is_tried_alone(filled, monkeypatch, error):
    asked = failing(monkeypatch, error, times=1)
    assert len(filled().samples) == 4 and len(asked) == 2


def test_a_picture_that_asks_for_more_than_its_size_explains_is_unreadable(filled, monkeypatch, capsys):
    failing(monkeypatch, MemoryError())
    assert len(filled().samples) == 3
    assert "2.png: it asks for more memory than its size explains; save it again as PNG" in capsys.readouterr().out


@pytest.mark.parametrize("said", ["out of memory error when reading image file", "Failed to decode: Out of memory"])
def test_decoders_that_say_out_of_memory_lack_memory(pictures, monkeypatch, said):
    def load(self):
        raise OSError(said)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    monkeypatch.setattr(images, "lacks", lambda amount: True)
    with pytest.raises(MemoryError, match=r"2\.png"):
        images.open_rgb(pictures / "2.png")


@both_ways
def test_a_verdict_is_kept_as_long_as_the_decoders_and_the_bytes(filled, pictures, monkeypatch, capsys, options):
    good = (pictures / "2.png").read_bytes()
    (pictures / "2.png").write_bytes(b"no picture")
    first = filled(**options)
    assert pictures_made(first) == 3 == len(first.samples) and "2.png: not a picture" in capsys.readouterr().out
    asked = failing(monkeypatch, MemoryError(), times=0)
    again = filled(**options)
    assert pictures_made(again) == 0 and len(again.samples) == 3 and len(asked) == 2  # to say why it is left out
    monkeypatch.setattr(images, "PICTURE_BYTES", images.PICTURE_BYTES + 1)  # another bound, as another decoder
    images.decoders.cache_clear()
    asked.clear()
    new = filled(**options)
    assert pictures_made(new) == (3 if options else 0) and len(asked) == 4  # tried again; what was encoded stays
    (pictures / "2.png").write_bytes(good)
    assert pictures_made(filled(**options)) == 1


@pytest.fixture(autouse=True)
def own_decoders():
    yield
    images.decoders.cache_clear()


def test_what_an_earlier_version_called_unreadable_is_tried_again(filled, pictures):
    data = filled()
    key = data.image_key(data.samples[2], False)
    drop(data.cache, key)
    data.cache.write("moments", {key: {"unreadable": torch.zeros(0, dtype=torch.bfloat16)}})
    again = filled()
    assert len(again.samples) == 4 and again.made["moments"] == [key]


def test_a_mask_that_cannot_be_used_is_a_verdict_too(filled, pictures):
    Image.new("L", (32, 32), 0).save(pictures / "1.mask.png")
    assert [len(filled().samples) for _ in range(2)] == [3, 3]
    Image.new("L", (32, 32), 255).save(pictures / "1.mask.png")
    assert len(filled().samples) == 4


def test_what_is_made_is_counted_among_what_is_used(filled, pictures):
    (pictures / "2.png").write_bytes(b"no picture")
    data = filled()
    before = np.empty(0, "S32")
    contents = data.contents(before, data.made)
    assert {kind: found[:2] for kind, found in contents.items()} == {"moments": (3, 3), "prompts": (3, 3), "masks": (0, 0), "pairs": (0, 0)}
    (pictures / "3.txt").write_text("another thing")
    before, data = data.existing_keys(), filled()
    contents = data.contents(before, data.made)
    assert {kind: found[:2] for kind, found in contents.items()} == {"moments": (3, 0), "prompts": (3, 1), "masks": (0, 0), "pairs": (0, 0)}


def test_a_mask_that_changes_while_it_is_trained_on_is_noticed(filled, pictures):
    Image.new("L", (32, 32), 255).save(pictures / "1.mask.png")
    reader = filled(online=True).reader(0, Dropout(0, 0))
    assert reader[[(0, 1, 0)], 8].mask.min() == 1
    Image.new("L", (32, 32), 128).save(pictures / "1.mask.png")
    with pytest.raises(InputError, match=r"1\.mask\.png changed"):
        reader[[(0, 1, 0)], 8]


# Captions


@both_ways
def test_captions_that_are_cut_are_said_once_with_their_number(filled, pictures, caplog, options):
    for index in range(3):
        (pictures / f"{index}.txt").write_text(f"a small brown dog in the park under a yellow sun {index} " * 3 + f"\nthing {index}")
    caplog.set_level(logging.WARNING)
    data = filled(**options)
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.match(r"3 of 7 captions are cut: 3 by text_encoder \(CLIP\) after 16 tokens, 3 by text_encoder_2 .*, \d by text_encoder_3 "
                    r"\(T5\) after 8 tokens; `latentfm data check` shows them .* begins \"a small brown", message)  # fmt: skip
    if options:
        reader = data.reader(0, Dropout(0, 0))
        data.complete(reader[[(0, index, 0) for index in range(4)], 8], torch.device("cpu"))
    else:
        filled()
    assert len(caplog.records) == 1
    data.models.encoder.encode(["a small brown dog in the park under a yellow sun " * 3], 8)
    assert len(caplog.records) == 4  # of a prompt by itself each encoder says it


def test_one_caption_for_a_folder_or_for_a_source(pictures):
    options = DataOptions(folder=str(pictures), caption=" a photo of sks dog ")
    assert {sample.captions for sample in open_dataset(options).samples} == {("a photo of sks dog",)}
    own = SourceOptions(path=str(pictures), name="own", caption="its own")
    columns = SourceOptions(path=str(pictures), name="other")
    dataset = open_dataset(DataOptions(sources=[own, columns], caption="for the rest"))
    assert {(sample.share.source, sample.captions) for sample in dataset.samples} == {("own", ("its own",)), ("other", ("for the rest",))}
    with pytest.raises(ValueError, match="caption stands for every caption"):
        SourceOptions(path="a", caption="x", caption_columns="text")


def test_progress_without_a_terminal_ends_with_all(capsys):
    progress = Progress(True)
    task = progress.add_task("caching", total=153)
    progress.advance(task, 32)
    progress.advance(task, 121)
    progress.update(task, "waiting for other processes (3 entries)")
    progress.update(task, "waiting for other processes (2 entries)")
    progress.remove_task(task)
    assert capsys.readouterr().out.splitlines() == [
        "caching: 32 of 153", "waiting for other processes (3 entries)", "caching: 153 of 153"
    ]  # fmt: skip
    progress.remove_task(progress.add_task("caching", total=5))
    assert capsys.readouterr().out == ""  # nothing was to be done
