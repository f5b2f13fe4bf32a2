"""What folders of pictures really hold: several rows a picture, other names and encodings, links, pipes, pointers, bounds."""

import json
import os
import socket
import subprocess
import threading
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from latentfm.data.images import UnreadableImage, digest, open_rgb, upright_size
from latentfm.data.sources import Columns, Problem, read_folder, summary
from latentfm.data.sources import rows as rows_module
from latentfm.data.sources.texts import CAPTION_BYTES, CAPTION_CHARACTERS, oddity
from latentfm.errors import InputError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)
    return path


def captioned(path, text="x"):
    picture(path).with_suffix(".txt").write_text(text, "utf-8")


def captions_of(dataset):
    return {sample.id: sample.captions for sample in dataset.samples}


def reasons(dataset):
    return {problem.path: problem.reason for problem in dataset.problems}


def metadata(folder, kind, rows):
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = [names, *([row.get(name, "") for name in names] for row in rows)]
        (folder / "metadata.csv").write_text("".join(",".join(f'"{value}"' for value in line) + "\n" for line in lines))


@pytest.fixture
def within():
    """A function that gives what another returns, within seconds: nothing waits for a pipe."""

    def call(function, *arguments):
        found = []
        thread = threading.Thread(target=lambda: found.append(function(*arguments)), daemon=True)
        thread.start()
        thread.join(20)
        assert found, "it waits"
        return found[0]

    return call


# Rows


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_several_rows_of_a_picture_are_its_several_captions(tmp_path, kind):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    texts = [("a.png", "one"), ("b.png", "only"), ("./a.png", "two"), ("a.png", "three")]
    metadata(tmp_path, kind, [{"file_name": name, "text": text} for name, text in texts])
    dataset = read_folder(tmp_path)
    assert captions_of(dataset) == {"a.png": ("one", "two", "three"), "b.png": ("only",)} and dataset.problems == ()
    assert {sample.caption_weights for sample in dataset.samples} == {()}


def test_a_columns_captions_share_its_weight_over_all_rows(tmp_path):
    picture(tmp_path / "a.png")
    rows = [{"long": "a red cat", "short": ["cat", "pet"]}, {"short": "animal"}, {"long": "a cat that is red"}]
    metadata(tmp_path, "jsonl", [{"file_name": "a.png", **row} for row in rows])
    (sample,) = read_folder(tmp_path, Columns(captions={"long": 3, "short": 1})).samples
    assert dict(zip(sample.captions, sample.caption_weights, strict=True)) == {
        "a red cat": 1.5, "a cat that is red": 1.5, "cat": 1 / 3, "pet": 1 / 3, "animal": 1 / 3
    }  # fmt: skip
    (equal,) = read_folder(tmp_path, Columns(captions={"long": 2, "short": 3})).samples
    assert equal.caption_weights == ()


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_rows_of_one_picture_with_two_masks_are_a_problem(tmp_path, kind):
    for name in "abmn":
        picture(tmp_path / f"{name}.png")
    rows = [("a", "one", ""), ("a", "two", "m.png"), ("a", "three", "n.png"), ("a", "four", "./m.png"), ("b", "five", "n.png")]
    metadata(tmp_path, kind, [{"file_name": f"{name}.png", "text": text, "mask": mask} for name, text, mask in rows])
    dataset = read_folder(tmp_path, Columns(mask="mask"))
    assert captions_of(dataset) == {"a.png": ("one", "two", "four"), "b.png": ("five",)}
    assert [sample.mask for sample in dataset.samples] == [tmp_path / "m.png", tmp_path / "n.png"]
    line = 4 if kind == "csv" else 3
    message = "row with another mask than an earlier row of its picture (keep one)"
    assert dataset.problems == (Problem(f"metadata.{kind}:{line} a.png", message),)


