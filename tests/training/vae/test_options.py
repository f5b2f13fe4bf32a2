"""A VAE run's options: refused with the nearest name and the way out, and what a run takes, counted before it starts."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from latentfm.config import load_config
from latentfm.errors import InputError
from latentfm.planning.devices import Device
from latentfm.planning.run import Parallelism
from latentfm.training.vae.checks import check, data_plan
from latentfm.training.vae.dry_run import dry_run, kept_and_flops, lines
from latentfm.training.vae.options import VAE_OPTIONS, VAEConfig

CPU = Device("CPU", 8 * 2**30, None, cpu=True)


@pytest.fixture
def config_of(vae_options, tmp_path):
    return lambda *more: load_config(None, vae_options(tmp_path / "run", *more), VAEConfig)


@pytest.mark.parametrize(
    "given, said",
    [
        ("loss.edge=1", "unknown option 'loss.edge' .did you mean 'edges'"),
        ("losses.l1=1", "unknown section 'losses' .did you mean 'loss'"),
        ("train.adapter={rank: 4}", "unknown option 'train.adapter'"),
        ("data.caption=a", "unknown option 'data.caption'"),
        ("model.norm_groups=3", "model.norm_groups 3 does not divide model.widths 8"),
        ("model.part=decoder", "model.part=decoder needs an encoder that is good: give model.vae"),
        ("validation.held_out=-1", "validation.held_out"),
        ("loss.l1=0", "nothing asks for the pictures back"),
        ("loss.lpips=x", "loss.lpips measures nothing"),
        ("data.crop=middle", "Input should be 'centre' or 'random'"),
    ],
)
def test_what_is_wrong_is_told_with_the_way_out(config_of, given, said):
    with pytest.raises(InputError, match=said):
        config_of(given)


def test_what_does_not_go_together_is_told(config_of):
    for more, said in (
        (["model.vae=x", "model.widths=[8]"], "model.vae has sizes of its own: leave out model.widths, or model.vae"),
        (["validation.held_out=2", "validation.folder=x"], "both given"),
        (["train.compile=true", "adversarial.weight=1"], "train.compile does not go with a discriminator"),
        (["train.batch_size=6", "train.gradient_accumulation=4"], "not divisible"),
    ):
        with pytest.raises(InputError, match=said):
            config_of(*more)


def test_a_run_that_cannot_be_is_told_before_it_starts(config_of, tmp_path):
    with pytest.raises(InputError, match="data.size is missing"):
        check(config_of("data.size=null"))
    with pytest.raises(InputError, match="not a multiple of 2; the nearest are 32 and 34"):
        check(config_of("data.size=33"))
    with pytest.raises(InputError, match="adversarial.layers 3 leaves no patch of 16 pixels to judge: lower it, or take 24"):
        check(config_of("data.size=16", "adversarial.weight=1"))
    with pytest.raises(InputError, match="validation.folder is data.folder"):
        check(config_of("data.folder=x", "validation.folder=x"), sources=False)
    with pytest.raises(InputError, match="validation.folder lies within data.folder: it would be trained on too"):
        check(config_of("data.folder=x", "validation.folder=x/y/../z"), sources=False)
    with pytest.raises(InputError, match="loss.lpips sees nothing of 8 pixels a side: leave it out, or take 16"):
        data_plan(config_of("data.size=8", "loss.lpips=x", "loss.perceptual=1"))
    with pytest.raises(InputError, match="muon moves the matrices of an MM-DiT's blocks, and none trains here; take adamw"):
        check(config_of("train.optimizer=muon"), sources=False)
    with pytest.raises(InputError, match="holds no AutoencoderKL"):
        check(config_of(f"model.vae={tmp_path}"))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL", "in_channels": 4, "out_channels": 4}')
    with pytest.raises(InputError, match="has 4 channels in and 4 out; pictures have 3"):
        check(config_of(f"model.vae={tmp_path}"))
    with pytest.raises(InputError, match="does not divide by 3 processes"):
        check(config_of(), parallelism=Parallelism(3))
    with pytest.raises(InputError, match=r"2 things are wrong.*there is no file.*there is no folder"):
        check(config_of("data.folder=nowhere", "loss.lpips=nowhere.safetensors", "loss.perceptual=1"))


def test_a_given_autoencoders_size_is_its_own(config_of, tiny_folder):
    for place in (tiny_folder, tiny_folder / "vae"):
        size, plan = data_plan(config_of(f"model.vae={place}", "data.size=null"))
        assert size == (32, 32) and plan.factor == 4


def test_every_option_has_a_meaning_or_a_name_that_is_one():
    unsaid = {name for name, option in VAE_OPTIONS.items() if not option.description}
    named = ("learning_rate", "betas", "max_grad_norm", "ema_decay", "seed")
    assert unsaid <= {*(f"train.{name}" for name in named), "output.checkpoint_every"}


def test_the_dry_run_counts_what_the_network_is(config_of, tmp_path):
    found = dry_run(config_of("adversarial.weight=1", "adversarial.layers=2", "adversarial.width=8", "validation.held_out=2"), device=CPU)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=4, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=False,
    )  # fmt: skip
    size = sum(parameter.numel() for parameter in vae.parameters())
    parts = found["memory"]["parts"]
    assert found["numbers"]["the autoencoder"] == size and parts["averages"] == 4 * size
    assert parts["gradients"] == 4 * sum(found["numbers"].values()) and parts["optimizer"] == 2 * parts["gradients"]
    assert found["latents"] == [4, 16, 16] and found["pictures"] == 10 and found["epochs"] == 6 * 4 / 10
    assert any("64" not in line and "memory" in line for line in lines(found)) and json.dumps(found)
    assert not (tmp_path / "run").exists()
    alone = dry_run(config_of(), device=CPU)["memory"]["parts"]["activations"]
    assert alone < parts["activations"] < 3 * alone
    assert dry_run(config_of("train.batch_size=8"), device=CPU)["memory"]["parts"]["activations"] == pytest.approx(2 * alone, rel=0.01)


def test_the_dry_run_sees_what_is_held_out(config_of, clear_pictures, tmp_path):
    with pytest.raises(InputError, match="validation.held_out 12 of 12 pictures leaves none to train on"):
        dry_run(config_of("validation.held_out=12"), device=CPU)
    with pytest.raises(InputError, match="there is no folder|does not exist"):
        dry_run(config_of(f"validation.folder={tmp_path / 'nowhere'}"), device=CPU)
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(clear_pictures.iterdir())[:3]:
        shutil.copy(path, few)
    found = dry_run(config_of(f"validation.folder={few}"), device=CPU)
    assert (found["pictures"], found["held out"]) == (12, 3)


def test_what_a_pass_keeps_is_counted_once():
    """A linear keeps its input, which a ReLU before it keeps as its output: one tensor, not two; FLOP are two a multiplication."""
    network = nn.Sequential(nn.ReLU(), nn.Linear(5, 7))
    kept, flops, largest = kept_and_flops(network, (torch.zeros(3, 5, requires_grad=True),))
    assert kept == 3 * 5 * 4 and flops == 2 * 3 * 5 * 7 and largest == 3 * 5


def test_a_decoder_alone_keeps_less(config_of, tiny_folder):
    whole, part = (
        dry_run(config_of(f"model.vae={tiny_folder}", *more), device=CPU) for more in ((), ("model.part=decoder",))
    )  # fmt: skip
    assert part["trained"] < whole["trained"] and part["numbers"] == whole["numbers"]
    assert part["memory"]["parts"]["activations"] < 0.8 * whole["memory"]["parts"]["activations"]
