"""`latentfm train-vae` from the command line: its options, what it would take, and a run."""

import json

import numpy as np
import pytest
from diffusers import AutoencoderKL
from PIL import Image

TINY = [
    "data.size=16", "data.workers=0", "model.widths=[8, 16]", "model.norm_groups=4", "model.layers=1", "model.latent_channels=4",
    "train.steps=2", "train.batch_size=2", "train.mixed_precision=no", "output.trackers=[]",
]  # fmt: skip


@pytest.fixture
def arguments(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)).save(folder / f"{number}.png")
    return ["train-vae", f"data.folder={folder}", f"data.cache={tmp_path / 'cache'}", f"output.folder={tmp_path / 'run'}", *TINY]


def test_options_are_listed(run):
    done = run("train-vae", "--options")
    assert done.exit_code == 0, done.stderr
    assert "loss.l1 = 1.0    absolute difference" in done.stdout and "output.folder = (required)" in done.stdout
    assert "train.adapter" not in done.stdout and "sample.prompts" not in done.stdout


def test_a_run_and_its_end(run, arguments, tmp_path):
    dry = run(*arguments, "--dry-run", "--json")
    assert dry.exit_code == 0, dry.stderr
    assert json.loads(dry.stdout)["pictures"] == 4 and not (tmp_path / "run").exists()
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "run" / "model")
    assert AutoencoderKL.from_pretrained(tmp_path / "run" / "model").config.latent_channels == 4
    again = run(*arguments)
    assert again.exit_code == 2 and "already holds a run" in again.stderr
    more = run(*arguments, "--resume")
    assert more.exit_code == 0 and "is finished already" in more.stdout


def test_bad_input_is_one_line(run, arguments):
    done = run(*arguments, "loss.l3=1")
    assert done.exit_code == 2 and done.stderr.startswith("error: unknown option 'loss.l3'") and done.stderr.count("\n") == 1