def test_an_absolute_name_inside_the_folder_is_read(tmp_path, monkeypatch):
    root = tmp_path / "set"
    for name in ("a.png", "sub/b.png", "c.png", "m.png"):
        picture(root / name)
    picture(tmp_path / "out.png")
    (tmp_path / "alias").symlink_to(root)
    names = [root / "a.png", root / "sub" / ".." / "sub" / "b.png", tmp_path / "alias" / "c.png", tmp_path / "out.png", root]
    metadata(root, "jsonl", [{"file_name": str(name), "text": "x", "mask": str(root / "m.png")} for name in names])
    dataset = read_folder(root, Columns(mask="mask"))
    assert list(captions_of(dataset)) == ["a.png", "c.png", "sub/b.png"] and {sample.mask for sample in dataset.samples} == {root / "m.png"}
    assert [problem.reason for problem in dataset.problems] == [
        "row whose file_name leads out of the folder", "row whose file_name is the folder itself"
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert list(captions_of(read_folder("set", Columns(mask="mask")))) == list(captions_of(dataset))  # however the folder is spelled
    assert list(captions_of(read_folder("alias", Columns(mask="mask")))) == list(captions_of(dataset))


@pytest.mark.parametrize(("name", "reason"), [
    (".", "is the folder itself"), ("./", "is the folder itself"), ("..", "leads out"), ("a\0.png", "picture is missing"),
    ("https://host/a.png", "is a URL, which is not followed"), (" ", "row without a file_name"), (None, "row without a file_name"),
    ("sub", "picture is not a regular file"), ("pipe.png", "picture is not a regular file"), ("gone.png", "picture is missing"),
    ([], "row without a file_name"), ("file:///etc/passwd", "leads out"), ("a.png/", None),
    ("sub\\b.png", None), ("b.png\\..\\a.png", None),
])  # fmt: skip
def test_odd_names_in_a_row(tmp_path, name, reason):
    for each in ("a.png", "sub/b.png", "ok.png"):
        picture(tmp_path / each)
    os.mkfifo(tmp_path / "pipe.png")
    metadata(tmp_path, "jsonl", [{"file_name": "ok.png", "text": "x"}, {"file_name": name, "text": "y"}])
    dataset = read_folder(tmp_path)
    found = [problem.reason for problem in dataset.problems if problem.path.startswith("metadata.jsonl:2")]
    assert len(dataset.samples) == 1 + (reason is None) and len(found) == (reason is not None)
    assert reason is None or reason in found[0]
    assert summary(dataset).replace("\n", "").isprintable()


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("begins", ["", "\ufeff"])
def test_a_csv_is_read_by_the_delimiter_that_finds_its_columns(tmp_path, delimiter, begins):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    lines = [["file_name", " text ", "n"], ["a.png", '"one, two; three"', "1"], [], ["b.png", "four", "2"]]
    lines += [["b.png"], ["", "", ""], list("abcd")]
    (tmp_path / "metadata.csv").write_text(begins + "\n".join(map(delimiter.join, lines)) + "\n", "utf-8")
    dataset = read_folder(tmp_path)
    assert captions_of(dataset) == {"a.png": ("one, two; three",), "b.png": ("four",)}
    assert list(reasons(dataset).values()) == ["row without a caption", "row without a file_name", "row whose picture is missing"]


def test_a_csv_of_excels_and_one_with_a_column_twice(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text('sep=;\r\nfile_name;text\r\na.png;"x;y"\r\ngone.png;z\r\n')
    dataset = read_folder(tmp_path)
    assert captions_of(dataset) == {"a.png": ("x;y",)} and dataset.problems[0].path == "metadata.csv:4 gone.png"
    (tmp_path / "metadata.csv").write_text("file_name,text,text\na.png,x,y\n")
    with pytest.raises(InputError, match="has 2 columns called 'text': give each a name of its own"):
        read_folder(tmp_path)


def test_a_line_too_long_to_be_one_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "LINE_CHARACTERS", 200)
    picture(tmp_path / "a.png")
    row = json.dumps({"file_name": "a.png", "text": "x"})
    (tmp_path / "metadata.jsonl").write_text(f"{row}\n" + json.dumps({"file_name": "a.png", "text": "y" * 900}) + f"\n{row}\n" + "z" * 500)
    dataset = read_folder(tmp_path)
    assert captions_of(dataset) == {"a.png": ("x", "x")}
    assert reasons(dataset) == {f"metadata.jsonl:{line}": "malformed line (not a JSON object)" for line in (2, 4)}
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"' + "y" * 500)
    with pytest.raises(InputError, match=r"metadata\.csv:2 is a line of more than 200 characters"):
        read_folder(tmp_path)
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\n")
    os.truncate(tmp_path / "metadata.csv", 2**41)
    with pytest.raises(InputError, match="2,199,023,255,552 bytes large"):
        read_folder(tmp_path)


# Names and encodings


@pytest.mark.parametrize("layout", ["txt", "jsonl"])
def test_names_with_composed_and_decomposed_accents_meet(tmp_path, layout):
    composed, decomposed = (unicodedata.normalize(form, "Bär é") for form in ("NFC", "NFD"))
    picture(tmp_path / f"{decomposed}.png")
    picture(tmp_path / f"{decomposed}.mask.png")
    if layout == "txt":
        (tmp_path / f"{composed}.txt").write_text("a bear")
        dataset = read_folder(tmp_path)
        assert dataset.samples[0].mask == tmp_path / f"{decomposed}.mask.png"
    else:
        metadata(tmp_path, "jsonl", [{"file_name": f"{form}.png", "text": "a bear"} for form in (composed, decomposed)])
        dataset = read_folder(tmp_path)
    assert captions_of(dataset) == {f"{composed}.png": ("a bear",) * (2 if layout == "jsonl" else 1)} and dataset.problems == ()
    assert dataset.samples[0].path == tmp_path / f"{decomposed}.png"  # the id is the same on every machine, the path is the file's


def test_two_pictures_whose_names_differ_by_their_accents_alone_are_two(tmp_path):
    names = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    for number, name in enumerate(names):
        captioned(tmp_path / f"{name}.png", f"{number}")
    assert captions_of(read_folder(tmp_path)) == {f"{name}.png": (f"{number}",) for number, name in enumerate(names)}
    for name in names:
        (tmp_path / f"{name}.txt").unlink()
    metadata(tmp_path, "jsonl", [{"file_name": f"{name}.png", "text": str(number)} for number, name in enumerate(names)])
    assert captions_of(read_folder(tmp_path)) == {f"{name}.png": (f"{number}",) for number, name in enumerate(names)}


def test_captions_of_other_programs_are_found_and_one_goes_first(tmp_path):
    for name in ("a.jpg", "b.png", "c.jpg", "c.png", "d.png", "e.jpg.png", "e.jpg"):
        picture(tmp_path / name)
    texts = {"a.jpg.txt": "a", "b.caption": "b", "c.jpg.txt": "no", "c.txt": "c", "d.txt": "d", "d.caption": "no", "e.jpg.txt": "e"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    dataset = read_folder(tmp_path)
    assert captions_of(dataset) == {
        "a.jpg": ("a",), "b.png": ("b",), "c.jpg": ("c",), "c.png": ("c",), "d.png": ("d",), "e.jpg.png": ("e",)
    }  # fmt: skip
    second = dict.fromkeys(("c.jpg.txt", "d.caption"), "second caption file of the same name")
    assert reasons(dataset) == second | {"e.jpg": "picture without a caption"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path, encoding):
    text = "ein Kätzchen 🐈\nzwei"
    mark = "" if encoding in ("utf-16", "utf-32", "utf-8-sig") else "\ufeff"
    captioned(tmp_path / "t" / "a.png")
    (tmp_path / "t" / "a.txt").write_bytes((mark + text).encode(encoding))
    assert captions_of(read_folder(tmp_path / "t")) == {"a.png": ("ein Kätzchen 🐈", "zwei")}
    for kind, table in (("csv", "file_name,text\na.png,Kätzchen 🐈\n"), ("jsonl", '{"file_name": "a.png", "text": "Kätzchen 🐈"}\n')):
        picture(tmp_path / kind / "a.png")
        (tmp_path / kind / f"metadata.{kind}").write_bytes((mark + table).encode(encoding))
        assert captions_of(read_folder(tmp_path / kind)) == {"a.png": ("Kätzchen 🐈",)}


def test_text_that_is_none_is_said_with_what_it_is(tmp_path):
    texts = {
        "utf16": "a cat".encode("utf-16-le"), "latin": "café".encode("latin-1"), "pointer": POINTER, "cut": "a cat".encode("utf-16")[:-1],
        "long": b"x" * (CAPTION_CHARACTERS + 1), "huge": b"x\n" * CAPTION_BYTES, "good": b"a cat",
    }  # fmt: skip
    for name, data in texts.items():
        captioned(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(data)
    dataset = read_folder(tmp_path)
    assert captions_of(dataset) == {"good.png": ("a cat",)}
    found = reasons(dataset)
    assert "NUL characters (UTF-16 without its byte order mark?); save it again as UTF-8" in found["utf16.txt"]
    assert found["latin.txt"] == found["cut.txt"] == "caption file that is not UTF-8"
    assert "Git LFS pointer, not the file itself (fetch it: git lfs pull)" in found["pointer.txt"]
    assert found["long.txt"] == "caption of more than 100,000 characters"
    assert found["huge.txt"] == "caption file of more than 1,048,576 bytes"
    for data, message in ((POINTER, "is a Git LFS pointer"), ("file_name,text\n".encode("utf-16-le"), "with NUL characters")):
        (tmp_path / "metadata.csv").write_bytes(data)
        with pytest.raises(InputError, match=message):
            read_folder(tmp_path)


@pytest.mark.parametrize(("caption", "said"), [
    ("\u200b", "invisible"), ("\u2060\u00ad \u3164", "invisible"), ("\u2800", "invisible"), ("a\u200bb", None), ("👩\u200d🚀", None),
    ("a \x1b[31mred\x1b[0m cat", "control characters"), ("a\x9bcat", "control characters"), ("caf\ufffd", "lost characters"),
    ("cafÃ©", "decoded wrongly"), ("itâ€™s", "decoded wrongly"), ("ä½¥", "decoded wrongly"), ("café", None), ("naïve Ärger", None),
    ("Â", None), ("猫", None), ("", None), ("a\tb", None),
])  # fmt: skip
def test_what_is_odd_about_a_caption_is_said_and_it_is_used(tmp_path, caption, said):
    assert (oddity(caption) or "None").find(said or "None") >= 0
    captioned(tmp_path / "a.png", f"{caption}\n\u200b\nplain" if said != "invisible" else caption)
    dataset = read_folder(tmp_path)
    assert captions_of(dataset)["a.png"] == (("",) if said == "invisible" else tuple(filter(None, (caption, "plain"))))
    assert [(problem.path, problem.used) for problem in dataset.problems] == [("a.png", True)] * (said is not None)
    metadata(tmp_path, "jsonl", [{"file_name": "a.png", "text": caption}])
    dataset = read_folder(tmp_path)
    assert captions_of(dataset)["a.png"] == ("" if said == "invisible" else caption,)
    assert summary(dataset).count("\nused, caption") == (said is not None)


# Links, pipes and depths


def test_a_folder_is_read_once_under_its_own_name(tmp_path):
    root = tmp_path / "set"
    captioned(root / "real" / "a.png")
    captioned(tmp_path / "elsewhere" / "b.png")
    for name, target in (("alias", "real"), ("first", tmp_path / "elsewhere"), ("second", tmp_path / "elsewhere"), ("loop", ".")):
        (root / name).symlink_to(target)
    dataset = read_folder(root)
    assert captions_of(dataset) == {"real/a.png": ("x",), "first/b.png": ("x",)}
    assert {problem.path for problem in dataset.problems if problem.used} == {
        "alias (read as real)", "second (read as first)", "loop (read as .)"
    }  # fmt: skip
    assert len(dataset.problems) == 3


@pytest.mark.parametrize("caption", ["sks", None])
@pytest.mark.parametrize("out", ["", "runs/out/"])
def test_what_a_training_drew_is_left_out_below_the_pictures_and_read_as_a_folder_of_its_own(tmp_path, out, caption):
    captioned(tmp_path / "a.png")
    captioned(tmp_path / "samples" / "b.png")
    columns = Columns(caption=caption)
    before = captions_of(read_folder(tmp_path / "samples", columns)), captions_of(read_folder(tmp_path, columns))
    assert [list(found) for found in before] == [["b.png"], ["a.png", "samples/b.png"]]
    (tmp_path / out).mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "run.json"):
        (tmp_path / f"{out}{name}").write_text("{}")
    captioned(tmp_path / f"{out}samples" / "step-00000000.png", "drawn")
    dataset = read_folder(tmp_path, columns)
    assert captions_of(dataset) == ({"a.png": (caption or "x",)} if not out else before[1])
    assert reasons(dataset)[f"{out}samples"] == "folder of a training's sample pictures"
    assert "step-00000000.png" in captions_of(read_folder(tmp_path / f"{out}samples", columns))


def test_what_is_no_file_is_named_and_nothing_waits_for_it(tmp_path, within):
    captioned(tmp_path / "ok.png")
    for name in ("pipe.png", "caption.png", "masked.png", "socket.png", "device.png", "dangling.png", "loop.png"):
        (tmp_path / name).with_suffix(".txt").write_text("x")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "caption.txt").unlink()
    os.mkfifo(tmp_path / "caption.txt")
    picture(tmp_path / "caption.png")
    picture(tmp_path / "masked.png")
    os.mkfifo(tmp_path / "masked.mask.png")
    os.mkfifo(tmp_path / "irrelevant")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "dangling.png").symlink_to("nowhere")
    (tmp_path / "loop.png").symlink_to("loop.png")
    dataset = within(read_folder, tmp_path)
    assert captions_of(dataset) == {"ok.png": ("x",), "masked.png": ("x",)} and dataset.samples[0].mask is None
    found = {name: reason for name, reason in reasons(dataset).items() if "regular file" in reason}
    assert found == {name: f"{kind}, not a regular file" for name, kind in {
        "pipe.png": "named pipe", "caption.txt": "named pipe", "masked.mask.png": "named pipe", "socket.png": "socket",
        "device.png": "device", "dangling.png": "link that leads nowhere", "loop.png": "link that leads nowhere",
    }.items()}  # fmt: skip


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_that_is_a_pipe_is_refused_by_name(tmp_path, within, name):
    captioned(tmp_path / "ok.png")
    os.mkfifo(tmp_path / name)

    def read():
        with pytest.raises(InputError, match=f"{name} is a named pipe, not a regular file"):
            read_folder(tmp_path)
        return True

    within(read)


