"""The solvers, on Gaussian data, whose flow is known in closed form, and on a mixture, whose field is."""

import math
import sys

import pytest
import torch
from flow.host import HostReads

from latentfm.flow.analytic import GaussianMixture
from latentfm.flow.grids import uniform_grid
from latentfm.flow.ode import RK4, SOLVERS, AdamsBashforth2, Euler, Heun, Midpoint, evaluations, integrate, integrate_adaptive

MEAN, STD = torch.tensor([1.5, -0.5]), 0.4
MIXTURE = GaussianMixture(torch.tensor([[1.5, 0.5], [-1.0, 1.0], [0.0, -1.5]], dtype=torch.float64), torch.tensor([0.4, 0.6, 0.5]).double())
SOLVER_LIST = [pytest.param(solver(), id=name) for name, solver in SOLVERS.items()]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian_field(mean, std):
    """The marginal velocity of the CondOT path to N(mean, std^2 I) (notes, eq. 18, carried out).

    x_t ~ N(t m, c^2) with c^2 = t^2 s^2 + (1 - t)^2; its flow keeps (x - t m) / c, so u = m + (c' / c) (x - t m).
    Starting from c = 1 at t = 0 and ending with c = s at t = 1, the flow of a whole trajectory is x -> m + s x.
    """

    def field(x, t):
        variance = t**2 * std**2 + (1 - t) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return field


def test_integration_is_the_exact_map_from_noise_to_data():
    noise = normal(256, 2)
    sample = integrate(gaussian_field(MEAN, STD), noise, uniform_grid(2000))
    torch.testing.assert_close(sample, MEAN + STD * noise, rtol=0, atol=5e-3)


@pytest.fixture(scope="module")
def ends():
    """Noise, the data that the mixture's flow carries it to, and the noise that this flow carries the same points back to."""
    noise, fine = normal(32, 2).double(), uniform_grid(1000)
    return noise, integrate(MIXTURE.field(), noise, fine, RK4()), integrate(MIXTURE.field(), noise, fine.flip(0), RK4())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("solver", SOLVER_LIST)
def test_a_solver_is_of_the_order_it_declares(solver, backward, shift, ends):
    """Forward and backward, on even steps and on steps of very different lengths."""
    start, end = ends[0], ends[2] if backward else ends[1]
    counts, errors = [64, 128, 256], []
    for steps in counts:
        grid = uniform_grid(steps, shift)
        reached = integrate(MIXTURE.field(), start, grid.flip(0) if backward else grid, solver)
        errors.append((reached - end).square().mean().sqrt().item())
    assert slope(counts, errors) == pytest.approx(-solver.order, abs=0.2)


def slope(counts, errors):
    """The slope of log error over log count, by least squares."""
    x, y = torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    return ((x - x.mean()) * y).sum().item() / (x - x.mean()).square().sum().item()


@pytest.mark.parametrize("solver", SOLVER_LIST)
def test_evaluations_are_counted_and_inside_the_grid(solver):
    asked = []

    def field(x, t):
        asked.append(t.item())
        return -x

    grid = uniform_grid(5, 3.0)
    integrate(field, torch.ones(1, 1), grid, solver)
    assert len(asked) == evaluations(solver, grid) == 5 * solver.evaluations_per_step
    assert min(asked) >= 0 and max(asked) <= 1


@pytest.mark.parametrize("solver", SOLVER_LIST)
def test_inversion_and_sampling_return_the_start(solver, ends):
    grid = uniform_grid(200)
    noise = integrate(MIXTURE.field(), ends[1], grid.flip(0), solver)
    again = integrate(MIXTURE.field(), noise, grid, solver)
    # two ways of 200 steps each, with errors of h^order; Euler's constant here is near 10
    torch.testing.assert_close(again, ends[1], rtol=0, atol=20 * (1 / 200) ** solver.order)


@pytest.mark.parametrize("steps", [8, 16, 32])
def test_two_step_method_beats_euler_and_needs_no_more_evaluations(steps, ends):
    grid = uniform_grid(steps)
    assert evaluations(AdamsBashforth2(), grid) == evaluations(Euler(), grid)
    euler, multistep = (
        (integrate(MIXTURE.field(), ends[0], grid, solver) - ends[1]).square().mean().sqrt() for solver in (Euler(), AdamsBashforth2())
    )
    assert multistep < euler / 3


