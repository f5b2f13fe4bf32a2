"""A VAE's training: it learns, goes on to the bit, is one run on two processes, and its result is diffusers' own kind of folder."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from latentfm.data.images import open_rgb, to_tensor
from latentfm.errors import InputError
from latentfm.training.checkpoint import storage
from latentfm.training.stop import Stopped
from latentfm.training.vae.quality import psnr
from latentfm.training.vae.report import page

HELD_OUT = ["validation.held_out=3", "validation.every=3"]
JUDGED = ["adversarial.weight=0.5", "adversarial.start=2", "adversarial.width=8", "adversarial.layers=2", "loss.perceptual=0.1"]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def column(out, name):
    return [row.get(name) for row in rows_of(out / "metrics.jsonl")]


def state_of(out, step=None):
    path = storage.path_of(out / "checkpoints", step) if step else storage.checkpoints(out / "checkpoints")[-1]
    return {name: stored.load() for name, stored in storage.load(path)[0].items()}


def weights_of(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same_to_the_bit(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def seen(folder, side):
    """A folder's pictures as a training of the network sees them, [N, 3, side, side] in [-1, 1]."""
    from latentfm.data.images import Transform, apply

    return torch.stack([to_tensor(apply(open_rgb(path), Transform(side, side))) for path in sorted(folder.glob("*.png"))])


def test_a_new_one_learns_and_diffusers_loads_it(tmp_path, train_vae, clear_pictures):
    out = train_vae(tmp_path / "run", "train.steps=40", "train.batch_size=6", "loss.edges=0.5", "loss.kl=1e-4", *HELD_OUT)
    losses = column(out, "loss")
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    validations = rows_of(out / "validation.jsonl")
    assert validations[-1]["psnr"] > validations[0]["psnr"] + 3 and validations[-1]["validation_loss"] < validations[0]["validation_loss"]

    vae = AutoencoderKL.from_pretrained(out / "model")
    assert vae.config.latent_channels == 4 and vae.config.sample_size == 32
    held_out = json.loads((out / "held_out.json").read_text())["pictures"]
    pictures = dict(zip(sorted(path.name for path in clear_pictures.glob("*.png")), seen(clear_pictures, 32), strict=True))
    kept = torch.stack([pictures[name] for name in held_out])
    with torch.no_grad():
        output = vae.decode(vae.encode(kept).latent_dist.mode()).sample
    assert psnr(output, kept).mean().item() == pytest.approx(validations[-1]["psnr"], abs=1e-4)

    trained = torch.stack([picture for name, picture in pictures.items() if name not in held_out])
    with torch.no_grad():
        posterior = vae.encode(trained).latent_dist
    mean, variance = (posterior.mean.double() - vae.config.shift_factor) * vae.config.scaling_factor, posterior.var.double()
    assert abs(mean.mean().item()) < 1e-5
    assert (mean.square() + variance * vae.config.scaling_factor**2).mean().item() == pytest.approx(1, abs=1e-5)

    assert "run.html" in {path.name for path in out.iterdir()} and "<h2>KL by channel</h2>" in (out / "report.html").read_text()
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["psnr"] == validations[-1]["psnr"] and len(report["after"]["kl_by_channel"]) == 4
    with Image.open(out / "samples" / "step-00000040.png") as grid:
        assert grid.width > 3 * 32


def test_it_goes_on_to_the_bit(tmp_path, train_vae, vae_trainer):
    """Stopped in its fifth step, a step after a checkpoint: the rest is what it would have been, the discriminator's too."""
    more = ["train.steps=9", "output.checkpoint_every=2", *JUDGED, *HELD_OUT]
    whole, cut = train_vae(tmp_path / "whole", *more), tmp_path / "cut"

    class Dies(Exception):
        pass

    trainer = vae_trainer(cut, *more)
    train_step = trainer.train_step
    trainer.train_step = lambda batches: train_step(batches) if trainer.step < 5 else (_ for _ in ()).throw(Dies)
    with pytest.raises(Dies):
        trainer.train()
    train_vae(cut, *more, resume=True)
    assert column(cut, "step") == list(range(1, 10))
    for name in ("loss", "gradient_norm", "discriminator", "adaptive_weight", "perceptual", "kl"):
        assert column(cut, name) == column(whole, name)
    assert same_to_the_bit(state_of(cut), state_of(whole))
    assert any(name.startswith("discriminator.optimizer.") for name in state_of(cut))
    assert same_to_the_bit(weights_of(cut / "model"), weights_of(whole / "model"))
    assert (cut / "model" / "config.json").read_bytes() == (whole / "model" / "config.json").read_bytes()
    assert rows_of(cut / "validation.jsonl") == rows_of(whole / "validation.jsonl")
    with pytest.raises(InputError, match="loss.l1 was 1.0, is 2.0"):
        vae_trainer(cut, *more, "loss.l1=2", "train.steps=12", resume=True)


