"""The CFM loss: its value, its minimiser, what else is regressed, and the weights that amount to the same."""

import math

import pytest
import torch

from latentfm.flow import (
    QUANTITIES,
    CondOT,
    Cosine,
    GaussianMixture,
    LogitNormal,
    Polynomial,
    Uniform,
    VariancePreserving,
    cfm_loss,
    convert,
    draw_t,
    sample_path,
)
from latentfm.flow.objective import (
    WEIGHTINGS,
    MinSNR,
    beta_squared,
    by_time,
    constant,
    cosmap,
    effective_weight,
    inverse_beta_squared,
    regression_target,
)
from latentfm.flow.timesteps import CosMap, Mode

SCHEDULES = [CondOT(), Cosine(), Polynomial(2.0), VariancePreserving()]
INSIDE = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)


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


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_targets_are_the_quantities_of_the_pair(quantity, schedule):
    """`convert`, given the conditional velocity at x_t, finds each of the others."""
    z, eps, t = normal(49, 3).double(), normal(49, 3, seed=1).double(), INSIDE
    x, velocity = sample_path(z, eps, t, schedule)
    target = regression_target(z, eps, t, quantity, schedule)
    torch.testing.assert_close(target, convert(velocity, x, t, "velocity", quantity, schedule), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_targets_are_finite_up_to_the_ends(quantity, schedule):
    z, eps, t = normal(4, 3).bfloat16(), normal(4, 3, seed=1).bfloat16(), torch.tensor([0.0, 1e-7, 1 - 6e-8, 1.0])
    target = regression_target(z, eps, t, quantity, schedule)
    assert target.dtype == torch.float32 and torch.isfinite(target).all()
    if quantity in ("denoiser", "noise"):
        assert torch.equal(target, (z if quantity == "denoiser" else eps).float())


def test_the_mean_target_is_the_marginal_quantity():
    """What least squares finds (Theorem 12, for all four): E[target f(x)] = E[marginal(x) f(x)] for a bounded f.

    Standard errors of these means over 100,000 draws: below 0.005 for targets of this size.
    """
    data = GaussianMixture(torch.tensor([[-2.0], [1.0]]), 0.5, torch.tensor([1.0, 2.0]))
    count, t = 100_000, 0.6
    z, eps, times = data.sample(count, torch.Generator().manual_seed(0)), normal(count, 1, seed=1), torch.full((count,), t)
    x = sample_path(z, eps, times).x_t
    for quantity in QUANTITIES:
        gap = regression_target(z, eps, times, quantity) - data.quantity(quantity, x, t)
        for f in (torch.ones_like(x), torch.sin(x), torch.cos(2 * x)):
            error = (gap * f).std().item() / count**0.5
            assert abs((gap * f).mean().item()) < 4 * error < 0.05


def test_the_score_weighted_by_beta_squared_is_the_noise_predictor():
    """Example 22: beta^2 |s + eps / beta|^2 = |eps_hat - eps|^2 with eps_hat = -beta s; at t = 1 it is 0 and finite."""
    z, eps, score = normal(50, 3), normal(50, 3, seed=1), normal(50, 3, seed=2)
    t = torch.linspace(0, 0.99, 50)
    losses = beta_squared(t) * cfm_loss(score, regression_target(z, eps, t, "score"))
    torch.testing.assert_close(losses, cfm_loss(-(1 - t)[:, None] * score, regression_target(z, eps, t, "noise")))
    end = torch.ones(50)
    assert (beta_squared(end) * cfm_loss(score, regression_target(z, eps, end, "score")) == 0).all()


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_seven_images_give_seven_losses_each_its_own(quantity, name):
    """Weights broadcast to [B, 1, 1, B] would mix the samples, and a batch would not be the sum of its parts."""
    z, eps, prediction = (normal(7, 4, 8, 6, seed=seed) for seed in range(3))
    t = torch.linspace(0.05, 0.95, 7)

    def losses(part):
        target = regression_target(z[part], eps[part], t[part], quantity)
        return WEIGHTINGS[name](t[part], CondOT()) * cfm_loss(prediction[part], target)

    together = losses(slice(None))
    assert together.shape == (7,)
    torch.testing.assert_close(together, torch.cat([losses(slice(i, i + 1)) for i in range(7)]))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    "weighting", [*WEIGHTINGS.values(), *(MinSNR(quantity=quantity) for quantity in QUANTITIES)],
    ids=lambda weighting: getattr(weighting, "__name__", str(weighting)),
)
def test_weights_are_finite_and_not_negative_up_to_the_ends(weighting, schedule):
    t = torch.tensor([0.0, 1e-30, 1e-7, 0.3, 1 - 6e-8, 1.0])
    weight = weighting(t, schedule)
    assert weight.shape == t.shape and weight.dtype == torch.float32
    assert torch.isfinite(weight).all() and (weight >= 0).all()
    for quantity in QUANTITIES:
        effective = effective_weight(t, quantity, weighting, LogitNormal(), 3.0, schedule)
        assert torch.isfinite(effective).all() and (effective >= 0).all()


