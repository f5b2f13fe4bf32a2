"""WebDataset shards, written and read side by side with the webdataset library; cut off, damaged, compressed, behind a URL."""

import gzip
import io
import pickle
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from latentfm.config import SourceOptions
from latentfm.data import images
from latentfm.data.sources import Columns, base, read_sources
from latentfm.data.sources.shards import read_shards, split
from latentfm.errors import InputError


def png(seed=0):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def shard(path, *samples):
    """A tar by webdataset's own writer; a sample is {"__key__": ..., extension: bytes or text}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            writer.write({name: value.encode() if isinstance(value, str) and name[0] != "_" else value for name, value in sample.items()})
    return path


def numbered(path, first, count):
    return shard(path, *({"__key__": f"{i:04d}", "png": png(i), "txt": f"picture {i}"} for i in range(first, first + count)))


def captions_of(dataset):
    return {sample.id: sample.captions for sample in dataset.samples}


def reasons(dataset):
    return {problem.path: problem.reason for problem in dataset.problems}


def test_shards_in_order_and_their_pictures_in_any(tmp_path):
    for i in range(3):
        numbered(tmp_path / f"{i:02d}.tar", 5 * i, 5)
    wanted = {f"{i // 5:02d}.tar/{i:04d}": (f"picture {i}",) for i in range(15)}
    for place in (tmp_path, tmp_path / "{00..02}.tar", tmp_path / "*.tar", f"file://{tmp_path}/{{00..02}}.tar"):
        dataset = read_shards(str(place))
        assert captions_of(dataset) == wanted and list(captions_of(dataset)) == list(wanted) and dataset.problems == ()
    for i in (14, 0, 7, 7, 3, 10):
        sample = dataset.samples[i]
        assert sample.path.read_bytes() == png(i) and images.digest(sample.path) == base.sha256(png(i))
    assert pickle.loads(pickle.dumps(dataset.samples[9])).path.read_bytes() == png(9)


def test_a_shard_in_memory_is_a_url_like_any_other(tmp_path):
    import fsspec

    with fsspec.open("memory://bucket/a/0.tar", "wb") as file:
        file.write(numbered(tmp_path / "0.tar", 0, 4).read_bytes())
    dataset = read_sources([SourceOptions(url="memory://bucket/a/{0..0}.tar", name="here")])
    assert captions_of(dataset) == {f"here/0.tar/{i:04d}": (f"picture {i}",) for i in range(4)}
    assert [sample.path.read_bytes() for sample in dataset.samples] == [png(i) for i in range(4)]


@pytest.mark.parametrize("suffix, mode", [("tar.gz", "w:gz"), ("tgz", "w:gz"), ("tar.bz2", "w:bz2"), ("tar.xz", "w:xz")])
def test_compressed_shards(tmp_path, suffix, mode):
    plain = numbered(tmp_path / "plain.tar", 0, 3)
    with tarfile.open(tmp_path / f"x.{suffix}", mode) as out, tarfile.open(plain) as archive:
        for member in archive:
            out.addfile(member, archive.extractfile(member))
    dataset = read_shards(str(tmp_path / f"x.{suffix}"))
    assert [sample.path.read_bytes() for sample in reversed(dataset.samples)] == [png(i) for i in (2, 1, 0)] and dataset.problems == ()


def test_groups_are_webdatasets_own(tmp_path):
    """Keys with folders and dots, in the order and with the files that webdataset itself finds."""
    long = "deep/" * 30 + "x" * 120  # beyond the 100 characters of a plain header
    keys = ["a", "b/c", "b.c/d", long, "ä 猫"]
    path = shard(tmp_path / "x.tar", *({"__key__": key, "cls": b"1", "thumb.jpg": png(1), "txt": key} for key in keys))
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    with path.open("rb") as file:
        parts = (part | {"__url__": ""} for part in tar_file_iterator(file))
        theirs = [(sample["__key__"], sample["thumb.jpg"]) for sample in group_by_keys(parts)]
    ours = [(s.id.removeprefix("x.tar/"), s.path.read_bytes()) for s in read_shards(str(path)).samples]
    assert ours == theirs and [key for key, _ in ours] == keys
    assert split("b.c/d.e.JPG") == ("b.c/d", ".", "e.jpg") and split(".hidden/.x") == (".hidden/.x", "", "x")


def test_columns_are_extensions_and_entries_of_json(tmp_path):
    sample = {
        "__key__": "0", "png": png(0), "alt.jpg": png(1), "mask.png": png(2), "txt": "one\n\ntwo\n",
        "json": '{"text": "by text", "long": ["a", "b"], "txt": "not this"}',
    }  # fmt: skip
    path = str(shard(tmp_path / "x.tar", sample, {"__key__": "1", "json": '{"text": "by text"}', "jpg": png(3)}))
    first, second = read_shards(path).samples
    assert (first.captions, first.path.read_bytes(), first.mask.read_bytes()) == (("one", "two"), png(0), png(2))
    assert (second.captions, second.path.read_bytes(), second.mask) == (("by text",), png(3), None)
    (first,) = read_shards(path, Columns("alt.jpg", {"txt": 1, "long": 3}, "png")).samples
    assert (first.captions, first.caption_weights) == (("one", "two", "a", "b"), (0.5, 0.5, 1.5, 1.5))
    assert (first.path.read_bytes(), first.mask.read_bytes()) == (png(1), png(0))
    with pytest.raises(InputError, match=r"no sample of .* has 'lonk' \(did you mean 'long'\?\); there are alt\.jpg, jpg, json, long"):
        read_shards(path, Columns(captions={"text": 1, "lonk": 1}))


def test_every_unusable_sample_is_named(tmp_path):
    path = shard(
        tmp_path / "x.tar", {"__key__": "ok", "png": png(), "txt": ""}, {"__key__": "bare", "png": png()}, {"__key__": "text", "txt": "x"},
        {"__key__": "latin", "png": png(), "txt": b"caf\xe9"}, {"__key__": "json", "png": png(), "json": "{"},
        {"__key__": "list", "png": png(), "json": "[1]"}, {"__key__": "number", "png": png(), "json": '{"text": 5}'},
        {"__key__": "other", "png": png(), "txt": "x"}, {"__key__": "ok", "png": png(), "txt": "again"},
        {"__key__": "twice", "png": png(), "json": '{"text": "a", "text": "b"}'},
    )  # fmt: skip
    dataset = read_shards(str(path))
    assert captions_of(dataset) == {"x.tar/ok": ("",), "x.tar/other": ("x",)}
    assert reasons(dataset) == {
        "x.tar/bare": "row without a caption", "x.tar/text": "sample without a picture", "x.tar/latin": "caption file that is not UTF-8",
        "x.tar/json": "sample whose .json is malformed", "x.tar/list": "sample whose .json is malformed",
        "x.tar/twice": "sample whose .json gives 'text' twice; leave one of them out",
        "x.tar/number": "row whose caption is not a text", "x.tar/ok": "key that came before in the archive",
    }  # fmt: skip


def offsets_of(path):
    with tarfile.open(path) as archive:
        return [(member.name, member.offset, member.offset_data, member.size) for member in archive]


@pytest.mark.parametrize("where", ["in a picture", "in a text", "in a header", "between files", "between samples", "before the end mark"])
def test_a_shard_that_is_cut_off_is_used_to_there_and_named(tmp_path, where):
    path = numbered(tmp_path / "x.tar", 0, 6)
    numbered(tmp_path / "y.tar", 6, 2)
    (_, start, data, size), (_, text, text_data, _), (_, following, _, _) = offsets_of(path)[8:11]  # of 0004
    last = offsets_of(path)[-1]
    cut, samples = {
        "in a picture": (data + size // 2, 4), "in a text": (text_data + 3, 4), "in a header": (text + 100, 4), "between files": (text, 4),
        "between samples": (following, 4), "before the end mark": (last[2] + 512, 5),
    }[where]  # fmt: skip
    path.write_bytes(path.read_bytes()[:cut])
    dataset = read_shards(str(tmp_path))
    assert list(captions_of(dataset)) == [f"x.tar/{i:04d}" for i in range(samples)] + ["y.tar/0006", "y.tar/0007"]
    (problem,) = dataset.problems
    assert problem.reason == "archive cut off or damaged, the rest of it is lost"
    assert problem.path.startswith(f"{path} after x.tar/{samples - 1:04d}, {samples} samples read (")


def test_an_archive_behind_another_in_one_file_is_named(tmp_path):
    path, other = numbered(tmp_path / "x.tar", 0, 2), numbered(tmp_path / "y.tar", 2, 2)
    path.write_bytes(path.read_bytes() + other.read_bytes())
    dataset = read_shards(str(path))
    (problem,) = dataset.problems
    assert list(captions_of(dataset)) == ["x.tar/0000", "x.tar/0001"]
    assert "after x.tar/0001, 2 samples read (more follows its end mark, as of two archives in one file" in problem.path


def test_damage_in_the_middle_is_named_too(tmp_path):
    path = numbered(tmp_path / "x.tar", 0, 6)
    data = bytearray(path.read_bytes())
    header = offsets_of(path)[6][1]
    data[header : header + 200] = b"\x07" * 200
    path.write_bytes(data)
    dataset = read_shards(str(path))
    assert len(dataset.samples) == 2 and "after x.tar/0001, 2 samples read" in dataset.problems[0].path


def test_a_compressed_shard_that_is_cut_off(tmp_path):
    whole = gzip.compress(numbered(tmp_path / "x.tar", 0, 6).read_bytes())
    (tmp_path / "z.tar.gz").write_bytes(whole[: len(whole) // 2])
    dataset = read_shards(str(tmp_path / "z.tar.gz"))
    assert 1 < len(dataset.samples) < 4 and f"{len(dataset.samples)} samples read" in dataset.problems[0].path
    assert [sample.path.read_bytes() for sample in dataset.samples] == [png(i) for i in range(len(dataset.samples))]
    (tmp_path / "z.tar.gz").write_bytes(whole[:100])
    with pytest.raises(InputError, match=r"first problem: .*z\.tar\.gz after its beginning, 0 samples read"):
        read_shards(str(tmp_path / "z.tar.gz"))


@pytest.mark.parametrize("content", [b"", b"not a tar" * 200])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(InputError, match=r"nothing to train on in .*x\.tar.*0001\.jpg beside 0001\.txt"):
        read_shards(str(tmp_path / "x.tar"))


def test_a_shard_that_changes_after_it_was_listed_is_not_read_for_the_old_one(tmp_path):
    path = numbered(tmp_path / "x.tar", 0, 6)
    samples = read_shards(str(path)).samples
    numbered(path, 0, 1)
    with pytest.raises(images.UnreadableImage, match=r"cannot read x\.tar/0005\.png: .*x\.tar ends early; it was changed"):
        images.contents(samples[5].path)


def test_archives_are_found_in_any_case_and_a_file_of_the_very_name_first(tmp_path):
    for name in ("a.tar", "B.TAR", "[a]*.tar"):
        numbered(tmp_path / name, 0, 1)
    assert sorted(captions_of(read_shards(str(tmp_path)))) == ["B.TAR/0000", "[a]*.tar/0000", "a.tar/0000"]
    assert list(captions_of(read_shards(str(tmp_path / "[a]*.tar")))) == ["[a]*.tar/0000"]
    assert sorted(captions_of(read_shards(str(tmp_path / "?.*")))) == ["B.TAR/0000", "a.tar/0000"]


def test_archives_of_one_name_are_refused(tmp_path):
    numbered(tmp_path / "0" / "x.tar", 0, 1)
    numbered(tmp_path / "1" / "x.tar", 1, 1)
    with pytest.raises(InputError, match=r"two archives are called x\.tar"):
        read_shards(str(tmp_path / "{0..1}" / "x.tar"))
