"""What is kept of files that did not change: never out of date, never damaged, not read again."""

import builtins
import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.preparing import Quiet, data_of
from PIL import Image

from latentfm.config import DataOptions, ModelOptions
from latentfm.data.cache import stat_cache
from latentfm.data.cache.processes import Processes
from latentfm.data.cache.stat_cache import COARSE_GRAIN, GRAIN, StatCache, settled, signature
from latentfm.data.from_options import open_dataset
from latentfm.data.sources import folder, shards
from latentfm.training.models import load_models


@pytest.fixture
def settle(monkeypatch):
    """settle() lets the time pass after which what was written before is kept."""
    late = [0]
    now = stat_cache.time.time_ns

    class Clock:
        @staticmethod
        def time_ns():
            return now() + late[0]

    monkeypatch.setattr(stat_cache, "time", Clock)

    def pass_time():
        late[0] += COARSE_GRAIN + GRAIN

    return pass_time


@pytest.fixture
def opened(monkeypatch):
    """The paths of all files that are opened from Python from now on, in order; `opened.clear()` forgets them."""
    found = []

    def noting(function):
        def noted(path, *arguments, **named):
            found.append(os.fspath(path) if isinstance(path, (str, os.PathLike)) else path)
            return function(path, *arguments, **named)

        return noted

    monkeypatch.setattr(os, "open", noting(os.open))
    monkeypatch.setattr(builtins, "open", noting(builtins.open))
    monkeypatch.setattr(io, "open", noting(io.open))
    return found


def kept(folder, files, made, name="x", more=()):
    """What a StatCache gives of files, with how often it was made: `made` counts."""

    def make():
        made.append(1)
        return [len(made), *(open(file).read() for file in files)], more

    return StatCache(folder).value((name,), files, make)


def test_a_value_is_made_once_as_long_as_its_files_are_the_same(tmp_path, settle):
    (tmp_path / "a").write_text("one")
    settle()
    files, made = [tmp_path / "a"], []
    assert kept(tmp_path, files, made) == kept(tmp_path, files, made) == [1, "one"]
    assert kept(tmp_path, files, made, "another name") == [2, "one"]
    (tmp_path / "a").write_text("two")
    settle()
    assert kept(tmp_path, files, made) == kept(tmp_path, files, made) == [3, "two"]
    (tmp_path / "b").write_text("more")
    settle()
    assert kept(tmp_path, [*files, tmp_path / "b"], made) == [4, "two", "more"]
    os.utime(tmp_path / "a", ns=(5, 5))
    assert kept(tmp_path, files, made)[0] == 5  # the time alone
    before = os.stat(tmp_path / "a").st_mtime_ns
    (tmp_path / "a").write_text("owt")
    os.utime(tmp_path / "a", ns=(before, before))  # size and modification time as they were: the change time is not
    settle()
    assert kept(tmp_path, files, made) == [6, "owt"]
    assert StatCache().value(("x",), files, lambda: (7, ())) == StatCache(tmp_path).value(("x",), None, lambda: (7, ())) == 7


def test_what_was_written_too_shortly_before_is_read_again(tmp_path):
    (tmp_path / "a").write_text("one")
    made = []
    kept(tmp_path, [tmp_path / "a"], made)
    (tmp_path / "a").write_text("two")  # at once: within the grain of a file system's times, of the same size
    assert kept(tmp_path, [tmp_path / "a"], made) == [2, "two"]
    assert not list(tmp_path.glob("listings/*"))
    now = 10**18 + 1
    assert settled([3, now - GRAIN - 1, 5], now) and not settled([3, now - GRAIN, 5], now) and not settled([3, 5, now], now)
    whole = 10**18 - 10**9  # of a file system whose times are whole seconds
    assert not settled([3, whole, whole], now) and settled([3, whole - 10**9, whole - 10**9], now) and not settled(None, now)


def test_files_come_upon_while_making_count_too(tmp_path, settle):
    for name in "ab":
        (tmp_path / name).write_text(name)
    settle()
    made, arguments = [], (tmp_path, [tmp_path / "a"])
    for _ in range(2):
        assert kept(*arguments, made, more=[tmp_path / "b"]) == [1, "a"]
    (tmp_path / "b").unlink()
    assert kept(*arguments, made, more=[tmp_path / "b"]) == [2, "a"]
    assert kept(*arguments, made, more=[tmp_path / "b"]) == [3, "a"]  # what is missing has nothing to tell a change by


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "a folder", "other"])
def test_what_is_damaged_is_made_again(tmp_path, settle, damage):
    (tmp_path / "a").write_text("one")
    settle()
    made = []
    kept(tmp_path, [tmp_path / "a"], made)
    (file,) = (tmp_path / "listings").iterdir()
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    if damage == "a folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes({"cut": data[:-5], "flipped": data, "empty": b"", "other": b'{"files": {}, "value": 1}'}[damage])
    assert kept(tmp_path, [tmp_path / "a"], made) == [2, "one"]


