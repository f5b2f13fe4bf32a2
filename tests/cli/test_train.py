"""`latentfm train` from the command line: a whole small run, the table of options, and one clear line for bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import latentfm
from latentfm.cli.main import app
from latentfm.cli.terminal import tell_result
from latentfm.config import RunConfig
from latentfm.training.stop import Stopped

ROOT = Path(latentfm.__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def this_process_stays_as_it_is():
    """The command silences libraries, and Accelerate keeps one configuration a process."""
    import diffusers
    import transformers
    from accelerate.state import AcceleratorState, GradientState

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    for library, verbosity in zip(libraries, before, strict=True):
        library.set_verbosity(verbosity)
        library.enable_progress_bar()


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, caption in enumerate(("a red apple", "a blue car", "two green trees")):
        Image.fromarray(np.full((32, 32, 3), 60 * index, np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption)
    return folder


@pytest.fixture
def arguments(pictures, tmp_path, tiny_folder):
    """A run of two steps into tmp_path/run."""
    return [
        f"data.folder={pictures}", f"data.cache={tmp_path / 'cache'}", f"model.pipeline={tiny_folder}", f"output.folder={tmp_path / 'run'}",
        "train.steps=2", "train.batch_size=2", "data.t5_lengths={8: 1}", "data.workers=0", "sample.steps=1", "train.mixed_precision=no",
    ]  # fmt: skip


def command(*words):
    environment = {name: value for name, value in os.environ.items() if name != "LATENTFM_DEBUG"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "latentfm", "train", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=300,
    )


def refused(*words):
    """The one line with which the command refuses `words`, in this process."""
    answer = CliRunner().invoke(app, ["train", *map(str, words)])
    assert answer.exit_code == 2, answer.output
    lines = answer.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), answer.stderr
    return lines[0]


def test_a_run_prints_its_result_on_stdout_and_resumes(arguments, tmp_path):
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "run" / "model")
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert (tmp_path / "run" / "model" / "model_index.json").exists()
    assert "already holds a run" in refused(*arguments)
    assert CliRunner().invoke(app, ["train", *arguments, "--resume"]).exit_code == 0


def test_a_configuration_and_overrides_make_the_run(arguments, tmp_path):
    (tmp_path / "run.yaml").write_text("train: {steps: 1, warmup_steps: 0, learning_rate: 1e-5}\n")
    later = [argument for argument in arguments if argument != "train.steps=2"]
    assert CliRunner().invoke(app, ["train", "--config", str(tmp_path / "run.yaml"), *later]).exit_code == 0
    (row,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["learning_rate"] == 1e-5


def test_options_lists_every_option_with_its_default(tmp_path):
    listed = CliRunner().invoke(app, ["train", "--options"])
    assert listed.exit_code == 0
    lines = listed.stdout.splitlines()
    expected = [(s, k, o) for s, field in RunConfig.model_fields.items() for k, o in field.annotation.model_fields.items()]
    assert len(lines) == len(expected)
    for line, (section, key, option) in zip(lines, expected, strict=True):
        default = "(required)" if option.is_required() else str(option.get_default(call_default_factory=True))
        assert line.startswith(f"{section}.{key} = {default}") and (option.description or "") in line


def test_bad_input_is_one_line_and_exit_code_2_from_a_shell(tmp_path):
    done = command(f"data.folder={tmp_path / 'nowhere'}", f"output.folder={tmp_path / 'run'}", "train.setps=3")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [line for line in done.stderr.splitlines() if line.startswith("error: unknown option 'train.setps'")]
    assert "did you mean 'steps'?" in done.stderr and not (tmp_path / "run").exists()


def test_what_is_wrong_with_the_pictures_is_said(arguments, tmp_path):
    assert "there is no folder" in refused(*arguments, f"data.folder={tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    assert "nothing to train on" in refused(*arguments, f"data.folder={tmp_path / 'empty'}")
    assert "no captions" in refused(*arguments, f"data.folder={uncaptioned(tmp_path)}")
    assert not (tmp_path / "run" / "checkpoints").exists()


def uncaptioned(tmp_path):
    (tmp_path / "uncaptioned").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "uncaptioned" / "a.png")
    return tmp_path / "uncaptioned"


def test_what_is_wrong_with_the_model_is_said(arguments, tmp_path, tiny_folder):
    assert "no such model folder" in refused(*arguments, f"model.pipeline={tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    assert "no model_index.json" in refused(*arguments, f"model.pipeline={tmp_path / 'empty'}")
    assert "no preset 'smal' (did you mean 'small'?)" in refused(*arguments, "model.preset=smal")
    for part in ("transformer", "vae", "text_encoder_2"):
        folder = tmp_path / f"pickled {part}"
        shutil.copytree(tiny_folder, folder)
        for weights in (folder / part).glob("*.safetensors"):
            weights.rename(weights.with_suffix(".bin"))
        line = refused(*arguments, f"model.pipeline={folder}")
        assert "is a pickle" in line and part in line and "Convert" in line
    missing = tmp_path / "missing"
    shutil.copytree(tiny_folder, missing)
    shutil.rmtree(missing / "vae")
    assert "has no vae/config.json" in refused(*arguments, f"model.pipeline={missing}")


def test_what_is_wrong_with_the_configuration_is_said(arguments, tmp_path):
    assert "nowhere.yaml" in refused(*arguments, "--config", tmp_path / "nowhere.yaml")
    assert "missing data" in refused("train.steps=3")
    assert "train.steps" in refused(*arguments, "train.steps=none")
    assert "multiple of 8" in refused(*arguments, "data.size=33")
    assert "nothing to resume" in refused(*arguments, "--resume")
    assert "No such option" in refused(*arguments, "--resum")


def test_a_dry_run_says_what_a_run_would_take_and_leaves_nothing(arguments, tmp_path):
    done = CliRunner().invoke(app, ["train", *arguments, "--dry-run"])
    assert done.exit_code == 0, done.output
    for part in (
        "* train.steps = 2   (default 1000)", "3 pictures, 3 captions", "32 x 32", "2 steps of 2 pictures", "1.333 epochs",
        "P(no condition) = 0.1000", "2 pictures a step = 1 process x 1 pass x 2 pictures", "every weight", "optimizer", "in all",
        "fits", str(tmp_path / "run" / "model"),
    ):  # fmt: skip
        assert part in done.stdout, part
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_dry_run_in_json_is_the_same_as_tables(arguments):
    done = CliRunner().invoke(app, ["train", *arguments, "--dry-run", "--json", "--gpu", "A100", "--gpus", "2", "--shard", "full"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["data"]["pictures"] == 3 and found["batch"]["processes"] == found["batch"]["processes a copy of the weights"] == 2
    assert found["memory"]["device"] == "A100" and found["time"]["hours"] > 0


def test_a_dry_run_refuses_what_a_run_would(arguments, tmp_path):
    line = refused(*arguments, "data.size=33", "train.blocks=7", "--dry-run")
    assert "2 things are wrong" in line and "data.size 33" in line and "train.blocks '7'" in line
    assert "2 does not divide by 3 processes" in refused(*arguments, "--dry-run", "--gpus", "3")
    assert "--gpu goes with --dry-run" in refused(*arguments, "--gpu", "h100")
    assert "--json goes with --dry-run" in refused(*arguments, "--json")
    assert "did you mean 'h100'" in refused(*arguments, "--dry-run", "--gpu", "h10")
    assert "--shard 'ful' does not exist" in refused(*arguments, "--dry-run", "--shard", "ful")
    assert "--gpus 0 must be at least 1" in refused(*arguments, "--dry-run", "--gpus", "0")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_speaks_once_over_all_processes(arguments, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, spoken in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        done = CliRunner().invoke(app, ["train", *arguments, "--dry-run"])
        assert done.exit_code == 0 and bool(done.stdout) is spoken


def test_a_result_is_told_once_over_all_processes(monkeypatch, capsys):
    def stopped():
        raise Stopped("stopped, go on with --resume")

    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        tell_result(lambda: Path("run/model"))
        assert capsys.readouterr() == (("run/model\n", "finished: run/model\n") if said else ("", ""))
        tell_result(stopped, "the same command")
        assert capsys.readouterr() == ("", "stopped, go on with the same command\n" * said)


@pytest.mark.parametrize("where", ["output.folder", "data.cache"])
def test_a_place_that_cannot_be_written_is_named(arguments, tmp_path, where):
    (tmp_path / "file").write_text("")
    line = refused(*arguments, f"{where}={tmp_path / 'file' / 'deeper'}")
    assert str(tmp_path / "file") in line


def test_a_dry_run_shows_names_as_they_are(arguments, pictures, tmp_path):
    name = "x\x1b[31mRED\x1b]0;TITLE\x07 [bold][red]:smile:"
    (pictures / f"{name}.png").write_bytes((pictures / "0.png").read_bytes())
    (pictures / f"{name}2.png").write_bytes(b"no picture")
    (pictures / f"{name}2.txt").write_text("y")
    moved = pictures.rename(tmp_path / "[bold][red]:smile:")
    answer = CliRunner().invoke(app, ["train", *arguments, f"data.folder={moved}", f"output.folder={moved}-run", "--dry-run"])
    assert answer.exit_code == 0, answer.output
    assert all(line.isprintable() for line in answer.output.split("\n"))
    assert answer.output.count(r"x\x1b[31mRED\x1b]0;TITLE\x07 [bold][red]:smile:") == 2
    assert f"Data {moved}: 3 pictures" in answer.output and f"run page: {moved}-run" in answer.output
def test_a_stream_outlives_its_reader():
    from latentfm.cli.terminal import Steady

    read, write = os.pipe()
    stream = Steady(open(write, "w", encoding="utf-8"))  # noqa: SIM115
    os.close(read)
    for _ in range(2):
        assert stream.write("a line\n") == 7
        stream.flush()
    assert stream.lost and not stream.isatty()
    stream.close()


def test_no_memory_is_one_line(monkeypatch):
    def no_memory(*given):
        raise MemoryError

    monkeypatch.setattr("latentfm.config.load_config", no_memory)
    result = CliRunner().invoke(app, ["train", "data.folder=a"])
    assert result.exit_code == 1
    assert result.stderr == "error: out of memory (nothing is left); ask for less at once, or close other programs\n"
