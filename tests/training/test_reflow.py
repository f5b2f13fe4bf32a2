"""Reflow: pairs whose map is known, the same whoever makes them; a straight flow, which it leaves alone; and weights that know of it."""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from data.preparing import Quiet
from safetensors.torch import load_file, save_file

from latentfm import flow
from latentfm.config import load_config
from latentfm.data.cache.processes import ONE_PROCESS
from latentfm.data.cache.shard import raw
from latentfm.data.cache.stat_cache import NOTHING_KEPT
from latentfm.data.cache.store import Cache
from latentfm.data.loader import Dropout
from latentfm.data.pairs import PairData, pair_dataset, pair_noise
from latentfm.errors import InputError
from latentfm.evaluation.paths import pipeline_paths
from latentfm.models.folder import read_info
from latentfm.models.text import assemble
from latentfm.models.velocity import velocity
from latentfm.pipelines.text_to_image import LatentFMPipeline
from latentfm.planning.run import plan_run
from latentfm.training.dry_run import dry_run
from latentfm.training.models import load_models
from latentfm.training.pairs import PipelineTeacher, folded_guidance
from latentfm.training.reflow import reflow, stages
from latentfm.training.step import cfm_losses, condition_widths

PROMPTS = ["a red apple", "a blue car", "the moon"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n", "utf-8")
    return file


@pytest.fixture
def given(prompts, tiny_folder, tmp_path):
    """given(*more) -> the overrides of a run on seven pairs; `more` goes after."""

    def build(*more, count=7):
        return [
            f"data.pairs.prompts={prompts}", f"data.pairs.count={count}", "data.pairs.steps=2", "data.pairs.guidance=2",
            "data.pairs.at_once=2", f"data.cache={tmp_path / 'cache'}", f"model.pipeline={tiny_folder}",
            f"output.folder={tmp_path / 'run'}", "train.steps=4", "train.batch_size=2", "train.mixed_precision=no", "train.warmup_steps=1",
            "train.learning_rate=1e-3", "train.dropout=0", "data.t5_lengths={8: 1}", "data.workers=0", "sample.every=1000",
            "sample.steps=1", "sample.guidance=1", "output.trackers=[]", *more,
        ]  # fmt: skip

    return build


@pytest.fixture
def trainer(given):
    """trainer(*more, resume=False) -> the Trainer of that run."""
    from accelerate.state import AcceleratorState, GradientState

    from latentfm.training.trainer import Trainer

    def build(*more, resume=False):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return Trainer(load_config(None, given(*more)), resume)

    return build


class Affine:
    """The teacher of N(1, 4 I): the flow of a Gaussian carries eps to 1 + 2 eps, whatever the prompt."""

    fingerprint = "N(1, 4 I)"

    def __init__(self, fails_after=None):
        self.drawn, self.fails_after, self.bad = [], fails_after, ()

    def draw(self, prompts, noise):
        if self.fails_after is not None and len(self.drawn) >= self.fails_after:
            raise KeyboardInterrupt
        self.drawn += prompts
        field = flow.GaussianMixture(torch.ones(1, noise[0].numel(), dtype=torch.float64), stds=2.0).field()
        rows = noise.double().flatten(1)
        found = flow.reflow_pairs(field, rows, flow.uniform_grid(200), flow.RK4()).z
        for row, prompt in zip(found, prompts, strict=True):
            row += float("nan") if prompt in self.bad else 0
        return found.reshape(noise.shape).float()

    def release(self):
        pass


@pytest.fixture
def affine(given):
    """affine(teacher, count) -> its PairData, in float32."""

    def build(teacher, count=7, *more):
        config = load_config(None, given("data.cache_dtype=float32", *more, count=count))
        dataset = pair_dataset(PROMPTS, count, "prompts.txt")
        return PairData(dataset, plan_run(config).data, load_models(config.model, weights=False), config.data, teacher)

    return build


def entries(folder):
    """Every entry of kind pairs in a cache: key -> bytes."""
    cache = Cache(folder)
    cache.refresh()
    found = cache.at(np.array([place for place, row in enumerate(cache.index) if "/pairs/" in cache.paths[row["shard"]]]))
    return {found.key(number): bytes(raw(found.read(number)["latents"])) for number in range(len(found))}


# The pairs


def test_the_pairs_of_a_gaussian_teacher_are_its_map_in_closed_form(affine):
    data = affine(Affine())
    data.prepare(Quiet())
    reader = data.reader(0, Dropout(0.0, 0.0))
    batch = reader[[(0, index, 0) for index in (5, 0, 3)], 8]
    noise = torch.stack([pair_noise(0, number, data.shape) for number in (5, 0, 3)])
    assert torch.equal(batch.eps, noise) and batch.latents.dtype == torch.float32
    torch.testing.assert_close(batch.latents, 1 + 2 * noise, rtol=1e-5, atol=1e-5)
    again = reader[[(4, index, 1) for index in (5, 0, 3)], 8]  # in another epoch t is another, the pair is not
    assert torch.equal(again.eps, noise) and not torch.equal(again.u, batch.u)


def test_reflow_leaves_a_straight_flow_alone():
    """x -> s x by straight paths has the velocity (s - 1) x / (1 + t (s - 1)): the field that its own pairs teach."""
    s = 2.5

    def straight(x, t):
        t = t if t.ndim == 0 else t[:, None]
        return (s - 1) * x / (1 + t * (s - 1))

    eps = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for steps in (1, 5):
        z, _ = flow.reflow_pairs(straight, eps, flow.uniform_grid(steps))
        torch.testing.assert_close(z, s * eps)
    t = torch.linspace(0, 1, 64, dtype=torch.float64)
    path = flow.sample_path(z, eps, t)
    assert flow.cfm_loss(straight(path.x_t, t), path.velocity).max() < 1e-12


def test_a_pairs_noise_is_a_function_of_seed_and_number_alone():
    assert torch.equal(pair_noise(3, 7, (2, 4, 4)), pair_noise(3, 7, (2, 4, 4)))
    others = [pair_noise(3, 8, (2, 4, 4)), pair_noise(4, 7, (2, 4, 4))]
    assert all(not torch.equal(pair_noise(3, 7, (2, 4, 4)), other) for other in others)


def test_the_teacher_draws_what_the_pipeline_draws(given, tiny_folder):
    config = load_config(None, given())
    plan = plan_run(config)
    teacher = PipelineTeacher(config, plan.size, torch.device("cpu"), NOTHING_KEPT, ONE_PROCESS)
    pipe = LatentFMPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.default_sample_size
    noise = torch.stack([pair_noise(0, number, (pipe.latent_channels, side, side)) for number in range(2)])
    drawn = pipe(PROMPTS[:2], latents=noise, num_inference_steps=2, guidance_scale=2.0, output_type="latent").images
    torch.testing.assert_close(teacher.draw(PROMPTS[:2], noise), drawn.float(), rtol=1e-5, atol=1e-5)


def test_stopped_and_gone_on_the_pairs_are_the_same_to_the_byte(affine, tmp_path):
    whole = affine(Affine(), 7)
    whole.prepare(Quiet())
    expected = entries(tmp_path / "cache")
    assert len(expected) == 7
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        affine(Affine(fails_after=4), 7).prepare(Quiet())
    assert 0 < len(entries(tmp_path / "cache")) < 7
    rest = Affine()
    affine(rest, 7).prepare(Quiet())
    assert len(rest.drawn) == 4  # three that lacked, and one beside the last
    assert entries(tmp_path / "cache") == expected


def test_one_and_two_processes_make_the_same_pairs(given, tmp_path, environment):
    found = []
    for number, launcher in enumerate(([], ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"])):
        cache = tmp_path / f"cache-{number}"
        command = [sys.executable, "-m", *launcher, "latentfm", "cache", *given(f"data.cache={cache}")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "pairs: 7 entries" in done.stdout
        found.append(entries(cache))
    assert len(found[0]) == 7 and found[0] == found[1]


def test_whatever_decides_a_pair_is_in_its_key(given, tiny_folder, tmp_path):
    def fingerprint(*more):
        config = load_config(None, given(*more))
        return PipelineTeacher(config, plan_run(config).size, torch.device("cpu"), NOTHING_KEPT, ONE_PROCESS).fingerprint

    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    weights = next((other / "transformer").glob("*.safetensors"))
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights, {"format": "pt"})
    (other / "latentfm_manifest.txt").unlink(missing_ok=True)
    assert fingerprint() == fingerprint("data.pairs.count=9", "data.pairs.at_once=5", f"data.pairs.teacher={tiny_folder}")
    changes = ["data.pairs.steps=3", "data.pairs.guidance=3", "data.pairs.solver=heun", "data.size=16", f"data.pairs.teacher={other}"]
    assert len({fingerprint(), *map(fingerprint, changes)}) == 1 + len(changes)


def test_a_pair_that_is_not_finite_is_left_out_by_its_number(affine, capsys):
    teacher = Affine()
    teacher.bad = (PROMPTS[1],)
    data = affine(teacher)
    data.prepare(Quiet())
    assert [sample.id for sample in data.samples] == ["0", "2", "3", "5", "6"]
    assert "pair 4: the teacher's latents are not finite" in capsys.readouterr().out
    batch = data.reader(0, Dropout(0.0, 0.0))[[(0, 1, 0)], 8]  # numbers stay with their noise
    assert torch.equal(batch.eps[0], pair_noise(0, 2, data.shape))


# The training


def test_one_step_is_the_squared_error_of_a_step_of_eulers_method(trainer):
    made = trainer("train.one_step=true")
    batch = next(iter(made.micro_batches()))
    with torch.no_grad():
        losses, t = cfm_losses(made.models.network, batch, made.models.null, made.objective)
    assert (t == 0).all() and (replace(made.objective, one_step=False).times(batch.u) > 0).all()
    condition = assemble(batch.parts.map(torch.Tensor.float), *condition_widths(made.models.network))
    with torch.no_grad():
        end = batch.eps + velocity(made.models.network, batch.eps, torch.zeros(len(batch.ids)), condition)
    torch.testing.assert_close(losses, (end - batch.latents).square().flatten(1).mean(1), rtol=1e-4, atol=1e-6)


def test_a_run_on_pairs_goes_on_to_the_bit_and_its_folder_says_what_it_has_learnt(trainer, tmp_path, caplog):
    made = trainer("validation.held_out=2", "validation.every=2", "output.checkpoint_every=2")
    folder = made.train()
    whole = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "loss" in row]) == 4
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004", ignore_errors=True)
    again = trainer("validation.held_out=2", "validation.every=2", "output.checkpoint_every=2", resume=True)
    assert again.step == 2
    tensors = load_file(again.train() / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)

    assert read_info(folder)["distilled_guidance"] == 2.0
    pipe = LatentFMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.distilled_guidance == 2.0

    def drawn(pipe, **given):
        return pipe("a red apple", num_inference_steps=2, output_type="latent", seed=0, **given).images

    assert torch.equal(drawn(pipe), drawn(pipe, guidance_scale=1.0))
    with caplog.at_level(logging.WARNING):
        strong = drawn(pipe, guidance_scale=7.0)
        drawn(pipe, guidance_scale=7.0)
    assert not torch.equal(strong, drawn(pipe)) and pipe.guidance_scale == 1.0
    assert [record.message for record in caplog.records if "guidance" in record.message] == [
        "this model has guidance 2 in its weights: guidance 7 comes on top of it; 1 is its own"
    ]
    pipe.save_pretrained(tmp_path / "saved")
    assert LatentFMPipeline.from_pretrained(tmp_path / "saved").distilled_guidance == 2.0


def test_weights_without_guidance_in_them_have_stocks_default(tiny_folder):
    pipe = LatentFMPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe("a red apple", num_inference_steps=1, output_type="latent")
    assert pipe.guidance_scale == 7.0 and pipe.distilled_guidance is None


def test_rounds_take_the_model_before_and_the_same_call_goes_on(given, tmp_path):
    told = []
    options = given("train.steps=1", "validation.held_out=0", f"output.folder={tmp_path / 'fast'}")
    config = load_config(None, options)
    for _ in range(2):
        told.clear()
        model = reflow(config, 1, True, lambda stage: told.append(stage), lambda stage, model: None)
        assert model == tmp_path / "fast" / "one-step" / "model"
    first, second = told
    assert first.model.pipeline == config.model.pipeline and not first.train.one_step and first.data.pairs.guidance == 2
    assert second.model.pipeline == str(tmp_path / "fast" / "round-1" / "model") and second.train.one_step
    assert folded_guidance(first) == (2.0, 2.0) and folded_guidance(second) == (1.0, 2.0)
    assert read_info(model)["distilled_guidance"] == 2.0
    assert second.data.pairs.seed == first.data.pairs.seed + 1


def test_two_processes_reflow_and_distil(given, tmp_path, prompts, environment):
    """One training after another in the same processes, which find each other anew for each."""
    asked = ("data.pairs.prompts", "output.folder", "data.pairs.guidance")
    options = [word for word in given("train.steps=2") if not word.startswith(asked)]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "latentfm", "reflow",
        "--prompts-file", str(prompts), "--out", str(tmp_path / "fast"), "--guidance", "2", "--one-step", *options,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == str(tmp_path / "fast" / "one-step" / "model")
    assert read_info(tmp_path / "fast" / "one-step" / "model")["distilled_guidance"] == 2.0
    told = done.stderr
    assert told.count("before: path energy") == told.count("after: path energy") == 2
    assert "round-1: pairs of" in told and "in 2 steps at guidance 2" in told and "in 2 steps at guidance 1" in told


def test_several_rounds_are_each_others_teachers(given):
    found = list(stages(load_config(None, given("model.preset=emoji", "data.pairs.teacher=somewhere")), 3, False))
    assert [stage.output.folder.rpartition("/")[2] for stage in found] == ["round-1", "round-2", "round-3"]
    assert [stage.data.pairs.teacher for stage in found] == ["somewhere", None, None]
    assert [stage.model.preset for stage in found] == ["emoji", None, None]
    assert [stage.data.pairs.guidance for stage in found] == [2, 1, 1]  # a student of no guidance is not guided either
    assert found[2].model.pipeline == found[1].output.folder + "/model"


def test_a_dry_run_knows_pairs(given, tmp_path):
    found = dry_run(load_config(None, given("data.pairs.count=50")))
    assert found["data"]["pictures"] == 50 and found["steps"]["an epoch"] == 25
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_straight_paths_are_seen_to_be_straight(tiny_folder):
    """Of a network that gives one velocity everywhere: each path's energy is that velocity squared, and nothing of it bends."""
    pipe = LatentFMPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    bent = pipeline_paths(pipe, PROMPTS, steps=4, guidance=2.0)
    assert bent.straightness.shape == (3,) and (bent.straightness > 0).all() and (bent.energy > bent.straightness).all()
    for parameter in pipe.transformer.proj_out.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(pipe.transformer.proj_out.bias, 0.5)
    straight = pipeline_paths(pipe, PROMPTS, steps=4, guidance=2.0)
    torch.testing.assert_close(straight.energy, torch.full((3,), 0.25))
    torch.testing.assert_close(straight.straightness, torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.flip=true"], "data.pairs stand for pictures"),
        (["data.folder=pics"], "leave them or data.folder out"),
        (["data.pairs.prompts=nowhere.txt"], "nowhere.txt"),
        (["data.pairs.count=0"], "data.pairs.count"),
    ],
)
def test_what_cannot_be_is_refused(trainer, more, said):
    with pytest.raises(InputError, match=said):
        trainer(*more)


def test_one_step_needs_pairs(options, tmp_path):
    with pytest.raises(InputError, match=r"train\.one_step distils pairs"):
        load_config(None, options(tmp_path / "out", "train.one_step=true"))
