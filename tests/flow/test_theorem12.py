"""Theorem 12: the flow matching loss and the conditional one differ by a constant, and their gradients not at all.

Both are expectations, compared by means over draws: each draw of (t, z, eps) gives one difference, whose mean over N draws
is off by its standard error, the standard deviation over sqrt(N). The marginal field is a mixture's, exact. The theorem holds
for any law of t; here t is uniform on [0, 0.95], which leaves out the infinite slope of the variance preserving schedule.
"""

import pytest
import torch

from latentfm.flow.analytic import GaussianMixture
from latentfm.flow.path import sample_path
from latentfm.flow.schedules import CondOT, Cosine, Polynomial, VariancePreserving

EACH = [CondOT(), Cosine(), Polynomial(), VariancePreserving()]
each_schedule = pytest.mark.parametrize("schedule", EACH, ids=str)
DATA = GaussianMixture(torch.tensor([[2.0, 0.0], [-1.0, 1.5]]).double(), torch.tensor([0.3, 0.5]), torch.tensor([1.0, 2.0]))
COUNT = 20_000


def network(weights, x, t):
    first, second, third = weights
    return torch.tanh(torch.cat([x, t[..., None], torch.ones_like(t)[..., None]], -1) @ first) @ second + x @ third


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 5), (5, 2), (2, 2)))


def draws(schedule, wrong=False):
    """x_t, t, and at them the conditional and the marginal velocity; wrong: the velocity of another pair than x_t's."""
    generator = torch.Generator().manual_seed(0)
    z = DATA.sample(COUNT, generator)
    eps = torch.randn(COUNT, 2, generator=generator, dtype=torch.float64)
    t = 0.95 * torch.rand(COUNT, generator=generator, dtype=torch.float64)
    x, conditional = sample_path(z, eps, t, schedule)
    if wrong:
        conditional = sample_path(z.roll(1, 0), eps, t, schedule).velocity
    return x, t, conditional, DATA.quantity("velocity", x, t, schedule)


def loss(weights, x, t, target):
    """One sample's loss, as in eq. 24 and 26: the squared error, summed over the dimensions."""
    return (network(weights, x, t) - target).square().sum(-1)


def deviations(differences):
    """How many standard errors the mean of each column [N, ...] is away from 0."""
    return differences.mean(0) / (differences.std(0) / len(differences) ** 0.5)


def gradient_deviations(x, t, conditional, marginal):
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))
    pairs = zip(each(weights(0), x, t, conditional), each(weights(0), x, t, marginal), strict=True)
    return torch.cat([deviations((a - b).flatten(1)) for a, b in pairs])


@each_schedule
def test_the_gradients_agree(schedule):
    """34 weights, each within 4 standard errors: a right theorem fails this once in five hundred seeds."""
    x, t, conditional, marginal = draws(schedule)
    away = gradient_deviations(x, t, conditional, marginal)
    assert len(away) == 34 and away.abs().max() < 4
    assert 0.3 < away.square().mean() < 3  # and the errors are those of chance: neither of them is computed from the other


@each_schedule
def test_the_gradients_of_another_target_do_not(schedule):
    """What the test above would see: with the velocity towards another datum, as large but not that of x_t, it fails by far."""
    assert gradient_deviations(*draws(schedule, wrong=True)).abs().max() > 20


@each_schedule
def test_the_losses_differ_by_the_variance_of_the_conditional_velocity(schedule):
    """L_CFM - L_FM = E|u_t(x|z) - u_t(x)|^2, whatever the network; the constant is not 0."""
    x, t, conditional, marginal = draws(schedule)
    constant = (conditional - marginal).square().sum(1)
    for seed in range(3):
        gap = loss(weights(seed), x, t, conditional) - loss(weights(seed), x, t, marginal)
        assert deviations(gap - constant).abs() < 4
        assert deviations(gap) > 10
