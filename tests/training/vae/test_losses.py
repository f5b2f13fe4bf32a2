"""The terms of a VAE's loss against torch.distributions and closed forms."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from latentfm.training.vae.losses import adaptive_weight, hinge, kl_by_channel, kl_weight, reconstruction_terms
from latentfm.training.vae.options import LossOptions


def pictures(seed=0, shape=(3, 3, 6, 8)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) * 2 - 1 for _ in range(2)]


def test_kl_is_that_of_torch_distributions():
    mean, logvar = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    posterior, prior = Normal(mean, (0.5 * logvar).exp()), Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.testing.assert_close(kl_by_channel(mean, logvar), kl_divergence(posterior, prior).sum(dim=(2, 3)))
    whole = kl_divergence(Independent(posterior, 3), Independent(prior, 3))
    torch.testing.assert_close(kl_by_channel(mean, logvar).sum(dim=1), whole)


def test_l1_and_l2_are_weighted_means_of_each_picture():
    output, target = pictures()
    found = reconstruction_terms(output, target, LossOptions(l1=2.0, l2=3.0))
    wanted = [2 * abs(a - b).mean() + 3 * ((a - b) ** 2).mean() for a, b in zip(output, target, strict=True)]
    assert found.keys() == {"pixels"}
    torch.testing.assert_close(found["pixels"], torch.stack(wanted))


@pytest.mark.parametrize("sigma", [0.3, 1.7])
def test_sigma_gives_the_gaussian_decoders_nats(sigma):
    """-log N(x; output, sigma^2) of a picture, divided by its numbers; without its constant, Algorithm 6's term."""
    output, target = pictures(1)
    found = reconstruction_terms(output, target, LossOptions(sigma=sigma))["pixels"]
    nats = -Independent(Normal(output, sigma), 3).log_prob(target)
    torch.testing.assert_close(found, nats / target[0].numel())
    algorithm_6 = (target - output).square().flatten(1).sum(1) / (2 * sigma**2)
    constant = 0.5 * math.log(2 * math.pi * sigma**2)
    torch.testing.assert_close(found - constant, algorithm_6 / target[0].numel(), rtol=1e-4, atol=1e-5)


def test_edges_see_a_blurred_step_and_no_constant_shift():
    target = torch.full((1, 3, 4, 6), -1.0)
    target[..., 3:] = 1.0
    output = target.clone()
    output[..., 3] = 0.0  # a step of 2 in two steps of 1: the difference at both places is off by 1, of five
    found = reconstruction_terms(output, target, LossOptions(edges=0.5))["edges"]
    assert found.item() == pytest.approx(0.5 * 2 / 5)
    assert reconstruction_terms(target + 0.25, target, LossOptions(edges=0.5))["edges"].item() == pytest.approx(0, abs=1e-7)


def test_kl_warms_up_linearly():
    options = LossOptions(kl=2.0, kl_warmup=4)
    assert [kl_weight(step, options) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert kl_weight(0, LossOptions(kl=2.0)) == 2.0


def test_hinge():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
    assert hinge(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 4) / 3))


def test_adaptive_weight_of_a_linear_decoder():
    """output = W z: the gradient of |W z - x|^2 / 2 is (W z - x) z^T, that of -a . output is -a z^T."""
    torch.manual_seed(0)
    last, z, x, a = nn.Parameter(torch.randn(5, 4)), torch.randn(4), torch.randn(5), torch.randn(5)
    output = last @ z
    found = adaptive_weight(0.5 * (output - x).square().sum(), -(a @ output), last, lambda value: value)
    assert found.item() == pytest.approx(((output - x).norm() / (a.norm() + 1e-4 / z.norm())).item(), rel=1e-5)
    halved = adaptive_weight(0.5 * (last @ z - x).square().sum(), -2 * (a @ (last @ z)), last, lambda value: value)
    assert halved.item() == pytest.approx(found.item() / 2, rel=1e-3)
    assert adaptive_weight((last @ z).sum() * 1e6, (last @ z).sum() * 0, last, lambda value: value).item() == 1e4  # at most
