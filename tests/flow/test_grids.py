"""Sampling grids: their ends and order, published sigmas, diffusers side by side, scipy's Beta quantiles."""

import math

import pytest
import torch

from latentfm.flow.grids import GRIDS, beta_grid, diffusers_grid, karras_grid, uniform_grid
from latentfm.flow.timesteps import shift_from_tokens, shift_sigma

SHIFTS = [0.25, 1.0, 1.1, 3.0, 6.0]


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
    torch.testing.assert_close(1 - uniform_grid(4, shift_from_tokens(4096)), expected, rtol=0, atol=1e-6)


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


def reference(steps, **options):
    """The sigmas of diffusers' scheduler."""
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_flow_match_euler_discrete")
    scheduler = scheduling.FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
def test_karras_and_beta_grids_are_those_of_diffusers_without_a_shift(steps):
    torch.testing.assert_close(1 - karras_grid(steps), reference(steps, use_karras_sigmas=True), rtol=0, atol=1e-7)
    torch.testing.assert_close(1 - beta_grid(steps), reference(steps, use_beta_sigmas=True), rtol=0, atol=1e-7)


def test_with_a_shift_diffusers_moves_only_the_smallest_sigma():
    """So its grid is to be had through sigma_min; here the shift moves every time, as in the other grids."""
    sigmas = reference(20, shift=3.0, use_karras_sigmas=True)
    torch.testing.assert_close(1 - karras_grid(20, sigma_min=sigmas[-2].item()), sigmas, rtol=0, atol=2e-7)
    for grid in (karras_grid, beta_grid):
        torch.testing.assert_close(1 - grid(20, 3.0), shift_sigma(1 - grid(20).double(), 3.0).float(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0, 10.0])
def test_karras_grid_is_even_in_the_root_of_sigma(rho):
    roots = (1 - karras_grid(16, rho=rho, sigma_min=0.01).double())[:-1] ** (1 / rho)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(15), rtol=1e-4, atol=0)
    assert roots[-1].item() ** rho == pytest.approx(0.01, rel=1e-5)


def test_beta_grid_in_closed_form():
    """Shape 1 is the uniform law, 1/2 the arcsine law sin^2(pi p / 2), 2 the law with distribution function 3 x^2 - 2 x^3."""
    p = torch.linspace(0, 1, 21, dtype=torch.float64)

    def quantiles(shape):
        return ((1 - beta_grid(21, shape=shape).double()[:-1] - 0.001) / 0.999).flip(0)

    torch.testing.assert_close(quantiles(1.0), p, rtol=0, atol=1e-7)
    torch.testing.assert_close(quantiles(0.5), torch.sin(math.pi * p / 2) ** 2, rtol=0, atol=1e-7)
    x = quantiles(2.0)
    torch.testing.assert_close(3 * x**2 - 2 * x**3, p, rtol=0, atol=2e-7)


@pytest.mark.parametrize("shape", [0.5, 0.6, 0.9, 1.7, 9.5, 10.0])
def test_beta_grid_is_scipys_quantile(shape):
    from scipy import stats
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = 0.001 + 0.999 * torch.from_numpy(stats.beta.ppf(p.numpy(), shape, shape))
    torch.testing.assert_close((1 - beta_grid(101, shape=shape)[:-1]).double().flip(0), expected, rtol=0, atol=1e-7)


def test_registry_holds_what_its_names_say():
    assert {"uniform": uniform_grid, "diffusers": diffusers_grid, "karras": karras_grid, "beta": beta_grid} == GRIDS


@pytest.mark.parametrize("steps", [0, -3, 2.0, "4", True])
@pytest.mark.parametrize("name", GRIDS)
def test_bad_step_counts_are_refused_with_their_value(name, steps):
    with pytest.raises(ValueError, match=f"steps .*{steps!r}"):
        GRIDS[name](steps)


@pytest.mark.parametrize("shift", [0.0, -3.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", GRIDS)
def test_bad_shifts_are_refused_with_their_value(name, shift):
    with pytest.raises(ValueError, match=f"shift .*{shift}"):
        GRIDS[name](4, shift)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diffusers_grid(4, 3.0, 1), "num_train_timesteps .*1"),
        (lambda: karras_grid(4, rho=0.5), r"rho .*0\.5"),
        (lambda: karras_grid(4, rho=math.nan), "rho .*nan"),
        (lambda: karras_grid(4, sigma_min=0.0), r"sigma_min .*0\.0"),
        (lambda: beta_grid(4, sigma_min=1.0), r"sigma_min .*1\.0"),
        (lambda: beta_grid(4, shape=0.1), r"shape .*0\.1"),
        (lambda: beta_grid(4, shape=math.inf), "shape .*inf"),
    ],
)
def test_other_bad_inputs_are_refused_with_their_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
