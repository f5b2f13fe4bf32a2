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


def test_a_model_is_drawn_as_its_folder_says_unless_something_else_is_asked(run, saved, tmp_path):
    from latentfm.pictures import read_settings

    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "latentfm_manifest.txt").unlink()
    info = json.loads((folder / "latentfm.json").read_text())
    (folder / "latentfm.json").write_text(json.dumps(info | {"steps": 2, "guidance": 1.5}))
    for words, wanted in (([], (2, 1.5)), (["--steps", "1"], (1, 1.5)), (["--guidance", "3"], (2, 3.0))):
        answer = run("generate", "a red apple", "--model", folder, "--device", "cpu", "--out", "out", *words)
        assert answer.exit_code == 0, answer.stderr
        settings = read_settings(answer.stdout.split()[-1])
        assert (settings["steps"], settings["guidance"]) == wanted
    again = run("generate", "--like", answer.stdout.split()[-1], "--steps", "1", "--device", "cpu", "--out", "again")
    settings = read_settings(again.stdout.split()[-1])
    assert (settings["steps"], settings["guidance"]) == (1, 3.0)
    (folder / "latentfm.json").write_text(json.dumps(info | {"steps": 2, "guidance": 1.5, "distilled_guidance": 3.0}))
    answer = run("generate", "a red apple", "--model", folder, "--device", "cpu", "--out", "distilled")
    settings = read_settings(answer.stdout.split()[-1])
    assert (settings["steps"], settings["guidance"]) == (2, 1.0)


@pytest.mark.parametrize("said", [
    {"distilled_guidance": "three"}, {"steps": 0}, {"steps": True}, {"steps": 10**6}, {"guidance": -1}, {"guidance": "2"},
])  # fmt: skip
def test_an_odd_word_on_how_to_draw_is_damage(run, saved, tmp_path, said):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "latentfm_manifest.txt").unlink()
    (folder / "latentfm.json").write_text(json.dumps({"format": 1, **said}))
    answer = run("generate", "a red apple", "--model", folder, "--device", "cpu")
    assert answer.exit_code == 2 and next(iter(said)) in answer.stderr
