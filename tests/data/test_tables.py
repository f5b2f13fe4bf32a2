"""Parquet and columns: every form of a picture's cell, every problem by name, and never all pictures in memory."""

import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentfm.config import SourceOptions
from latentfm.data import images
from latentfm.data.sources import Columns, base, read_folder, read_sources, summary, tables
from latentfm.data.sources.tables import read_parquet
from latentfm.errors import InputError


def png(seed=0, size=(4, 4)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def parquet(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def captions_of(dataset):
    return {sample.id: sample.captions for sample in dataset.samples}


def test_bytes_a_struct_and_a_path_are_pictures(tmp_path):
    parquet(tmp_path / "a.parquet", [{"image": png(0), "text": " zero "}, {"image": png(1), "text": "one"}])
    parquet(tmp_path / "b.parquet", [{"image": {"bytes": png(2), "path": "x.png"}, "text": ["two", "2"]}])
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "3.png").write_bytes(png(3))
    parquet(tmp_path / "c.parquet", [{"image": "pictures/3.png", "text": ""}])
    dataset = read_parquet(str(tmp_path))
    assert captions_of(dataset) == {"a.parquet:0": ("zero",), "a.parquet:1": ("one",), "b.parquet:0": ("two", "2"), "c.parquet:0": ("",)}
    assert [sample.path.read_bytes() for sample in dataset.samples] == [png(i) for i in range(4)]
    assert [images.digest(sample.path) for sample in dataset.samples] == [base.sha256(png(i)) for i in range(4)]
    assert dataset.problems == () and summary(dataset) == f"4 pictures, 5 captions in {tmp_path}"
    assert images.open_rgb(dataset.samples[3].path).tobytes() == Image.open(io.BytesIO(png(3))).tobytes()


def test_a_glob_braces_and_a_url_name_the_same_files(tmp_path):
    for i in range(3):
        parquet(tmp_path / f"part-{i:02d}.parquet", [{"jpg": png(i), "caption": str(i)}])
    wanted = {f"part-{i:02d}.parquet:0": (str(i),) for i in range(3)}
    for place in (tmp_path, tmp_path / "*.parquet", tmp_path / "part-{00..02}.parquet", f"file://{tmp_path}/part-*.parquet"):
        dataset = read_parquet(str(place))
        assert captions_of(dataset) == wanted and [s.path.read_bytes() for s in dataset.samples] == [png(i) for i in range(3)]


def test_pictures_behind_a_url_are_read_in_any_order_and_in_another_process(tmp_path):
    import fsspec

    rows = [{"image": png(i), "text": str(i)} for i in range(70)]
    parquet(tmp_path / "x.parquet", rows, row_group_size=20)
    with fsspec.open("memory://bucket/x.parquet", "wb") as file:
        file.write((tmp_path / "x.parquet").read_bytes())
    samples = read_parquet("memory://bucket/x.parquet").samples
    for i in (69, 0, 35, 34, 35, 69):
        assert samples[i].path.read_bytes() == png(i)
    assert pickle.loads(pickle.dumps(samples[35])).path.read_bytes() == png(35)


def test_few_pictures_are_held_at_a_time(tmp_path):
    """40 MB of pictures in one row group: what Python and Arrow hold at any time stays below a quarter of it."""
    import tracemalloc

    rng = np.random.default_rng(0)
    rows = [{"image": rng.bytes(200_000), "text": "x"} for _ in range(200)]
    parquet(tmp_path / "x.parquet", rows, use_dictionary=False, write_batch_size=4)  # pages of 1 MB: a page is read whole
    del rows
    before, highest = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    for _ in tables.parquet_rows(str(tmp_path / "x.parquet"), ["image", "text"]):
        highest = max(highest, pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(highest, peak) < 10_000_000


def test_captions_of_several_columns_have_their_weights(tmp_path):
    rows = [
        {"image": png(), "long": "a red cat", "short": ["cat", "pet"]}, {"image": png(), "long": None, "short": ["dog"]},
        {"image": png(), "long": "both", "short": []},
    ]  # fmt: skip
    path = parquet(tmp_path / "x.parquet", rows)
    first, second, third = read_parquet(str(path), Columns(captions={"long": 3, "short": 1})).samples
    assert (first.captions, first.caption_weights) == (("a red cat", "cat", "pet"), (3, 0.5, 0.5))
    assert (second.captions, second.caption_weights) == (("dog",), ()) and third.captions == ("both",)
    equal = read_parquet(str(path), Columns(captions={"long": 2, "short": 2})).samples[0]
    assert equal.caption_weights == (2, 1, 1)


def test_every_unusable_row_is_named(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "outside.png").write_bytes(png())
    rows = [
        {"image": png(), "text": "fine"}, {"image": None, "text": "x"}, {"image": png(), "text": None},
    ]  # fmt: skip
    parquet(tmp_path / "sub" / "a.parquet", rows)
    parquet(tmp_path / "sub" / "b.parquet", [{"image": "../outside.png", "text": "x"}, {"image": "gone.png", "text": "x"}])
    parquet(tmp_path / "sub" / "c.parquet", [{"image": png(), "text": 5}])
    dataset = read_parquet(str(tmp_path / "sub"))
    assert captions_of(dataset) == {"a.parquet:0": ("fine",)}
    assert {problem.path: problem.reason for problem in dataset.problems} == {
        "a.parquet:1": "row without a picture", "a.parquet:2": "row without a caption",
        "b.parquet:0": "row whose picture leads out of the folder", "b.parquet:1": "row whose picture or mask is missing",
        "c.parquet:0": "row whose caption is not a text",
    }  # fmt: skip


def test_a_file_that_is_cut_off_is_named_and_the_others_are_used(tmp_path):
    good, bad = (parquet(tmp_path / name, [{"image": png(), "text": "x"}]) for name in ("a.parquet", "b.parquet"))
    bad.write_bytes(bad.read_bytes()[:-20])
    dataset = read_parquet(str(tmp_path))
    assert len(dataset.samples) == 1
    (problem,) = dataset.problems
    assert problem.path.startswith("b.parquet (") and problem.reason == "parquet file that cannot be read, or not to its end"
    good.unlink()
    with pytest.raises(InputError, match=r"nothing to train on in .*first problem: b\.parquet"):
        read_parquet(str(tmp_path))


def test_a_damaged_page_in_the_middle_costs_what_comes_after(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"image": png(i), "text": str(i)} for i in range(60)], row_group_size=20, compression="gzip")
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data[start : start + 200] = b"\xff" * 200
    path.write_bytes(data)
    dataset = read_parquet(str(path))
    assert len(dataset.samples) >= 20 and dataset.problems[-1].path.startswith("a.parquet (")
    assert [s.path.read_bytes() for s in dataset.samples[:20]] == [png(i) for i in range(20)]


