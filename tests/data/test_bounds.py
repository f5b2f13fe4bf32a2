"""What a small file can say of itself or unfold to, and what is read of it: bounds by name, and the rest used."""

import gzip
import io
import os
import struct
import tarfile
import threading
import unicodedata
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentfm.data import images
from latentfm.data.images import UnreadableImage, open_rgb, upright_size
from latentfm.data.memory import Budget, lacks
from latentfm.data.sources import Columns, shards, tables, urls
from latentfm.data.sources.shards import read_shards
from latentfm.data.sources.tables import read_parquet
from latentfm.errors import InputError


def png(seed=0):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def captions_of(dataset):
    return {sample.id: sample.captions for sample in dataset.samples}


def reasons(dataset):
    return {problem.path: problem.reason for problem in dataset.problems}


# Archives


def header(name, size, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(format=tarfile.GNU_FORMAT)


def file(name, data):
    return header(name, len(data)) + data + bytes(-len(data) % 512)


FIRST = file("a.png", png()) + file("a.txt", b"a cat")


@pytest.mark.parametrize("lie", [
    header("b.png", 2**62), header("b.png", -512), header("b.png", 10**6), header("b.txt", 2**62), header("b.bin", 2**62),
    file("b.txt", b"a dog") + header("x", -512, tarfile.XHDTYPE), file("b.txt", b"a dog") + header("x", 2**40, tarfile.GNUTYPE_LONGNAME),
    file("b.txt", b"a dog") + header("x", 0, tarfile.XHDTYPE) * 5000,
], ids=["huge", "negative", "cut", "huge text", "huge other", "pax", "long name", "nested"])  # fmt: skip
def test_an_archive_that_lies_about_sizes_is_used_up_to_there(tmp_path, lie):
    (tmp_path / "x.tar").write_bytes(FIRST + lie + bytes(10240))
    dataset = read_shards(str(tmp_path / "x.tar"))
    assert captions_of(dataset) == {"x.tar/a": ("a cat",)} and dataset.samples[0].path.read_bytes() == png()
    assert "archive cut off or damaged, the rest of it is lost" in reasons(dataset).values()


def test_files_of_a_sample_need_not_stand_together(tmp_path):
    parts = {f"{i}.{kind}": png(i) if kind == "png" else f"{kind} {i}".encode() for kind in ("png", "txt", "mask.png") for i in range(3)}
    parts |= {f"{i}.mask.png": png(9 + i) for i in range(3)}
    archive = b"".join(file(name, data) for name, data in parts.items()) + file("1.txt", b"again")
    (tmp_path / "x.tar").write_bytes(archive + bytes(10240))
    dataset = read_shards(str(tmp_path / "x.tar"))
    assert captions_of(dataset) == {f"x.tar/{i}": (f"txt {i}",) for i in range(3)} and dataset.pictures == 3
    assert [(s.path.read_bytes(), s.mask.read_bytes()) for s in dataset.samples] == [(png(i), png(9 + i)) for i in range(3)]
    assert reasons(dataset) == {"x.tar/1": "key that came before in the archive"}


def test_a_file_too_large_to_be_what_it_is_costs_its_sample_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PICTURE_BYTES", 1000)
    monkeypatch.setattr(shards, "CAPTION_BYTES", 100)
    parts = {"a.png": png(), "a.txt": b"a", "b.png": bytes(1001), "b.txt": b"b", "c.png": png(), "c.txt": b"c" * 101}
    parts |= {"d.png": png(), "d.txt": b"d", "d.mp4": bytes(5000)}
    (tmp_path / "x.tar").write_bytes(b"".join(file(*part) for part in parts.items()) + bytes(10240))
    dataset = read_shards(str(tmp_path / "x.tar"))
    assert captions_of(dataset) == {"x.tar/a": ("a",), "x.tar/d": ("d",)}
    said = "file in an archive of more than"
    assert reasons(dataset) == {"x.tar/b": f"{said} 1,000 bytes", "x.tar/c": f"{said} 100 bytes"}


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.bz2", "x.tar.xz"])
def test_what_unfolds_without_end_is_not_followed(tmp_path, monkeypatch, name):
    monkeypatch.setattr(urls, "UNFOLDED_BYTES", 2**22)
    import bz2
    import lzma

    data = FIRST + header("b.mp4", 2**26) + bytes(2**26) + file("c.png", png(1)) + file("c.txt", b"c") + bytes(10240)
    packed = {"bz2": bz2.compress, "xz": lzma.compress}.get(name.split(".")[-1], gzip.compress)(data)
    (tmp_path / name).write_bytes(packed)
    dataset = read_shards(str(tmp_path / name))
    assert captions_of(dataset) == {f"{name}/a": ("a cat",)} and "unfolds to more than 100 times its size" in dataset.problems[0].path
    with urls.open_url(str(tmp_path / name)) as opened:  # nor by one who asks for the rest
        opened.seek(1000)
        with pytest.raises(OSError, match="unfolds to more than 100 times"):
            opened.read()


def test_decompressed_files_are_read_at_any_place(tmp_path):
    data = np.random.default_rng(0).bytes(3 * 2**20)
    (tmp_path / "x.gz").write_bytes(gzip.compress(data, 1))
    with urls.open_url(str(tmp_path / "x.gz")) as opened:
        for place, size in ((5, 10), (2**21, 2**20), (0, 7), (3 * 2**20 - 3, 10)):
            assert opened.seek(place) == place and opened.read(size) == data[place : place + size]
        assert opened.read() == b"" and opened.tell() == len(data)


def test_archives_and_tables_that_are_pointers_or_pipes_are_told(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "a.tar").write_bytes(FIRST + bytes(10240))
    (tmp_path / "b.tar").write_bytes(pointer)
    os.mkfifo(tmp_path / "c.tar")
    dataset = read_shards(str(tmp_path))
    found = reasons(dataset)
    assert list(captions_of(dataset)) == ["a.tar/a"] and len(found) == 2
    (reason,) = [reason for path, reason in found.items() if "b.tar" in path]
    assert reason == "Git LFS pointer, not the file itself (fetch it: git lfs pull)"
    assert any("c.tar is a named pipe, not a regular file" in path for path in found)
    folder = tmp_path / "tables"
    folder.mkdir()
    pq.write_table(pa.table({"image": [png()], "text": ["x"]}), folder / "a.parquet")
    (folder / "b.parquet").write_bytes(pointer)
    os.mkfifo(folder / "c.parquet")
    dataset = read_parquet(str(folder))
    assert list(captions_of(dataset)) == ["a.parquet:0"]
    assert reasons(dataset)["b.parquet (Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet "
                            "file.)"].startswith("Git LFS pointer")  # fmt: skip
    assert any("c.parquet is a named pipe" in path for path in reasons(dataset))


def test_accents_in_an_archives_names_meet(tmp_path):
    names = [unicodedata.normalize(form, "Bär") for form in ("NFC", "NFD")]
    (tmp_path / "x.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in ((f"{names[0]}.png", png()), (f"{names[1]}.txt", b"a bear")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert captions_of(read_shards(str(tmp_path / "x.tar"))) == {f"x.tar/{names[0]}": ("a bear",)}


@pytest.mark.parametrize("name", ["{0..999999999}.tar", "{0..999}{0..999}.tar", "{0..1}" * 60 + ".tar", "{0..0}" * 3000])
def test_a_name_that_stands_for_too_many_files_is_refused(name):
    with pytest.raises(InputError, match="stands for more than 100,000 files; name the folder") as caught:
        urls.expand(f"/nowhere/{name}", [".tar"])
    assert len(str(caught.value)) < 500
    assert urls.braces("a{08..10}{1..2}") == ["a081", "a082", "a091", "a092", "a101", "a102"] and urls.braces("a{2..1}") == []


# Tables


def test_a_table_that_unfolds_without_end_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "UNFOLDED_BYTES", 2**20)
    pq.write_table(pa.table({"image": [png(), bytes(2**24)], "text": ["a", "b"]}), tmp_path / "cell.parquet", compression="zstd")
    pq.write_table(pa.table({"image": [png()] * 2, "text": ["a", "b" * 2**24]}), tmp_path / "text.parquet", compression="zstd")
    once = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array([bytes(2**16)]))
    pq.write_table(pa.table({"image": once, "text": ["a"] * 4000}), tmp_path / "twice.parquet", compression="zstd")
    pq.write_table(pa.table({"image": [png()], "text": ["a"]}), tmp_path / "good.parquet")
    dataset = read_parquet(str(tmp_path))
    message = "parquet file that unfolds to more than 100 times its size, the rest of it is lost"
    assert reasons(dataset) == dict.fromkeys((f"{name}.parquet" for name in ("cell", "text", "twice")), message)
    assert sum(sample.id.startswith("twice") for sample in dataset.samples) < 40  # read up to there
    assert "good.parquet:0" in captions_of(dataset)


