"""The tab of trainings: what may be named, how runs stand, what is sent of them, and one that is started, stopped and gone on with."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from latentfm.cli.main import app
from latentfm.errors import InputError
from latentfm.training.checkpoint.claim import claimed, holder
from latentfm.training.records.run_page import RECORDS
from latentfm.web.training import runs
from latentfm.web.training.runs import ADAPTER, DEFAULTS, EVERY_WEIGHT, LOG, Runs, Wanted, command, configured

gradio = pytest.importorskip("gradio")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TRICKS = (
    "../first", "..", ".", "", "/etc", "first/../first", "first/checkpoints", "first\n", "first\x00", "fir\u202est",
    "\uff0e\uff0e\uff0ffirst", "first\u2215checkpoints", "~", "-x", "$(x)", "a" * 65, " first", "first ", "first.", None, 7,
    ["first"], {"first": 1},
)  # fmt: skip


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def row(step):
    return json.dumps({"step": step, "loss": 1 / step, "learning_rate": 1e-4, "images_per_second": 8.0, "seconds": 2.0 * step}) + "\n"


def a_run(folder, steps=4, latest="started"):
    """A folder with the records of a run that got so far of ten steps."""
    write(folder / "metrics.jsonl", "".join(map(row, range(1, steps + 1))))
    write(folder / "events.jsonl", json.dumps({"step": 0, "what": "started"}) + "\n" + json.dumps({"step": steps, "what": latest}) + "\n")
    write(folder / "config.json", json.dumps({"train": {"steps": 10, "batch_size": 4}}))
    return folder


@pytest.fixture
def data(tmp_path):
    """pictures/ with the folders cats and more/dogs, a hidden one, one without pictures and a link out of it."""
    for name in ("pictures/cats", "pictures/more/dogs", "pictures/.hidden", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        for number, caption in enumerate(("a red apple", "a blue car", "two green trees")):
            Image.fromarray(np.full((32, 32, 3), 60 * number, np.uint8)).save(tmp_path / name / f"{number}.png")
            write(tmp_path / name / f"{number}.txt", caption)
    write(tmp_path / "pictures/texts/a.txt", "no picture")
    (tmp_path / "pictures/link").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "pictures"


@pytest.fixture
def known(tmp_path, data, tiny_folder, monkeypatch):
    """Runs in tmp_path/runs, on the pictures of `data`, by a configuration that trains the tiny model."""
    write(tmp_path / "tiny.yaml", f"""