@pytest.mark.parametrize(
    "columns, message",
    [
        (Columns(image="imgae"), r"no column 'imgae' \(did you mean 'image'\?\); there are image, label"),
        (Columns(captions={"labl": 1}), r"no column 'labl' \(did you mean 'label'\?\); there are image, label"),
        (Columns(mask="mask"), r"no column 'mask'; there are image, label"),
        (Columns(), r"no column text or caption or prompt; name yours as caption_columns, there are image, label"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path, columns, message):
    path = parquet(tmp_path / "a.parquet", [{"image": png(), "label": "x"}])
    with pytest.raises(InputError, match=message):
        read_parquet(str(path), columns)


def test_a_place_without_parquet_or_without_a_protocol_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"there is no \.parquet file at .*nowhere"):
        read_parquet(str(tmp_path / "nowhere.parquet"))
    with pytest.raises(InputError, match="cannot read nosuch://a/b.parquet: .*nosuch"):
        read_parquet("nosuch://a/b.parquet")


def test_a_row_that_changes_after_it_was_listed_does_not_pass_for_the_old_one(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"image": png(i), "text": "x"} for i in range(3)])
    sample = read_parquet(str(path)).samples[2]
    parquet(path, [{"image": png(0), "text": "x"}])
    with pytest.raises(images.UnreadableImage, match=r"a\.parquet:2 image: it ends before row 2; it was changed"):
        images.contents(sample.path)


# Columns and masks of a folder


def pictures(folder, *names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(i))


def test_metadata_columns_may_have_other_names_and_weights(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file,short,long,area\na.png,cat,a red cat,b.png\nb.png,dog,,\n")
    columns = Columns("file", {"short": 1, "long": 4}, "area")
    first, second = read_folder(tmp_path, columns).samples
    assert (first.captions, first.caption_weights, first.mask) == (("cat", "a red cat"), (1, 4), tmp_path / "b.png")
    assert (second.captions, second.caption_weights, second.mask) == (("dog",), (), None)
    with pytest.raises(InputError, match=r"metadata\.csv has 'aera' \(did you mean 'area'\?\); there are area, file, long, short"):
        read_folder(tmp_path, Columns("file", {"short": 1}, "aera"))


def test_jsonl_names_a_column_that_no_row_has(tmp_path):
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "caption_long": "x", "text": "y"}\n')
    with pytest.raises(InputError, match=r"no row of .*metadata\.jsonl has 'caption_lnog' \(did you mean 'caption_long'\?\)"):
        read_folder(tmp_path, Columns(captions={"caption_lnog": 1}))
    assert captions_of(read_folder(tmp_path, Columns(captions={"caption_long": 1}))) == {"a.png": ("x",)}


