"""The learning rate's course, and every optimizer: what it decays, that it learns, and that its state survives a checkpoint."""

import copy
import math
import sys
from itertools import pairwise

import pytest
import torch
from models.twins import inputs, twins
from safetensors.torch import load_file, save_file
from torch import nn

from latentfm.config import TrainOptions
from latentfm.errors import InputError
from latentfm.models.mmdit import MMDiT
from latentfm.optimizers import OPTIMIZERS
from latentfm.training.adapters import choose_trainable
from latentfm.training.optimizers.adamw import AdamW
from latentfm.training.optimizers.factory import (
    check_optimizer,
    learning_rate,
    make_optimizer,
)
from latentfm.training.optimizers.state import optimizer_state, restore_optimizer_state

DECAYS = ["constant", "linear", "cosine", "wsd"]
RATES = {"lion": 1e-4, "prodigy": 1.0}  # the others' is AdamW's
UNPAGED = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def course(**settings):
    options = TrainOptions(**settings)
    return [learning_rate(step, options) for step in range(options.steps)]


@pytest.mark.parametrize("decay", DECAYS)
def test_it_rises_in_equal_steps_to_the_peak(decay):
    rates = course(steps=20, warmup_steps=4, learning_rate=8e-3, decay=decay)
    assert rates[:5] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 8e-3])
    assert max(rates) == pytest.approx(8e-3)


@pytest.mark.parametrize("decay", DECAYS)
def test_it_never_rises_after_the_warm_up_and_stays_positive(decay):
    rates = course(steps=50, warmup_steps=5, learning_rate=1.0, decay=decay)
    assert all(later <= earlier for earlier, later in pairwise(rates[5:]))
    assert all(rate > 0 for rate in rates)