model: {{pipeline: "{tiny_folder}"}}
data: {{folder: pictures, cache: "{tmp_path / 'cache'}", t5_lengths: {{8: 1}}, workers: 0}}
train: {{steps: 20, batch_size: 2, warmup_steps: 1, mixed_precision: "no", decay: constant}}
sample: {{every: 20, steps: 2}}
output: {{folder: run, checkpoint_every: 1000, trackers: []}}
""")  # fmt: skip
    write(tmp_path / "sources.yaml", "data: {sources: [{path: x}]}\noutput: {folder: run}\n")
    write(tmp_path / "another.yaml", "loss: {l1: 1}\n")
    monkeypatch.setattr(
        runs, "bundled_configurations", lambda: {name: tmp_path / name for name in ("another.yaml", "sources.yaml", "tiny.yaml")}
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Runs(tmp_path / "runs", data)


# What may be named


def test_runs_are_folders_with_records_the_latest_first(known):
    assert known.names() == []
    for age, name in enumerate(("old", "new run", "grün")):
        os.utime(a_run(known.folder / name) / "config.json", (1e9 + age, 1e9 + age))
    write(known.folder / "notes" / "a.txt", "no run")
    (known.folder / "link").symlink_to(known.folder / "old")
    write(known.folder / "begins" / LOG, "")
    assert known.names() == ["begins", "grün", "new run", "old"]
    assert known.place("grün") == known.folder / "grün"


@pytest.mark.parametrize("name", TRICKS, ids=repr)
def test_no_name_leads_out_of_the_folders(known, name):
    a_run(known.folder / "first")
    for act in (known.place, known.look, known.stop, known.resume):
        with pytest.raises(InputError, match="there is no run"):
            act(name)
    with pytest.raises(InputError, match="should be a plain one"):
        known.words(Wanted("cats", "tiny.yaml", name))
    for wanted in (Wanted(name, "tiny.yaml", "a"), Wanted("cats", name, "a")):
        with pytest.raises(InputError, match="there is no (folder of pictures|configuration)"):
            known.words(wanted)


def test_a_link_in_the_place_of_a_run_is_not_written_through(known, tmp_path):
    (tmp_path / "away").mkdir()
    known.folder.mkdir()
    (known.folder / "linked").symlink_to(tmp_path / "away")
    with pytest.raises(InputError, match="is a link to elsewhere"):
        known.start(Wanted("cats", "tiny.yaml", "linked"))
    (known.folder / "own").mkdir()
    (known.folder / "own" / LOG).symlink_to(tmp_path / "away" / "log")
    with pytest.raises(OSError, match="symbolic links"):
        known.start(Wanted("cats", "tiny.yaml", "own"))
    assert list((tmp_path / "away").iterdir()) == [] and known.processes == {}


def test_folders_of_pictures_are_those_that_hold_some(known, data):
    assert known.pictures() == {"cats": data / "cats", "more/dogs": data / "more" / "dogs"}
    assert Runs(known.folder).pictures() == {}
    assert list(known.configurations()) == ["tiny.yaml", DEFAULTS]


def test_the_configurations_that_come_with_the_package_are_offered_quickstart_first(tmp_path):
    found = Runs(tmp_path).configurations()
    assert next(iter(found)) == "quickstart.yaml" and "sd3-medium-lora.yaml" in found and "scratch-256.yaml" not in found


@pytest.mark.parametrize(
    "words, said",
    [("--data pictures", "--data pictures goes with --runs"), ("--runs nowhere", "--runs nowhere is no folder"),
     ("--runs runs --data nowhere", "--data nowhere is no folder"), ("--runs tiny.yaml --data pictures", "tiny.yaml is a file"),
     ("--runs runs --data pictures --trainings 0", "--trainings 0 must be at least 1")],
)  # fmt: skip
def test_the_command_says_which_folder_is_wrong(known, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(app, ["app", *words.split()])
    assert answer.exit_code == 2 and said in answer.stderr and len(answer.stderr.splitlines()) == 1


# What is asked for


@pytest.mark.parametrize(
    "asked, adapter",
    [({}, None), ({"trains": EVERY_WEIGHT}, None), ({"trains": ADAPTER, "rank": 3}, 3), ({"trains": ADAPTER}, 16)],
    ids=str,
)  # fmt: skip
def test_the_command_line_makes_what_is_asked_for(known, data, asked, adapter):
    words = known.words(Wanted("more/dogs", "tiny.yaml", "my run", steps=7.0, learning_rate=3e-4, **asked))
    assert shlex.split(command(words)) == ["latentfm", "train", *words]
    config = configured(words)
    assert (config.data.folder, config.output.folder) == (str(data / "more" / "dogs"), str(known.folder / "my run"))
    assert (config.train.steps, config.train.learning_rate, config.train.batch_size) == (7, 3e-4, 2)
    assert (config.train.adapter and config.train.adapter.rank) == adapter
    assert configured(known.words(Wanted("cats", DEFAULTS, "a"))).train.steps == 1000


@pytest.mark.parametrize(
    "asked, said",
    [({"trains": "adapter", "rank": 4}, "trains should be 'every weight' or 'an adapter', got 'adapter'"), ({"trains": ""}, "got ''"),
     ({"trains": ["an adapter"]}, "trains should be"), ({"trains": EVERY_WEIGHT, "rank": 4}, "rank 4 is an adapter's"),
     ({"rank": 4}, "rank 4 is an adapter's: give trains 'an adapter' too")],
)  # fmt: skip
def test_what_trains_is_one_of_two_and_a_rank_is_an_adapters(known, asked, said):
    with pytest.raises(InputError, match=said):
        known.words(Wanted("cats", "tiny.yaml", "a", **asked))


@pytest.mark.parametrize("value", ["5", "5 output.folder=/x", True, [5], float("nan"), float("inf"), -1, 0, 2.5, 1e300], ids=repr)
def test_what_is_no_number_of_steps_is_refused(known, value):
    with pytest.raises(InputError, match="train.steps"):
        known.check(Wanted("cats", "tiny.yaml", "a", steps=value))


def test_the_check_says_what_the_dry_run_of_the_command_line_says(known, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    words, found, text = known.check(Wanted("cats", "tiny.yaml", "a", steps=4))
    done = CliRunner().invoke(app, ["train", *words, "--dry-run"])
    assert done.exit_code == 0 and found["steps"]["steps"] == 4
    steady, told = ([line for line in lines.splitlines() if " GiB" not in line] for lines in (text, done.stdout))  # what is free changes
    assert steady == told and len(told) > 30
    assert not known.folder.exists()
    with pytest.raises(InputError) as refused:
        known.check(Wanted("cats", "tiny.yaml", "a", trains=ADAPTER, rank=0))
    done = CliRunner().invoke(app, ["train", *words, "train.adapter.rank=0", "--dry-run"])
    assert done.stderr == f"error: {refused.value}\n"


# How a run stands


CLAIMING = "import sys, pathlib; from latentfm.training.checkpoint.claim import claimed\n" \
    "with claimed(pathlib.Path(sys.argv[1])): print('claimed', flush=True); sys.stdin.read()"  # fmt: skip


@pytest.fixture
def other_process():
    """A function that starts a process which has the claim on a folder."""
    started = []

    def start(folder):
        started.append(subprocess.Popen([sys.executable, "-c", CLAIMING, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "claimed\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_who_holds_a_folder_is_known_without_taking_it(tmp_path, other_process):
    assert holder(tmp_path) == 0
    process = other_process(tmp_path)
    assert holder(tmp_path) == process.pid
    with pytest.raises(InputError, match=f"process {process.pid} "), claimed(tmp_path):  # it is still theirs
        pass
    (tmp_path / "running.lock").write_text("process 1 on another machine")
    assert holder(tmp_path) == -1
    process.kill()
    process.wait()
    assert (tmp_path / "running.lock").exists() and holder(tmp_path) == 0


@pytest.mark.parametrize("latest, word", [("started", "died"), ("stopped by a signal, saved", "stopped"), ("ended: no room", "failed")])
def test_states_of_a_run(known, other_process, latest, word):
    folder = a_run(known.folder / "first", latest=latest)
    look = known.look("first")
    assert (look.run["state"]["word"], look.running, look.resumable) == (word, False, False)
    (folder / "checkpoints").mkdir()
    assert known.look("first").resumable
    process = other_process(folder)
    look = known.look("first")
    assert (look.run["state"]["word"], look.running, look.resumable) == ("training", True, False)
    known.stop("first")
    assert process.wait(10) == -signal.SIGTERM
    with pytest.raises(InputError, match="is not training"):
        known.stop("first")
    (folder / "model").mkdir()
    write(folder / "metrics.jsonl", "".join(map(row, range(1, 11))))
    look = known.look("first")
    assert (look.run["state"]["word"], look.resumable) == ("finished", False)


def test_a_run_of_another_machine_is_left_alone(known, other_process):
    folder = a_run(known.folder / "first")
    other_process(folder)
    (folder / "running.lock").write_text("process 1 on another machine")
    with pytest.raises(InputError, match="another machine"):
        known.stop("first")


def test_a_training_waits_for_the_one_before(known, other_process):
    other_process(a_run(known.folder / "first"))
    with pytest.raises(InputError, match="first is training; 1 training at a time may run here"):
        known.start(Wanted("cats", "tiny.yaml", "second"))
    assert known.names() == ["first"]


def test_what_cannot_go_on_says_so(known):
    write(known.folder / "first" / LOG, "error: no such model folder\n")
    look = known.look("first")
    assert look.run["state"]["word"] == "not begun" and look.run["notes"] == ["error: no such model folder"]
    with pytest.raises(InputError, match="was not begun"):
        known.resume("first")


def test_only_what_is_new_is_read_and_sent(known, monkeypatch):
    from latentfm.training.records.curves import Log
    from latentfm.web.training.tab import news

    folder, reads, read = a_run(known.folder / "first"), [], Log.read
    monkeypatch.setattr(Log, "read", lambda log: reads.append(log) or read(log))
    *first, seen = news(known, None, {})
    assert first[1]["value"]["curves"]["step"] == [1, 2, 3, 4] and "pictures" in first[1] and len(reads) == 1
    assert all(update == gradio.skip() for update in news(known, "first", seen)) and len(reads) == 1
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("no row\n" + row(5) + row(6)[:20])  # damaged, whole, and still being written
    run, frame, log, stop, resume, after = news(known, "first", seen)
    assert frame["value"]["curves"]["step"] == [1, 2, 3, 4, 5] and "pictures" not in frame and len(reads) == 2
    assert frame["value"]["notes"] == ["1 row of metrics.jsonl is damaged and not shown"]
    assert run == log == stop == resume == gradio.skip() and after != seen
    a_run(known.folder / "second")
    run, frame, *_ = news(known, "first", after)
    assert [name for _, name in run.choices] == ["second", "first"] and run.value == "first" and frame == gradio.skip()
    _, frame, *_ = news(known, "second", after)
    assert frame["value"]["name"] == "second" and "pictures" in frame


@pytest.mark.parametrize("name", [*RECORDS, LOG, "samples", "running.lock"])
@pytest.mark.parametrize("content", [b"\xff\x00{[", b"{}" * 40, b"[" * 100_000, None], ids=["bytes", "objects", "deep", "folder"])
def test_damaged_records_do_no_harm(known, name, content):
    folder = a_run(known.folder / "first")
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)
    look = known.look("first")
    assert json.loads(json.dumps(look.run, allow_nan=False)) == look.run and look.run["state"]["word"]


def test_the_log_is_read_from_its_end_and_obeyed_by_nobody(known):
    folder = a_run(known.folder / "first")
    text = "warning: long ago\n$ latentfm train\n" + "warning: \x1b[31m<b>\n" * 3 + "10 %\r20 %\rstep 1\n"
    write(folder / LOG, text + "\u202ex" * 99_999)
    look = known.look("first")
    assert len(look.log) < 2**20 and "\x1b" not in look.log and "\u202e" not in look.log and "long ago" not in look.log
    write(folder / LOG, text)
    look = known.look("first")
    assert look.log.splitlines()[-1] == "step 1" and look.run["notes"] == ["warning: \\x1b[31m<b>"]


# A training


def wait_for(true, seconds=240):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


@pytest.fixture
def nothing_left_running(known, monkeypatch):
    """Whatever was started is ended with the test, whether or not it has come to claim its folder."""
    begun, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **more: begun.append(popen(*words, **more)) or begun[-1])
    yield
    for process in begun:
        process.kill()
        process.wait()


@pytest.fixture
def served_tab(serving, known):
    """The page with the tab, served."""
    from latentfm.web.training.tab import training_tab

    return serving(training=partial(training_tab, known.folder, known.data))


@pytest.mark.slow
def test_a_training_through_the_endpoints_of_the_page(served_tab, known, nothing_left_running):
    client = pytest.importorskip("gradio_client")
    program = client.Client(served_tab.url, verbose=False)

    def ask(what, *words, **more):
        return program.predict(*words, **more, api_name=f"/{what}")

    def refused(*words, **more):
        with pytest.raises(client.exceptions.AppError) as error:
            ask(*words, **more)
        return str(error.value)

    assert ask("training_choices") == {"pictures": ["cats", "more/dogs"], "configurations": ["tiny.yaml", DEFAULTS]}
    form = {"steps": 100_000, "learning_rate": 1e-3, "trains": EVERY_WEIGHT}
    words = command(known.words(Wanted("cats", "tiny.yaml", "first", **form)))
    answer = ask("check_training", "cats", "first", **form)
    assert answer["command"] == words and "100,000 steps of 2 pictures" in answer["text"] and ask("trainings") == []
    assert "should be a plain one" in refused("start_training", "cats", "../first", **form)
    assert ask("start_training", "cats", "first", **form)["command"] == words
    wait_for(lambda: ask("training", "first")["state"]["step"] >= 5)
    look = ask("training", "first")
    assert look["state"]["word"] == "training" and look["running"] and f"$ {words}" in look["log"] and len(look["curves"]["step"]) >= 5
    assert "may run here" in refused("start_training", "cats", "second", **form)
    assert ask("trainings") == [{"name": "first", "running": True}]
    ask("stop_training", "first")
    look = wait_for(lambda: not (look := ask("training", "first"))["running"] and look)
    assert look["state"]["word"] == "stopped" and look["resumable"] and "saved; go on with --resume" in look["log"]
    step = look["state"]["step"]
    ask("resume_training", "first")
    wait_for(lambda: known.look("first").run["state"]["step"] > step)  # by a server that did not start it
    look = known.look("first")
    assert look.run["state"]["word"] == "training" and f"resuming after step {step}" in look.log
    known.stop("first")
    wait_for(lambda: not known.look("first").running)


def test_without_a_folder_of_pictures_runs_are_only_followed(serving, known, tmp_path):
    from gradio_client import Client

    from latentfm.web.training.tab import training_tab

    a_run(known.folder / "first")
    program = Client(serving(training=partial(training_tab, known.folder)).url, verbose=False)
    assert program.predict("first", api_name="/training")["state"]["step"] == 4
    named = program.view_api(return_format="dict")["named_endpoints"]
    assert {"/trainings", "/training"} <= set(named) and not [name for name in named if name.endswith(("_training", "_choices"))]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_training_in_a_browser(served_tab, known, nothing_left_running, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    complaints = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(240_000)
        playwright.expect.set_options(timeout=60_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(served_tab.url)
        page.get_by_role("tab", name="Train").click()
        form = page.locator("#training-new")
        form.get_by_label("Pictures").click()
        page.get_by_role("option", name="more/dogs").click()
        form.get_by_label("Name").fill("../first")
        form.get_by_role("button", name="Check").click()
        page.locator("#training-answer", has_text="should be a plain one").wait_for()
        form.get_by_label("Name").fill("first")
        form.get_by_label("Steps").fill("100000")
        start = page.get_by_role("button", name="Start", exact=True)
        form.get_by_role("button", name="Check").click()
        page.locator("#training-answer pre", has_text="100,000 steps of 2 pictures").wait_for()
        playwright.expect(start).to_be_enabled()
        form.get_by_label("Steps").fill("90000")
        playwright.expect(start).to_be_disabled()  # that was not checked
        form.get_by_role("button", name="Check").click()
        playwright.expect(page.locator("#training-command textarea")).to_have_value(command(known.words(
            Wanted("more/dogs", "tiny.yaml", "first", 90_000, 1e-4)
        )))  # fmt: skip
        start.click()
        run = page.frame_locator("#training-frame iframe")
        run.locator("#state", has_text="training").wait_for()
        run.locator(".picture").first.wait_for()
        curve = run.locator("section", has=page.get_by_role("heading", name="Loss", exact=True)).locator("svg path[stroke-width='2']")
        drawn, seen = curve.get_attribute("d"), run.locator("#progress").text_content()
        playwright.expect(run.locator("#progress")).not_to_have_text(seen)
        playwright.expect(curve).not_to_have_attribute("d", drawn)
        page.get_by_role("tab", name="Draw").click()
        page.get_by_role("tab", name="Train").click()
        run.locator(".picture").first.wait_for()  # what is not new is there again too
        for scheme, width in SIZES:
            look_at(page, scheme, width, tmp_path / f"{scheme}-{width}.png")
        page.get_by_role("button", name="Stop").click()
        run.locator("#state", has_text="stopped").wait_for()
        playwright.expect(page.get_by_role("button", name="Resume")).to_be_enabled()
        browser.close()
    assert complaints == []


SIZES = [(scheme, width) for scheme in ("light", "dark") for width in (1280, 390)]


def look_at(page, scheme, width, path):
    """A picture of the page as it is in these colours and this width, in which nothing is wider than it."""
    page.set_viewport_size({"width": width, "height": 2600})
    page.evaluate(f"document.body.classList.toggle('dark', {'true' if scheme == 'dark' else 'false'})")
    run = page.frame_locator("#training-frame iframe").locator("html")
    run.locator(f"xpath=self::*[@data-theme='{scheme}']").wait_for()
    page.wait_for_timeout(500)
    page.screenshot(path=path)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert run.evaluate("page => page.scrollWidth <= page.clientWidth")
