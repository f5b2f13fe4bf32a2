"""The oracle itself: its score and velocity against automatic differentiation, its draws against its moments."""

import math

import pytest
import torch

from latentfm.flow.analytic import GaussianMixture, finite_dataset
from latentfm.flow.path import QUANTITIES
from latentfm.flow.schedules import CondOT, Cosine, Polynomial, VariancePreserving

EACH = [CondOT(), Cosine(), Polynomial(), VariancePreserving()]
each_schedule = pytest.mark.parametrize("schedule", EACH, ids=str)
TIMES = [0.0, 0.1, 0.5, 0.9, 0.99]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixture(*shape, dtype=torch.float64):
    """Four components of unequal widths and weights; one of them is a point."""
    stds, weights = torch.tensor([0.3, 0.0, 1.2, 0.6]), torch.tensor([1.0, 2.0, 0.5, 3.0])
    return GaussianMixture(normal(4, *shape, seed=1, dtype=dtype), stds, weights)


def gradient(function, x):
    return torch.func.grad(lambda x: function(x).sum())(x)


def test_log_density_is_that_of_torch_distributions():
    data, x = mixture(3), normal(10, 3)
    for t in (0.0, 0.4, 0.95):
        width = torch.sqrt((t * data.stds) ** 2 + (1 - t) ** 2)
        parts = torch.distributions.Independent(torch.distributions.Normal(t * data.means, width[:, None]), 1)
        law = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(data.weights), parts)
        torch.testing.assert_close(data.log_density(x, t), law.log_prob(x))
    gaussian = GaussianMixture(torch.zeros(1, 3), 2.0)
    expected = torch.distributions.Normal(0, 2).log_prob(x.float()).sum(1)
    torch.testing.assert_close(gaussian.log_density(x.float()), expected)


@each_schedule
@pytest.mark.parametrize("t", TIMES)
def test_score_is_the_gradient_of_the_log_density(schedule, t):
    data, x = mixture(3), normal(10, 3)
    expected = gradient(lambda x: data.log_density(x, t, schedule), x)
    torch.testing.assert_close(data.quantity("score", x, t, schedule), expected, rtol=1e-9, atol=1e-9)


@each_schedule
@pytest.mark.parametrize("t", [0.01, 0.5, 0.9, 0.99])
def test_velocity_satisfies_the_continuity_equation(schedule, t):
    """d/dt log p + div u + u . grad log p = 0: eq. 23, divided by p."""
    data, x = mixture(3), normal(10, 3)
    time = torch.full((10,), t, dtype=torch.float64)
    rate = torch.func.grad(lambda time: data.log_density(x, time, schedule).sum())(time)
    velocity = data.quantity("velocity", x, time, schedule)
    each = [gradient(lambda x, i=i: data.quantity("velocity", x, time, schedule)[:, i], x)[:, i] for i in range(3)]
    flow = (velocity * data.quantity("score", x, time, schedule)).sum(1)
    torch.testing.assert_close(rate + sum(each), -flow, rtol=1e-9, atol=1e-9)
    assert rate.abs().max() > 0.01


@each_schedule
@pytest.mark.parametrize("t", [*TIMES, 1 - 1e-6])
def test_the_two_ends_put_together_are_x(schedule, t):
    data, x, at = mixture(3), normal(10, 3), schedule(torch.tensor(t, dtype=torch.float64))
    z, eps = data.ends(x, t, schedule)
    torch.testing.assert_close(at.alpha * z + at.beta * eps, x)
    torch.testing.assert_close(data.quantity("denoiser", x, t, schedule), z, rtol=0, atol=0)
    torch.testing.assert_close(data.quantity("noise", x, t, schedule), eps, rtol=0, atol=0)
    torch.testing.assert_close(at.d_alpha * z + at.d_beta * eps, data.quantity("velocity", x, t, schedule))
    torch.testing.assert_close(-at.beta * data.quantity("score", x, t, schedule), eps)