def test_a_folder_that_cannot_be_written_keeps_nothing_and_says_nothing(tmp_path, settle):
    (tmp_path / "a").write_text("one")
    settle()
    (tmp_path / "listings").write_text("a file where the folder should be")
    assert [kept(tmp_path, [tmp_path / "a"], []) for _ in range(2)] == [[1, "one"]] * 2


def test_what_a_stranger_wrote_where_everybody_may_is_not_used(tmp_path, settle, monkeypatch):
    (tmp_path / "a").write_text("one")
    settle()
    made = []
    kept(tmp_path, [tmp_path / "a"], made)
    monkeypatch.setattr(stat_cache, "rank_of", lambda status, open_to_all: None if open_to_all else 1)
    assert kept(tmp_path, [tmp_path / "a"], made) == [1, "one"]
    os.chmod(tmp_path / "listings", 0o1777)
    assert kept(tmp_path, [tmp_path / "a"], made) == [2, "one"]


def test_behind_a_url_an_etag_is_what_tells(tmp_path, monkeypatch):
    import fsspec

    (tmp_path / "a").write_text("one")
    assert signature(f"file://{tmp_path / 'a'}") == signature(tmp_path / "a")
    assert signature("memory://nothing") is None and signature("nosuchprotocol://x") is None
    fsspec.filesystem("memory").pipe("/x", b"1")
    assert signature("memory://x") is None
    infos = iter([{"size": 1, "ETag": '"a"'}, {"size": 1, "etag": "b"}, {"size": 1, "ETag": 'W/"a"'}])
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", lambda self, path: next(infos))
    assert [signature("memory://x") for _ in range(3)] == [[1, '"a"'], [1, "b"], None]


def test_values_of_many_files_are_read_where_they_changed_by_all_processes(tmp_path, settle):
    files = [tmp_path / f"{i}" for i in range(7)]
    for file in files:
        file.write_text(file.name)
    settle()
    read, looked = [], []

    def share(work, items, name):
        """As three processes do: this is the first, and does what the others do."""
        found = [None] * len(items)
        for rank in range(3):
            found[rank::3] = work(items[rank::3])
        return json.loads(json.dumps(found))

    def values():
        read.clear()
        looked.clear()
        return StatCache(tmp_path / "cache").values("n", files, str, lambda file: looked.append(file) or signature(file), contents,
                                                    Processes(0, 3, share), keep=lambda value: value != "keep me not")  # fmt: skip

    def contents(own):
        read.append(len(own))
        return [file.read_text() for file in own]

    assert values() == [str(i) for i in range(7)] and read == [3, 2, 2] and len(looked) == 7
    assert values() == [str(i) for i in range(7)] and sum(read) == 0
    files[3].write_text("x")
    files[4].write_text("keep me not")
    settle()
    assert values()[2:5] == ["2", "x", "keep me not"] and sum(read) == 2
    assert values()[2:5] == ["2", "x", "keep me not"] and sum(read) == 1


# Sources


