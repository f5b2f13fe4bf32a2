"""Velocity fields from every quantity a network may predict, and one schedule's field sampled on another."""

import itertools

import pytest
import torch

from latentfm.flow.analytic import GaussianMixture
from latentfm.flow.fields import change_schedule, velocity_field
from latentfm.flow.grids import uniform_grid
from latentfm.flow.ode import RK4, integrate
from latentfm.flow.path import QUANTITIES
from latentfm.flow.schedules import CondOT, Cosine, Polynomial, VariancePreserving

EACH = [CondOT(), Cosine(), Polynomial(), Polynomial(1.0), VariancePreserving()]
DATA = GaussianMixture(
    torch.tensor([[1.5, -0.5], [-1.0, 1.0], [0.0, -2.0]]).double(), torch.tensor([0.4, 0.7, 0.5]), torch.tensor([1.0, 2.0, 1.0])
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def name(schedules):
    return " to ".join(type(schedule).__name__ for schedule in schedules)


@pytest.mark.parametrize("schedule", EACH, ids=str)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_network_of_any_quantity_has_the_velocity_of_the_data(schedule, quantity):
    x = normal(16, 2)
    field = velocity_field(lambda x, t: DATA.quantity(quantity, x, t, schedule), quantity, schedule)
    for t in torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64):
        torch.testing.assert_close(field(x, t), DATA.field(schedule)(x, t), rtol=1e-9, atol=1e-9)


def test_a_network_of_the_velocity_is_its_field():
    def network(x, t):
        return x * t

    assert velocity_field(network, "velocity", Cosine()) is network


@pytest.mark.parametrize("trained", EACH, ids=str)
def test_every_prediction_is_converted_at_the_point_and_time_it_is_asked_for(trained):
    seen = []

    def network(x, t):
        seen.append((x, t))
        return DATA.quantity("noise", x, t, trained)

    x, t = normal(3, 2), torch.tensor(0.4, dtype=torch.float64)
    velocity_field(network, "noise", trained)(x, t)
    assert len(seen) == 1 and seen[0][0] is x and seen[0][1] is t


@pytest.mark.parametrize("pair", list(itertools.product(EACH, EACH)), ids=name)
def test_a_changed_field_is_the_datas_own_on_the_other_schedule(pair):
    trained, sampling = pair
    changed, own, x = change_schedule(DATA.field(trained), trained, sampling), DATA.field(sampling), normal(16, 2)
    for r in torch.tensor([0.12, 0.3, 0.5, 0.8, 0.97, 0.999], dtype=torch.float64):  # from where each has the other's ratio
        torch.testing.assert_close(changed(x, r), own(x, r), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("pair", list(itertools.permutations([CondOT(), Cosine(), Polynomial()], 2)), ids=name)
def test_samples_are_the_same_on_every_schedule(pair):
    """Noise and data are where the schedules agree, so that each noise is carried to the same datum."""
    trained, sampling = pair
    noise, grid = normal(64, 2), uniform_grid(200).double()
    samples = integrate(DATA.field(trained), noise, grid, RK4())
    field, start = change_schedule(DATA.field(trained), trained, sampling), noise
    if isinstance(trained, Polynomial):  # its velocity at t = 0 says nothing of the data: a first short step is made without it
        start = noise + 1e-4 * DATA.field(sampling)(noise, torch.tensor(0.0))
        grid[0] = 1e-4
    torch.testing.assert_close(integrate(field, start, grid, RK4()), samples, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampling", [CondOT(), Cosine()], ids=str)
def test_a_trace_of_the_data_in_the_noise_is_as_small_in_the_samples(sampling):
    """VariancePreserving never reaches pure noise, alpha = 0.0066: to start from pure noise costs about that much."""
    trained, noise = VariancePreserving(), normal(64, 2)
    changed = integrate(change_schedule(DATA.field(trained), trained, sampling), noise, uniform_grid(200), RK4())
    exact = integrate(DATA.field(sampling), noise, uniform_grid(200), RK4())
    assert (changed - exact).abs().max() < 0.02


def test_a_changed_field_keeps_the_shape_and_float32():
    data = GaussianMixture(torch.zeros(2, 3, 2, 2), 1.0)
    field = change_schedule(data.field(CondOT()), CondOT(), Cosine())
    for r in (0.0, 0.5, 1.0):
        velocity = field(torch.ones(5, 3, 2, 2), torch.tensor(r))
        assert velocity.shape == (5, 3, 2, 2) and velocity.dtype == torch.float32 and torch.isfinite(velocity).all()
