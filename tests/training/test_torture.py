"""A training killed again and again is the training left alone; tests/torture.py does the same at more moments."""

import json
import random
import shutil

import pytest


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    import torture

    return torture


def test_a_run_killed_at_random_moments_is_the_run_left_alone(script, tmp_path):
    told = []
    torture = script.Torture(tmp_path, random.Random(3), told.append, steps=38)
    torture.prepare()
    torture.one_process(["cache", "save", "step", "validation", "pictures", "rename", "step"])
    assert not torture.failed, "\n".join(told)
    kills = [line for line in told if line.endswith("exact")]
    assert len(kills) == 8 and "38 steps" in kills[-1], "\n".join(told)  # none of the moments was missed
    can_fail(script, torture, tmp_path)


def can_fail(script, torture, folder):
    """Each comparison notices the smallest difference."""
    for damage in (one_loss, one_weight, one_pixel):
        out = folder / damage.__name__
        shutil.copytree(folder / "killed", out)
        assert torture.differing(out, 0.0) is None and script.differing_files(out, torture.reference) is None
        damage(out)
        assert torture.differing(out, 0.0) or script.differing_files(out, torture.reference)


def one_loss(out):
    path = out / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[20]["loss"] += 1e-12
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def one_weight(out):
    """The state of the last step under the name of another would be whole, but not what that step had."""
    older, newer = sorted((out / "checkpoints").iterdir())[-2:]
    for name in ("state.safetensors", "state.json"):
        shutil.copy(older / name, newer / name)


def one_pixel(out):
    path = out / "samples" / "step-00000009.png"
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DDP", "FSDP2", "mixed"])
def test_a_run_killed_goes_on_with_two_and_four_processes(script, tmp_path, name):
    told = []
    torture = script.Torture(tmp_path, random.Random(0), told.append, script.STEPS_OF_A_CHAIN)
    torture.prepare()
    torture.chain(name)
    assert not torture.failed and len(told) == 4, "\n".join(told)
