"""The page of a run: what it shows of the log, that nothing in it is markup, and that a browser draws it without a complaint."""

import json
import math
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from faults import files_no_larger_than
from PIL import Image

from latentfm.config import load_config
from latentfm.errors import InputError
from latentfm.training.records.curves import BLOCK, POINTS, Log, curves, parsed
from latentfm.training.records.run_page import LARGEST, RunPage
from latentfm.training.records.sample_files import write_step

NASTY = "</script><script>window.hurt = 1</script><!-- <b>&amp;\u2028 ' \" `"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def row(step, **more):
    return {
        "step": step, "loss": 1 + 1 / step, "learning_rate": 1e-4, "gradient_norm": 0.5, "images_per_second": 20.0, "seconds": 2.0 * step,
        "memory_gib": 1.5, "loss_by_t": [None, 0.5, *[1.0] * 6], "count_by_t": [0, 4, *[2] * 6], **more,
    }  # fmt: skip


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def data_of(page):
    """The data in a page, found as a browser does."""

    class Reader(HTMLParser):
        found, inside = "", False

        def handle_starttag(self, tag, attributes):
            self.inside = ("id", "data") in attributes

        def handle_endtag(self, tag):
            self.inside = False

        def handle_data(self, data):
            self.found += data if self.inside else ""

    reader = Reader()
    reader.feed(page.read_text("utf-8"))
    return json.loads(reader.found, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.fixture
def finished(tmp_path):
    """A run of 40 steps of 50 with everything a run writes, and texts that would hurt as markup."""
    folder = tmp_path / "my run"
    write_rows(folder / "metrics.jsonl", [row(step) for step in range(1, 41)])
    held_out = [{"step": step, "validation_loss": 2 - step / 40, "by_t": {"0.25": 1.0, "0.75": 2.0}, "stderr": 0.1} for step in (0, 20, 40)]
    write_rows(folder / "validation.jsonl", held_out)
    events = [{"step": 0, "time": "2026-01-01T00:00:00", "what": "started"}, {"step": 9, "time": 1e9, "what": NASTY}]
    write_rows(folder / "events.jsonl", events)
    config = load_config(None, ["data.folder=pictures", "output.folder=runs/a", "train.steps=50", "train.batch_size=8"])
    config = config.model_copy(update={"sample": config.sample.model_copy(update={"prompts": [NASTY, "two"]})})
    (folder / "config.json").write_text(config.model_dump_json(), "utf-8")
    facts = {"devices": NASTY, "processes": 2, "parameters": 10**9, "pictures": 100, "epochs": 4.0, "versions": {"torch": "2.15"}}
    (folder / "run.json").write_text(json.dumps(facts), "utf-8")
    for step in (0, 20, 40):
        write_step(folder / "samples", step, [Image.new("RGB", (32, 16), (step, 90 * i, 90)) for i in range(2)], [NASTY, "two"], {})
    return folder


# What is shown


def test_it_shows_all_that_the_run_wrote(finished):
    page = RunPage(finished).write()
    assert page == finished / "run.html" and [p.name for p in finished.glob("*partial*")] == []
    data = data_of(page)
    assert data["name"] == "my run" and data["notes"] == []
    state = data["state"]
    assert (state["step"], state["steps"], state["seconds"], state["seconds_a_step"], state["left"]) == (40, 50, 80.0, 2.0, 20.0)
    assert not state["finished"] and not state["stopped"] and data["epochs"] == pytest.approx(3.2)
    assert data["curves"]["step"] == list(range(1, 41))
    assert data["curves"]["loss"]["mean"] == pytest.approx([1 + 1 / step for step in range(1, 41)], rel=1e-4)
    assert data["curves"]["by_t"]["mean"][0] == [None] * 40 and data["curves"]["by_t"]["mean"][1] == [0.5] * 40
    assert data["validation"] == {
        "step": [0, 20, 40], "loss": [2, 1.5, 1], "stderr": [0.1] * 3, "by_t": {"0.25": [1.0] * 3, "0.75": [2.0] * 3},
    }  # fmt: skip
    assert [step["step"] for step in data["pictures"]["steps"]] == [0, 20, 40]
    assert data["pictures"]["prompts"] == [NASTY, "two"] and data["pictures"]["tile"] == [32, 16]
    assert [event["what"] for event in data["events"]] == ["started", NASTY]
    assert data["facts"]["devices"] == NASTY


def test_options_that_differ_from_the_defaults_are_told(finished):
    options = {option["name"]: option for option in data_of(RunPage(finished).write())["options"]}
    changed = {name for name, option in options.items() if option["changed"]}
    assert changed == {"data.folder", "output.folder", "train.steps", "train.batch_size", "sample.prompts"}
    assert options["train.steps"]["value"] == "50" and options["train.steps"]["default"] == "1000"
    assert options["train.betas"]["value"] == "[0.9, 0.99]" and "meaning" not in options["train.learning_rate"]
    assert "optimizer steps" in options["train.steps"]["meaning"]


def test_what_was_chosen_for_an_option_is_not_shown_as_given(finished):
    recorded = {"config.json": {"train": {"mixed_precision": "bf16"}}, "run.json": {"chosen": {"train.mixed_precision": "auto"}}}
    for name, more in recorded.items():
        file = finished / name
        said = json.loads(file.read_text("utf-8"))
        file.write_text(json.dumps(said | {key: said.get(key, {}) | value for key, value in more.items()}), "utf-8")
    data = data_of(RunPage(finished).write())
    option = next(option for option in data["options"] if option["name"] == "train.mixed_precision")
    assert option["value"] == "bf16 (auto)" and not option["changed"] and "chosen" not in data["facts"]


def test_states(finished):
    (finished / "model").mkdir()
    assert not data_of(RunPage(finished).write())["state"]["finished"]  # of an earlier run: the last step is not reached
    write_rows(finished / "metrics.jsonl", [row(step) for step in range(1, 51)])
    assert data_of(RunPage(finished).write())["state"]["finished"]
    write_rows(finished / "events.jsonl", [{"step": 50, "time": 0, "what": "stopped by a signal, saved"}])
    assert data_of(RunPage(finished).write())["state"]["stopped"]


@pytest.mark.parametrize("left", [[], ["metrics.jsonl"], ["validation.jsonl"], ["config.json", "run.json"], ["samples"]], ids=str)
def test_any_part_may_be_absent(finished, left):
    for path in list(finished.iterdir()):
        if path.name not in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    data = data_of(RunPage(finished).write())
    assert bool(data["curves"]["step"]) == ("metrics.jsonl" in left) and bool(data["options"]) == ("config.json" in left)


def test_rows_of_other_versions_and_damaged_ones(tmp_path):
    """Lines cut, fields missing, of other kinds or not finite: what can be shown is, what cannot is counted."""
    rows = [
        row(1), {"step": 2, "loss": 0.5}, {"step": 3, "loss": None, "loss_by_t": [1.0, 2.0]}, {"step": 4, "loss": "high", "loss_by_t": "?"},
        {"step": 5, "loss": math.nan, "gradient_norm": math.inf}, {"loss": 1.0}, {"step": 2, "loss": 0.25}, {"step": None},
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows) + '[1]\n{"step": 6, "lo\n\n{"step": 7, "loss": 3.5}\n{"step": 8, "loss": 9'
    (tmp_path / "metrics.jsonl").write_text(text, "utf-8")
    write_rows(tmp_path / "validation.jsonl", [{"step": 1}, {"validation_loss": 1}, {"step": 2, "by_t": {"x": 1, "0.5": "y"}}])
    (tmp_path / "config.json").write_text('{"train": {"steps": "many", "fun": 1}, "odd": 3, "model": {"pipeline": NaN}}', "utf-8")
    (tmp_path / "run.json").write_text("[]", "utf-8")
    data = data_of(RunPage(tmp_path).write())
    assert data["curves"]["step"] == [1, 2, 3, 4, 5, 7]
    assert data["curves"]["loss"]["mean"] == [2, 0.25, None, None, None, 3.5]  # of two rows of a step the later
    assert [column[2] for column in data["curves"]["by_t"]["mean"]] == [1.0, 2.0, *[None] * 6]
    assert data["notes"] == ["2 rows of metrics.jsonl are damaged and not shown"]
    assert data["validation"]["loss"] == [None, None] and data["state"]["steps"] is None
    assert {o["name"]: o["changed"] for o in data["options"]} == {"train.steps": True, "train.fun": True, "model.pipeline": False}


# Long runs


def test_a_long_curve_is_few_points_and_loses_no_spike(tmp_path):
    rng = np.random.default_rng(0)
    losses = 1 + 0.1 * rng.random(20_000)
    losses[[7, 12_345]], losses[15_000] = (99.0, 123.0), -5.0
    norms = [None if step % 3 else float(step) for step in range(20_000)]
    write_rows(tmp_path / "metrics.jsonl", [row(i + 1, loss=losses[i], gradient_norm=norms[i]) for i in range(20_000)])
    found = curves(Log(tmp_path / "metrics.jsonl").read())
    loss = found["loss"]
    assert len(found["step"]) == POINTS and 2 * POINTS <= 1500 and found["step"][-1] == 20_000
    assert {99.0, 123.0} <= set(loss["high"]) and -5.0 in loss["low"]
    assert loss["high"][np.searchsorted(found["step"], 12_346)] == 123.0  # where it was
    edges = [0, *found["step"]]
    wanted = [losses[first:stop].mean() for first, stop in zip(edges[:-1], edges[1:], strict=True)]
    assert loss["mean"] == pytest.approx(wanted, rel=1e-4)
    assert None not in found["gradient_norm"]["mean"] and found["gradient_norm"]["high"][-1] == 19_998
    assert found["by_t"]["count"][1] == pytest.approx([4 * (b - a) for a, b in zip(edges[:-1], edges[1:], strict=True)])


def test_the_mean_by_t_weighs_samples_not_steps(tmp_path):
    rows = [row(i + 1, loss_by_t=[1.0 if i % 2 else 4.0], count_by_t=[3 if i % 2 else 1]) for i in range(2 * POINTS)]
    write_rows(tmp_path / "metrics.jsonl", rows)
    assert set(curves(Log(tmp_path / "metrics.jsonl").read())["by_t"]["mean"][0]) == {1.75}


def test_the_log_is_read_on_where_it_ended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(row(step)) + "\n" for step in range(1, 61)]
    log = Log(path)
    assert log.read()["step"].tolist() == []
    for upto in (1, 2, 30, 60):
        path.write_text("".join(lines[:upto])[:-5], "utf-8")  # the last line is still being written
        assert log.read()["step"].tolist() == list(range(1, upto))
        path.write_text("".join(lines[:upto]), "utf-8")
        assert log.read()["step"].tolist() == list(range(1, upto + 1)) and log.damaged == 0
    assert log.read()["loss_by_t"].shape == (60, 8)
    path.write_text("".join(lines[:20]), "utf-8")  # a run that went back to a checkpoint
    assert log.read()["step"].tolist() == list(range(1, 21))
    (tmp_path / "new").write_text("".join(lines[:10] + [json.dumps(row(step, loss=7.0)) + "\n" for step in range(11, 31)]), "utf-8")
    (tmp_path / "new").rename(path)  # and has gone on since
    assert log.read()["step"].tolist() == list(range(1, 31)) and log.read()["loss"][10:].tolist() == [7.0] * 20 and log.damaged == 0
    path.write_text("".join(lines[:20]) + '{"step": 21, "loss_by_t": [1, 2, 3, 4, 5, 6, 7, 8, 9]}\n', "utf-8")
    assert log.read()["loss_by_t"].shape == (21, 9) and np.isnan(log.read()["loss_by_t"][:20, 8]).all()


