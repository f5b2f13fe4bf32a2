"""What a run wrote down, read as what it may have become."""

import json
import os
import random
import sys

import pytest
from PIL import Image

from latentfm.files import read_json
from latentfm.training.records import json_lines as rows
from latentfm.training.records.json_lines import keep_rows, rows_of
from latentfm.training.records.progress import Progress
from latentfm.training.records.run_log import RunLog
from latentfm.training.records.run_page import RunPage
from latentfm.training.records.sample_files import cells_of, settings_of, write_step

ROWS = [{"step": step, "loss": 1.0, "seconds": float(step)} for step in (1, 2, 3)]


def written(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


# Rows

ODD = [
    b'{"step":"x"}\n', b"[1]\n", b"5\n", b'{"step": 1e400}\n', b'{"step": -1}\n', b'{"step": true}\n', b'{"loss": 1}\n', b"\xff\xfe\n",
    b"[" * 9999 + b"\n",
    b'{"step": 1.5}\n', b'{"step": 1' + b"0" * 500 + b"}\n", b'{"step": NaN}\n', b"\x00\n", b'{"a": "' + b"x" * 2**21 + b'"}\n',
]  # fmt: skip


@pytest.mark.parametrize("line", ODD, ids=range(len(ODD)))
def test_lines_that_are_no_rows_are_set_aside_and_said(tmp_path, line, capsys):
    path, told = written(tmp_path / "metrics.jsonl", ROWS[0], line, *ROWS[1:], b'{"step": 4, "lo'), []
    assert keep_rows(path, told.append, 2) == [ROWS[1]]
    assert rows_of(path) == ROWS[:2]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes().endswith(line[-2**20:]) and len(told) == 1
    assert "cannot be read as rows; they are in metrics.jsonl.damaged now" in told[0]
    assert keep_rows(path, told.append) == [ROWS[1]] and len(told) == 1


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe", "a folder"])
def test_what_is_no_file_is_set_aside_whole(tmp_path, make):
    for name in ("metrics.jsonl", "validation.jsonl", "events.jsonl", "run.json", "config.json"):
        make(tmp_path / name)
    records = RunLog(tmp_path, True)
    records.open(3, {"train": {}}, {"epochs": 1}, [])
    records.metrics({"step": 4})
    assert rows_of(tmp_path / "metrics.jsonl")[0]["step"] == 4 and read_json(tmp_path / "run.json")["epochs"] == 1
    assert {path.name for path in tmp_path.glob("*.damaged")} >= {"metrics.jsonl.damaged", "run.json.damaged"}


def test_a_link_to_nowhere_and_a_disk_that_does_not_answer_stop_nothing(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "nowhere")
    told = []
    assert keep_rows(tmp_path / "metrics.jsonl", told.append) == [] and "cannot be read now" in told[0]
    path = written(tmp_path / "validation.jsonl", *ROWS)

    def fails(path):
        yield b'{"step": 1}\n'
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(rows, "lines_of", fails)
    assert keep_rows(path, told.append) == [] and "Input/output error" in told[1]
    monkeypatch.undo()
    assert rows_of(path) == ROWS and not list(tmp_path.glob("*.damaged")) and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("text", ["{", "[1]", "", "\x00\xff", '{"started": 5}', '{"started": ["\\u001b"]}', "[" * 100_000])
def test_a_damaged_description_is_set_aside_and_the_run_goes_on(tmp_path, text, capsys):
    (tmp_path / "run.json").write_text(text, "utf-8")
    written(tmp_path / "metrics.jsonl", {"step": 1, "seconds": "x"})
    records = RunLog(tmp_path, True)
    records.open(1, {}, {"epochs": 2}, [])
    assert records.before == 0.0 and isinstance(read_json(tmp_path / "run.json")["started"], str)
    said, aside = capsys.readouterr().out, (tmp_path / "run.json.damaged").exists()
    assert aside != text.startswith('{"started') and ("is now called run.json.damaged" in said) == aside and "\x1b" not in said


def test_a_validation_without_its_loss_is_made_again(tmp_path):
    written(tmp_path / "validation.jsonl", {"step": 2}, {"step": 2, "validation_loss": "x"}, {"step": 3, "validation_loss": 0.5})
    records = RunLog(tmp_path, True)
    assert records.validated(2) is None and records.validated(3)["validation_loss"] == 0.5 and records.validated(4) is None


def test_a_page_that_cannot_be_made_ends_no_run(tmp_path, monkeypatch, capsys):
    records = RunLog(tmp_path, True)

    def fails(self):
        raise KeyError("loss")

    monkeypatch.setattr(RunPage, "write", fails)
    records.page(now=True)
    assert "warning: no run page" in capsys.readouterr().out


# The samples


def small(folder, step, prompts=("a", "b")):
    return write_step(folder, step, [Image.new("RGB", (8, 8), (step, 9, 9)) for _ in prompts], list(prompts), {"seed": 1})


def with_settings(path, text):
    from PIL import PngImagePlugin

    with Image.open(path) as image:
        image.load()
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt("latentfm", text, zip=len(text) > 10_000)
    image.save(path, pnginfo=chunk)


SETTINGS = ["[1]", "5", '"x"', "{}", '{"prompts": 5}', '{"prompts": []}', '{"prompts": [1]}', '{"prompts": {"a": 1}}', "{", "[" * 100_000]


@pytest.mark.parametrize("text", SETTINGS, ids=range(len(SETTINGS)))
def test_a_picture_with_odd_settings_is_left_out(tmp_path, text):
    for step in (1, 2):
        small(tmp_path / "samples", step)
    odd = tmp_path / "samples" / "step-00000002.png"
    with_settings(odd, text)
    assert settings_of(odd) is None
    small(tmp_path / "samples", 3)
    page = RunPage(tmp_path)
    assert [step["step"] for step in page.data()["pictures"]["steps"]] == [1, 3] and page.write().is_file()


@pytest.mark.parametrize("which", ["cells", "picture"])
@pytest.mark.parametrize("what", ["cut", "noise", "empty", "pipe", "folder", "large"])
def test_pictures_that_are_damaged_are_left_out(tmp_path, which, what):
    for step in (1, 2, 3):
        small(tmp_path / "samples", step)
    path = tmp_path / "samples" / "step-00000003.png"
    path = cells_of(path) if which == "cells" else path
    data = path.read_bytes()
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "large":
        Image.new("1", (12_000, 12_000)).save(path, format="PNG")
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "noise": os.urandom(300), "empty": b""}[what])
    small(tmp_path / "samples", 4)
    assert [step["step"] for step in RunPage(tmp_path).data()["pictures"]["steps"]] in ([1, 2, 4], [1, 2, 3, 4])


