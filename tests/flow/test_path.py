"""The conditional path and its velocity, and the four quantities, against automatic differentiation and the notes."""

import pytest
import torch

from latentfm.flow.analytic import GaussianMixture
from latentfm.flow.path import QUANTITIES, conditional_velocity, convert, ends, expand_like, sample_path
from latentfm.flow.schedules import Coefficients, CondOT, Cosine, Polynomial, VariancePreserving


class Quarter:
    """alpha = sin(pi t / 2), beta = cos(pi t / 2): a schedule of the caller's own, with slopes that are not constant."""

    def __call__(self, t):
        rate = torch.pi / 2
        sin, cos = torch.sin(rate * t), torch.cos(rate * t)
        return Coefficients(alpha=sin, beta=cos, d_alpha=rate * cos, d_beta=-rate * sin)


def batch(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(2))
    return z, eps, torch.rand(shape[0], generator=generator, dtype=dtype)


def test_condot_derivatives_are_those_of_autograd():
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    at = CondOT()(t)
    for value, slope in ((lambda t: CondOT()(t).alpha, at.d_alpha), (lambda t: CondOT()(t).beta, at.d_beta)):
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(value))(t), slope, rtol=0, atol=0)
    assert all(c.shape == t.shape and c.dtype == t.dtype for c in at)


@pytest.mark.parametrize("schedule", [CondOT(), Quarter(), Polynomial(), VariancePreserving()])
def test_velocity_is_the_time_derivative_of_the_path(schedule):
    z, eps, t = batch(5, 3, 2, dtype=torch.float64)
    point, rate = torch.func.jvp(lambda t: sample_path(z, eps, t, schedule).x_t, (t,), (torch.ones_like(t),))
    sample = sample_path(z, eps, t, schedule)
    torch.testing.assert_close(sample.x_t, point)
    torch.testing.assert_close(sample.velocity, rate)


@pytest.mark.parametrize("schedule", [CondOT(), Quarter(), Polynomial(), VariancePreserving()])
def test_velocity_is_equation_20_at_the_sampled_point(schedule):
    z, eps, t = batch(6, 4, dtype=torch.float64)
    t = 0.05 + 0.9 * t
    sample = sample_path(z, eps, t, schedule)
    at = schedule(t[:, None])
    ratio = at.d_beta / at.beta
    torch.testing.assert_close(sample.velocity, (at.d_alpha - ratio * at.alpha) * z + ratio * sample.x_t)


def test_the_ends_are_noise_and_data_exactly():
    z, eps, _ = batch(4, 3, 2, 2)
    assert torch.equal(sample_path(z, eps, torch.zeros(4)).x_t, eps)
    assert torch.equal(sample_path(z, eps, torch.ones(4)).x_t, z)


def test_condot_velocity_is_bitwise_z_minus_eps_even_at_the_ends():
    z, eps, t = batch(64, 3, 5)
    t[0], t[1] = 0, 1
    assert torch.equal(sample_path(z, eps, t).velocity, z - eps)


def test_each_sample_uses_its_own_time_when_batch_and_width_agree():
    z, eps, t = batch(4, 4)
    together = sample_path(z, eps, t).x_t
    alone = torch.cat([sample_path(z[i : i + 1], eps[i : i + 1], t[i : i + 1]).x_t for i in range(4)])
    assert torch.equal(together, alone)
    assert len(t.unique()) == 4


def test_half_precision_data_is_noised_in_float32():
    z, eps, t = batch(4, 3)
    half = sample_path(z.bfloat16(), eps.bfloat16(), t)
    full = sample_path(z.bfloat16().float(), eps.bfloat16().float(), t)
    assert half.x_t.dtype == half.velocity.dtype == torch.float32
    assert torch.equal(half.x_t, full.x_t) and torch.equal(half.velocity, full.velocity)


def test_expand_like_aligns_times_with_the_batch():
    t = torch.rand(3)
    assert torch.equal(expand_like(t, torch.zeros(3)), t)
    assert expand_like(t, torch.zeros(3, 16, 8, 8)).shape == (3, 1, 1, 1)


