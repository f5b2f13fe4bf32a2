"""`latentfm verify`, and --verify of the other commands."""

import shutil
from pathlib import Path

import pytest

from latentfm import LatentFMPipeline
from latentfm.models.manifest import MANIFEST


@pytest.fixture
def refused(run):
    """A function that runs a command which must fail in one line, and returns that line."""

    def said(*args):
        result = run(*args)
        assert result.exit_code == 2 and not result.stdout and len(result.stderr.splitlines()) == 1, result.output
        return result.stderr

    return said


@pytest.fixture(scope="module")
def saved(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    LatentFMPipeline.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, run):
    """A saved model, called model in the current folder, to spoil."""
    return Path(shutil.copytree(saved, "model"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def test_a_whole_folder_is_said_to_be_so(run, model):
    result = run("verify", "model")
    assert result.exit_code == 0 and "bytes, all as they were saved" in result.stdout and " files, " in result.stdout


def test_a_flipped_byte_is_found_by_every_command_that_is_asked(run, refused, tmp_path, saved):
    model = shutil.copytree(saved, tmp_path / "model")
    flip(model / "text_encoder_2" / "model.safetensors")
    says = "model is not what was saved there: text_encoder_2/model.safetensors has other bytes"
    for command in (
        ("verify", model), ("generate", "a", "--model", model, "--steps", 1, "--seed", 1, "--verify"),
        ("convert", model, "x.safetensors", "--verify"), ("convert", saved, "x.safetensors", "--pipeline", model, "--verify"),
    ):  # fmt: skip
        assert says in refused(*command), command
    assert run("generate", "a", "--model", model, "--steps", 1, "--seed", 1).exit_code == 0
    assert not (tmp_path / "x.safetensors").exists()


def test_a_change_on_purpose_is_taken_as_it_is(run, refused, model):
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("1.0", "3.25"))
    drawing = ("generate", "a", "--model", "model", "--steps", 1, "--seed", 1)
    for command in (drawing, ("plan", "--model", "model"), ("verify", "model"), ("convert", "model", "x.safetensors")):
        said = refused(*command)
        assert "scheduler/scheduler_config.json" in said and "on purpose, take it as it is now: latentfm verify --renew model" in said
    result = run("verify", "--renew", "model")
    assert result.exit_code == 0 and f"model/{MANIFEST}: " in result.stdout and "as they are now" in result.stdout
    assert run("verify", "model").exit_code == run(*drawing, "--verify").exit_code == 0


def test_a_folder_from_elsewhere_gets_a_manifest_when_asked(run, refused, tiny_folder):
    shutil.copytree(tiny_folder, "stock")
    assert "has no latentfm_manifest.txt" in refused("verify", "stock")
    assert "has no latentfm_manifest.txt" in refused("generate", "a", "--model", "stock", "--verify")
    assert run("verify", "--renew", "stock").exit_code == 0 == run("generate", "a", "--model", "stock", "--steps", 1, "--verify").exit_code


def test_what_is_no_model_is_refused(refused, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    assert "is no model's or adapter's folder" in refused("verify", "--renew", "pictures")
    assert "is a file; give its folder" in refused("verify", "pictures/a.png")
    assert "does not exist" in refused("verify", "nowhere")
    assert "--verify does nothing here: pictures/a.png is a single file" in refused("convert", "pictures/a.png", "x", "--verify")
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["a.png"]
