"""Going on: a finished run asked for more, data and models that moved, and what is refused with the way out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentfm.config import SourceOptions, load_config
from latentfm.errors import InputError
from latentfm.training import trainer
from latentfm.training.checkpoint import storage
from latentfm.training.checkpoint.resuming import FREE_ON_RESUME, check_options, differences, same_rates, without_places
from latentfm.training.dry_run import dry_run

CONSTANT = ["train.decay=constant", "train.steps=3", "output.checkpoint_every=1", "sample.every=2"]


def column(out, name):
    return [json.loads(line)[name] for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out):
    return load_file(out / "model" / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """A run of three steps at a constant rate."""
    return run(tmp_path_factory.mktemp("finished") / "run", *CONSTANT)


@pytest.fixture
def again(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "again"))


@pytest.fixture
def config_of(options, tmp_path):
    """config_of(*overrides) -> the options of a run."""
    return lambda *more: load_config(None, options(tmp_path / "run", *more))


@pytest.fixture
def train(options):
    """train(out, *overrides) -> what `train` with --resume does, in this process."""
    from accelerate.state import AcceleratorState, GradientState

    def act(out, *more):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return trainer.train(load_config(None, options(out, *CONSTANT, *more)), resume=True)

    return act


def test_a_finished_run_asked_for_more_becomes_what_a_longer_one_is(tmp_path, run, again, train, capsys):
    longer = run(tmp_path / "longer", *CONSTANT, "train.steps=5")
    assert train(again, "train.steps=5") == again / "model"
    assert column(again, "step") == [1, 2, 3, 4, 5] and column(again, "loss") == column(longer, "loss")
    assert all(torch.equal(value, weights(longer)[name]) for name, value in weights(again).items())
    assert json.loads((again / "model" / "latentfm.json").read_text())["trained"]["steps"] == 5
    assert "resuming after step 3" in capsys.readouterr().out
    assert train(again, "train.steps=5") == again / "model"
    said = capsys.readouterr().out
    assert "is finished already" in said and "warning" not in said
    assert train(again) == again / "model"  # what it was once asked for it has more than done
    said = capsys.readouterr().out
    assert "is finished already" in said
    assert f"warning: {again} has 5 steps already, train.steps=3 asks for fewer: it stays as it is\n" in said
    assert train(again, "train.steps=5", "sample.prompts=[b]", "sample.seed=9", "data.workers=1") == again / "model"
    assert "warning: sample.prompts, sample.seed came too late" in capsys.readouterr().out


def test_a_constant_run_may_be_given_its_end_where_what_is_done_stays(tmp_path, run, again, train):
    ended = run(tmp_path / "ended", *CONSTANT, "train.steps=5", "train.decay=wsd")
    train(again, "train.steps=5", "train.decay=wsd")
    rates = column(again, "learning_rate")
    assert rates == column(ended, "learning_rate") and rates[3] == rates[2] and column(again, "loss") == column(ended, "loss")
    with pytest.raises(InputError, match=r"steps was 5, is 6; train\.decay was 'wsd', is 'linear' \(steps and decay set .* that are done"):
        train(again, "train.steps=6", "train.decay=linear")


@pytest.mark.parametrize(
    ("before", "now", "most"),
    [(("constant", 20), ("constant", 90), 49), (("constant", 100), ("wsd", 50), 41), (("wsd", 50), ("wsd", 100), 41),
     (("wsd", 50), ("constant", 100), 41), (("cosine", 50), ("cosine", 100), 3), (("cosine", 50), ("linear", 50), 3)],
)  # fmt: skip
def test_steps_and_decay_may_change_as_long_as_the_rates_of_what_is_done_do_not(config_of, before, now, most):
    def of(decay, steps):
        return config_of(f"train.decay={decay}", f"train.steps={steps}", "train.warmup_steps=2")

    was = of(*before).model_dump(mode="json")
    found = [same_rates(was, of(*now), done) for done in range(1, 50)]
    assert found == [done <= most for done in range(1, 50)]
    assert not same_rates({"train": {"steps": "x", "decay": 3}}, of(*now), 1) and not same_rates({}, of(*now), 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["train.steps=5", "train.learning_rate=2e-3"], r"train\.learning_rate was 0\.001, is 0\.002\. .*train its result on in a new run"),
        (["train.steps=5", "train.warmup_steps=1"], r"train\.warmup_steps was 2, is 1"),
        (["train.seed=5"], r"is finished, with other options: train\.seed was 0, is 5\. Restore them, or train its result on"),
        (["output.dtype=bfloat16"], "saved in float32; for another dtype: latentfm convert .*again/model OUT --dtype bfloat16"),
    ],
)  # fmt: skip
def test_what_would_be_dropped_is_refused_with_the_way_out(again, train, more, message):
    before = {path: path.read_bytes() for path in again.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message) as caught:
        train(again, *more)
    assert "model.pipeline=" in str(caught.value) or "convert" in str(caught.value)
    kept = {path: data for path, data in before.items() if path.name not in ("run.html", "events.jsonl")}
    assert all(path.read_bytes() == data for path, data in kept.items())


def test_fewer_steps_than_are_done_are_refused_while_a_run_goes_on(again, train):
    shutil.rmtree(again / "model")
    with pytest.raises(InputError, match=r"train\.steps was 3, is 2 \(step 3 is done\)\. Restore them, or choose another output.folder"):
        train(again, "train.steps=2")


def test_a_model_without_checkpoints_cannot_go_on(again, train):
    shutil.rmtree(again / "checkpoints")
    with pytest.raises(InputError, match="holds no checkpoint; to train its result on, start a new run with model.pipeline="):
        train(again, "train.steps=5")
    assert train(again) == again / "model"


@pytest.mark.parametrize("name", ["latentfm.json", "config.json"])
@pytest.mark.parametrize("text", ["{", "[]", '{"trained": 5, "train": 7, "output": []}', ""])
def test_a_finished_run_is_finished_whatever_became_of_its_words(again, train, name, text, capsys):
    (again / ("model/latentfm.json" if name == "latentfm.json" else name)).write_text(text)
    assert train(again) == again / "model"
    assert "finished" in capsys.readouterr().out


def test_the_dry_run_fails_where_the_run_would(again, options, monkeypatch):
    def look(*more):
        return dry_run(load_config(None, options(again, *CONSTANT, *more)), resume=True)

    assert look("train.steps=5")["steps"]["steps"] == 5
    with pytest.raises(InputError, match=r"train\.learning_rate was 0\.001"):
        look("train.learning_rate=1")
    (storage.checkpoints(again / "checkpoints")[-1] / "state.json").write_text("{")  # the run will take the one before
    assert look("train.steps=5")


# The same data and models, elsewhere


def test_data_and_models_that_moved_are_the_same(tmp_path, monkeypatch, again, start, pictures, tiny_folder):
    shutil.copytree(pictures, tmp_path / "moved")
    shutil.copytree(tiny_folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for folder in ("moved", "./moved/", str(tmp_path / "moved"), "again/../moved"):
        trainer = start(again, *CONSTANT, f"data.folder={folder}", "model.pipeline=model", resume=True)
        assert trainer.step == 3
    (tmp_path / "moved" / "00.txt").write_text("another caption")
    with pytest.raises(InputError, match="captions of this run are not those"):
        start(again, *CONSTANT, "data.folder=moved", resume=True)


def test_another_length_of_prompts_in_the_model_is_another_training(tmp_path, run, start, tiny_folder):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "latentfm.json").write_text('{"max_sequence_length": 8}')
    more = [*CONSTANT, f"model.pipeline={folder}", "data.t5_lengths=null"]
    out = run(tmp_path / "out", *more)
    (folder / "latentfm.json").write_text('{"max_sequence_length": 12}')
    with pytest.raises(InputError, match="T5 lengths of this run are not those"):
        start(out, *more, resume=True)


def test_sources_are_compared_without_their_places():
    before = {"data": {"sources": [{"path": "a", "url": None, "repeats": 2}, {"path": None, "url": "u", "repeats": 1}]}}
    now = {"data": {"sources": [{"path": "/mnt/a", "url": None, "repeats": 2}, {"path": None, "url": "v", "repeats": 1}]}}
    assert differences(before, now) == []
    now["data"]["sources"][0]["repeats"] = 3
    assert len(differences(before, now)) == 1 and differences(before, {"data": {"sources": None}})
    assert without_places([5]) == [5] and without_places(None) is None
    assert without_places([{"path": "a"}]) == without_places([SourceOptions(path="b").model_dump(mode="json")])  # of before an option was


def test_odd_descriptions_are_compared_and_not_stumbled_over():
    config = load_config(None, ["data.folder=a", "output.folder=b"])
    for before in ({}, {"train": 5}, {"train": []}, {"train": {"steps": "x" * 10_000}}):
        with pytest.raises(InputError) as caught:
            check_options(Path("step-1"), {"config": before | {"validation": {"held_out": 9}}, "step": "x"}, config)
        assert len(str(caught.value)) < 1000
    assert {"data.folder", "model.pipeline"} <= FREE_ON_RESUME
    assert differences({}, load_config(None, ["data.folder=a", "output.folder=b"]).model_dump(mode="json")) == []  # all as by default