def test_cells_that_are_too_large_or_no_text_cost_their_row_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PICTURE_BYTES", 1000)
    texts = pa.array([b"fine", b"x", b"\xff\xfe", b"y" * 100_001, b"z\0"]).cast(pa.binary())
    texts = pa.Array.from_buffers(pa.string(), len(texts), texts.buffers())
    table = pa.table({"image": [png(), np.random.default_rng(0).bytes(1001), png(), png(), png()], "text": texts})
    pq.write_table(table, tmp_path / "x.parquet")
    dataset = read_parquet(str(tmp_path / "x.parquet"))
    assert captions_of(dataset) == {"x.parquet:0": ("fine",)} and dataset.pictures == 5
    assert list(reasons(dataset).values()) == [
        "row whose picture has more than 1,000 bytes", "row whose caption is not a text", "caption of more than 100,000 characters",
        "caption with NUL characters",
    ]  # fmt: skip


def test_cells_that_name_files_lead_to_files_of_the_folder_alone(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    name = unicodedata.normalize("NFC", "Bär.png")
    (folder / name).write_bytes(png())
    (tmp_path / "out.png").write_bytes(png())
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    cells = [str(folder / name), unicodedata.normalize("NFD", name), f"file://{folder / name}", "pipe.png", "device.png", "../out.png",
             str(tmp_path / "out.png"), "http://host/a.png", "a\0b", ".", "/dev/zero", "filecache::out.png"]  # fmt: skip
    pq.write_table(pa.table({"image": cells, "text": ["x"] * len(cells)}), folder / "x.parquet")
    dataset = read_parquet(str(folder))
    assert list(captions_of(dataset)) == [f"x.parquet:{i}" for i in range(3)]
    assert [sample.path.read_bytes() for sample in dataset.samples] == [png()] * 3
    words = ["not a regular file"] * 2 + ["leads out of the folder"] * 2
    words += ["is a URL", "missing", "is the folder itself", "leads out", "missing"]
    assert all(word in reason for word, reason in zip(words, reasons(dataset).values(), strict=True))


def test_one_caption_stands_for_those_of_tables_and_archives(tmp_path):
    pq.write_table(pa.table({"image": [png(), png(1)], "text": ["a", None]}), tmp_path / "x.parquet")
    (tmp_path / "x.tar").write_bytes(FIRST + file("b.png", png(1)) + bytes(10240))
    columns = Columns(caption="a photo of sks dog")
    for dataset in (read_parquet(str(tmp_path / "x.parquet"), columns), read_shards(str(tmp_path / "x.tar"), columns)):
        assert [sample.captions for sample in dataset.samples] == [("a photo of sks dog",)] * 2 and dataset.problems == ()


# Pictures


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("extra", [
    chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**24))), chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(2**24))),
    chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**24))), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 99))) * 70,
], ids=["text", "international text", "profile", "many texts"])  # fmt: skip
def test_texts_in_a_picture_that_unfold_to_much_make_it_unreadable(tmp_path, extra):
    (tmp_path / "a.png").write_bytes(png()[:33] + extra + png()[33:])
    with pytest.raises(UnreadableImage, match="too large|Too much memory"):
        open_rgb(tmp_path / "a.png")


