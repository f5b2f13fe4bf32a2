"""The Euler solver and guidance, on Gaussian data, whose marginal field and flow are known in closed form."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from latentfm.flow import Euler, classifier_free, diffusers_grid, evaluations, integrate, uniform_grid

MEAN, STD = torch.tensor([1.5, -0.5]), 0.4


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


@pytest.mark.parametrize("backward", [False, True])
def test_euler_is_of_the_order_it_declares(backward):
    noise = normal(64, 2)
    data = MEAN + STD * noise
    start, end = (data, noise) if backward else (noise, data)
    counts, errors = [16, 32, 64, 128, 256], []
    for steps in counts:
        grid = uniform_grid(steps).flip(0) if backward else uniform_grid(steps)
        errors.append((integrate(gaussian_field(MEAN, STD), start, grid, Euler()) - end).abs().max().item())
    x = torch.tensor(counts).log() - torch.tensor(counts).log().mean()
    slope = (x * torch.tensor(errors).log()).sum() / (x * x).sum()
    assert -slope.item() == pytest.approx(Euler.order, abs=0.2)


def test_one_step_of_euler_is_equation_4():
    x = normal(3, 2)
    stepped = Euler().step(lambda x, t: x * t, x, torch.tensor(0.5), torch.tensor(0.75))
    torch.testing.assert_close(stepped, x + 0.25 * 0.5 * x)


def test_a_straight_flow_needs_one_step_on_any_grid():
    z, eps = normal(4, 3), normal(4, 3, seed=1)
    for grid in (uniform_grid(1), uniform_grid(7, 3.0), diffusers_grid(5, 3.0)):
        torch.testing.assert_close(integrate(lambda x, t: z - eps, eps, grid), z)


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


def test_evaluations_counts_what_a_costlier_solver_calls():
    @dataclass(frozen=True)
    class Heun:
        order: ClassVar[int] = 2
        evaluations_per_step: ClassVar[int] = 2

        def step(self, field, x, t, t_next):
            first = field(x, t)
            return x + (t_next - t) / 2 * (first + field(x + (t_next - t) * first, t_next))

    calls, exact = [], gaussian_field(MEAN, STD)

    def field(x, t):
        calls.append(t)
        return exact(x, t)

    noise, grid = normal(32, 2), uniform_grid(32)
    heun = integrate(field, noise, grid, Heun())
    assert len(calls) == evaluations(Heun(), grid) == 64
    euler = integrate(exact, noise, grid)
    data = MEAN + STD * noise
    assert (heun - data).abs().max() < 0.2 * (euler - data).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_state_is_float32_whatever_comes_in(dtype):
    """A thousand steps of 1e-3: in bfloat16 a state near 1 would not move at all."""
    kinds = set()

    def field(x, t):
        kinds.add((x.dtype, t.dtype))
        return torch.ones_like(x, dtype=dtype)

    end = integrate(field, torch.ones(2, 3, dtype=dtype), uniform_grid(1000))
    assert kinds == {(torch.float32, torch.float32)}
    assert end.dtype == torch.float32
    torch.testing.assert_close(end, torch.full((2, 3), 2.0), rtol=0, atol=1e-4)


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


def test_gradients_flow_through_the_sampler():
    noise = normal(3, 2).requires_grad_()
    end = integrate(gaussian_field(MEAN, STD), noise, uniform_grid(2000))
    (gradient,) = torch.autograd.grad(end.sum(), noise)
    torch.testing.assert_close(gradient, torch.full((3, 2), STD), rtol=0, atol=5e-3)


def test_guidance_is_equation_65_and_exact_at_its_ends():
    conditional, unconditional = normal(4, 3, 2), 100 * normal(4, 3, 2, seed=1)
    assert torch.equal(classifier_free(conditional, unconditional, 1.0), conditional)
    assert torch.equal(classifier_free(conditional, unconditional, 0.0), unconditional)
    for w in (-1.0, 0.3, 2.0, 7.5):
        expected = (1 - w) * unconditional + w * conditional
        torch.testing.assert_close(classifier_free(conditional, unconditional, w), expected, rtol=1e-5, atol=1e-4)


def test_guidance_is_computed_in_float32():
    conditional, unconditional = normal(64).bfloat16(), normal(64, seed=1).bfloat16()
    guided = classifier_free(conditional, unconditional, 5.0)
    assert guided.dtype == torch.float32
    torch.testing.assert_close(guided.double(), unconditional + 5.0 * (conditional.double() - unconditional))


def test_guided_sampling_of_two_gaussians_of_equal_width():
    """The field is affine in the mean, so guidance between m_c and m_u aims at m_u + w (m_c - m_u)."""
    m_c, m_u, w = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 0.5]), 3.0
    conditional, unconditional = gaussian_field(m_c, STD), gaussian_field(m_u, STD)

    def guided(x, t):
        return classifier_free(conditional(x, t), unconditional(x, t), w)

    noise = normal(16, 2)
    sample = integrate(guided, noise, uniform_grid(2000))
    torch.testing.assert_close(sample, m_u + w * (m_c - m_u) + STD * noise, rtol=0, atol=2e-2)


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
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(1, 3\)"):
        classifier_free(torch.zeros(2, 3), torch.zeros(1, 3), 2.0)
    for scale in (math.nan, math.inf):
        with pytest.raises(ValueError, match=str(scale)):
            classifier_free(torch.zeros(2), torch.zeros(2), scale)
