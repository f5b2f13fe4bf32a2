"""`latentfm reflow`: what it refuses before anything is loaded; what it trains is in tests/training/test_reflow.py."""

import json
import shutil

import pytest


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red apple\na blue car\n")
    return file


def test_what_is_needed_is_said(run, prompts):
    for words, said in (
        ([], "--prompts-file is needed"),
        (["--prompts-file", prompts], "--out is needed"),
        (["--prompts-file", prompts, "--out", "fast", "--rounds", "0"], "--rounds 0"),
        (["--prompts-file", prompts, "--out", "fast", "--rounds", "-1", "--one-step"], "--rounds -1"),
        (["--prompts-file", "nowhere.txt", "--out", "fast"], "nowhere.txt"),
        (["--prompts-file", prompts, "--out", "fast", "--pairs", "0"], "data.pairs.count"),
        (["--prompts-file", prompts, "--out", "fast", "data.flip=true"], "data.pairs stand for pictures"),
        (["--prompts-file", prompts, "--out", "fast", "--model", "nowhere"], "nowhere"),
    ):
        answer = run("reflow", *words)
        assert answer.exit_code == 2 and said in answer.stderr and answer.stderr.count("\n") == 1, answer.stderr


def test_a_model_with_guidance_in_its_weights_is_drawn_at_1_unless_more_is_asked(run, saved, tmp_path):
    from latentfm.pictures import read_settings

    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "latentfm_manifest.txt").unlink()
    info = json.loads((folder / "latentfm.json").read_text())
    (folder / "latentfm.json").write_text(json.dumps(info | {"distilled_guidance": 3.0}))
    for model, words, guidance in ((folder, [], 1.0), (saved, [], 3.0), (folder, ["--guidance", "2"], 2.0)):
        answer = run("generate", "a red apple", "--steps", "1", "--model", model, "--device", "cpu", "--out", "out", *words)
        assert answer.exit_code == 0, answer.stderr
        assert read_settings(answer.stdout.split()[-1])["guidance"] == guidance
    again = run("generate", "--like", answer.stdout.split()[-1], "--device", "cpu", "--out", "again")
    assert read_settings(again.stdout.split()[-1])["guidance"] == 2.0  # as the picture was made


def test_an_odd_word_on_guidance_is_damage(run, saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "latentfm_manifest.txt").unlink()
    (folder / "latentfm.json").write_text(json.dumps({"format": 1, "distilled_guidance": "three"}))
    answer = run("generate", "a red apple", "--model", folder, "--device", "cpu")
    assert answer.exit_code == 2 and "distilled_guidance" in answer.stderr
