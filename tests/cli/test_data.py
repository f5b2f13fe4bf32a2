"""`latentfm data check` from the command line: tables, page and JSON of every kind of source, and one clear line for bad input."""

import errno
import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from faults import files_no_larger_than
from PIL import Image
from typer.testing import CliRunner

from latentfm.cli.main import app


def png(seed, width=32, height=32):
    file = io.BytesIO()
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(colours).resize((width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate(((32, 32), (64, 40), (40, 64), (128, 16))):
        (folder / f"{i}.png").write_bytes(png(i, *size))
        (folder / f"{i}.txt").write_text("a red apple")
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_folder):
    """A function that runs `latentfm data check` with its arguments in tmp_path, on the tiny model."""
    monkeypatch.delenv("LATENTFM_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, ["data", "check", "--model", str(tiny_folder), *map(str, words)])


@pytest.fixture
def refused(run):
    """A function that gives the one line with which a check is refused."""

    def check(*words):
        answer = run(*words)
        assert answer.exit_code == 2, answer.output
        (line,) = answer.stderr.splitlines()
        assert line.startswith("error: ") and answer.stdout == ""
        return line

    return check


def state(folder):
    return {path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_a_folder_is_shown_as_tables_and_a_page_and_stays_as_it_is(run, pictures, tmp_path):
    before = state(pictures)
    answer = run(pictures, "--buckets", 3)
    assert answer.exit_code == 0, answer.output
    for text in ("4 of 4 pictures", "Buckets", "32x32", "Caption lengths in tokens", "text_encoder_3 (T5)", "Left out\nnothing"):
        assert text in answer.stdout
    made = (tmp_path / "data-check.html").read_text("utf-8")
    assert made.count("<figure>") == 4 and "the page: data-check.html" in answer.stderr
    assert state(pictures) == before and sorted(path.name for path in tmp_path.iterdir()) == ["data-check.html", "pictures"]


def test_the_page_goes_where_it_is_asked_for_and_replaces_nothing_unasked(run, refused, pictures, tmp_path):
    (tmp_path / "data-check.html").write_text("mine")
    assert "data-check.html exists and is no page of latentfm data check; replace it with --overwrite" in refused(pictures)
    assert run(pictures, "--out", "other.html", "--pictures", 2).exit_code == 0
    assert (tmp_path / "other.html").read_text("utf-8").count("<figure>") == 2 and (tmp_path / "data-check.html").read_text() == "mine"
    assert run(pictures, "--overwrite").exit_code == 0 and "<figure>" in (tmp_path / "data-check.html").read_text("utf-8")
    assert run(pictures).exit_code == 0  # a page of ours is written anew
    assert "is a folder; give a file" in refused(pictures, "--out", pictures)


def test_a_page_that_cannot_be_written_whole_leaves_the_old_one(run, refused, pictures, tmp_path):
    (tmp_path / "data-check.html").write_text("mine")
    with files_no_larger_than(2000):
        answer = run(pictures, "--overwrite")
    assert answer.exit_code == 1 and "could not write data-check.html" in answer.stderr
    assert (tmp_path / "data-check.html").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data-check.html", "pictures"]


def test_json_alone_writes_no_page(run, in_json, pictures, tmp_path):
    findings = in_json(pictures, "--buckets", 3, "--max-crop", 0.5)
    assert [row["name"] for row in findings["left_out"]] == ["3.png"] and not (tmp_path / "data-check.html").exists()
    assert findings["max_crop"] == 0.5 and len(findings["buckets"]) == 3
    assert run(pictures, "--json", "--out", "page.html").exit_code == 0 and (tmp_path / "page.html").exists()


def test_strict_says_by_its_exit_code_whether_anything_is_lost(run, pictures):
    assert run(pictures, "--json", "--strict", "--size", "32", "data.t5_lengths={16: 1}").exit_code == 0
    assert run(pictures, "--json", "--strict", "--max-crop", "0.5").exit_code == 1
    (pictures / "0.txt").write_text("a red apple on a white plate " * 9)
    assert run(pictures, "--json", "--strict").exit_code == 1 and run(pictures, "--json").exit_code == 0


def test_a_configuration_is_checked_as_the_run_will_use_it(in_json, pictures, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"data:\n  sources:\n    - {{path: {pictures}, name: own, repeats: 3}}\n"
        f"    - {{path: {pictures}, name: prior, weight: 0.5, regularisation: true}}\n"
        "  size: [64, 32]\n  t5_lengths: {8: 0.5, 12: 0.5}\ntrain: {batch_size: 7}\n"
    )
    findings = in_json("--config", "run.yaml")
    assert [(row["name"], row["draws_an_epoch"]) for row in findings["sources"]] == [("own", 12), ("prior", 2)]
    assert [(row["width"], row["height"]) for row in findings["buckets"]] == [(64, 32)] and findings["steps_an_epoch"] == 2
    assert [row["limit"] for row in findings["tokens"] if "T5" in row["encoder"]] == [8, 12]
    findings = in_json("--config", "run.yaml", "train.batch_size=14", "--size", "32", "--max-aspect", "3", "data.buckets=3")
    assert findings["steps_an_epoch"] == 1 and len(findings["buckets"]) == 3
    assert in_json(pictures, "--config", "run.yaml")["pictures"] == 4  # the path instead of the configuration's sources


def test_what_is_held_out_for_validation_is_not_drawn(in_json, run, pictures):
    findings = in_json(pictures, "validation.held_out=2", "train.batch_size=2")
    assert findings["used"] == 4 and findings["held_out"] == 2 and findings["steps_an_epoch"] == 1
    assert "leaves none to train on" in run(pictures, "--json", "validation.held_out=4").stderr


def test_a_preset_has_its_own_size(in_json, pictures):
    (row,) = in_json(pictures, "model.preset=small")["buckets"]
    assert (row["width"], row["height"]) == (512, 512)  # 128 latents of the tiny model's factor 4


def test_shards_and_parquet_are_checked_too(in_json, run, tmp_path):
    with tarfile.open(tmp_path / "part.tar", "w") as tar:
        for i in range(5):
            for suffix, data in (("png", png(i)), ("txt", f"picture {i}".encode())):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    rows = {"image": [{"bytes": png(i), "path": f"{i}.png"} for i in (0, 1, 1)], "text": ["a", "b", "c"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "part.parquet")
    assert in_json("part.tar")["used"] == 5 and in_json(f"file://{tmp_path}/part.tar")["used"] == 5
    table = in_json("part.parquet")
    assert table["used"] == 3 and len(table["exact_duplicates"]) == 1
    assert run("part.tar", "--pictures", 3).exit_code == 0 and (tmp_path / "data-check.html").read_text("utf-8").count("<figure>") == 3


def test_bad_input_is_one_line(refused, pictures, tmp_path):
    assert "nothing to check: give a path" in refused()
    assert "there is no folder 'nowhere'" in refused("nowhere")
    assert "one path at a time" in refused(pictures, pictures)
    assert "data.size 33 is not a multiple of 8; the nearest are 32 and 40" in refused(pictures, "--size", "33x32")
    assert "no size" in refused(pictures, "--size", "big")
    assert "there are no 50 shapes" in refused(pictures, "--buckets", 50)
    assert "data.buckets" in refused(pictures, "--buckets", 0)
    assert "did you mean 'max_crop'" in refused(pictures, "data.maxcrop=0.3")
    assert "no preset 'smal'" in refused(pictures, "model.preset=smal")
    assert "--pictures 0 must be at least 1" in refused(pictures, "--pictures", 0)
    assert "nowhere.yaml" in refused("--config", "nowhere.yaml")
    assert "--model nowhere does not exist" in refused(pictures, "--model", "nowhere")
    assert not list(tmp_path.glob("*.html*"))


def test_data_alone_explains_itself():
    answer = CliRunner().invoke(app, ["data"])
    assert answer.exit_code == 0 and "check" in answer.stdout
    assert "data check pictures" in CliRunner().invoke(app, ["data", "check", "--help"]).stdout


# What is not ours


BAD = "x\x1b[31mRED\x1b]0;TITLE\x07 [bold]:smile: \u202egnp"


def test_nothing_in_names_or_captions_reaches_the_terminal_as_a_command(run, pictures, tmp_path):
    (pictures / f"{BAD}.png").write_bytes(png(9))
    (pictures / f"{BAD}2.png").write_bytes(b"no picture")
    (pictures / f"{BAD}2.txt").write_text("y")
    (pictures / "1.txt").write_text(f"caption {BAD} " * 9)
    answer = run(pictures)
    assert answer.exit_code == 0, answer.output
    assert all(line.isprintable() for line in (answer.stdout + answer.stderr).split("\n"))
    told = "".join(answer.stdout.split())
    assert r"x\x1b[31mRED\x1b]0;TITLE\x07[bold]:smile:\u202egnp.png" in told and "captionwithcontrolcharacters" in told
    assert all(line.isprintable() for line in run(tmp_path / BAD).stderr.split("\n"))
    assert all(line.isprintable() for line in run(pictures, "--out", tmp_path / BAD / "page.html").stderr.split("\n"))


def test_a_page_that_may_not_be_written_is_one_line_after_the_tables(run, pictures, tmp_path, monkeypatch):
    def refuse(path, *arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)  # even of what is not there
    answer = run(pictures)
    assert answer.exit_code == 2 and "4 of 4 pictures" in answer.stdout
    (line,) = answer.stderr.splitlines()
    assert "could not write data-check.html: Read-only file system" in line and line.endswith("or give another place as --out")


def test_all_pictures_are_counted_those_without_a_caption_too(in_json, pictures, run):
    (pictures / "2.txt").unlink()
    (pictures / "1.png").write_bytes(b"no picture")
    findings = in_json(pictures)
    assert (findings["used"], findings["pictures"], findings["dropped"]) == (2, 4, 2)
    assert "2 of 4 pictures of" in run(pictures).stdout


def test_what_is_only_said_is_no_loss(in_json, run, pictures):
    (pictures / "0.txt").write_text("cafÃ©")
    (pictures / "again").symlink_to(".")
    findings = in_json(pictures, "data.t5_lengths={16: 1}")
    assert findings["dropped"] == 0 and findings["problems"] == [] and [len(row["names"]) for row in findings["remarks"]] == [1, 1]
    assert run(pictures, "--strict", "--json", "data.t5_lengths={16: 1}").exit_code == 0
    shown = "".join(run(pictures).stdout.split())
    assert "decodedwrongly" in shown and "folderthatisthereunderanothernametoo" in shown
