"""Hugging Face datasets: saved on disk, from files, streamed; nothing here needs the network."""

import io
import json
import os
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from latentfm.config import SourceOptions
from latentfm.data import images
from latentfm.data.sources import Columns, base, read_sources
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
    streamed = SourceOptions(path=files, kind="datasets", split="test", name="b", streaming=True)
    dataset = read_sources([SourceOptions(path=saved, name="a"), streamed])
    assert len(dataset.samples) == 8 and dataset.samples[-1].id == "b/test:1"
    with pytest.raises(InputError, match="is of the kind parquet, which has no split, streaming; leave it out, or give kind: datasets"):
        read_sources([SourceOptions(path=files, split="test", streaming=True)])


# Datasets that are not to be believed


def saved_cells(folder, cells):
    """A saved dataset whose pictures are `cells`, as another program could write it: no bytes, only names."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": b"", "path": None}] * len(cells), "text": ["x"] * len(cells)}
    datasets.Dataset.from_dict(rows, features).save_to_disk(folder)  # which would put the files' bytes in
    (file,) = folder.glob("*.arrow")
    table = pa.table(rows | {"image": [{"bytes": None, "path": cell} for cell in cells]})
    table = table.cast(pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "text": pa.string()}))
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_cells_that_name_files_lead_to_files_of_the_dataset_alone(tmp_path, streaming):
    (tmp_path / "out.png").write_bytes(png())
    (tmp_path / "set" / "in").mkdir(parents=True)
    (tmp_path / "set" / "in" / "a.png").write_bytes(png(1))
    inside = ["in/a.png", str(tmp_path / "set" / "in" / "a.png"), f"file://{tmp_path}/set/in/a.png"]
    outside = ["../out.png", str(tmp_path / "out.png"), "/etc/passwd", "/dev/zero", f"file://{tmp_path}/out.png", "http://host/a.png",
               f"zip://a.png::{tmp_path}/out.zip", f"http://host::{tmp_path}/set/in/a.png", "s3://bucket/a.png"]  # fmt: skip
    dataset = read_dataset(str(saved_cells(tmp_path / "set", inside + outside)), streaming=streaming)
    assert list(captions_of(dataset)) == [f"train:{i}" for i in range(3)] and {s.path.read_bytes() for s in dataset.samples} == {png(1)}
    assert len(dataset.problems) == len(outside) == sum("leads out" in p.reason or "is a URL" in p.reason for p in dataset.problems)


def test_pictures_in_an_archive_of_the_dataset_are_its_own(tmp_path):
    import zipfile

    folder = saved_cells(tmp_path / "set", [f"zip://a.png::{tmp_path}/set/in.zip", "zip://a.png::in.zip", "zip://b.png::in.zip"])
    with zipfile.ZipFile(folder / "in.zip", "w") as archive:
        archive.writestr("a.png", png(1))
    dataset = read_dataset(str(folder))
    assert [s.path.read_bytes() for s in dataset.samples] == [png(1)] * 2 and dataset.problems[0].reason.endswith("is missing")


def test_a_picture_of_the_hub_is_read_from_its_repository_or_what_was_fetched(tmp_path, monkeypatch):
    from latentfm.data.sources import hub
    from latentfm.data.sources.texts import Unusable

    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")
    asked = []
    monkeypatch.setattr(hub, "read_whole", lambda url: asked.append(url) or b"")
    (tmp_path / "downloads" / "extracted").mkdir(parents=True)
    (tmp_path / "downloads" / "extracted" / "a.png").write_bytes(png())
    assert hub.read_of_hub("user/name", f"{tmp_path}/downloads/extracted/a.png") == png()
    places = ["hf://datasets/user/name@main/a.png", "hf://datasets/user/name/a.png", f"zip://a.png::{tmp_path}/downloads/a.zip",
              "zip://a.png::hf://datasets/user/name@main/a.zip"]  # fmt: skip
    for place in places:
        hub.read_of_hub("user/name", place)
    assert asked == places
    for place in ("hf://datasets/user/name2/a.png", "hf://datasets/user/name/../other/a.png", "https://host/a.png", "/etc/passwd",
                  "http://host::hf://datasets/user/name/a.zip", f"{tmp_path}/downloads/../secret"):  # fmt: skip
        with pytest.raises(Unusable, match="leads out"):
            hub.read_of_hub("user/name", place)
    assert asked == places


@pytest.mark.parametrize("damage", ["state", "splits", "pipe", "pointer"])
def test_a_saved_dataset_whose_files_are_others_is_refused(saved, tmp_path, damage):
    folder = tmp_path / "saved"
    arrow = next(folder.glob("*.arrow"))
    if damage == "state":
        state = json.loads((folder / "state.json").read_text())
        state["_data_files"] = [{"filename": "../elsewhere.arrow"}]
        (folder / "state.json").write_text(json.dumps(state))
    elif damage == "splits":
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "/etc"]}))
    elif damage == "pipe":
        arrow.unlink()
        os.mkfifo(arrow)
    else:
        arrow.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    message = {"pipe": "named pipe, not a regular file", "pointer": "Git LFS pointer"}
    with pytest.raises(InputError, match=message.get(damage, "is damaged: an entry row whose file leads")):
        read_dataset(str(folder))


def test_offsets_that_lead_out_of_a_column_are_not_followed(saved, tmp_path):
    """Arrow maps the file and trusts it: what it would read is another part of the memory, if any."""
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    data = bytearray(arrow.read_bytes())
    lengths = np.cumsum([0, *(len(f"picture {i}") for i in range(6))], dtype=np.int32).tobytes()
    at = data.index(lengths)
    data[at + 8 : at + 12] = np.int32(2**30).tobytes()
    arrow.write_bytes(data)
    with pytest.raises(InputError, match="reading the dataset .* failed after 0 rows"):
        read_dataset(saved)
