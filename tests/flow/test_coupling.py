"""Couplings against sorting, brute force and the closed-form flow of one dimension."""

import itertools
import sys

import pytest
import torch

from latentfm.flow import GaussianMixture, uniform_grid
from latentfm.flow.coupling import COUPLINGS, independent, optimal_transport, reflow_pairs
from latentfm.flow.ode import Heun, integrate


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cost(z, eps):
    return (z.double() - eps.double()).square().sum().item()


def test_independent_changes_nothing():
    z, eps = normal(4, 3), normal(4, 3, seed=1)
    assert independent(z, eps) is eps


@pytest.mark.parametrize("seed", range(5))
def test_optimal_transport_is_the_best_of_all_orders(seed):
    z, eps = 3 * normal(5, 2, 2, seed=seed) + 1, normal(5, 2, 2, seed=seed + 100)
    best = min(cost(z, eps[list(order)]) for order in itertools.permutations(range(5)))
    assert cost(z, optimal_transport(z, eps)) == pytest.approx(best)


def test_optimal_transport_in_one_dimension_is_sorting():
    z, eps = normal(300).exp().double(), normal(300, seed=1).double()
    paired = optimal_transport(z, eps)
    assert torch.equal(paired[z.argsort()], eps.sort().values)


def test_optimal_transport_only_reorders_the_noise():
    z, eps = normal(64, 2, 3), normal(64, 2, 3, seed=1)
    kept = z.clone(), eps.clone()
    paired = optimal_transport(z, eps)
    assert torch.equal(z, kept[0]) and torch.equal(eps, kept[1])
    rows = {tuple(row.flatten().tolist()) for row in eps}
    assert {tuple(row.flatten().tolist()) for row in paired} == rows and len(rows) == 64
    half = optimal_transport(z.bfloat16(), eps.bfloat16())
    assert half.dtype == torch.bfloat16 and half.shape == eps.shape


@pytest.mark.parametrize("dimension", [1, 4, 100])
def test_optimal_transport_never_costs_more(dimension):
    """And gains most where the batch is large beside the dimension."""
    z, eps = normal(64, dimension), normal(64, dimension, seed=1)
    before, after = cost(z, eps), cost(z, optimal_transport(z, eps))
    assert after < before
    assert after < {1: 0.1, 4: 0.5, 100: 0.95}[dimension] * before
    assert optimal_transport(z, z.flip(0)).equal(z)


def test_optimal_transport_tells_the_noise_of_the_label():
    """The caution of its docstring, measured: two classes at -2 and 2; the noise paired with a class is half of a normal law.

    Its mean is then -+ sqrt(2 / pi) = -+ 0.80, where a sampler with that label starts from mean 0.
    """
    label = torch.arange(400) % 2
    z = 4.0 * label - 2 + 0.1 * normal(400)
    eps = normal(400, seed=1)
    assert abs(eps[label == 1].mean().item()) < 0.15
    assert optimal_transport(z, eps)[label == 1].mean().item() == pytest.approx(0.80, abs=0.1)


def test_without_scipy_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        optimal_transport(normal(2, 2), normal(2, 2))


MIXTURE = GaussianMixture(torch.tensor([[-2.0], [1.5]]), torch.tensor([0.3, 0.6]), torch.tensor([0.4, 0.6]))
PLANE = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.5]]), 0.3)


def test_reflow_pairs_in_one_dimension_are_the_monotone_map():
    """A flow on the line keeps the order, so eps goes to the z of the same rank: F_data(z) = Phi(eps)."""
    eps = normal(500, 1)
    z, kept = reflow_pairs(MIXTURE.field(), eps, uniform_grid(1000))
    assert kept is eps
    share = (MIXTURE.weights * torch.special.ndtr((z - MIXTURE.means.T) / MIXTURE.stds)).sum(1)
    torch.testing.assert_close(share, torch.special.ndtr(eps[:, 0]), rtol=0, atol=4e-3)
    assert torch.equal(z[:, 0].argsort(), eps[:, 0].argsort())


def test_reflow_pairs_are_deterministic_and_use_the_solver_given():
    eps = normal(20, 2)
    first, again = (reflow_pairs(PLANE.field(), eps, uniform_grid(10)) for _ in range(2))
    assert torch.equal(first.z, again.z) and torch.equal(first.eps, again.eps)
    alone = torch.cat([reflow_pairs(PLANE.field(), row[None], uniform_grid(10)).z for row in eps])
    torch.testing.assert_close(alone, first.z)

    heun = reflow_pairs(PLANE.field(), eps, uniform_grid(10), Heun()).z
    assert torch.equal(heun, integrate(PLANE.field(), eps, uniform_grid(10), Heun()))
    assert not torch.equal(heun, first.z)


def test_reflow_pairs_carry_no_gradients():
    weight = torch.ones(2, requires_grad=True)
    assert not reflow_pairs(lambda x, t: weight * x, normal(3, 2), uniform_grid(4)).z.requires_grad


def test_reflow_straightens_the_paths():
    """E Var[z - eps | x_t], what the paths' bending comes from and what is left of the loss at best, all but vanishes.

    It is estimated at t = 1/2 from nearest neighbours: half the mean squared difference of their velocities.
    """
    count = 3000
    eps = normal(count, 2)
    z = reflow_pairs(PLANE.field(), eps, uniform_grid(100)).z

    def unexplained(data):
        x, velocity = (data + eps) / 2, data - eps
        apart = torch.cdist(x, x).fill_diagonal_(float("inf"))
        return (velocity - velocity[apart.argmin(1)]).square().sum(1).mean().item() / 2

    drawn = PLANE.sample(count, torch.Generator().manual_seed(1))
    ends = PLANE.ends((drawn + eps) / 2, 0.5)
    exact = ((drawn - ends.z) - (eps - ends.eps)).square().sum(1).mean().item()
    assert unexplained(drawn) == pytest.approx(exact, rel=0.1)
    assert unexplained(z) < 0.05 * unexplained(drawn)


def test_registry_holds_what_its_names_say():
    assert {"independent": independent, "optimal_transport": optimal_transport} == COUPLINGS


@pytest.mark.parametrize("name", COUPLINGS)
def test_shapes_must_agree(name):
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 1\)"):
        COUPLINGS[name](torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"\(\) and \(\)"):
        COUPLINGS[name](torch.tensor(0.0), torch.tensor(0.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_must_be_finite(value):
    with pytest.raises(ValueError, match="finite"):
        optimal_transport(torch.full((2, 3), value), torch.zeros(2, 3))


@pytest.mark.parametrize("grid", [[0.1, 1.0], [0.0, 0.9], [1.0, 0.0], [0.0]])
def test_reflow_needs_the_whole_way(grid):
    with pytest.raises(ValueError, match=r"from 0 \(noise\) to 1 \(data\), got"):
        reflow_pairs(PLANE.field(), normal(2, 2), torch.tensor(grid))