def test_columns_without_metadata_are_refused(tmp_path):
    pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"has no metadata\.jsonl or metadata\.csv whose columns"):
        read_folder(tmp_path, Columns(captions={"text": 1}))


def test_a_mask_lies_beside_its_picture_unless_it_is_a_picture_itself(tmp_path):
    pictures(tmp_path, "a.jpg", "a.mask.png", "b.png", "b.mask.png", "lone.mask.png")
    for name in ("a.txt", "b.txt", "b.mask.txt", "lone.mask.txt"):
        (tmp_path / name).write_text(name)
    dataset = read_folder(tmp_path)
    masks = {sample.id: sample.mask for sample in dataset.samples}
    assert masks == {"a.jpg": tmp_path / "a.mask.png", "b.png": None, "b.mask.png": None, "lone.mask.png": None}
    assert dataset.problems == ()
    (tmp_path / "metadata.csv").write_text("file_name,text\na.jpg,x\nb.png,y\nlone.mask.png,z\n")
    for name in ("a.txt", "b.txt", "b.mask.txt", "lone.mask.txt"):
        (tmp_path / name).unlink()
    dataset = read_folder(tmp_path)
    masks = {sample.id: sample.mask for sample in dataset.samples}
    assert masks == {"a.jpg": tmp_path / "a.mask.png", "b.png": tmp_path / "b.mask.png", "lone.mask.png": None}
    assert dataset.problems == ()


def test_a_mask_that_a_row_names_must_be_there(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "x", "m": "gone.png"}\n{"file_name": "b.png", "text": "x", "m": "../a.png"}\n'
        '{"file_name": "b.png", "text": "x"}\n'
    )
    dataset = read_folder(tmp_path, Columns(mask="m"))
    assert [(problem.path, problem.reason) for problem in dataset.problems][:2] == [
        ("metadata.jsonl:1 a.png", "row whose mask is missing"), ("metadata.jsonl:2 b.png", "row whose m leads out of the folder"),
    ]  # fmt: skip
    assert captions_of(dataset) == {"b.png": ("x",)}


# Several sources


def test_several_sources_keep_their_ids_apart_and_name_their_problems(tmp_path):
    pictures(tmp_path / "cats", "0.png", "bare.png")
    (tmp_path / "cats" / "0.txt").write_text("a cat")
    parquet(tmp_path / "dogs" / "x.parquet", [{"image": png(), "text": "a dog"}, {"image": None, "text": "no dog"}])
    cats = SourceOptions(path=str(tmp_path / "cats"), repeats=3, weight=0.5)
    dataset = read_sources([cats, SourceOptions(path=str(tmp_path / "dogs"), regularisation=True)])
    assert captions_of(dataset) == {"cats/0.png": ("a cat",), "dogs/x.parquet:0": ("a dog",)}
    assert [(s.share.source, s.share.rate, s.share.regularisation) for s in dataset.samples] == [("cats", 1.5, False), ("dogs", 1, True)]
    assert [problem.path for problem in dataset.problems] == ["cats/bare.png", "dogs/x.parquet:1"]
    assert summary(dataset).split("\n")[1:] == [
        "cats: 1 picture, 1.5 x an epoch", "dogs: 1 picture, 1 x an epoch, a regularisation set",
        "not used, picture without a caption: 1 (cats/bare.png)", "not used, row without a picture: 1 (dogs/x.parquet:1)",
    ]  # fmt: skip


def test_sources_of_one_name_must_be_told_apart(tmp_path):
    for parent in ("x", "y"):
        pictures(tmp_path / parent / "cats", "0.png")
        (tmp_path / parent / "cats" / "0.txt").write_text(parent)
    places = [str(tmp_path / parent / "cats") for parent in ("x", "y")]
    with pytest.raises(InputError, match="2 sources are called 'cats': give each a name of its own"):
        read_sources([SourceOptions(path=place) for place in places])
    dataset = read_sources([SourceOptions(path=places[0]), SourceOptions(path=places[1], name="more")])
    assert captions_of(dataset) == {"cats/0.png": ("x",), "more/0.png": ("y",)}


def test_regularisation_alone_and_a_url_of_no_kind_are_refused(tmp_path):
    parquet(tmp_path / "x.parquet", [{"image": png(), "text": "a dog"}])
    with pytest.raises(InputError, match="regularisation alone"):
        read_sources([SourceOptions(path=str(tmp_path / "x.parquet"), regularisation=True)])
    with pytest.raises(InputError, match="cannot tell what memory://a/b is: give its kind, one of folder, parquet, webdataset, datasets"):
        read_sources([SourceOptions(url="memory://a/b")])
    with pytest.raises(InputError, match="there is no folder"):
        read_sources([SourceOptions(path=str(tmp_path / "nowhere"))])
