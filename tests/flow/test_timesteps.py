"""Densities against numerical integration, shifts against their algebra, grids against diffusers."""

import pytest
import torch

from latentfm.flow import (
    DENSITIES,
    GRIDS,
    LogitNormal,
    Uniform,
    diffusers_grid,
    draw_t,
    shift_sigma,
    uniform_grid,
)

LAWS = [Uniform(), LogitNormal(), LogitNormal(-0.5, 0.6), LogitNormal(1.0, 1.5)]
SHIFTS = [0.25, 1.0, 1.1, 3.0, 6.0]
UNIT = torch.linspace(0, 1, 200_001, dtype=torch.float64)
LARGEST_DRAW = 1 - 2**-24


def cumulative(law):
    """The distribution function of the law on UNIT, by the trapezoidal rule over its pdf."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(law.pdf(UNIT), UNIT)])


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_pdf_is_a_density(law):
    pdf = law.pdf(UNIT)
    assert torch.isfinite(pdf).all() and (pdf >= 0).all()
    assert cumulative(law)[-1].item() == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_icdf_inverts_the_integrated_pdf(law):
    cdf = cumulative(law)
    for u in torch.linspace(0.001, 0.999, 41, dtype=torch.float64):
        i = torch.searchsorted(UNIT, law.icdf(u)).clamp(1, len(UNIT) - 1)
        share = (law.icdf(u) - UNIT[i - 1]) / (UNIT[i] - UNIT[i - 1])
        assert torch.lerp(cdf[i - 1], cdf[i], share).item() == pytest.approx(u.item(), abs=1e-6)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_random_draws_follow_the_pdf(law):
    """Kolmogorov-Smirnov: sqrt(n) times the largest distance of the two distribution functions exceeds 1.95 in 1e-3."""
    count = 20_000
    t = draw_t(torch.rand(count, generator=torch.Generator().manual_seed(0)), law)
    sigma = (1 - t.double()).sort().values
    expected = cumulative(law)[torch.searchsorted(UNIT, sigma).clamp(max=len(UNIT) - 1)]
    empirical = torch.arange(1, count + 1) / count
    assert (empirical - expected).abs().max().item() * count**0.5 < 1.95


def test_logit_normal_mean_is_on_sigma():
    """The median of sigma is sigmoid(mean): a positive mean means more noise, that is smaller t."""
    median = draw_t(torch.tensor([0.5]), LogitNormal(mean=1.0))
    assert median.item() == pytest.approx(1 - 0.7310586, abs=1e-6)


def test_logit_normal_pdf_vanishes_at_the_ends_and_beyond():
    assert LogitNormal().pdf(torch.tensor([-0.1, 0.0, 1.0, 1.1])).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_draw_is_a_time(law, shift, dtype):
    middle = torch.linspace(2**-12, 1 - 2**-12, 1000, dtype=dtype)
    u = torch.cat([torch.tensor([0, 2**-24], dtype=dtype), middle, torch.tensor([LARGEST_DRAW], dtype=dtype)])
    t = draw_t(u, law, shift)
    assert t.dtype == torch.float32
    assert ((t >= 0) & (t <= 1)).all()
    assert (t.diff() <= 0).all() and (t[2:-1].diff() < 0).all()


def test_draws_keep_their_shape_and_uniform_is_the_complement():
    u = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw_t(u, Uniform()), 1 - u)


def test_shift_moves_draws_towards_noise():
    u = torch.linspace(0.1, 0.9, 9)
    torch.testing.assert_close(draw_t(u, Uniform(), 3.0), 1 - 3 * u / (1 + 2 * u))
    assert (draw_t(u, Uniform(), 3.0) < draw_t(u, Uniform())).all()


@pytest.mark.parametrize("shift", SHIFTS)
def test_shift_is_the_papers_formula_and_fixes_the_ends(shift):
    sigma = torch.linspace(0, 1, 101)
    shifted = shift_sigma(sigma, shift)
    torch.testing.assert_close(shifted, (shift * sigma.double() / (1 + (shift - 1) * sigma.double())).float())
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted.diff() > 0).all()


def test_shift_one_is_the_identity_and_shifts_multiply():
    sigma = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small = torch.logspace(-12, 0, 1000)
    assert torch.equal(shift_sigma(sigma, 1.0), sigma) and torch.equal(shift_sigma(small, 1.0), small)
    torch.testing.assert_close(shift_sigma(shift_sigma(sigma, 1.7), 2.5), shift_sigma(sigma, 1.7 * 2.5))
    torch.testing.assert_close(shift_sigma(shift_sigma(sigma, 4.0), 1 / 4.0), sigma)


@pytest.mark.parametrize("shift", [1e-3, 0.1, 1.1, 1.3, 7.7, 1e3])
def test_rounding_never_leaves_the_unit_interval(shift):
    near_one = 1 - torch.arange(2**12) * 2**-24
    assert near_one.dtype == torch.float32
    shifted = shift_sigma(near_one, shift)
    assert shifted[0] == 1 and (shifted <= 1).all()


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 28, 1000])
@pytest.mark.parametrize("shift", SHIFTS)
def test_grids_run_from_noise_to_data_in_the_steps_asked_for(name, steps, shift):
    grid = GRIDS[name](steps, shift)
    assert grid.shape == (steps + 1,) and grid.dtype == torch.float32
    assert grid[0] == 0 and grid[-1] == 1
    assert (grid.diff() > 0).all()


def test_uniform_grid_vector():
    """Flux's dynamic shift at 4,096 tokens is exp(1.15): its published sigmas at 4 steps."""
    assert uniform_grid(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    expected = torch.tensor([1, 0.904531, 0.759511, 0.512844, 0])
    torch.testing.assert_close(1 - uniform_grid(4, 2.718281828459045**1.15), expected, rtol=0, atol=1e-6)


def test_diffusers_grid_vector():
    expected = torch.tensor([1, 0.857692, 0.602151, 0.008929, 0])
    torch.testing.assert_close(1 - diffusers_grid(4, 3.0), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 1.15, 3.0, 5.7, 12.0])
