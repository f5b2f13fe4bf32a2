"""`latentfm evaluate` on tiny models: its report, what it keeps, two models, two processes, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline

from latentfm.bundled import detector_folder
from latentfm.evaluation.geneval import TASKS
from latentfm.pictures import read_settings

PROMPTS = [
    {"tag": "single_object", "prompt": "a red apple", "include": [{"class": "apple", "count": 1, "color": "red"}]},
    {"tag": "two_object", "prompt": "a cat and a fish", "include": [{"class": "cat", "count": 1}, {"class": "fish", "count": 1}]},
    {"tag": "counting", "prompt": "two cars", "include": [{"class": "car", "count": 2}], "exclude": [{"class": "car", "count": 3}]},
    {"prompt": "the moon above a dark sea"},
]
FEW = ("--seeds", 3, "--steps", 2, "--device", "cpu")


@pytest.fixture
def prompts(tmp_path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in PROMPTS))
    return tmp_path / "prompts.jsonl"


@pytest.fixture
def real(tmp_path) -> Path:
    """Nine pictures with captions."""
    (tmp_path / "real").mkdir()
    for number in range(9):
        Image.new("RGB", (32, 32), (25 * number, 90, 255 - 25 * number)).save(tmp_path / "real" / f"{number}.png")
        (tmp_path / "real" / f"{number}.txt").write_text("a blue car\n")
    return tmp_path / "real"


@pytest.fixture
def evaluate(run, prompts):
    def report(*args, out="out", code=0):
        answer = run("evaluate", "--prompts", prompts, "--out", out, *FEW, *args)
        assert answer.exit_code == code, answer.output
        return json.loads((Path(out) / "report.json").read_text()) if code == 0 else answer.stderr

    return report


def test_each_model_is_drawn_at_its_own_guidance(evaluate, tiny_folder, tmp_path):
    fast = tiny_pipeline(tmp_path / "fast", seed=5)
    (fast / "latentfm.json").write_text(json.dumps({"format": 1, "distilled_guidance": 4.0, "steps": 4}))
    assert [model["told"]["guidance"] for model in evaluate(tiny_folder, "--against", fast)["models"]] == [3, 1]
    assert [model["told"]["guidance"] for model in evaluate(fast, "--guidance", 2, out="other")["models"]] == [2]


def test_a_report_of_everything(evaluate, tiny_folder, real, tmp_path):
    other = tiny_pipeline(tmp_path / "other", seed=5)
    report = evaluate(
        tiny_folder, "--detector", "emoji", "--real", real, "--held-out", real, "--against", other, "--sweep", "steps=1,2",
        "--sweep", "solver=euler,heun",
    )  # fmt: skip
    first, second = report["models"]
    assert set(first["figures"]) == {
        "overall", "single_object", "two_object", "counting", "diversity", "nearest", "copies", "fid", "precision", "recall", "density",
        "coverage", "mmd", "loss",
    }  # fmt: skip
    assert report["comparison"].keys() == first["figures"].keys() - {"loss"}
    within = [each for name, each in first["figures"].items() if name in (*TASKS, "overall", "loss")]
    assert all(each["low"] <= each["value"] <= each["high"] for each in within)
    assert len(first["pictures"]) == 12 and ["right" in row for row in first["pictures"]] == [True] * 9 + [False] * 3
    assert [row["seed"] for row in first["pictures"]] == list(range(12)) and report["seeds"] == [0, 11]
    assert [sweep["option"] for sweep in report["sweeps"]] == ["steps", "solver"] and report["sweeps"][0]["values"] == [1, 2]
    assert report["sweeps"][0]["figures"][1] == {name: value for name, value in first["figures"].items() if name != "loss"}
    assert report["sweeps"][0]["figures"][0] != report["sweeps"][0]["figures"][1]
    assert len(report["losses"]) == 2 and len(report["losses"][0]["figures"]) == 11
    kept = read_settings(Path("out") / first["pictures"][3]["file"])
    assert (kept["prompt"], kept["seed"], kept["steps"]) == ("a cat and a fish", 3, 2)
    page = Path("out/report.html").read_text()
    assert page.count("<svg") >= 20 and page.count("data:image/png") > 16 and "<script" not in page and "http" not in page


def test_what_is_there_is_not_drawn_again_and_what_is_damaged_is(evaluate, tiny_folder):
    first = evaluate(tiny_folder, "--detector", "emoji")
    paths = [Path("out") / row["file"] for row in first["models"][0]["pictures"]]
    before = [path.stat().st_mtime_ns for path in paths]
    pixels = Image.open(paths[1]).tobytes()
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:40])
    again = evaluate(tiny_folder, "--detector", "emoji")
    changed = [path.stat().st_mtime_ns != time for path, time in zip(paths, before, strict=True)]
    assert changed == [True, True] + [False] * 10 and again == first
    assert Image.open(paths[1]).tobytes() == pixels and len(list(paths[0].parent.iterdir())) == 12


def test_an_earlier_evaluation_is_compared_with_without_its_model(evaluate, tiny_folder, tmp_path):
    other = tiny_pipeline(tmp_path / "other", seed=5)
    evaluate(other, "--detector", "emoji", out="before")
    report = evaluate(tiny_folder, "--detector", "emoji", "--against", "before", out="after")
    both = evaluate(tiny_folder, "--detector", "emoji", "--against", other, out="both")
    assert report["comparison"] == both["comparison"]
    alone = evaluate(tiny_folder, "--detector", "emoji", "--against", tiny_folder, out="alone")
    assert all(each["p"] == 1 and each["value"] == 0 for each in alone["comparison"].values())


def test_an_earlier_evaluation_by_other_weights_of_the_detector_is_refused(evaluate, tiny_folder, tmp_path, monkeypatch):
    evaluate(tiny_folder, "--detector", "emoji", out="before")
    report = json.loads(Path("before/report.json").read_text())
    assert report["fingerprints"].keys() == {"detector", "space"}
    newer = shutil.copytree(detector_folder(), tmp_path / "newer")
    tensors = load_file(newer / "model.safetensors")
    tensors["classes.bias"] += 1e-3
    save_file(tensors, newer / "model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("latentfm.cli.evaluation.detector_folder", lambda: newer)
        told = " ".join(evaluate(tiny_folder, "--detector", "emoji", "--against", "before", out="after", code=2).split())
    assert "--against before was measured by a detector of other weights or settings than the present one of that name" in told
    assert "evaluate that model again with the same --out, which keeps its pictures" in told
    Path("before/report.json").write_text(json.dumps({name: each for name, each in report.items() if name != "fingerprints"}))
    told = " ".join(evaluate(tiny_folder, "--detector", "emoji", "--against", "before", out="after", code=2).split())
    assert "was measured by an earlier version of latentfm, and does not say by which detector's weights" in told
    evaluate(tiny_folder, "--detector", "emoji", out="before")  # the way out
    assert evaluate(tiny_folder, "--detector", "emoji", "--against", "before", out="after")["comparison"]["overall"]["p"] == 1


def test_an_earlier_evaluation_of_too_few_pictures_is_refused_beside_real_ones(evaluate, tiny_folder, real):
    evaluate(tiny_folder, "--detector", "emoji", "-n", 1, out="before")
    told = evaluate(tiny_folder, "--detector", "emoji", "--real", real, "--against", "before", out="after", code=2)
    assert "--against before has 4 pictures, too few to compare with --real; 12 are the least" in " ".join(told.split())


def test_two_processes_write_the_same_report(evaluate, tiny_folder, prompts, real):
    one = evaluate(tiny_folder, "--detector", "emoji", "--real", real, "--held-out", real, out="one")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", "localhost:0", "-m", "latentfm", "evaluate", tiny_folder, "--detector", "emoji", "--real", real, "--held-out",
        real, "--prompts", prompts, "--out", "two", *FEW,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    two = json.loads(Path("two/report.json").read_text())
    assert [row["file"] for row in one["models"][0]["pictures"]] == [row["file"] for row in two["models"][0]["pictures"]]
    for path in (row["file"] for row in two["models"][0]["pictures"]):
        assert Image.open(Path("one") / path).tobytes() == Image.open(Path("two") / path).tobytes()
    for name, figure in one["models"][0]["figures"].items():
        assert two["models"][0]["figures"][name] == pytest.approx(figure, rel=1e-4, abs=1e-6)
    assert "report.html" in done.stdout and done.stdout.count("report.html") == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere"], "MODEL nowhere does not exist"),
        (["TINY", "--real", "real"], "--real needs a space to compare pictures in"),
        (["TINY", "--clip", "nowhere"], "--clip nowhere does not exist"),
        (["TINY", "--features", "nowhere"], "--features nowhere does not exist"),
        (["TINY", "--detector", "emojy"], "--detector emojy is no folder"),
        (["TINY", "--sweep", "stepz=1"], "did you mean 'steps'"),
        (["TINY", "--sweep", "solver=euler,huen"], "--sweep solver 'huen' does not exist (did you mean 'heun'?)"),
        (["TINY", "--sweep", "steps=0"], "--sweep steps 0 must be at least 1"),
        (["TINY", "--against", "nowhere"], "--against nowhere does not exist"),
        (["TINY", "--threshold", "1.5"], "--threshold 1.5 is no score"),
        (["TINY", "--guidance-rule", "autoguidance"], "needs a weaker model"),
        (["TINY", "--seeds", "0"], "--seeds 0 must be at least 1"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(run, tiny_folder, prompts, real, args, said):
    answer = run("evaluate", *[tiny_folder if each == "TINY" else each for each in args], "--prompts", prompts, "--out", "out")
    assert answer.exit_code == 2 and said in answer.stderr and not Path("out").exists()


def test_prompts_are_needed_for_a_model_of_other_art(run, tiny_folder):
    assert "--prompts FILE is needed" in run("evaluate", tiny_folder).stderr


def test_a_class_that_the_detector_does_not_know_is_told_early(run, tiny_folder, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a zebra", "tag": "single_object", "include": [{"class": "kat"}]}\n')
    answer = run("evaluate", tiny_folder, "--prompts", tmp_path / "p.jsonl", "--detector", "emoji", "--out", "out")
    assert answer.exit_code == 2 and "knows no 'kat' (did you mean 'cat'?)" in answer.stderr