def test_two_step_method_integrates_a_velocity_linear_in_time_exactly_after_its_first_step():
    """Of any step lengths; the first step is Euler's, and here has no velocity to get wrong."""
    grid = torch.tensor([0.0, 0.1, 0.15, 0.5, 0.6, 1.0], dtype=torch.float64)
    end = integrate(lambda x, t: torch.full_like(x, 2) * (t - 0.1).clamp(min=0), torch.zeros(1, 1).double(), grid, AdamsBashforth2())
    # between 0.1 and 0.15 the slope remembered is that from the corner: 0, and the step misses 0.05^2
    torch.testing.assert_close(end, torch.tensor([[0.9**2 - 0.05**2]]).double())


def test_a_solver_begins_afresh_at_each_integration():
    solver, grid, noise = AdamsBashforth2(), uniform_grid(6), normal(4, 2)
    once = integrate(gaussian_field(MEAN, STD), noise, grid, solver)
    assert torch.equal(integrate(gaussian_field(MEAN, STD), noise, grid, solver), once)


def test_runge_kutta_steps_are_quadrature_rules():
    """For a velocity of t alone a step is a rule of integration: exact for t, and Simpson's for t^3."""
    x, t, t_next = torch.zeros(2, 3).double(), torch.tensor(0.25).double(), torch.tensor(0.75).double()
    for solver in (Midpoint(), Heun()):
        stepped = solver.step(lambda x, t: torch.ones_like(x) * t, x, t, t_next)
        torch.testing.assert_close(stepped, torch.full_like(x, 0.25))
    cubic = RK4().step(lambda x, t: torch.ones_like(x) * t**3, x, t, t_next)
    torch.testing.assert_close(cubic, torch.full_like(x, (0.75**4 - 0.25**4) / 4))


def test_one_step_of_euler_is_equation_4():
    x = normal(3, 2)
    stepped = Euler().step(lambda x, t: x * t, x, torch.tensor(0.5), torch.tensor(0.75))
    torch.testing.assert_close(stepped, x + 0.25 * 0.5 * x)


def test_a_straight_flow_needs_one_step_on_any_grid():
    z, eps = normal(4, 3), normal(4, 3, seed=1)
    for solver in (kind() for kind in SOLVERS.values()):
        for grid in (uniform_grid(1), uniform_grid(7, 3.0)):
            torch.testing.assert_close(integrate(lambda x, t: z - eps, eps, grid, solver), z)


def test_times_and_steps_agree():
    """The field is evaluated at the start of each interval of the grid, once: `steps` evaluations, none at t = 1."""
    grid, seen = uniform_grid(5, 3.0), []

    def field(x, t):
        assert t.shape == () and t.dtype == torch.float32
        seen.append(t.item())
        return torch.zeros_like(x)

    integrate(field, torch.zeros(1, 1), grid)
    assert seen == grid[:-1].tolist()
    assert len(seen) == evaluations(Euler(), grid) == 5


@pytest.mark.parametrize("solver", SOLVER_LIST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_state_is_float32_or_float64_whatever_the_network_answers_in(dtype, solver):
    """A thousand steps of 1e-3: in bfloat16 a state near 1 would not move at all."""
    kinds = set()

    def field(x, t):
        kinds.add((x.dtype, t.dtype))
        return torch.ones_like(x, dtype=torch.bfloat16)

    end = integrate(field, torch.ones(2, 3, dtype=dtype), uniform_grid(1000), solver)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    assert kinds == {(state, state)} and end.dtype == state
    torch.testing.assert_close(end, torch.full((2, 3), 2.0, dtype=state), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-7])
def test_dormand_prince_meets_its_tolerance_and_counts_its_evaluations(tolerance, backward, ends):
    asked = []

    def field(x, t):
        assert x.dtype == t.dtype == torch.float64 and t.shape == ()
        asked.append(t.item())
        return MIXTURE.quantity("velocity", x, t)

    start, end = (1.0, 0.0) if backward else (0.0, 1.0)
    reached, calls = integrate_adaptive(field, ends[0], start, end, rtol=tolerance, atol=tolerance)
    assert calls == len(asked) and min(asked) >= 0 and max(asked) <= 1
    error = (reached - ends[2 if backward else 1]).square().mean().sqrt().item()
    assert error < 10 * tolerance
    assert calls < 150  # a step's error is like h^5: three more digits cost four times as many steps, here from 38 calls


def test_dormand_prince_spends_more_on_less_tolerance_and_works_in_float32(ends):
    costs = [integrate_adaptive(MIXTURE.field(), ends[0], rtol=tol, atol=tol).evaluations for tol in (1e-3, 1e-6, 1e-9)]
    assert costs == sorted(costs) and costs[0] < costs[2]
    reached, _ = integrate_adaptive(MIXTURE.field(), ends[0].float())
    assert reached.dtype == torch.float32
    assert (reached - ends[1]).square().mean().sqrt() < 2e-4  # twenty times the default tolerance