def test_the_denoiser_is_the_mean_of_the_data_that_lead_to_x():
    """By brute force: draws of the data weighted by p_t(x|z), eq. 43. Five standard errors, some 0.02, are allowed."""
    data = GaussianMixture(torch.tensor([[-1.0, 0.5], [1.0, 0.0]]).double(), torch.tensor([0.3, 0.6]))
    x, t = torch.tensor([[0.2, 0.1], [-0.4, 0.6]]).double(), 0.4
    z = data.sample(100_000, torch.Generator().manual_seed(0))
    exact = data.quantity("denoiser", x, t)
    for i in range(len(x)):
        share = torch.softmax(-(x[i] - t * z).square().sum(1) / (2 * (1 - t) ** 2), 0)[:, None]
        mean = (share * z).sum(0)
        error = ((share * (z - mean)) ** 2).sum(0).sqrt()
        assert ((mean - exact[i]).abs() < 5 * error).all() and (error < 0.005).all()


def test_a_gaussian_has_the_affine_field_derived_by_hand():
    """x_t ~ N(t m, c^2), c^2 = t^2 s^2 + (1 - t)^2, and its flow keeps (x - t m) / c: u = m + c'/c (x - t m)."""
    m, s, x = normal(1, 2, seed=2), 0.4, normal(6, 2)
    for t in (0.0, 0.3, 0.8, 1.0):
        slope = (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2)
        found = GaussianMixture(m, s).field()(x, torch.tensor(t, dtype=torch.float64))
        torch.testing.assert_close(found, m + slope * (x - t * m))


def test_responsibilities_are_bayes_rule():
    data, x, t = mixture(2), normal(5, 2), 0.7
    each = [GaussianMixture(data.means[k : k + 1], data.stds[k : k + 1]).log_density(x, t).exp() for k in range(4)]
    joint = data.weights * torch.stack(each, 1)
    torch.testing.assert_close(data.responsibilities(x, t), joint / joint.sum(1, keepdim=True))


@each_schedule
def test_a_finite_dataset_near_its_end_is_its_nearest_point_in_float32(schedule):
    """A thousand points, at t = 1 - 1e-6 and at 1: the denoiser is the point itself, to the last bit."""
    points = normal(1000, 8, dtype=torch.float32)
    data, t = finite_dataset(points), torch.tensor(1 - 1e-6)
    at = schedule(t)
    eps = normal(1000, 8, seed=3, dtype=torch.float32)
    x = at.alpha * points + at.beta * eps
    assert torch.equal(data.quantity("denoiser", x, t, schedule), points)
    # the noise is a difference of neighbours over beta: what rounding leaves of it
    rounding = 4 * torch.finfo(torch.float32).eps * points.abs().max() / at.beta
    assert (data.quantity("noise", x, t, schedule) - eps).abs().max() < rounding
    elsewhere = points + 0.01 * eps
    assert torch.equal(data.quantity("denoiser", elsewhere, 1.0, schedule), points[torch.cdist(elsewhere, points).argmin(1)])
    for name in QUANTITIES:
        assert torch.isfinite(data.quantity(name, elsewhere, 1.0, schedule)).all()


