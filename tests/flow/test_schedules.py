"""Schedules against automatic differentiation, their own inverses, and the diffusion that one of them comes from."""

import math

import pytest
import torch

from latentfm.flow.schedules import SCHEDULES, CondOT, Cosine, Polynomial, VariancePreserving, log_snr

EACH = [CondOT(), Cosine(), Polynomial(), Polynomial(1.0), Polynomial(3.5), VariancePreserving(), VariancePreserving(1.0, 4.0)]
each_schedule = pytest.mark.parametrize("schedule", EACH, ids=str)
INSIDE = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


@each_schedule
def test_slopes_are_those_of_autograd(schedule):
    at = schedule(INSIDE)
    for name in ("alpha", "beta"):
        slope = torch.func.vmap(torch.func.grad(lambda t, name=name: getattr(schedule(t), name)))(INSIDE)
        torch.testing.assert_close(getattr(at, f"d_{name}"), slope, rtol=1e-11, atol=1e-12)


@each_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_are_reached_exactly_and_noise_up_to_the_trace_that_is_stated(schedule, dtype):
    start, end = schedule(torch.zeros((), dtype=dtype)), schedule(torch.ones((), dtype=dtype))
    assert (end.alpha, end.beta) == (1, 0)
    if isinstance(schedule, VariancePreserving):
        trace = math.exp(-(schedule.low + schedule.high) / 4)  # exp(-T / 2) for T = integral_0^1 b
        assert start.alpha.item() == pytest.approx(trace, rel=1e-6)
        assert start.beta.item() == pytest.approx(math.sqrt(1 - trace**2), rel=1e-6)
    else:
        assert (start.alpha, start.beta) == (0, 1)


def test_the_trace_of_the_default_rates_is_the_one_stated():
    assert VariancePreserving()(torch.zeros(())).alpha.item() == pytest.approx(0.0066, abs=5e-5)


@pytest.mark.parametrize(
    ("schedule", "slopes"),
    [
        (CondOT(), (1, -1, 1, -1)),
        (Cosine(), (math.pi / 2, 0, 0, -math.pi / 2)),
        (Polynomial(), (0, 0, 2, -2)),
        (Polynomial(1.0), (1, -1, 1, -1)),
    ],
    ids=str,
)
def test_slopes_at_the_ends(schedule, slopes):
    start, end = schedule(torch.tensor(0.0)), schedule(torch.tensor(1.0))
    assert [c.item() for c in (start.d_alpha, start.d_beta, end.d_alpha, end.d_beta)] == pytest.approx(slopes, abs=1e-6)


@each_schedule
@pytest.mark.parametrize("shape", [(), (5,), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_coefficient_is_finite_and_like_t(schedule, shape, dtype):
    t = torch.linspace(0, 1, max(1, math.prod(shape)), dtype=dtype).reshape(shape)
    for coefficient in schedule(t):
        assert coefficient.shape == shape and coefficient.dtype == dtype and torch.isfinite(coefficient).all()


@each_schedule
def test_alpha_rises_and_beta_falls(schedule):
    at = schedule(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert (at.alpha.diff() > 0).all() and (at.beta.diff() < 0).all()
    assert (at.d_alpha >= 0).all() and (at.d_beta <= 0).all()


@each_schedule
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-7), (torch.float64, 1e-15)])
def test_time_at_inverts_the_signal_to_noise_ratio(schedule, dtype, within):
    t = torch.linspace(0, 1, 10_001, dtype=dtype)
    torch.testing.assert_close(schedule.time_at(log_snr(schedule, t)), t, rtol=0, atol=within)


@each_schedule
def test_a_ratio_beyond_the_schedule_has_the_nearest_end_for_its_time(schedule):
    assert schedule.time_at(torch.tensor([-1e5, -math.inf, 1e5, math.inf])).tolist() == [0, 0, 1, 1]


@each_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_snr_is_finite_and_increasing_ends_included(schedule, dtype):
    t = torch.linspace(0, 1, 10_001, dtype=dtype)
    ratio = log_snr(schedule, t)
    assert torch.isfinite(ratio).all() and (ratio.diff() > 0).all()
    assert ratio.shape == t.shape and ratio.dtype == dtype
    at = schedule(t[1:-1])
    torch.testing.assert_close(ratio[1:-1].exp(), (at.alpha / at.beta) ** 2, rtol=1e-4, atol=0)


def test_log_snr_at_the_ends_is_what_is_stated():
    assert log_snr(CondOT(), torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([-174.67, 0, 174.67], abs=0.01)


def test_variance_preserving_vector():
    at = VariancePreserving()(torch.tensor(0.5, dtype=torch.float64))
    assert [c.item() for c in at] == pytest.approx([0.281183, 0.959654, 1.412944, -0.413999], abs=1e-6)


@pytest.mark.parametrize("schedule", [Cosine(), VariancePreserving(), VariancePreserving(1.0, 4.0)], ids=str)
def test_schedules_that_preserve_the_variance(schedule):
    at = schedule(torch.linspace(0, 1, 101, dtype=torch.float64))
    torch.testing.assert_close(at.alpha**2 + at.beta**2, torch.ones(101, dtype=torch.float64), rtol=0, atol=1e-14)


def test_variance_preserving_solves_the_moments_of_its_diffusion():
    """dX = -b X / 2 ds + sqrt(b) dW has d mean/ds = -b mean / 2 and d var/ds = b (1 - var), with s = 1 - t."""
    low, high = 0.3, 7.0
    at = VariancePreserving(low, high)(INSIDE)
    rate = low + (high - low) * (1 - INSIDE)
    torch.testing.assert_close(-at.d_alpha, -rate * at.alpha / 2)
    torch.testing.assert_close(-2 * at.beta * at.d_beta, rate * (1 - at.beta**2))


def test_the_infinite_slope_is_taken_at_the_shortest_distance_and_the_others_left_alone():
    schedule = VariancePreserving(shortest=1e-3)
    t = torch.tensor([1 - 2e-3, 1 - 1e-3, 1 - 1e-4, 1.0], dtype=torch.float64)
    slope = schedule(t).d_beta
    torch.testing.assert_close(slope[1:], slope[1].expand(3), rtol=1e-9, atol=0)
    assert slope[0] > slope[1] > -math.inf
    expected = -0.1 / (2 * math.sqrt(0.1 * 1e-5))  # beta is near sqrt(low s): its slope is -low / (2 sqrt(low s))
    assert VariancePreserving()(torch.ones(())).d_beta.item() == pytest.approx(expected, rel=2e-3)


def test_the_registry_makes_every_schedule_by_name():
    expected = {"condot": CondOT, "cosine": Cosine, "polynomial": Polynomial, "variance_preserving": VariancePreserving}
    assert expected.items() <= SCHEDULES.items()
    for schedule in SCHEDULES.values():
        assert schedule() == schedule() and hash(schedule()) == hash(schedule())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Polynomial(0.5), "n must be at least 1 and finite, got 0.5"),
        (lambda: Polynomial(math.inf), "inf"),
        (lambda: Polynomial(math.nan), "nan"),
        (lambda: VariancePreserving(low=0.0), "0 < low <= high, got 0.0 and 20.0"),
        (lambda: VariancePreserving(low=2.0, high=1.0), "got 2.0 and 1.0"),
        (lambda: VariancePreserving(high=math.inf), "inf"),
        (lambda: VariancePreserving(shortest=0.0), "shortest must lie between 0 and 1, got 0.0"),
        (lambda: VariancePreserving(shortest=1.0), "got 1.0"),
    ],
)
def test_bad_parameters_are_refused_with_their_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