@pytest.mark.parametrize(("start", "end"), [(0.9999, 1.0), (1e-4, 0.0)])
def test_dormand_prince_never_looks_past_its_end(start, end):
    asked = []

    def field(x, t):
        asked.append(t.item())
        return torch.full_like(x, 0.01)  # slow, so that the first step could be long

    reached, _ = integrate_adaptive(field, torch.ones(2, 3).double(), start, end)
    assert min(asked) >= min(start, end) and max(asked) <= max(start, end)
    torch.testing.assert_close(reached, torch.full((2, 3), 1 + 0.01 * (end - start), dtype=torch.float64))


def test_adaptive_solver_refuses_bad_inputs_and_says_what_is_missing(monkeypatch):
    for times in ((0.5, 0.5), (0.0, math.nan)):
        with pytest.raises(ValueError, match=f"{times[0]} and {times[1]}"):
            integrate_adaptive(lambda x, t: x, torch.zeros(1, 1), *times)
    with pytest.raises(ValueError, match=r"rtol must be positive and finite, got 0\.0"):
        integrate_adaptive(lambda x, t: x, torch.zeros(1, 1), rtol=0.0)
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match="pip install torchdiffeq"):
        integrate_adaptive(lambda x, t: x, torch.zeros(1, 1))


def test_on_step_sees_every_state_and_may_replace_it():
    grid, seen = uniform_grid(4), []

    def record(i, t, x):
        seen.append((i, t.item(), x.clone()))

    def ones(x, t):
        return torch.ones_like(x)

    end = integrate(ones, torch.zeros(1, 2), grid, on_step=record)
    assert [(i, t) for i, t, _ in seen] == [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0)]
    assert [x[0, 0].item() for _, _, x in seen] == [0.25, 0.5, 0.75, 1.0]
    assert torch.equal(end, seen[-1][2])

    held = integrate(ones, torch.zeros(1, 2), grid, on_step=lambda i, t, x: x.double() * 0 if i == 2 else None)
    assert held.dtype == torch.float32 and held.tolist() == [[0.25, 0.25]]


@pytest.mark.parametrize("solver", SOLVER_LIST)
def test_the_host_never_waits_for_the_device(solver):
    with HostReads(lambda x, t: -x * t) as reads:
        integrate(reads.field, torch.ones(2, 3), uniform_grid(8), solver, on_step=lambda i, t, x: x)
    assert reads.armed and reads.count == 0
    with HostReads(lambda x, t: x * t.item()) as reads:  # the watch does see one
        integrate(reads.field, torch.ones(2, 3), uniform_grid(8), solver)
    assert reads.count == 8 * solver.evaluations_per_step


def test_gradients_flow_through_the_sampler():
    noise = normal(3, 2).requires_grad_()
    end = integrate(gaussian_field(MEAN, STD), noise, uniform_grid(2000))
    (gradient,) = torch.autograd.grad(end.sum(), noise)
    torch.testing.assert_close(gradient, torch.full((3, 2), STD), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (torch.tensor([0.0, 0.5, 0.5, 1.0]), r"0\.5, 0\.5"),
        (torch.tensor([0.0, 0.75, 0.5]), r"0\.75, 0\.5"),
        (torch.tensor([0.0, math.nan, 1.0]), "nan"),
        (torch.tensor([0.0, math.inf]), "inf"),
        (torch.tensor([0.5, 0.5 + 1e-12], dtype=torch.float64), "float32"),
        (torch.tensor([0.0]), r"\(1,\)"),
        (torch.zeros(2, 2), r"\(2, 2\)"),
        (torch.tensor([0, 1]), "int64"),
    ],
)
def test_bad_grids_are_refused_with_their_values(grid, message):
    with pytest.raises(ValueError, match=message):
        integrate(lambda x, t: x, torch.zeros(1, 1), grid)
    with pytest.raises(ValueError, match=message):
        evaluations(Euler(), grid)


def test_other_bad_inputs_are_refused_with_their_values():
    with pytest.raises(ValueError, match="int64"):
        integrate(lambda x, t: x, torch.zeros(1, 1).long(), uniform_grid(2))
    with pytest.raises(ValueError, match=r"field returned shape \(2, 1\) for a state of shape \(2, 3\)"):
        integrate(lambda x, t: x[:, :1], torch.zeros(2, 3), uniform_grid(2))
    with pytest.raises(ValueError, match=r"on_step returned shape \(3,\)"):
        integrate(lambda x, t: x, torch.zeros(2, 3), uniform_grid(2), on_step=lambda i, t, x: x[0])
