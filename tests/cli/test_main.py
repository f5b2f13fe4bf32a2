"""The front door: what the TAB key adds, and what an exit code says."""

import pytest
import torch
from typer.testing import CliRunner

from latentfm.cli.checks import chosen_dtype
from latentfm.cli.main import app
from latentfm.errors import Failure, InputError


def completed(*words):
    """What the TAB key adds after the last of `words`, as a shell asks for it."""
    asked = {"_LATENTFM_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("latentfm", *words)), "COMP_CWORD": str(len(words))}
    return CliRunner().invoke(app, [], env=asked, prog_name="latentfm").stdout.split()


@pytest.mark.parametrize(
    ("words", "answers"),
    [
        (("gen",), ["generate"]),
        (("generate", "--sched"), ["--schedule"]),
        (("generate", "--schedule", "ka"), ["karras"]),
        (("generate", "--solver", "euler,he"), ["euler,heun"]),
        (("train", "train.weight_d"), ["train.weight_decay="]),
        (("train", "train.optimizer=adamw8"), ["train.optimizer=adamw8bit"]),
        (("cache", "data.onl"), ["data.online="]),
        (("train", "nothing.like=th"), []),
        (("plan", "--preset", "sd3.5-l"), ["sd3.5-large"]),
    ],
)
def test_the_shell_completes(words, answers):
    assert completed(*words) == answers


@pytest.mark.parametrize(
    ("name", "device", "multiplies", "chosen"),
    [
        ("auto", "cpu", True, "bfloat16"), ("auto", "cpu", False, "float32"), ("auto", "cuda", False, "bfloat16"),
        ("float16", "cpu", True, "float16"), ("float32", "cpu", True, "float32"),
    ],
)  # fmt: skip
def test_the_dtype_is_the_fast_one_unless_another_is_asked_for(monkeypatch, name, device, multiplies, chosen):
    monkeypatch.setattr("latentfm.training.precision.has_bfloat16", lambda _: multiplies)
    assert chosen_dtype(name, torch.device(device)) == chosen


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("no such folder"), 2, "error: no such folder"),
        (Failure("the disk is full"), 1, "error: the disk is full"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_exit_code_tells_wrong_input_from_failed_work(monkeypatch, error, code, said):
    def train(*_):
        raise error

    monkeypatch.setattr("latentfm.training.trainer.train", train)
    result = CliRunner().invoke(app, ["train", "data.folder=pictures", "output.folder=run"])
    assert (result.exit_code, result.stderr, result.stdout) == (code, said + "\n", "")