def test_a_picture_of_too_many_bytes_or_a_pointer_is_told(tmp_path):
    (tmp_path / "a.png").touch()
    os.truncate(tmp_path / "a.png", 2**41)
    (tmp_path / "b.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    for reader in (open_rgb, images.digest):
        with pytest.raises(UnreadableImage, match="2,199,023,255,552 bytes large, the most that is read here is 1,073,741,824"):
            reader(tmp_path / "a.png")
    for reader in (open_rgb, upright_size):
        with pytest.raises(UnreadableImage, match=r"b\.png: Git LFS pointer, not the file itself \(fetch it: git lfs pull\)"):
            reader(tmp_path / "b.png")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "I", "F", "P", "PA", "L", "1", "CMYK", "RGB"])
def test_strips_are_the_whole_picture(monkeypatch, mode):
    values = np.random.default_rng(0).integers(0, 256, (50, 31, 4), np.uint8)
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode](values[..., 0].astype(int) * 200))
    elif mode == "PA":
        image = Image.fromarray(values[..., :3]).convert("P")
        image.info["transparency"] = bytes(range(256))
    else:
        image = Image.fromarray(values).convert(mode)
    whole = np.asarray(images._to_rgb(image, images.WHITE))
    monkeypatch.setattr(images, "STRIP", 31 * 7)
    assert np.array_equal(np.asarray(images._to_rgb(image, images.WHITE)), whole) and whole.shape == (50, 31, 3)


def test_large_pictures_are_decoded_one_at_a_time():
    room, inside, most = Budget(100), [], []

    def decode(amount):
        with room.of(amount):
            inside.append(amount)
            most.append(sum(min(100, each) for each in inside))
            threading.Event().wait(0.01)
            inside.remove(amount)

    threads = [threading.Thread(target=decode, args=(amount,)) for amount in (60, 40, 500, 30, 100, 70, 20, 10**9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) <= 100 and len(most) == len(threads) and room.taken == 0
    with pytest.raises(ValueError, match="x"), room.of(50):
        raise ValueError("x")
    assert room.taken == 0 and not lacks(2**20) and lacks(2**62)