def test_the_ends_and_the_middle():
    settings = {"steps": 104, "warmup_steps": 4, "learning_rate": 1.0}
    assert set(course(decay="constant", **settings)[4:]) == {1.0}
    linear, cosine = course(decay="linear", **settings), course(decay="cosine", **settings)
    assert linear[54] == pytest.approx(0.5) and linear[-1] == pytest.approx(0.01)
    assert cosine[54] == pytest.approx(0.5) and cosine[29] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert cosine[-1] == pytest.approx((1 + math.cos(math.pi * 0.99)) / 2)
    wsd = course(decay="wsd", **settings)
    assert set(wsd[4:84]) == {1.0} and wsd[84] < 1 and wsd[94] == pytest.approx(10 / 20.8) and wsd[-1] == pytest.approx(1 / 20.8)
    for decay in ("linear", "cosine", "wsd"):  # at the step after the last, were there one
        assert learning_rate(104, TrainOptions(decay=decay, **settings)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_no_warm_up_starts_at_the_peak_and_a_long_one_never_reaches_it(decay):
    assert course(steps=3, warmup_steps=0, learning_rate=0.5, decay=decay)[0] == 0.5
    assert course(steps=3, warmup_steps=30, learning_rate=0.3, decay=decay) == pytest.approx([0.01, 0.02, 0.03])
    assert course(steps=2, warmup_steps=2, learning_rate=1.0, decay=decay) == pytest.approx([0.5, 1.0])


def test_the_groups_of_a_network_and_of_an_adapter(tiny_folder):
    network = MMDiT.from_pretrained(tiny_folder, subfolder="transformer")
    network.context_embedder.requires_grad_(False)
    optimizer = make_optimizer(dict(network.named_parameters()), TrainOptions(weight_decay=0.25, betas=(0.8, 0.9), learning_rate=0.01))
    names = {id(p): name for name, p in network.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    assert all(group["betas"] == (0.8, 0.9) and group["lr"] == 0.01 for group in optimizer.param_groups)
    trainable = {name for name, p in network.named_parameters() if p.requires_grad}
    assert decayed | plain == trainable and not decayed & plain
    assert plain == {n for n in trainable if n.endswith("bias") or "norm_q" in n or "norm_k" in n or "norm_added" in n}

    for kind, decays in (("lora", [0.01]), ("dora", [0.01, 0.0])):  # DoRA's magnitudes are no matrices
        network = MMDiT.from_pretrained(tiny_folder, subfolder="transformer")
        options = TrainOptions(adapter={"kind": kind, "rank": 2})
        choose_trainable(network, options)
        optimizer = make_optimizer(dict(network.named_parameters()), options)
        assert [group["weight_decay"] for group in optimizer.param_groups] == decays
        assert sum(len(group["params"]) for group in optimizer.param_groups) == sum(p.requires_grad for p in network.parameters())


class Net(nn.Module):
    """A block's matrix that bitsandbytes keeps in 8 bits (4,096 numbers or more), one that it does not, a convolution and a norm."""

    def __init__(self):
        super().__init__()
        self.conv, wide, self.norm, self.out = nn.Conv2d(3, 8, 2), nn.Linear(8, 700), nn.LayerNorm(700), nn.Linear(700, 5)
        self.transformer_blocks = nn.ModuleList([wide])

    def forward(self, x):
        return self.out(self.norm(self.transformer_blocks[0](self.conv(x).flatten(2).mean(-1)).tanh()))


def options_of(name, **more):
    return TrainOptions(optimizer=name, learning_rate=RATES.get(name, 1e-3), steps=12, warmup_steps=2, weight_decay=0.05, **more)


def started(name, seed=0, **more):
    torch.manual_seed(seed)
    network, options = Net(), options_of(name, **more)
    return network, make_optimizer(dict(network.named_parameters()), options), options


def steps(network, optimizer, options, first, last):
    """Optimizer steps `first` up to `last`, each on a batch of its own."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(6, 3, 4, 4, generator=generator), torch.randn(6, 5, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.zero_grad()
        (network(x) - y).square().mean().backward()
        optimizer.step()


def names_of(network):
    return {id(p): name for name, p in network.named_parameters()}


@UNPAGED
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_matrices_decay(name):
    network, optimizer, options = started(name)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.05, 0.0}
    if name == "prodigy":
        return  # without a gradient it takes no step at all
    before = copy.deepcopy(network.state_dict())
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, value in network.state_dict().items():
        factor = 1 - options.learning_rate * 0.05 if value.ndim > 1 else 1.0
        torch.testing.assert_close(value, before[key] * factor, rtol=1e-6, atol=0)


SETTINGS = [(name, {}) for name in OPTIMIZERS]
SETTINGS += [("adamw", {"weights": "bfloat16", **more}) for more in ({}, {"master_weights": True}, {"moments": "bfloat16"})]
LABELS = [" ".join([name, *(key for key in more if key != "weights")] + ["bfloat16"] * bool(more)) for name, more in SETTINGS]


@UNPAGED
@pytest.mark.parametrize("name, more", SETTINGS, ids=LABELS)
def test_a_restored_optimizer_goes_on_to_the_bit(tmp_path, name, more):
    network, optimizer, options = started(name, **more)
    steps(network, optimizer, options, 0, 5)
    save_file(optimizer_state(optimizer, names_of(network)), tmp_path / "optimizer.safetensors")
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    steps(network, optimizer, options, 5, 10)

    again, other, _ = started(name, seed=1, **more)  # another start: nothing of it may be left
    again.load_state_dict(load_file(tmp_path / "network.safetensors"))
    restore_optimizer_state(other, load_file(tmp_path / "optimizer.safetensors"), names_of(again))
    steps(again, other, options, 5, 10)
    for key, value in network.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    found, expected = optimizer_state(other, names_of(again)), optimizer_state(optimizer, names_of(network))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert value.dtype == found[key].dtype and torch.equal(value, found[key]), key
    for mine, theirs in zip(network.parameters(), again.parameters(), strict=True):
        kinds = [{key: type(value) for key, value in made.state[p].items()} for made, p in ((optimizer, mine), (other, theirs))]
        assert kinds[0] == kinds[1]


def test_what_prodigy_has_found_is_in_the_checkpoint():
    network, optimizer, options = started("prodigy")
    for _ in range(40):
        steps(network, optimizer, options, 3, 4)  # one batch over and over: its estimate rises
    state = optimizer_state(optimizer, names_of(network))
    assert state["group.0/d"].item() == optimizer.param_groups[0]["d"] > 10 * optimizer.d0  # float64: to the bit
    assert state["group.1/k"].item() == 40 and "group.0/lr" not in state
    forgetful = {key: value for key, value in state.items() if not key.startswith("group.")}
    again, other, _ = started("prodigy")
    again.load_state_dict(network.state_dict())
    restore_optimizer_state(other, forgetful, names_of(again))
    for moved, opt in ((network, optimizer), (again, other)):
        steps(moved, opt, options, 8, 9)
    assert not torch.equal(network.transformer_blocks[0].weight, again.transformer_blocks[0].weight)


@UNPAGED
@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_large_parameters_have_8_bit_moments_and_no_table_is_saved(name):
    network, optimizer, options = started(name)
    steps(network, optimizer, options, 0, 1)
    state = optimizer_state(optimizer, names_of(network))
    wide = "transformer_blocks.0.weight"
    assert state[f"state1/{wide}"].dtype == state[f"state2/{wide}"].dtype == torch.uint8
    assert state["state1/out.weight"].dtype == torch.float32 and state[f"absmax1/{wide}"].shape == (22,)  # 5,600 in blocks of 256
    assert not any("qmap" in key for key in state) and "qmap1" in optimizer.state[network.transformer_blocks[0].weight]


def test_another_network_is_refused():
    network, optimizer, options = started("adamw")
    steps(network, optimizer, options, 0, 1)
    state = optimizer_state(optimizer, names_of(network))
    with pytest.raises(InputError, match="has the parameter nothing_like_it, this run has not"):
        restore_optimizer_state(optimizer, {"exp_avg/nothing_like_it": torch.zeros(1)}, names_of(network))
    small = nn.Linear(2, 2, bias=False)
    with pytest.raises(InputError, match="2 groups of parameters, this run 1"):
        other = make_optimizer(dict(small.named_parameters()), options)
        restore_optimizer_state(other, {key: value for key, value in state.items() if "group.1" in key}, names_of(small))


@UNPAGED
@pytest.mark.parametrize("adapter", [None, {"rank": 4}], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_trains_a_network(name, adapter):
    network, _ = twins(qk_norm="rms_norm", num_layers=2)
    options = TrainOptions(optimizer=name, learning_rate=RATES.get(name, 1e-3) * (10 if adapter and name != "prodigy" else 1),
                           steps=60, warmup_steps=3, decay="constant", adapter=adapter)  # fmt: skip
    choose_trainable(network, options)
    optimizer, given = make_optimizer(dict(network.named_parameters()), options), inputs(network)
    target = torch.randn(given["hidden_states"].shape, generator=torch.Generator().manual_seed(2))
    losses = []
    for step in range(60 if name == "prodigy" else 30):  # it begins with a rate of 1e-6
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.zero_grad()
        loss = (network(**given).sample - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses[::10]


def test_adafactor_is_transformers_at_a_rate_of_its_own():
    """An oracle: their class without scaling by the weight's size and without its relative step, from a gradient of zeros on."""
    from transformers.optimization import Adafactor

    generator = torch.Generator().manual_seed(0)
    start = [torch.zeros(7, 4), 0.1 * torch.randn(6, 9, generator=generator), 0.1 * torch.randn(11, generator=generator)]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    optimizers = [
        torch.optim.Adafactor(ours, lr=0.01, eps=OPTIMIZERS["adafactor"].keywords["eps"]),
        Adafactor(theirs, lr=0.01, scale_parameter=False, relative_step=False, warmup_init=False),
    ]
    for step in range(6):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            size = (0.0 if index == 0 and step == 0 else 1.0) * 10.0 ** (-step)  # and gradients get small
            a.grad = size * torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, value in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert (a - value).abs().max() > 0.01


def test_adamw_of_an_adapter_is_float32s_and_its_moments_may_be_narrow(tiny_folder):
    for moments, kind in (("float32", torch.optim.AdamW), ("bfloat16", AdamW)):
        network = MMDiT.from_pretrained(tiny_folder, subfolder="transformer")
        options = TrainOptions(adapter={"rank": 2}, weights="bfloat16", moments=moments)
        choose_trainable(network, options)
        assert type(make_optimizer(dict(network.named_parameters()), options)) is kind


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"optimizer": "prodigy"}, "finds its own rate .* which is 0.0001; set it to 1"),
        ({"optimizer": "adafactor", "betas": (0.8, 0.99)}, r"takes no train.betas, got \[0.8, 0.99\]"),
        ({"master_weights": True, "weights": "bfloat16", "adapter": {"rank": 2}}, "those of train.adapter are float32 already"),
        ({"optimizer": "lion", "moments": "bfloat16"}, "train.moments=bfloat16 is for train.optimizer=adamw, not lion"),
    ],
)
def test_what_an_optimizer_cannot_use_is_refused(settings, says):
    with pytest.raises(InputError, match=says):
        check_optimizer(TrainOptions(**settings))
    with pytest.raises(InputError, match=says):
        make_optimizer(dict(Net().named_parameters()), TrainOptions(**settings))


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind.package])
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, monkeypatch):
    options = options_of(name)
    check_optimizer(options)
    monkeypatch.setitem(sys.modules, OPTIMIZERS[name].target.split(":")[0], None)  # what an import of a package that is not there finds
    with pytest.raises(InputError, match=rf"train.optimizer={name} needs .* not installed: pip install 'latentfm\[optimizers\]'"):
        make_optimizer(dict(Net().named_parameters()), options)