@pytest.mark.parametrize(
    ("z", "eps", "t", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2), r"\(2, 3\) and \(2, 4\)"),
        (torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(2), r"\(2, 3\) and \(1, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1), r"\(2, 1\) for \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1), r"\(1,\) for \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor(0.5), r"\(\) for \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0.5, 1.25]), r"1\.25"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([-0.5, 1.0]), r"-0\.5"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0.5, torch.nan]), "nan"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0.5, torch.inf]), "inf"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]), "int64"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2).bfloat16(), "bfloat16"),
        (torch.zeros(2, 3).int(), torch.zeros(2, 3), torch.zeros(2), "z must be floating point, got torch.int32"),
        (torch.zeros(2, 3), torch.zeros(2, 3).long(), torch.zeros(2), "eps must be floating point, got torch.int64"),
    ],
)
def test_bad_inputs_are_refused_with_their_values(z, eps, t, message):
    with pytest.raises(ValueError, match=message):
        sample_path(z, eps, t)


EACH = [CondOT(), Cosine(), Polynomial(), VariancePreserving()]
each_schedule = pytest.mark.parametrize("schedule", EACH, ids=str)


def mixture(*shape):
    means = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.3, 0.8, 0.5]), torch.tensor([1.0, 2.0, 1.0]))


@each_schedule
@pytest.mark.parametrize("source", QUANTITIES)
@pytest.mark.parametrize("target", QUANTITIES)
def test_every_quantity_converts_to_every_other(schedule, source, target):
    """Against the mixture, which has each by its own formula, at times near both ends and between; any shape."""
    for shape in ((3,), (2, 3, 2), (1,)):
        data, (x, _, _) = mixture(*shape), batch(5, *shape, dtype=torch.float64)
        times = torch.tensor([0.03, 0.25, 0.5, 0.9, 0.99], dtype=torch.float64)
        for t in (times, *times):
            given, expected = (data.quantity(name, x, t, schedule) for name in (source, target))
            torch.testing.assert_close(convert(given, x, t, source, target, schedule), expected, rtol=1e-8, atol=1e-8)


@each_schedule
def test_proposition_1_and_equation_43(schedule):
    """u = a s + b x with a = beta^2 alpha'/alpha - beta' beta, b = alpha'/alpha, the score by autograd; D from u."""
    data, (x, _, t) = mixture(3), batch(8, 3, dtype=torch.float64)
    t = 0.05 + 0.9 * t
    score = torch.func.grad(lambda x: data.log_density(x, t, schedule).sum())(x)
    alpha, beta, d_alpha, d_beta = schedule(t[:, None])
    velocity = (beta**2 * d_alpha / alpha - d_beta * beta) * score + d_alpha / alpha * x
    torch.testing.assert_close(convert(score, x, t, "score", "velocity", schedule), velocity)
    torch.testing.assert_close(data.quantity("velocity", x, t, schedule), velocity)
    denoiser = (beta * velocity - d_beta * x) / (d_alpha * beta - alpha * d_beta)
    torch.testing.assert_close(convert(velocity, x, t, "velocity", "denoiser", schedule), denoiser)
    torch.testing.assert_close(data.quantity("denoiser", x, t, schedule), denoiser)


@each_schedule
def test_conditional_velocity_is_equation_20_off_the_path_as_well(schedule):
    z, x, t = batch(6, 2, 3, dtype=torch.float64)
    t = 0.05 + 0.9 * t
    at = schedule(expand_like(t, x))
    ratio = at.d_beta / at.beta
    torch.testing.assert_close(conditional_velocity(x, z, t, schedule), (at.d_alpha - ratio * at.alpha) * z + ratio * x)
    sample = sample_path(z, x, t, schedule)
    torch.testing.assert_close(conditional_velocity(sample.x_t, z, t, schedule), sample.velocity)
    one_point = GaussianMixture(z[:1], 0.0)
    torch.testing.assert_close(
        conditional_velocity(x, z[:1].expand_as(z), t, schedule), one_point.quantity("velocity", x, t, schedule)
    )


@each_schedule
@pytest.mark.parametrize("source", QUANTITIES)
def test_a_pair_is_recovered_from_any_quantity_and_its_point(schedule, source):
    z, eps, t = batch(6, 2, 3, dtype=torch.float64)
    t = 0.05 + 0.9 * t
    sample = sample_path(z, eps, t, schedule)
    value = {"velocity": sample.velocity, "score": -eps / schedule(expand_like(t, z)).beta, "denoiser": z, "noise": eps}[source]
    found = ends(value, sample.x_t, t, source, schedule)
    torch.testing.assert_close(found.z, z)
    torch.testing.assert_close(found.eps, eps)