def test_a_signal_saves_and_the_run_goes_on(tmp_path, train_vae, vae_trainer):
    whole, cut = train_vae(tmp_path / "whole"), tmp_path / "cut"
    trainer = vae_trainer(cut)
    log = trainer.log
    trainer.log = lambda row: (log(row), signal.raise_signal(signal.SIGTERM) if trainer.step == 2 else None)
    with pytest.raises(Stopped, match="stopped after step 3 of 6"):
        trainer.train()
    train_vae(cut, resume=True)
    assert column(cut, "loss") == column(whole, "loss") and same_to_the_bit(state_of(cut), state_of(whole))


@pytest.mark.parametrize("more", [[], ["train.gradient_accumulation=2"], JUDGED], ids=["plain", "accumulated", "judged"])
def test_two_processes_are_one(tmp_path, train_vae, vae_options, environment, more):
    more = [*more, *HELD_OUT, "train.batch_size=8", "train.learning_rate=1e-4"]  # a higher one makes much of the last digit
    alone = [option for option in more if "accumulation" not in option]
    one, two = train_vae(tmp_path / "one", *alone), tmp_path / "two"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "latentfm"]
    command = [*launcher, "train-vae", *vae_options(two, *more)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes on cpu" in done.stdout
    for name in ("loss", "gradient_norm", "kl", "pixels", *(("discriminator", "adaptive_weight") if JUDGED[0] in more else ())):
        wanted = [value for value in column(one, name) if value is not None]
        found, relative = [value for value in column(two, name) if value is not None], 1e-6 if name == "loss" else 1e-5
        assert found == pytest.approx(wanted, rel=relative, abs=1e-6), name
    for name, value in weights_of(one / "model").items():
        torch.testing.assert_close(weights_of(two / "model")[name], value, rtol=1e-4, atol=1e-5)
    factors = [json.loads((out / "model" / "config.json").read_text()) for out in (one, two)]
    assert factors[1]["scaling_factor"] == pytest.approx(factors[0]["scaling_factor"], rel=1e-5)
    for mine, theirs in zip(rows_of(one / "validation.jsonl"), rows_of(two / "validation.jsonl"), strict=True):
        assert theirs.pop("kl_by_channel") == pytest.approx(mine.pop("kl_by_channel"), rel=1e-4)
        assert theirs == pytest.approx(mine, rel=1e-4)


def test_a_decoder_alone_leaves_the_encoder_and_its_latents(tmp_path, train_vae, tiny_folder):
    out = train_vae(tmp_path / "run", f"model.vae={tiny_folder}", "model.part=decoder", *HELD_OUT, *JUDGED)
    before, after = weights_of(tiny_folder / "vae"), weights_of(out / "model")
    assert before.keys() == after.keys()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"decoder"}
    settings = [json.loads((folder / "config.json").read_text()) for folder in (tiny_folder / "vae", out / "model")]
    assert settings[0].pop("_name_or_path", None) != "" and settings[0] == {name: settings[1][name] for name in settings[0]}
    assert not any(name.startswith(("model.encoder", "ema.encoder")) for name in state_of(out))
    found = json.loads((out / "report.json").read_text())
    assert found["before"]["step"] == 0
    assert "the decoder alone was trained" in (out / "report.html").read_text()
    found["after"]["lpips"] = 0.125  # as where loss.lpips came with --resume
    assert '<tr><td>LPIPS</td><td class="n"></td><td class="n">0.125</td>' in page(found, [], [])


