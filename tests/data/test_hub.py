"""Hugging Face datasets: saved on disk, from files, streamed; nothing here needs the network."""

import io
import json
import pickle

import datasets
import numpy as np
import pytest
from PIL import Image

from latentfm.data import images
from latentfm.data.sources import Columns, Source, base, read_sources
from latentfm.data.sources.hub import read_dataset
from latentfm.errors import InputError


def png(seed=0):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def made(count=6, **columns):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"), "short": datasets.Value("string")})
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(count)], "text": [f"picture {i}" for i in range(count)]}
    rows["short"] = [f"p{i}" for i in range(count)]
    return datasets.Dataset.from_dict(rows | columns, features)


@pytest.fixture
def saved(tmp_path):
    made().save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder of parquet files, as a dataset on the hub is laid out."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    made().to_parquet(tmp_path / "files" / "train-00000-of-00001.parquet")
    made(2).to_parquet(tmp_path / "files" / "test-00000-of-00001.parquet")
    return str(tmp_path / "files")


def captions_of(dataset):
    return {sample.id: sample.captions for sample in dataset.samples}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_dataset(saved, streaming):
    dataset = read_dataset(saved, streaming=streaming)
    assert captions_of(dataset) == {f"train:{i}": (f"picture {i}",) for i in range(6)} and dataset.problems == ()
    for i in (5, 0, 3, 3, 4):  # a stream begins anew to go back
        sample = dataset.samples[i]
        assert sample.path.read_bytes() == png(i) and images.digest(sample.path) == base.sha256(png(i))


@pytest.mark.parametrize("streaming", [False, True])
def test_files_laid_out_as_on_the_hub(files, streaming):
    dataset = read_dataset(files, Columns(captions={"text": 3, "short": 1}), streaming=streaming)
    assert captions_of(dataset) == {f"train:{i}": (f"picture {i}", f"p{i}") for i in range(6)}
    assert {sample.caption_weights for sample in dataset.samples} == {(3, 1)}
    assert [sample.path.read_bytes() for sample in dataset.samples] == [png(i) for i in range(6)]
    assert captions_of(read_dataset(files, split="test", streaming=streaming)) == {f"test:{i}": (f"picture {i}",) for i in range(2)}


@pytest.mark.parametrize("streaming", [False, True])
def test_files_whose_columns_are_not_declared(tmp_path, monkeypatch, streaming):
    """JSON lines that name their pictures: a stream of them does not know its columns before its first row."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "lines"
    (folder / ".pictures").mkdir(parents=True)
    (folder / ".pictures" / "0.png").write_bytes(png())
    names = [".pictures/0.png", str(folder / ".pictures" / "0.png"), "../outside.png", str(tmp_path / "outside.png"), "http://localhost/0.png"]
    (tmp_path / "outside.png").write_bytes(png())
    (folder / "train.jsonl").write_text("".join(json.dumps({"image": name, "text": ["a", "b"]}) + "\n" for name in names))
    dataset = read_dataset(str(folder), streaming=streaming)
    assert [(s.id, s.captions, s.path.read_bytes()) for s in dataset.samples] == [(f"train:{i}", ("a", "b"), png()) for i in (0, 1)]
    reasons = ["row whose picture leads out of the folder"] * 2 + ["row whose picture is a URL, which is not followed (fetch it beside)"]
    assert [problem.reason for problem in dataset.problems] == reasons


def test_a_stream_is_read_forward_once_for_listing_and_once_for_its_pictures(saved, monkeypatch):
    begun = []
    original = datasets.IterableDataset.__iter__
    monkeypatch.setattr(datasets.IterableDataset, "__iter__", lambda self: begun.append(1) or original(self))
    dataset = read_dataset(saved, streaming=True)
    assert len(begun) == 1
    for sample in dataset.samples:
        sample.path.read_bytes()
        sample.path.read_bytes()
    assert len(begun) == 2


def test_samples_go_to_other_processes(saved):
    for streaming in (False, True):
        samples = read_dataset(saved, streaming=streaming).samples
        samples[2].path.read_bytes()
        assert pickle.loads(pickle.dumps(samples[4])).path.read_bytes() == png(4)


def test_a_dataset_of_several_splits(tmp_path):
    datasets.DatasetDict({"train": made(2), "validation": made(3)}).save_to_disk(tmp_path / "saved")
    place = str(tmp_path / "saved")
    assert len(read_dataset(place).samples) == 2 and len(read_dataset(place, split="validation", streaming=True).samples) == 3
    with pytest.raises(InputError, match=r"has no split 'valid' \(did you mean 'validation'\?\); there are train, validation"):
        read_dataset(place, split="valid")


def test_every_unusable_row_is_named(tmp_path):
    rows = {"image": [{"bytes": png(), "path": None}, None, {"bytes": png(1), "path": None}], "text": ["fine", "x", None]}
    made(3, **rows).save_to_disk(tmp_path / "saved")
    dataset = read_dataset(str(tmp_path / "saved"))
    assert captions_of(dataset) == {"train:0": ("fine",)}
    assert {p.path: p.reason for p in dataset.problems} == {"train:1": "row without a picture", "train:2": "row without a caption"}


def test_pictures_are_kept_as_stored_not_decoded_and_encoded_again(tmp_path):
    """A JPEG's bytes, and so its hash, are the file's own."""
    file = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(file, quality=50)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": [str(file)], "text": ["x"]}, features).save_to_disk(tmp_path / "saved")
    (sample,) = read_dataset(str(tmp_path / "saved")).samples
    assert sample.path.read_bytes() == file.read_bytes()


def test_what_is_not_there_is_named(saved, tmp_path, files):
    with pytest.raises(InputError, match=r"the dataset .* has no column 'txt' \(did you mean 'text'\?\); there are image, text, short"):
        read_dataset(saved, Columns(captions={"txt": 1}))
    with pytest.raises(InputError, match="cannot open the dataset .*nowhere"):
        read_dataset(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="cannot open the dataset .*no_such_subset"):
        read_dataset(files, subset="no_such_subset")


def test_a_dataset_that_cannot_be_read_to_its_end_is_refused(saved, monkeypatch):
    original = datasets.IterableDataset.__iter__

    def broken(self):
        for i, row in enumerate(original(self)):
            if i == 4:
                raise ConnectionError("the line is dead")
            yield row

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", broken)
    with pytest.raises(InputError, match=r"failed after 4 rows \(the line is dead\); start again"):
        read_dataset(saved, streaming=True)


def test_kinds_are_told_by_what_is_there_and_options_of_others_are_refused(saved, files):
    dataset = read_sources([Source(saved, name="a"), Source(files, "datasets", split="test", name="b", streaming=True)])
    assert len(dataset.samples) == 8 and dataset.samples[-1].id == "b/test:1"
    with pytest.raises(InputError, match="is of the kind parquet, which has no split, streaming; leave it out, or give kind: datasets"):
        read_sources([Source(files, split="test", streaming=True)])
