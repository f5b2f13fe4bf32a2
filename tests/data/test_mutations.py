"""Every reader of data over damaged copies of every file it reads: the right result, a problem by name, or one line; nothing else.

Each mutation is a function of its number: a failure names the reader, the file and the number.
"""

import gzip
import io
import json
import random
import tarfile
import warnings

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latentfm.config import SourceOptions
from latentfm.data.cache.store import Cache, key_of
from latentfm.data.images import UnreadableImage, contents, load, open_rgb, upright_size
from latentfm.data.sources import read_folder, read_sources, summary
from latentfm.data.sources.base import sha256
from latentfm.errors import InputError

OFTEN = [
    pytest.param(60, id="60"),
    pytest.param(2000, id="2000", marks=pytest.mark.slow),
]  # mutations a reader
TOKENS = [
    b"\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff\xff\xff\xff\xff", b"-1", b"99999999999999999999", b"[" * 5000, b'{"a":' * 3000,
    b"\x1b[31m", b"null", b"\xed\xa0\x80", b"../", b"/dev/zero", b"\n", b",", b'"', b"1e999", b"NaN", b"\\ud83d", b"file://", b"::", b".",
]  # fmt: skip


def mutated(data, rng):
    """`data` with one to five changes: bits, bytes and stretches changed, cut out, doubled, zeroed, or replaced by a token."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if not data:
            return b"x"
        start = rng.randrange(len(data))
        stop = min(len(data), start + rng.choice((1, 2, 4, 8, 16, 64, 512)))
        kind = rng.randrange(8)
        if kind == 0:
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[start] = rng.randrange(256)
        elif kind == 2:
            data[start:stop] = bytes(stop - start)
        elif kind == 3:
            del data[start:stop]
        elif kind == 4:
            del data[start:]
        elif kind == 5:
            data[start:start] = data[rng.randrange(len(data)) :][: rng.choice((1, 8, 64, 600))]
        else:
            data[start:stop] = rng.choice(TOKENS) if kind == 6 else b"\xff" * (stop - start)
    return bytes(data)


def png(seed, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)).save(file, kind, **options)
    return file.getvalue()


# Each maker writes its files into a folder and returns those to damage, and what reads them all


def sidecars(folder):
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(i))
        (folder / f"{i}.txt").write_text(f"a cäption {i}\nanother")
    (folder / "1.mask.png").write_bytes(png(9))
    return sorted(folder.iterdir()), lambda: read_folder(folder)


def metadata(name, text):
    def make(folder):
        for i in range(3):
            (folder / f"{i}.png").write_bytes(png(i))
        (folder / name).write_text(text)
        return [folder / name], lambda: read_folder(folder)

    return make


def parquet(plain):
    def make(folder):
        rows = [{"image": {"bytes": png(i) if i else None, "path": "p.png"}, "text": [f"t{i}", "ü"], "short": "x"} for i in range(6)]
        if plain:
            rows = [{"image": png(i), "text": f"t{i} {'y' * i}"} for i in range(6)]
        (folder / "p.png").write_bytes(png(7))
        options = {"compression": "none", "use_dictionary": False} if plain else {"row_group_size": 3}
        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", **options)
        return [folder / "a.parquet"], lambda: read_sources([SourceOptions(path=str(folder / "a.parquet"))])

    return make


def shards(name):
    def make(folder):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for i in range(4):
                text = (f"k{i}.txt", b"text") if i % 2 else (f"k{i}.json", b'{"text": "t"}')
                for file, data in ((f"k{i}.png", png(i)), text, ("ü" * 60 + f"{i}.x", b"x")):
                    member = tarfile.TarInfo(file)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        (folder / name).write_bytes(gzip.compress(out.getvalue()) if name.endswith("gz") else out.getvalue())
        return [folder / name], lambda: read_sources([SourceOptions(path=str(folder / name))])

    return make


def saved(folder):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(5)], "text": [f"t{i}" for i in range(5)]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(folder / "saved")
    return sorted((folder / "saved").iterdir()), lambda: read_sources([SourceOptions(path=str(folder / "saved"), kind="datasets")])


def cache(folder):
    entries = {
        key_of(str(i)): {"moments": torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(i)), "more": torch.ones(3)}
        for i in range(4)
    }  # fmt: skip
    shard = Cache(folder).write("moments", entries)
    shard.with_suffix(".lost").write_text(f"{key_of('9')}\n")

    def read():
        for key, tensors in entries.items():
            try:
                found = Cache(folder).entries([key]).read(0)
            except KeyError:
                continue
            assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)

    return [shard, shard.with_suffix(".lost")], read


def picture(kind):
    def make(folder):
        exif, path = Image.Exif(), folder / f"x.{kind.lower()}"
        exif[0x0112] = 6
        options = {"exif": exif} if kind not in ("BMP", "GIF") else {}
        path.write_bytes(png(1, kind, **options, **({"compression": "tiff_lzw"} if kind == "TIFF" else {})))

        def read():
            try:
                size = upright_size(path)
            except UnreadableImage:
                size = None
            image = open_rgb(path)
            assert image.mode == "RGB" and (size is None or image.size == size)

        return [path], read

    return make


READERS = {
    "sidecars": sidecars, "saved": saved, "cache": cache, "parquet": parquet(False), "plain parquet": parquet(True),
    "jsonl": metadata("metadata.jsonl", "".join(json.dumps({"file_name": f"{i % 3}.png", "text": ["a", "b"]}) + "\n" for i in range(5))),
    "csv": metadata("metadata.csv", "file_name,text,other\n" + "".join(f'{i % 3}.png,"a, {i}",x\n' for i in range(5))),
    "tar": shards("a.tar"), "tar.gz": shards("a.tar.gz"),
    **{kind: picture(kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")},
}  # fmt: skip


def examined(dataset):
    """Reads everything a dataset lists, as a training would, and what is said of it."""
    for line in summary(dataset).split("\n"):
        assert line.isprintable()
    assert len(dataset.samples) <= dataset.pictures and len({sample.id for sample in dataset.samples}) == len(dataset.samples)
    for sample in dataset.samples:
        assert sample.captions and all(isinstance(caption, str) and caption.encode() is not None for caption in sample.captions)
        data = contents(sample.path)
        assert getattr(sample.path, "sha256", None) in (None, sha256(data))  # what was listed is what is read
        try:
            open_rgb(sample.path, data)
        except UnreadableImage as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("count", OFTEN)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_the_right_result_a_problem_or_one_line(reader, count, tmp_path, capfd):
    files, read = READERS[reader](tmp_path)
    written = {file: file.read_bytes() for file in files}
    outcomes = {"read": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count):
            rng = random.Random(f"{reader} {number}")
            chosen = rng.choice(files)
            for file, data in written.items():
                file.write_bytes(mutated(data, rng) if file == chosen else data)
            for left in [*chosen.parent.glob("*.damaged"), *chosen.parent.glob("*.lost")]:
                if left not in written:
                    left.unlink()
            try:
                found = read()
                if found is not None:
                    examined(found)
                outcomes["read"] += 1
            except InputError as error:
                assert str(error).isprintable() and len(str(error)) < 3000, number
                outcomes["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"{reader}, {chosen.name}, mutation {number}: {type(error).__name__}: {error}") from error
    assert min(outcomes.values()) > 0 or reader == "sidecars", outcomes  # it reads some, and it refuses some
    capfd.readouterr()  # libtiff says what it thinks of them


def test_a_damaged_file_of_a_folder_costs_no_other_sample(tmp_path):
    files, read = sidecars(tmp_path)
    written = {file: file.read_bytes() for file in files}
    from latentfm.data.images import Transform

    def pixels(dataset):
        return {sample.id: (sample.captions, load(sample.path, Transform(9, 7)).tobytes()) for sample in dataset.samples}

    whole = pixels(read())
    for number in range(100):
        rng = random.Random(number)
        chosen = rng.choice(files)
        for file, data in written.items():
            file.write_bytes(mutated(data, rng) if file == chosen else data)
        untouched = [sample for sample in read().samples if sample.id[0] != chosen.name[0]]
        assert len(untouched) == 2
        assert all((sample.captions, load(sample.path, Transform(9, 7)).tobytes()) == whole[sample.id] for sample in untouched)