def picture(index):
    file = io.BytesIO()
    pixels = np.random.default_rng(index).integers(0, 256, (32 + 8 * (index % 3), 32, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def folder_of(tmp_path):
    place = tmp_path / "folder"
    place.mkdir()
    for i in range(6):
        (place / f"{i}.png").write_bytes(picture(i))
        (place / f"{i}.txt").write_text(f"thing {i}\nan object")
    Image.new("L", (32, 32), 255).save(place / "0.mask.png")
    (place / "lone.txt").write_text("x")
    return place, place / "1.txt", b"another thing"


def metadata_of(tmp_path):
    place = tmp_path / "metadata"
    place.mkdir()
    for i in range(6):
        (place / f"{i}.png").write_bytes(picture(i))
    rows = "".join(json.dumps({"file_name": f"{i}.png", "text": f"thing {i}"}) + "\n" for i in range(6))
    (place / "metadata.jsonl").write_text(rows)
    return place, place / "metadata.jsonl", rows.replace("thing 1", "thinx 1").encode()


def shard_of(tmp_path):
    place = tmp_path / "x.tar"
    with tarfile.open(place, "w") as archive:
        for i in range(6):
            for name, data in ((f"{i}.png", picture(i)), (f"{i}.txt", f"thing {i}".encode()), ("no picture.txt", b"x")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return place, place, None


def parquet_of(tmp_path):
    place = tmp_path / "x.parquet"
    table = pa.table({"image": [picture(i) for i in range(6)], "text": [f"thing {i}" for i in range(6)]})
    pq.write_table(table, place, compression="none", use_dictionary=False)
    return place, place, None


def parquet_of_paths(tmp_path):
    (tmp_path / "beside").mkdir()
    for i in range(6):
        (tmp_path / "beside" / f"{i}.png").write_bytes(picture(i))
    place = tmp_path / "beside" / "x.parquet"
    pq.write_table(pa.table({"image": [f"{i}.png" for i in range(6)], "text": [f"thing {i}" for i in range(6)]}), place)
    return place, tmp_path / "beside" / "1.png", picture(9)


def dataset_of(tmp_path):
    import datasets

    place = tmp_path / "saved"
    datasets.Dataset.from_list([{"image": picture(i), "text": f"thing {i}"} for i in range(6)]).save_to_disk(place)
    return place, next(place.glob("*.arrow")), None


MADE = [folder_of, metadata_of, shard_of, parquet_of, parquet_of_paths, dataset_of]


@pytest.fixture(scope="module")
def models(tiny_folder):
    return load_models(ModelOptions(pipeline=str(tiny_folder)), weights=False)


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("buckets", [1, 3])
def test_a_source_that_did_not_change_is_not_read_at_a_start(tmp_path, settle, opened, models, make, buckets):
    place, changing, data = make(tmp_path)
    given = {"folder": str(place)} if make in (folder_of, metadata_of) else {"sources": [{"path": str(place)}]}
    options = DataOptions(cache=str(tmp_path / "cache"), buckets=buckets, **given)
    settle()

    def start():
        opened.clear()
        found = data_of(open_dataset(options, StatCache(tmp_path / "cache")), models, options, (8,))
        found.prepare(Quiet())
        return found, {path for path in map(str, opened) if path.startswith(str(tmp_path)) and not path.startswith(str(tmp_path / "cache"))}

    first, read = start()
    assert read
    again, read = start()
    assert not read
    assert again.identity() == first.identity() and again.bucket_of.tolist() == first.bucket_of.tolist()
    listed, relisted = ([(s.id, s.captions, s.caption_weights, str(s.path), str(s.mask)) for s in d.samples] for d in (first, again))
    assert listed == relisted and first.inventory.dataset.problems == again.inventory.dataset.problems
    assert [s.path.read_bytes() for s in again.samples] == [s.path.read_bytes() for s in first.samples]
    if data is None:  # in place, as many bytes
        data = changing.read_bytes().replace(b"thing 1", b"thinx 1")
    assert changing.read_bytes() != data
    changing.write_bytes(data)
    settle()
    changed, read = start()
    assert read and changed.identity() != first.identity()
    if make is not parquet_of_paths:
        assert {"thinx 1", "another thing"} & {caption for sample in changed.samples for caption in sample.captions}
    assert not start()[1]


def test_a_picture_that_changed_is_the_only_one_that_is_read(tmp_path, settle, opened, models):
    place, _, _ = folder_of(tmp_path)
    options = DataOptions(folder=str(place), cache=str(tmp_path / "cache"), buckets=3)
    settle()
    first = data_of(open_dataset(options, StatCache(tmp_path / "cache")), models, options, (8,))
    (place / "4.png").write_bytes(picture(11))
    settle()
    opened.clear()
    second = data_of(open_dataset(options, StatCache(tmp_path / "cache")), models, options, (8,))
    assert {path for path in map(str, opened) if path.startswith(str(place))} == {str(place / "4.png")}
    assert {id for id, digest in first.inventory.digests.items() if second.inventory.digests[id] != digest} == {"4.png"}
    assert second.bucket_of[4] != first.bucket_of[4]


def test_a_problem_that_may_pass_is_looked_at_again(tmp_path, settle, monkeypatch):
    """A disk that fails for a moment costs a caption at one start, not at all later ones."""
    place, _, _ = folder_of(tmp_path)
    settle()
    read = folder.decoded

    def one_fails(data):
        if data.startswith(b"thing 3"):
            raise OSError(5, "Input/output error")
        return read(data)

    with monkeypatch.context() as fails:
        fails.setattr(folder, "decoded", one_fails)
        found = folder.read_folder(place, kept=StatCache(tmp_path / "cache"))
        assert len(found.samples) == 5 and "caption file that cannot be read" in {problem.reason for problem in found.problems}
    assert len(folder.read_folder(place, kept=StatCache(tmp_path / "cache")).samples) == 6
    place, _, _ = shard_of(tmp_path)
    data = place.read_bytes()
    place.write_bytes(data[: len(data) // 2])
    settle()
    for _ in range(2):  # an archive that is cut off, or a disk that says so
        assert "cut off" in shards.read_shards(str(place), kept=StatCache(tmp_path / "other")).problems[-1].reason
    assert not list((tmp_path / "other").glob("listings/*"))


def test_one_process_reads_the_sources_and_the_others_hear_of_it(tmp_path, settle, opened):
    place, _, _ = shard_of(tmp_path)
    options = DataOptions(sources=[{"path": str(place)}])
    settle()
    whole = open_dataset(options, StatCache(tmp_path / "cache"))
    opened.clear()

    def after_the_first(work, items, name):
        return [None for _ in items]  # the first process has done it

    other = open_dataset(options, StatCache(tmp_path / "cache"), Processes(1, 2, after_the_first))
    assert [sample.id for sample in other.samples] == [sample.id for sample in whole.samples]
    assert str(place) not in map(str, opened)