def test_one_bad_line_does_not_hide_its_neighbours():
    assert parsed([b'{"a": 1}', b'{"b": 2', b'{"c": 3}', b"", b"7"]) == ([{"a": 1}, {"c": 3}], 2)
    assert parsed([b"1},{", b'{"a": 1}']) == ([{"a": 1}], 1)
    assert parsed([]) == ([], 0)


def test_a_hundred_thousand_rows_take_well_under_a_second(tmp_path):
    line = json.dumps(row(1000))[len('{"step": 1000') :]
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}{line}\n' for step in range(1, 100_001)), "utf-8")
    assert (tmp_path / "metrics.jsonl").stat().st_size > 2 * BLOCK
    page = RunPage(tmp_path)
    began = time.process_time()
    page.write()
    first = time.process_time() - began
    page.write()
    assert first < 3 and time.process_time() - began - first < 0.5  # 0.7 s and 0.02 s on a quiet machine
    assert data_of(tmp_path / "run.html")["state"]["rows"] == 100_000
    assert (tmp_path / "run.html").stat().st_size < 10**6


# Pictures


def test_pictures_are_bounded_and_of_the_latest_prompts(tmp_path):
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (192, 192, 3), dtype=np.uint8)) for _ in range(16)]  # no picture is larger as a file
    prompts = [f"prompt {i}" for i in range(18)]
    write_step(tmp_path / "samples", 0, noise[:1], ["another"], {})
    for step in range(10, 60, 10):
        write_step(tmp_path / "samples", step, [*noise, *noise[:2]], prompts, {"seed": 1})
    cells = tmp_path / "samples" / "cells"
    for step in range(60, 500, 10):  # forty more without drawing them anew
        for kind, folder in (("png", cells.parent), ("webp", cells)):
            shutil.copy(folder / f"step-00000050.{kind}", folder / f"step-{step:08d}.{kind}")
    page = RunPage(tmp_path).write()
    pictures = data_of(page)["pictures"]
    assert sum(len(step["src"]) for step in pictures["steps"]) <= LARGEST * 1.01 and page.stat().st_size < LARGEST + 10**6
    assert pictures["steps"][0]["step"] == 10 and pictures["steps"][-1]["step"] == 490 and pictures["total"] == 49
    assert len(pictures["prompts"]) == 16 and pictures["hidden"] == 2 and pictures["tile"] == [192, 192]