def test_weights_of_the_linear_schedule_are_those_of_diffusers_sd3_training():
    training_utils = pytest.importorskip("diffusers.training_utils")
    sigmas = torch.linspace(1e-3, 1, 1000)
    for scheme, weighting in (("none", constant), ("sigma_sqrt", inverse_beta_squared), ("cosmap", cosmap)):
        expected = training_utils.compute_loss_weighting_for_sd3(scheme, sigmas)
        torch.testing.assert_close(weighting(1 - sigmas), expected, rtol=2e-4, atol=0)


def test_min_snr_is_the_papers():
    """Hang et al.: min(SNR, g) for x0, min(SNR, g) / SNR for noise, min(SNR, g) / (SNR + 1) for v = alpha eps - beta z.

    On the cosine schedule the velocity is -(pi / 2) v.
    """
    snr = torch.tan(math.pi * INSIDE / 2) ** 2
    capped = snr.clamp(max=5.0)
    torch.testing.assert_close(MinSNR(5.0, "denoiser")(INSIDE, Cosine()), capped)
    torch.testing.assert_close(MinSNR(5.0, "noise")(INSIDE, Cosine()), capped / snr)
    torch.testing.assert_close(MinSNR(5.0, "velocity")(INSIDE, Cosine()), capped / (snr + 1) / (math.pi / 2) ** 2)
    torch.testing.assert_close(MinSNR(3.0)(INSIDE), torch.minimum(INSIDE**2, 3 * (1 - INSIDE) ** 2))
    assert MinSNR(4.0, "denoiser")(torch.tensor([0.0, 1.0])).tolist() == [0, 4]
    assert MinSNR(4.0, "noise")(torch.tensor([0.0, 1.0])).tolist() == [1, 0]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_min_snr_is_one_training_whatever_is_predicted(schedule):
    def effective(quantity):
        return effective_weight(INSIDE, quantity, MinSNR(2.0, quantity), Mode(), 1.5, schedule)

    for quantity in QUANTITIES:
        torch.testing.assert_close(effective(quantity), effective("velocity"))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_effective_weight_is_that_of_the_velocitys_error(quantity, schedule):
    """A disturbed prediction of the quantity, turned into a velocity by `convert`: w |dq|^2 p = effective |du|^2."""
    z, eps, t = normal(49, 3).double(), normal(49, 3, seed=1).double(), INSIDE
    x = sample_path(z, eps, t, schedule).x_t
    target = regression_target(z, eps, t, quantity, schedule)
    prediction = target + 0.1 * normal(49, 3, seed=2).double()
    du = convert(prediction, x, t, quantity, "velocity", schedule) - convert(target, x, t, quantity, "velocity", schedule)
    dq = prediction - target
    stated = cosmap(t, schedule) * dq.square().sum(1) * LogitNormal().pdf(1 - t)
    amounts = effective_weight(t, quantity, cosmap, LogitNormal(), schedule=schedule) * du.square().sum(1)
    torch.testing.assert_close(amounts, stated, rtol=1e-5, atol=1e-12)


