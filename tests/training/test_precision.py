"""train.mixed_precision=auto is what the device has."""

import os

import pytest
import torch

from latentfm.config import load_config
from latentfm.planning.run import with_precision
from latentfm.training import loop, precision, trainer
from latentfm.training.precision import compute_dtype, has_bfloat16


def configured(*overrides):
    return load_config(None, ["data.folder=a", "output.folder=b", *overrides])


def test_auto_is_bfloat16_where_the_device_has_it_and_float32_elsewhere():
    for bfloat16, word, dtype in ((True, "bf16", torch.bfloat16), (False, "no", torch.float32)):
        found = with_precision(configured(), bfloat16)
        assert found.train.mixed_precision == word and compute_dtype(found.train) == dtype
        assert found == configured(f"train.mixed_precision={word}")


@pytest.mark.parametrize("word", ["no", "bf16"])
def test_what_is_asked_for_stays(word):
    for bfloat16 in (True, False):
        assert with_precision(configured(f"train.mixed_precision={word}"), bfloat16).train.mixed_precision == word


def test_a_cpu_has_it_where_its_products_are_no_slower():
    """An imitation takes 5 to 100 times as long as float32 there."""
    from time import perf_counter

    def seconds(dtype):
        x, weight = torch.randn(256, 512).to(dtype), torch.randn(512, 512).to(dtype)
        torch.nn.functional.linear(x, weight)
        times = []
        for _ in range(5):
            began = perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(perf_counter() - began)
        return min(times)

    assert has_bfloat16(torch.device("cpu")) == (seconds(torch.bfloat16) < 2.5 * seconds(torch.float32))


def test_a_run_says_when_its_precision_is_imitated(tmp_path, run, start, monkeypatch, capsys):
    for has, word, warned in ((False, "bf16", True), (False, "auto", False), (True, "bf16", False)):
        for module in (precision, trainer, loop):
            monkeypatch.setattr(module, "has_bfloat16", lambda device, has=has: has)
        out = run(tmp_path / f"{has} {word}", "train.steps=1", f"train.mixed_precision={word}")
        assert ("imitates it" in capsys.readouterr().out) == warned
        assert out.is_dir()


def test_a_deterministic_run_takes_kernels_that_repeat_themselves_and_leaves_the_process_as_it_was(tmp_path, start, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is gone afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    trainer = start(tmp_path, "train.deterministic=true", "train.steps=1")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    asked, train_step = [], trainer.train_step
    trainer.train_step = lambda batches: asked.append(torch.are_deterministic_algorithms_enabled()) or train_step(batches)
    trainer.train()
    assert asked == [True] and not torch.are_deterministic_algorithms_enabled()