def test_grids_of_runs_that_kept_no_small_pictures(tmp_path):
    (tmp_path / "samples").mkdir()
    for step in range(0, 2000, 100):
        Image.new("RGB", (1200, 600), (0, step // 10, 0)).save(tmp_path / "samples" / f"step-{step:08d}.png")
    (tmp_path / "samples" / "step-00001900.png").write_bytes(b"cut")
    pictures = data_of(RunPage(tmp_path).write())["pictures"]
    assert pictures["prompts"] == ["all prompts"] and pictures["tile"] == [800, 400]
    assert 2 <= len(pictures["steps"]) <= 8 and pictures["steps"][0]["step"] == 0


# The file


def test_nothing_in_it_is_markup_and_nothing_is_fetched(finished):
    (finished / "metrics.jsonl").write_text(json.dumps(row(1)) + "\n", "utf-8")
    text = RunPage(finished).write().read_text("utf-8")
    assert "window.hurt" in text and not re.search(r"<script>\s*window.hurt", text)
    assert "\u2028" not in text and text.count("<script") == text.count("</script>") == 2
    assert not re.search(r"(src|href)=[\"']?https?:|@import|url\(http", text)
    assert re.search(r"default-src 'none'; img-src data:", text)
    named = finished.parent / "<b>{{data}}&"
    shutil.copytree(finished, named)
    assert "<title>&lt;b&gt;{{data}}&amp; - latentfm</title>" in RunPage(named).write().read_text("utf-8")


def test_a_full_disk_leaves_the_page_before(finished):
    before = RunPage(finished).write().read_bytes()
    with files_no_larger_than(2000), pytest.raises(InputError, match="could not write .*run.html"):
        RunPage(finished).write()
    assert (finished / "run.html").read_bytes() == before


HANDS = """<script>
const click = thing => thing.dispatchEvent(new MouseEvent("click", { bubbles: true }));
const at = (kind, x) => { const svg = document.querySelector("svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent(kind, { clientX: box.left + x, clientY: box.top + 40, pointerId: 1 })); };
at("pointermove", 200); at("pointerdown", 200); at("pointermove", 320); at("pointerup", 320);
const zoomed = [...document.querySelectorAll("svg text")].map(text => text.textContent);
click($("log")); click($("theme")); click($("unzoom")); click(document.querySelector(".picture"));
const label = document.querySelector("input[aria-label]"); label.value = 0; label.dispatchEvent(new Event("input"));
const said = document.createElement("pre");
const count = what => document.querySelectorAll(what).length;
said.textContent = JSON.stringify({ film: count(".film figure"), first: count("button.picture.step0"),
  zoomed: !zoomed.includes("40"), log: logarithmic, theme: document.documentElement.dataset.theme });
document.body.append(said);
</script></body>"""


def seen_by_a_browser(page, profile):
    """The page's HTML after its scripts have run. Fails when one of them complains."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom", "--virtual-time-budget=2000",
         f"--user-data-dir={profile}", page.as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_draws_it(finished, tmp_path):
    seen = seen_by_a_browser(RunPage(finished).write(), tmp_path / "profile")
    assert 'data-ready="8"' in seen and seen.count("<svg") == 8
    assert "step 40 of 50 (80 %)" in seen and "20 s left" in seen
    assert seen.count('class="picture step2"') == 2
    shown = seen.split('<main id="main">')[1].split("application/json")[0]
    assert "NaN" not in shown and "undefined" not in shown
    assert "&lt;/script&gt;&lt;script&gt;window.hurt" in shown and "<script>window.hurt" not in shown


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_draws_a_run_that_has_not_begun(tmp_path):
    seen = seen_by_a_browser(RunPage(tmp_path).write(), tmp_path / "profile")
    assert 'data-ready="0"' in seen and "No step has been logged yet." in seen


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_the_controls_work(finished, tmp_path):
    page = RunPage(finished).write()
    page.write_text(page.read_text("utf-8").replace("</body>", HANDS), "utf-8")
    said = json.loads(seen_by_a_browser(page, tmp_path / "profile").split("<pre>")[1].split("</pre>")[0])
    assert said == {"film": 3, "first": 3, "zoomed": True, "log": True, "theme": "light"}
