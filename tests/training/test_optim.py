"""The learning rate's course and the optimizer's groups."""

import math
from itertools import pairwise

import pytest
import torch

from latentfm.config import TrainOptions
from latentfm.models.mmdit import MMDiT
from latentfm.training.optim import learning_rate, make_optimizer

DECAYS = ["constant", "linear", "cosine"]


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


def test_the_three_ends_and_the_middle():
    settings = {"steps": 104, "warmup_steps": 4, "learning_rate": 1.0}
    assert set(course(decay="constant", **settings)[4:]) == {1.0}
    linear, cosine = course(decay="linear", **settings), course(decay="cosine", **settings)
    assert linear[54] == pytest.approx(0.5) and linear[-1] == pytest.approx(0.01)
    assert cosine[54] == pytest.approx(0.5) and cosine[29] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert cosine[-1] == pytest.approx((1 + math.cos(math.pi * 0.99)) / 2)
    for decay in ("linear", "cosine"):  # at the step after the last, were there one
        assert learning_rate(104, TrainOptions(decay=decay, **settings)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_no_warm_up_starts_at_the_peak_and_a_long_one_never_reaches_it(decay):
    assert course(steps=3, warmup_steps=0, learning_rate=0.5, decay=decay)[0] == 0.5
    assert course(steps=3, warmup_steps=30, learning_rate=0.3, decay=decay) == pytest.approx([0.01, 0.02, 0.03])
    assert course(steps=2, warmup_steps=2, learning_rate=1.0, decay=decay) == pytest.approx([0.5, 1.0])


def test_matrices_decay_and_vectors_and_frozen_parameters_do_not(tiny_folder):
    network = MMDiT.from_pretrained(tiny_folder, subfolder="transformer")
    network.context_embedder.requires_grad_(False)
    optimizer = make_optimizer(network, TrainOptions(weight_decay=0.25, betas=(0.8, 0.9), learning_rate=0.01))
    names = {id(p): name for name, p in network.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    assert all(group["betas"] == (0.8, 0.9) and group["lr"] == 0.01 for group in optimizer.param_groups)
    trainable = {name for name, p in network.named_parameters() if p.requires_grad}
    assert decayed | plain == trainable and not decayed & plain
    assert plain == {n for n in trainable if n.endswith("bias") or "norm_q" in n or "norm_k" in n or "norm_added" in n}

    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # with zero gradients AdamW only decays: by 1 - lr * weight_decay
    for name, parameter in network.named_parameters():
        factor = 1 - 0.01 * 0.25 if name in decayed else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0)
