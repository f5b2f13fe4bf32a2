"""read_folder: every layout, every problem by name, and the same answer whatever the order of the files on disk."""

import json
import os

import pytest
from PIL import Image

from latentfm.data.sources import Problem, Sample, read_folder, summary
from latentfm.errors import InputError


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)
    return path


def caption(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def jsonl(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    caption(folder / "metadata.jsonl", "\n".join(lines) + "\n")


def captions_of(dataset):
    return {sample.id: sample.captions for sample in dataset.samples}


def reasons(dataset):
    return {problem.path: problem.reason for problem in dataset.problems}


# Pictures beside .txt files


def test_each_non_empty_line_of_the_txt_is_a_caption(tmp_path):
    picture(tmp_path / "cat.png")
    caption(tmp_path / "cat.txt", "\ufeffa cat\r\n\n  a sleeping cat \n")  # with a byte order mark, as Notepad writes
    dataset = read_folder(str(tmp_path))
    assert dataset.folder == tmp_path
    assert dataset.samples == (Sample(tmp_path / "cat.png", ("a cat", "a sleeping cat"), "cat.png"),)
    assert dataset.problems == ()


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_lines_end_as_any_system_ends_them(tmp_path, end):
    picture(tmp_path / "cat.png")
    (tmp_path / "cat.txt").write_bytes(f"a cat{end}{end}a sleeping cat{end}".encode())
    assert captions_of(read_folder(tmp_path)) == {"cat.png": ("a cat", "a sleeping cat")}


def test_a_line_separator_inside_a_caption_does_not_cut_it(tmp_path):
    picture(tmp_path / "cat.png")
    caption(tmp_path / "cat.txt", "a cat\u2028on a mat")
    assert captions_of(read_folder(tmp_path)) == {"cat.png": ("a cat\u2028on a mat",)}


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_an_empty_txt_is_the_empty_caption(tmp_path, text):
    picture(tmp_path / "cat.png")
    caption(tmp_path / "cat.txt", text)
    dataset = read_folder(tmp_path)
    assert captions_of(dataset) == {"cat.png": ("",)}
    assert dataset.problems == ()


def test_pictures_that_share_a_stem_are_samples_of_their_own(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "a.jpg")
    caption(tmp_path / "a.txt", "one")
    dataset = read_folder(tmp_path)
    assert [(sample.id, sample.path.name) for sample in dataset.samples] == [("a.jpg", "a.jpg"), ("a.png", "a.png")]
    assert captions_of(dataset) == {"a.jpg": ("one",), "a.png": ("one",)}


def test_extensions_in_any_case_at_any_depth_with_dots_in_the_name(tmp_path):
    suffixes = ["png", "JPG", "Jpeg", "webp", "BMP", "tif", "tiff", "gif", "AVIF"]
    for i, suffix in enumerate(suffixes):
        file = tmp_path / "deep" / str(i) / f"v1.{i}.{suffix}"
        file.parent.mkdir(parents=True)
        file.touch()  # read_folder opens no picture
        caption(file.with_suffix(".TXT"), suffix)
    dataset = read_folder(tmp_path)
    assert captions_of(dataset) == {f"deep/{i}/v1.{i}.{suffix}": (suffix,) for i, suffix in enumerate(suffixes)}
    assert dataset.problems == ()


def test_same_stem_in_another_folder_is_not_a_pair(tmp_path):
    picture(tmp_path / "x" / "cat.png")
    caption(tmp_path / "y" / "cat.txt", "a cat")
    picture(tmp_path / "dog.png")
    caption(tmp_path / "dog.txt", "a dog")
    dataset = read_folder(tmp_path)
    assert captions_of(dataset) == {"dog.png": ("a dog",)}
    assert reasons(dataset) == {"x/cat.png": "picture without a caption", "y/cat.txt": "caption without a picture"}


def test_hidden_files_and_folders_are_ignored_but_a_hidden_parent_is_not(tmp_path):
    root = tmp_path / ".cache" / "set"
    for name in ["cat", ".hidden", ".git/dog", "sub/._cat"]:
        picture(root / f"{name}.png")
        caption(root / f"{name}.txt", name)
    dataset = read_folder(root)
    assert captions_of(dataset) == {"cat.png": ("cat",)}
    assert dataset.problems == ()


def test_unicode_names_and_captions(tmp_path):
    picture(tmp_path / "猫 写真" / "é🐈.png")
    caption(tmp_path / "猫 写真" / "é🐈.txt", "ein Kätzchen 🐈")
    assert captions_of(read_folder(tmp_path)) == {"猫 写真/é🐈.png": ("ein Kätzchen 🐈",)}


def test_order_does_not_depend_on_creation_or_listing(tmp_path, monkeypatch):
    names = ["b/1.png", "a.png", "c.png", "b.png", "B.png", "10.png", "2.png", "lone2.png", "lone1.png"]

    def make(root, names):
        for name in names:
            picture(root / name)
            if "lone" not in name:
                caption((root / name).with_suffix(".txt"), name)
        (root / "z.heic").touch()
        (root / "y.heic").touch()

    make(tmp_path / "one", names)
    make(tmp_path / "two", names[::-1])
    one = read_folder(tmp_path / "one")
    walk = os.walk

    def walk_backwards(*args, **kwargs):
        for directory, subdirectories, files in walk(*args, **kwargs):
            subdirectories.sort(reverse=True)
            yield directory, subdirectories, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", walk_backwards)
    two = read_folder(tmp_path / "two")
    assert [sample.id for sample in one.samples] == sorted(names[:-2])
    assert captions_of(one) == captions_of(two)
    assert [s.id for s in one.samples] == [s.id for s in two.samples]
    assert one.problems == two.problems
    assert len(one.problems) == 4


def test_links_to_folders_are_followed_and_a_loop_ends(tmp_path):
    picture(tmp_path / "elsewhere" / "cat.png")
    caption(tmp_path / "elsewhere" / "cat.txt", "a cat")
    root = tmp_path / "set"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    assert captions_of(read_folder(root)) == {"linked/cat.png": ("a cat",)}


def test_files_that_cannot_be_used_are_named(tmp_path):
    for name in ["good", "latin", "twice"]:
        picture(tmp_path / f"{name}.png")
    caption(tmp_path / "good.txt", "good")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    caption(tmp_path / "twice.txt", "lower")
    caption(tmp_path / "twice.TXT", "upper")
    (tmp_path / "phone.HEIC").touch()
    jsonl(tmp_path / "train", {"file_name": "good.png", "text": "x"})
    dataset = read_folder(tmp_path)
    assert captions_of(dataset) == {"good.png": ("good",), "twice.png": ("upper",)}
    found = reasons(dataset)
    assert set(found) == {"latin.txt", "twice.txt", "phone.HEIC", "train/metadata.jsonl"}
    assert found["latin.txt"] == "caption file that is not UTF-8"
    assert found["twice.txt"] == "second caption file of the same name"
    assert "format that is not read" in found["phone.HEIC"]
    assert "metadata not read" in found["train/metadata.jsonl"]


def test_a_file_name_that_is_not_utf8_is_a_problem_that_can_be_printed(tmp_path):
    picture(tmp_path / "cat.png")
    caption(tmp_path / "cat.txt", "a cat")
    try:
        os.close(os.open(os.fsencode(tmp_path) + b"/caf\xe9.png", os.O_CREAT))
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    dataset = read_folder(tmp_path)
    assert [problem.reason for problem in dataset.problems] == ["file name that is not UTF-8"]
    assert "caf" in summary(dataset).encode("utf-8").decode()


# metadata.jsonl


def test_jsonl_takes_text_caption_or_prompt_and_lists(tmp_path):
    for name in ["a.png", "b.png", "c.png", "sub/d.png", "e.png"]:
        picture(tmp_path / name)
    jsonl(
        tmp_path,
        {"file_name": "sub/d.png", "text": ""},
        {"file_name": "a.png", "caption": "lost", "text": " by text "},
        "",
        {"file_name": "./b.png", "prompt": "by prompt", "text": None},
        {"file_name": "sub/../c.png", "caption": ["one", "two", ""]},
        {"file_name": "e.png", "text": "a cat\u2028on a mat 🐈"},
    )
    dataset = read_folder(tmp_path)
    assert captions_of(dataset) == {
        "a.png": ("by text",),
        "b.png": ("by prompt",),
        "c.png": ("one", "two", ""),
        "e.png": ("a cat\u2028on a mat 🐈",),
        "sub/d.png": ("",),
    }
    assert dataset.problems == ()
    assert all(sample.path.is_file() for sample in dataset.samples)
    assert [sample.id for sample in dataset.samples] == ["a.png", "b.png", "c.png", "e.png", "sub/d.png"]


def test_every_unusable_row_is_a_problem_with_its_line(tmp_path):
    picture(tmp_path / "set" / "ok.png")
    picture(tmp_path / "outside.png")
    picture(tmp_path / "set" / "twin.png")
    picture(tmp_path / "set" / "bare.png")
    picture(tmp_path / "set" / "number.png")
    outside = str(tmp_path / "outside.png")
    jsonl(
        tmp_path / "set",
        {"file_name": "ok.png", "text": "fine"},
        '{"file_name": "cut.png", "te',
        '["a list"]',
        {"file_name": "gone.png", "text": "x"},
        {"text": "no name"},
        {"file_name": 7, "text": "x"},
        {"file_name": "bare.png"},
        {"file_name": "bare.png", "text": []},
        {"file_name": "number.png", "text": 3},
        {"file_name": "twin.png", "text": "first"},
        {"file_name": "./twin.png", "text": "second"},
        {"file_name": "../outside.png", "text": "x"},
        {"file_name": "no/../../outside.png", "text": "x"},
        {"file_name": outside, "text": "x"},
        '{"file_name": "ok.png\\u0000", "text": "x"}',
        '{"file_name": "number.png", "text": "half an emoji \\ud83d"}',
        {"file_name": "x" * 5000, "text": "x"},
        '{"file_name": "ok.png", "text": "one", "text": "two"}',
    )
    dataset = read_folder(tmp_path / "set")
    assert captions_of(dataset) == {"ok.png": ("fine",), "twin.png": ("first", "second")}
    escape = "row whose file_name leads out of the folder"
    assert dataset.problems == tuple(
        Problem(f"metadata.jsonl:{where}", reason)
        for where, reason in [
            ("2", "malformed line (not a JSON object)"),
            ("3", "malformed line (not a JSON object)"),
            ("4 gone.png", "row whose picture is missing"),
            ("5", "row without a file_name"),
            ("6", "row without a file_name"),
            ("7 bare.png", "row without a caption"),
            ("8 bare.png", "row without a caption"),
            ("9 number.png", "row whose caption is not a text"),
            ("12", escape),
            ("13", escape),
            ("14", escape),
            ("15 ok.png\0", "row whose picture is missing"),
            ("16 number.png", "row whose caption is not a text"),
            ("17 " + "x" * 5000, "row whose picture is missing"),
            ("18", "row that gives 'text' twice; leave one of them out"),
        ]
    )


def test_pictures_and_txt_files_that_metadata_passes_over_are_named(tmp_path):
    for name in ["a.png", "b.png"]:
        picture(tmp_path / name)
    caption(tmp_path / "b.txt", "not read")
    caption(tmp_path / "README.txt", "about these pictures")
    jsonl(tmp_path, {"file_name": "a.png", "text": "x"})
    dataset = read_folder(tmp_path)
    assert captions_of(dataset) == {"a.png": ("x",)}
    assert reasons(dataset) == {
        "b.png": "picture without a caption in metadata.jsonl",
        "b.txt": "caption file beside metadata.jsonl, which is read instead",
    }


# metadata.csv


def test_csv_with_quotes_commas_newlines_and_a_byte_order_mark(tmp_path):
    for name in ["a.png", "b.png", "c.png", "d.png", "short.png"]:
        picture(tmp_path / name)
    caption(
        tmp_path / "metadata.csv",
        '\ufefffile_name,text\r\na.png,"a red, round ""apple"""\r\nb.png,\r\nc.png,"two\nlines"\r\n'
        "d.png,a red, round apple\r\nshort.png\r\ngone.png,x\r\n",
    )
    dataset = read_folder(tmp_path)
    assert captions_of(dataset) == {"a.png": ('a red, round "apple"',), "b.png": ("",), "c.png": ("two\nlines",)}
    assert [problem.path for problem in dataset.problems] == [
        "metadata.csv:6 d.png",
        "metadata.csv:7 short.png",
        "metadata.csv:8 gone.png",
    ]
    assert "more fields than columns" in dataset.problems[0].reason
    assert dataset.problems[1].reason == "row without a caption"
    assert dataset.problems[2].reason == "row whose picture is missing"


@pytest.mark.parametrize(
    "text, message",
    [
        ("filename,text\na.png,x\n", r"no column file_name \(did you mean 'filename'\?\)"),
        ("file_name,label\na.png,x\n", r"no column text or caption or prompt, only \[file_name, label\]"),
        ("file_name:text\na.png:x\n", r"no column file_name.*only \[file_name:text\]"),
        ("", r"no column file_name, only \[\]"),
        ('file_name,text\na.png,"never closed\n', r"metadata\.csv:2 is malformed CSV"),
        ('file_name,text\na.png,"never closed\nb.png,x\nc.png,y\n', r"metadata\.csv:2 is malformed CSV"),
        ('file_name,text\na.png,x\nb.png,y\nc.png,"z" q\nd.png,ok\n', r"metadata\.csv:4 is malformed CSV"),
        ('sep=;\nfile_name;text\n\na.png;"x\ny"\n\n\nc.png;"z" q\n', r"metadata\.csv:8 is malformed CSV"),
        ('file_name,"te"xt\n', r"metadata\.csv:1 is malformed CSV"),
    ],
)
def test_a_csv_that_cannot_be_understood_is_refused(tmp_path, text, message):
    picture(tmp_path / "a.png")
    caption(tmp_path / "metadata.csv", text)
    with pytest.raises(InputError, match=message) as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_metadata_that_is_not_utf8_is_refused(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,café\n".encode("latin-1"))
    with pytest.raises(InputError, match="metadata.csv is not UTF-8: save it again"):
        read_folder(tmp_path)


def test_both_metadata_files_are_refused(tmp_path):
    picture(tmp_path / "a.png")
    jsonl(tmp_path, {"file_name": "a.png", "text": "x"})
    caption(tmp_path / "metadata.csv", "file_name,text\na.png,y\n")
    with pytest.raises(InputError, match="both metadata.jsonl and metadata.csv.*keep one"):
        read_folder(tmp_path)


# Folders with nothing to use


def refusal(folder):
    with pytest.raises(InputError) as caught:
        read_folder(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "cat.png beside cat.txt" in message, "the message ends with the expected layout"
    return message


def test_missing_folder_file_and_empty_name_are_refused(tmp_path, monkeypatch):
    assert f"there is no folder '{tmp_path / 'nowhere'}'" in refusal(tmp_path / "nowhere")
    assert "is a file, not a folder" in refusal(picture(tmp_path / "cat.png"))
    caption(tmp_path / "cat.txt", "a cat")
    monkeypatch.chdir(tmp_path)  # "" must not quietly mean the current folder
    assert "there is no folder ''" in refusal("")


def test_a_folder_with_nothing_usable_says_what_was_found(tmp_path):
    (tmp_path / "empty").mkdir()
    message = refusal(tmp_path / "empty")
    assert str(tmp_path / "empty") in message
    assert "no pictures (.avif .bmp" in message and "0 other files" in message

    for name in "abc":
        picture(tmp_path / "bare" / f"{name}.png")
    assert "3 pictures but no captions" in refusal(tmp_path / "bare")

    caption(tmp_path / "bare" / "d.txt", "x")
    assert "3 pictures and 1 .txt file, but none that can be paired" in refusal(tmp_path / "bare")

    jsonl(tmp_path / "bare", {"file_name": "d.png", "text": "x"})
    message = refusal(tmp_path / "bare")
    assert "3 pictures and metadata.jsonl, but no usable row" in message
    assert "first problem: metadata.jsonl:1 d.png, row whose picture is missing" in message

    picture(tmp_path / "hub" / "train" / "a.png")
    jsonl(tmp_path / "hub" / "train", {"file_name": "a.png", "text": "x"})
    assert "train/metadata.jsonl" in refusal(tmp_path / "hub"), "points at the metadata of a folder below"


def test_summary_counts_and_names_at_most_five_of_a_kind(tmp_path):
    for i in range(7):
        picture(tmp_path / f"lone{i}.png")
    picture(tmp_path / "cat.png")
    caption(tmp_path / "cat.txt", "a cat\na pet")
    caption(tmp_path / "dog.txt", "a dog")
    assert summary(read_folder(tmp_path)).split("\n") == [
        f"1 picture, 2 captions in {tmp_path}",
        "not used, picture without a caption: 7 (lone0.png, lone1.png, lone2.png, lone3.png, lone4.png and 2 more)",
        "not used, caption without a picture: 1 (dog.txt)",
    ]


def test_summary_of_a_clean_folder_is_one_line(tmp_path):
    picture(tmp_path / "cat.png")
    caption(tmp_path / "cat.txt", "a cat")
    assert summary(read_folder(tmp_path)) == f"1 picture, 1 caption in {tmp_path}"