# Seeded mutations of everything the page and a resumed run read


def mutated(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        place, kind = rng.randrange(len(data) + 1), rng.randrange(4)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place : place + rng.randint(1, 30)]
        elif kind == 2:
            data[place:place] = rng.choice([b'"', b"{", b"[", b"null", b"1e999", b"-", b"\n", b"\\ud800", b"\xff", b"9" * 400])
        else:
            other = rng.randrange(len(data) + 1)
            data[place:place] = data[min(place, other) : max(place, other)]
    return bytes(data)


def whole_run(folder):
    written(folder / "metrics.jsonl", *[row | {"loss_by_t": [0.5, None], "count_by_t": [2, 0], "images_per_second": 3.0} for row in ROWS])
    written(folder / "validation.jsonl", *[{"step": 1, "validation_loss": 0.5, "stderr": 0.1, "by_t": {"0.06": 0.5}}] * 2)
    written(folder / "events.jsonl", {"step": 0, "time": "2026-01-01T00:00:00+00:00", "what": "started"})
    written(folder / "config.json", {"train": {"steps": 9, "batch_size": 2}, "data": {"folder": "a"}})
    written(folder / "run.json", {"started": "2026-01-01T00:00:00+00:00", "epochs": 3.5, "pictures": 4, "versions": {"torch": "2"}})
    for step in (1, 2):
        small(folder / "samples", step)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "validation.jsonl", "events.jsonl", "config.json", "run.json", "samples/step-00000002.png",
             "samples/cells/step-00000002.webp"],
)  # fmt: skip
def test_a_run_goes_on_over_whatever_became_of_its_files(tmp_path, name, capsys):
    whole_run(tmp_path)
    data, rng = (tmp_path / name).read_bytes(), random.Random(name)
    for _ in range(60):
        (tmp_path / name).write_bytes(mutated(data, rng))
        page = RunPage(tmp_path).write().read_text("utf-8")
        assert page.count("</script>") >= 1 and "\x1b" not in page
        if "samples" in name:
            small(tmp_path / "samples", 3)
            continue
        records = RunLog(tmp_path, True)
        records.open(2, {"train": {"steps": 9}}, {"epochs": 1}, [])
        assert records.validated(1) is None or records.validated(1)["validation_loss"] is not None
        records.metrics({"step": 3})
        assert rows_of(tmp_path / "metrics.jsonl")[-1]["step"] == 3
    assert "\x1b" not in capsys.readouterr().out


def test_plain_progress_goes_to_its_end(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    progress = Progress(True)
    with progress:
        task = progress.add_task("caching", 5)
        for _ in range(5):
            progress.advance(task, 1)
    assert capsys.readouterr().out.splitlines() == ["caching: 1 of 5", "caching: 5 of 5"]