def test_the_result_is_the_average(tmp_path, train_vae):
    """Each step's weights weigh as the decays (1 + n) / (10 + n), at most ema_decay, say."""
    out = train_vae(tmp_path / "run", "train.steps=4", "output.checkpoint_every=1", "output.keep=4", "train.ema_decay=0.3")
    name, found = "decoder.conv_in.weight", weights_of(out / "model")["decoder.conv_in.weight"]
    steps = [state_of(out, step) for step in range(1, 5)]
    average = steps[0][f"ema.{name}"]  # of the start and the first step
    for number, state in enumerate(steps[1:], start=2):
        decay = min(0.3, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * state[f"model.{name}"]
        torch.testing.assert_close(state[f"ema.{name}"], average)
    torch.testing.assert_close(found, average)
    assert not torch.equal(found, steps[-1][f"model.{name}"])


def test_the_discriminator_starts_when_told(tmp_path, train_vae):
    more = ["output.checkpoint_every=1", "output.keep=9", "train.steps=5"]
    out = train_vae(tmp_path / "run", *more, *JUDGED, "adversarial.start=3")
    plain = train_vae(tmp_path / "plain", *more)
    rows = rows_of(out / "metrics.jsonl")
    assert ["discriminator" in row for row in rows] == [False, False, False, True, True]
    assert ["perceptual" in row for row in rows] == [False, False, False, True, True]  # in its features
    assert column(out, "loss")[:3] == column(plain, "loss")[:3] and column(out, "loss")[3] != column(plain, "loss")[3]
    judges = [{n: v for n, v in state_of(out, step).items() if n.startswith("discriminator.model.")} for step in (1, 3, 4, 5)]
    assert same_to_the_bit(judges[0], judges[1]) and not same_to_the_bit(judges[1], judges[2]) and not same_to_the_bit(judges[2], judges[3])


def test_what_fools_the_discriminator_does_not_teach_it(tmp_path, vae_trainer):
    """Its gradient is that of its own loss alone."""
    trainer = vae_trainer(tmp_path / "run", *JUDGED, "adversarial.start=0")
    judge, batch, sums = trainer.weights.judge, next(iter(trainer.micro_batches())), {}
    trainer.forward_backward_step(batch, sums, last=True)
    found = {name: parameter.grad.clone() for name, parameter in judge.named_parameters()}
    judge.zero_grad()
    target = batch.pixels.float() / 127.5 - 1
    with torch.no_grad():
        output = trainer.weights.shards.model(target, batch.noise)[0]
    real, fake = judge(target), judge(output)
    (0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())).backward()
    for name, parameter in judge.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    trainer.resources.close()


def test_a_loss_that_is_no_number_stops_it_by_the_pictures_name(tmp_path, vae_trainer):
    trainer = vae_trainer(tmp_path / "run", "output.checkpoint_every=1")
    model, bad = trainer.weights.shards.model, []

    def broken(pixels, noise):
        output, mean, logvar = model(pixels, noise)
        if trainer.step == 3:
            output = output * torch.tensor([1.0, float("nan"), 1.0, 1.0]).view(4, 1, 1, 1)
        return output, mean, logvar

    trainer.weights.shards.model = broken
    step = trainer.forward_backward_step
    trainer.forward_backward_step = lambda batch, *rest, **named: (bad.append(batch.ids[1]), step(batch, *rest, **named))[1]
    with pytest.raises(InputError, match="the loss is not finite at step 4 for") as caught:
        trainer.train()
    assert bad[3] in str(caught.value) and not any(name in str(caught.value) for name in bad[:3] if name != bad[3])
    assert [path.name for path in storage.checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002", "step-00000003"]
    assert not (tmp_path / "run" / "model").exists()


def test_unreadable_pictures_are_left_out_and_others_validated_on(tmp_path, train_vae, clear_pictures, capfd):
    import shutil

    folder = tmp_path / "pictures"
    shutil.copytree(clear_pictures, folder)
    (folder / "broken.png").write_bytes(b"no picture")
    out = train_vae(tmp_path / "run", f"data.folder={folder}", f"validation.folder={clear_pictures}", "validation.every=6", "train.steps=2")
    said = capfd.readouterr().out
    assert "broken.png" in said and "1 of 13 pictures cannot be read and is left out" in said
    assert rows_of(out / "validation.jsonl")[-1]["pictures"] == 12


@pytest.mark.slow
def test_compiled_it_is_the_same_training(tmp_path, train_vae):
    plain = train_vae(tmp_path / "plain", "train.steps=3")
    compiled = train_vae(tmp_path / "compiled", "train.steps=3", "train.compile=true")
    assert column(compiled, "loss") == pytest.approx(column(plain, "loss"), rel=1e-4)
    for name, value in weights_of(plain / "model").items():
        torch.testing.assert_close(weights_of(compiled / "model")[name], value, rtol=1e-2, atol=1e-3)