@pytest.mark.parametrize("schedule", [CondOT(), Cosine(), Polynomial(1.0)], ids=str)
def test_a_velocity_has_both_ends_at_every_time_in_float32(schedule):
    z, eps, _ = batch(4, 3)
    for t in (0.0, 1e-7, 0.5, 1 - 1e-7, 1.0):
        t = torch.full((4,), t)
        sample = sample_path(z, eps, t, schedule)
        found = ends(sample.velocity, sample.x_t, t, "velocity", schedule)
        torch.testing.assert_close(found.z, z, rtol=0, atol=2e-6)
        torch.testing.assert_close(found.eps, eps, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("source", "schedule", "t", "exact"),
    [
        ("denoiser", CondOT(), 1.0, "z"),
        ("denoiser", Cosine(), 1.0, "z"),
        ("denoiser", VariancePreserving(), 1.0, "z"),
        ("noise", CondOT(), 0.0, "eps"),
        ("noise", Polynomial(), 0.0, "eps"),
        ("score", CondOT(), 0.0, "eps"),
        ("velocity", Polynomial(), 0.0, "eps"),
        ("velocity", Polynomial(), 1e-7, "eps"),
        ("velocity", Polynomial(3.5), 0.0, "eps"),
        ("velocity", Polynomial(), 1.0, "z"),
        ("velocity", VariancePreserving(), 1.0, "z"),
    ],
)
def test_where_an_end_is_undetermined_the_other_is_exact_and_both_are_finite(source, schedule, t, exact):
    z, eps, _ = batch(4, 3)
    t = torch.full((4,), t)
    sample = sample_path(z, eps, t, schedule)
    value = {"velocity": sample.velocity, "score": -eps, "denoiser": z, "noise": eps}[source]
    found = ends(value, sample.x_t, t, source, schedule)
    assert torch.isfinite(found.z).all() and torch.isfinite(found.eps).all()
    torch.testing.assert_close(getattr(found, exact), {"z": z, "eps": eps}[exact], rtol=0, atol=1e-6)
    for target in QUANTITIES:
        assert torch.isfinite(convert(value, sample.x_t, t, source, target, schedule)).all()


def test_noise_and_score_are_one_number_where_the_data_are_undetermined():
    x, eps, _ = batch(4, 3)
    assert torch.equal(convert(eps, x, torch.tensor(0.0), "noise", "score"), -eps)
    assert torch.equal(convert(-eps, x, torch.tensor(0.0), "score", "noise"), eps)


@pytest.mark.parametrize("target", QUANTITIES)
def test_conversions_are_in_float32_at_least_for_one_time_and_for_each(target):
    value, x, _ = batch(4, 3)
    value, x = value.bfloat16(), x.bfloat16()
    for t in (torch.tensor(0.3), torch.full((4,), 0.3)):
        found = convert(value, x, t, "velocity", target)
        assert found.dtype == torch.float32
        assert torch.equal(found, convert(value.float(), x.float(), t, "velocity", target))
        assert convert(value, x, t.double(), "velocity", target).dtype == torch.float64
        assert convert(value.double(), x, t, "velocity", target).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, t: convert(x, x, t, "speed", "velocity"), "source must be one of velocity, .* got 'speed'"),
        (lambda x, t: convert(x, x, t, "velocity", "speed"), "target must be one of velocity, .* got 'speed'"),
        (lambda x, t: convert(x[:, :1], x, t, "noise", "velocity"), r"the noise and x .* \(2, 1\) and \(2, 3\)"),
        (lambda x, t: convert(x, x, t[:1], "noise", "velocity"), r"\(1,\) for \(2, 3\)"),
        (lambda x, t: convert(x, x, t.bfloat16(), "noise", "velocity"), "bfloat16"),
        (lambda x, t: ends(x, x, t, "eps"), "got 'eps'"),
        (lambda x, t: conditional_velocity(x, x[:1], t), r"\(1, 3\) and \(2, 3\)"),
    ],
)
def test_bad_conversions_are_refused_with_their_values(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3), torch.full((2,), 0.5))