@pytest.mark.parametrize("reader", [open_rgb, upright_size, digest])
def test_a_picture_that_became_a_pipe_is_not_waited_for(tmp_path, within, reader):
    os.mkfifo(tmp_path / "a.png")

    def read():
        with pytest.raises(UnreadableImage, match="a.png is a named pipe, not a regular file"):
            reader(tmp_path / "a.png")
        return True

    within(read)


@pytest.fixture
def deep(tmp_path, monkeypatch):
    """A folder with 2,100 folders in one another, a picture in the thousandth; no library removes what is so deep."""
    monkeypatch.chdir(tmp_path)
    for depth in range(2100):
        os.mkdir("d")
        os.chdir("d")
        if depth == 999:
            captioned(Path("p.png"))
    os.chdir(tmp_path)
    yield tmp_path
    subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)


def test_folders_may_be_as_deep_as_the_system_allows(deep):
    captioned(deep / "ok.png")
    dataset = read_folder(deep)
    assert sorted(captions_of(dataset)) == ["/".join(["d"] * 1000 + ["p.png"]), "ok.png"]
    assert [problem.reason for problem in dataset.problems] == ["folder that cannot be listed"]


# One caption for all, and how many pictures there are


def test_one_caption_stands_for_all_whatever_is_there(tmp_path):
    captioned(tmp_path / "a.png", "its own")
    picture(tmp_path / "sub" / "b.jpg")
    picture(tmp_path / "sub" / "b.mask.png")
    metadata(tmp_path, "csv", [{"file_name": "a.png", "text": "in a row"}])
    dataset = read_folder(tmp_path, Columns(caption="a photo of sks dog"))
    assert captions_of(dataset) == dict.fromkeys(("a.png", "sub/b.jpg"), ("a photo of sks dog",))
    assert dataset.samples[1].mask == tmp_path / "sub" / "b.mask.png"
    assert {problem.path for problem in dataset.problems} == {"a.txt", "metadata.csv"} and all(p.used for p in dataset.problems)
    with_masks = read_folder(tmp_path, Columns(image="file_name", caption="a photo of sks dog"))  # the rows say which pictures
    assert captions_of(with_masks) == {"a.png": ("a photo of sks dog",)}


@pytest.mark.parametrize("text", [None, "a cat"])
def test_the_suffix_of_a_mask_may_be_in_any_case(tmp_path, text):
    captioned(tmp_path / "A.PNG", "a cat")
    picture(tmp_path / "A.MASK.PNG")
    dataset = read_folder(tmp_path, Columns(caption=text))
    assert captions_of(dataset) == {"A.PNG": ("a cat",)} and dataset.samples[0].mask == tmp_path / "A.MASK.PNG"
    assert not any(problem.path == "A.MASK.PNG" for problem in dataset.problems)


def test_pictures_that_are_there_are_counted_used_or_not(tmp_path):
    for name in ("a.png", "b.png"):
        captioned(tmp_path / name)
    picture(tmp_path / "a.mask.png")
    picture(tmp_path / "lone.png")
    assert read_folder(tmp_path).pictures == 3
    metadata(tmp_path, "jsonl", [{"file_name": "a.png", "text": "x"}, {"file_name": "gone.png", "text": "x"}])
    assert read_folder(tmp_path).pictures == 3
    assert read_folder(tmp_path, Columns(caption="x")).pictures == 3