def test_effective_weight_is_what_training_averages():
    """The mean of w |dq|^2 over drawn t is the integral of effective |du|^2, here for a denoiser whose velocity errs by cos t."""
    density, shift, count = LogitNormal(0.3, 0.8), 2.0, 200_000
    t = draw_t(torch.rand(count, generator=torch.Generator().manual_seed(0)), density, shift).double()
    drawn = MinSNR(quantity="denoiser")(t, CondOT()) * ((1 - t) * torch.cos(t)).square()
    every = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    effective = effective_weight(every, "denoiser", MinSNR(quantity="denoiser"), density, shift)
    integral = torch.trapezoid(effective * torch.cos(every).square(), every).item()
    assert abs(drawn.mean().item() - integral) < 4 * drawn.std().item() / count**0.5 < 0.02 * integral


def test_trainings_that_are_one_and_the_same():
    """Stated differently, equal in the mean: the sense of `effective_weight`."""
    t = INSIDE[:-1]  # 1 / sigma^2 is bounded beyond
    plain = effective_weight(t, "velocity", constant, LogitNormal())
    torch.testing.assert_close(effective_weight(t, "denoiser", inverse_beta_squared, LogitNormal()), plain)
    by_weight = effective_weight(t, "velocity", cosmap, Uniform())
    torch.testing.assert_close(by_weight, effective_weight(t, "velocity", constant, CosMap()))
    score = effective_weight(t, "score", beta_squared, Uniform())
    torch.testing.assert_close(score, effective_weight(t, "noise", constant, Uniform()))
    torch.testing.assert_close(score, t**2)
    torch.testing.assert_close(effective_weight(t, "denoiser", constant, Uniform()), (1 - t) ** 2)


def test_by_time_is_the_mean_of_each_interval():
    losses, t = normal(500).exp(), torch.rand(500, generator=torch.Generator().manual_seed(1))
    mean, count = by_time(losses, t, 7)
    assert count.dtype == torch.int64 and count.sum() == 500
    for i in range(7):
        inside = (t >= i / 7) & (t < (i + 1) / 7)
        assert count[i] == inside.sum()
        torch.testing.assert_close(mean[i], losses[inside].mean())


def test_by_time_at_the_edges_and_where_nothing_is():
    losses = torch.tensor([1.0, 2.0, 4.0, float("nan")]).requires_grad_()
    mean, count = by_time(losses, torch.tensor([0.0, 0.25, 1.0, 0.6]), 4)
    assert not mean.requires_grad
    assert count.tolist() == [1, 1, 1, 1]
    assert mean[[0, 1, 3]].tolist() == [1, 2, 4] and mean[2].isnan()
    mean, count = by_time(losses[:1], torch.tensor([0.9]), 3)
    assert count.tolist() == [0, 0, 1] and mean[:2].isnan().all() and mean[2] == 1
    mean, count = by_time(torch.empty(0), torch.empty(0), 2)
    assert count.tolist() == [0, 0] and mean.isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: regression_target(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), "flow"), "velocity, score.*'flow'"),
        (lambda: regression_target(torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(2), "noise"), r"\(2, 3\) and \(2, 1\)"),
        (lambda: regression_target(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0.5, 1.5]), "noise"), r"1\.5"),
        (lambda: effective_weight(torch.zeros(2), "flow", constant, Uniform()), "quantity .*'flow'"),
        (lambda: effective_weight(torch.zeros(2), "noise", constant, Uniform(), shift=0.0), r"shift .*0\.0"),
        (lambda: MinSNR(0.0), r"gamma .*0\.0"),
        (lambda: MinSNR(math.inf), "gamma .*inf"),
        (lambda: MinSNR(5.0, "x0"), "quantity .*'x0'"),
        (lambda: by_time(torch.zeros(2, 3), torch.zeros(2), 4), r"\(2, 3\) and \(2,\)"),
        (lambda: by_time(torch.zeros(2), torch.zeros(3), 4), r"\(2,\) and \(3,\)"),
        (lambda: by_time(torch.zeros(2), torch.zeros(2), 0), "buckets .*0"),
    ],
)
def test_bad_inputs_are_refused_with_their_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