def test_a_finite_dataset_weighs_its_points():
    data = finite_dataset(torch.tensor([[1.0], [-1.0]]), torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(data.quantity("denoiser", torch.zeros(1, 1), 0.5), torch.tensor([[0.5]]))


def test_draws_have_the_moments_of_the_data():
    data, count = mixture(2), 100_000
    draws = data.sample(count, torch.Generator().manual_seed(0))
    mean = data.weights @ data.means
    second = data.weights @ (data.means**2 + data.stds[:, None] ** 2)
    for power, exact in ((draws, mean), (draws**2, second)):
        error = power.std(0) / count**0.5
        assert ((power.mean(0) - exact).abs() < 4 * error).all()
    again = data.sample(count, torch.Generator().manual_seed(0))
    assert torch.equal(draws, again) and draws.dtype == data.means.dtype


@each_schedule
@pytest.mark.parametrize("shape", [(3,), (2, 3, 2), (1,)])
def test_one_time_for_all_is_the_same_time_for_each(schedule, shape):
    data, x = mixture(*shape), normal(6, *shape)
    for name in QUANTITIES:
        one = data.quantity(name, x, 0.6, schedule)
        assert one.shape == x.shape
        torch.testing.assert_close(data.quantity(name, x, torch.full((6,), 0.6, dtype=torch.float64), schedule), one)
    torch.testing.assert_close(
        data.log_density(x, torch.full((6,), 0.6, dtype=torch.float64), schedule), data.log_density(x, 0.6, schedule)
    )


def test_a_samples_value_depends_on_no_other_sample():
    data, x, t = mixture(3, 2), normal(7, 3, 2), torch.linspace(0, 1, 7, dtype=torch.float64)
    for name in QUANTITIES:
        together = data.quantity(name, x, t)
        alone = torch.cat([data.quantity(name, x[i : i + 1], t[i : i + 1]) for i in range(7)])
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
        scalar = torch.cat([data.quantity(name, x[i : i + 1], t[i].item()) for i in range(7)])
        torch.testing.assert_close(together, scalar, rtol=1e-12, atol=1e-12)


def test_the_work_is_done_in_the_widest_dtype():
    data = mixture(3, dtype=torch.float32)
    x = normal(4, 3, dtype=torch.float32)
    assert data.quantity("velocity", x.bfloat16(), 0.5).dtype == torch.float32
    assert data.quantity("velocity", x.double(), 0.5).dtype == torch.float64
    assert data.quantity("velocity", x, torch.tensor(0.5, dtype=torch.float64)).dtype == torch.float64
    # a time written in Python is not rounded to float32 on its way to a float64 result
    exact = mixture(3).log_density(x.double(), torch.tensor(0.3, dtype=torch.float64))
    assert torch.equal(mixture(3).log_density(x.double(), 0.3), exact)


def test_weights_need_not_sum_to_one():
    data = GaussianMixture(torch.zeros(2, 1), 1.0, torch.tensor([2, 6]))
    assert data.weights.tolist() == [0.25, 0.75] and data.stds.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianMixture(torch.zeros(3)), r"means must be .* got torch.float32 \(3,\)"),
        (lambda: GaussianMixture(torch.zeros(0, 2)), r"\(0, 2\)"),
        (lambda: GaussianMixture(torch.zeros(2, 2).long()), "int64"),
        (lambda: GaussianMixture(torch.zeros(2, 1), -0.5), r"stds must be >= 0.* got \[-0.5, -0.5\]"),
        (lambda: GaussianMixture(torch.zeros(2, 1), math.nan), "nan"),
        (lambda: GaussianMixture(torch.zeros(2, 1), torch.ones(3)), r"\[1.0, 1.0, 1.0\] .* for 2 means"),
        (lambda: GaussianMixture(torch.zeros(2, 1), torch.ones(1)), r"\[1.0\] .* for 2 means"),
        (lambda: GaussianMixture(torch.zeros(2, 1), 1.0, torch.tensor([1.0, 0.0])), r"\[1.0, 0.0\]"),
        (lambda: GaussianMixture(torch.zeros(2, 1), 1.0, torch.tensor([1.0, math.inf])), "inf"),
        (lambda: GaussianMixture(torch.zeros(2, 1), 1.0, torch.ones(3)), "for 2 means"),
        (lambda: mixture(3).log_density(torch.zeros(5, 2)), r"x must be \[B, 3\], got \(5, 2\)"),
        (lambda: mixture(3).quantity("velocity", torch.zeros(5, 3), torch.zeros(4)), r"\(4,\) for x \(5, 3\)"),
        (lambda: mixture(3).quantity("speed", torch.zeros(5, 3), 0.5), "'speed'"),
    ],
)
def test_bad_inputs_are_refused_with_their_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
