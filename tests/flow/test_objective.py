"""The CFM loss: its value, its minimiser, and the fields it leads to."""

import pytest
import torch

from latentfm.flow import CondOT, Uniform, cfm_loss, draw_t, sample_path


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_loss_is_each_samples_own_mean_square():
    prediction, target = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    loss = cfm_loss(prediction, target)
    expected = torch.stack([((p - q) ** 2).sum() / 8 for p, q in zip(prediction, target, strict=True)])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(cfm_loss(prediction[:, 0, 0], target[:, 0, 0]), (prediction - target)[:, 0, 0] ** 2)


def test_loss_is_float32_from_half_precision():
    prediction, target = normal(4, 100).bfloat16(), normal(4, 100, seed=1).bfloat16()
    loss = cfm_loss(prediction, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cfm_loss(prediction.double(), target.double()))


def test_the_best_constant_is_the_mean_target():
    target = normal(500, 3) + torch.tensor([1.0, -2.0, 0.5])
    mean = target.mean(0).requires_grad_()
    (gradient,) = torch.autograd.grad(cfm_loss(mean.expand_as(target), target).mean(), mean)
    assert gradient.abs().max() < 1e-6
    away = (target.mean(0) + torch.tensor([0.3, 0.0, 0.0])).requires_grad_()
    (gradient,) = torch.autograd.grad(cfm_loss(away.expand_as(target), target).mean(), away)
    torch.testing.assert_close(gradient, torch.tensor([0.2, 0.0, 0.0]), rtol=0, atol=1e-6)


def test_the_minimiser_is_the_marginal_field():
    """Theorem 12: regressing the conditional velocity finds the marginal one.

    For data N(m, s^2) and a fixed t the marginal velocity is affine in x, so that least squares can represent it:
    E[z - eps | x] = m + (t s^2 - (1 - t)) / (t^2 s^2 + (1 - t)^2) (x - t m).
    """
    m, s, t = 1.5, 0.5, 0.6
    count = 200_000
    z, eps = m + s * normal(count), normal(count, seed=1)
    x, velocity = sample_path(z, eps, torch.full((count,), t), CondOT())
    features = torch.stack([torch.ones_like(x), x], 1).double()
    weights = torch.linalg.lstsq(features, velocity.double()[:, None]).solution.squeeze(1).requires_grad_()
    slope = (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2)
    exact = torch.tensor([m - slope * t * m, slope], dtype=torch.float64)
    torch.testing.assert_close(weights.detach(), exact, rtol=0, atol=0.02)
    (gradient,) = torch.autograd.grad(cfm_loss(features @ weights, velocity).mean(), weights)
    assert gradient.abs().max() < 1e-4


def test_a_training_step_lowers_the_loss():
    """The docstring's training step, end to end: a linear network on a Gaussian learns in a few hundred steps."""
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        z = torch.tensor([2.0, -1.0]) + 0.1 * torch.randn(256, 2)
        t = draw_t(torch.rand(256), Uniform())
        x_t, velocity = sample_path(z, torch.randn_like(z), t)
        loss = cfm_loss(network(torch.cat([x_t, t[:, None]], 1)), velocity).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (2, 3, 1), (2,), ()])
def test_shapes_are_never_broadcast(shape):
    message = str(tuple(shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=message):
        cfm_loss(torch.zeros(2, 3), torch.zeros(shape))


def test_a_scalar_has_no_batch():
    with pytest.raises(ValueError, match=r"\(\) and \(\)"):
        cfm_loss(torch.tensor(0.0), torch.tensor(0.0))