@pytest.mark.parametrize("num_train_timesteps", [1000, 100])
def test_diffusers_grid_is_that_of_diffusers(steps, shift, num_train_timesteps):
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_flow_match_euler_discrete")
    scheduler = scheduling.FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_train_timesteps, shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = 1 - diffusers_grid(steps, shift, num_train_timesteps)
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=0, atol=6e-8)


def test_registries_hold_what_their_names_say():
    assert {"uniform": Uniform, "logit_normal": LogitNormal}.items() <= DENSITIES.items()
    assert {"uniform": uniform_grid, "diffusers": diffusers_grid}.items() <= GRIDS.items()


@pytest.mark.parametrize("steps", [0, -3, 2.0, "4", True])
@pytest.mark.parametrize("name", GRIDS)
def test_bad_step_counts_are_refused_with_their_value(name, steps):
    with pytest.raises(ValueError, match=f"steps .*{steps!r}"):
        GRIDS[name](steps)


@pytest.mark.parametrize("shift", [0.0, -3.0, float("nan"), float("inf")])
def test_bad_shifts_are_refused_with_their_value(shift):
    calls = (
        lambda: shift_sigma(torch.rand(2), shift),
        lambda: draw_t(torch.rand(2), Uniform(), shift),
        lambda: uniform_grid(4, shift),
        lambda: diffusers_grid(4, shift),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"shift .*{shift}"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LogitNormal(std=0.0), r"std .*0\.0"),
        (lambda: LogitNormal(std=-1.0), r"std .*-1\.0"),
        (lambda: LogitNormal(std=float("inf")), "std .*inf"),
        (lambda: LogitNormal(mean=float("nan")), "mean .*nan"),
        (lambda: draw_t(torch.tensor([0.5, 1.5]), Uniform()), r"1\.5"),
        (lambda: draw_t(torch.tensor([-0.5, 0.5]), Uniform()), r"-0\.5"),
        (lambda: draw_t(torch.tensor([0.5, torch.nan]), Uniform()), "nan"),
        (lambda: draw_t(torch.tensor([0, 1]), Uniform()), "int64"),
        (lambda: draw_t(torch.rand(2).half(), Uniform()), "float16"),
        (lambda: diffusers_grid(4, 3.0, 1), "num_train_timesteps .*1"),
    ],
)
def test_other_bad_inputs_are_refused_with_their_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
