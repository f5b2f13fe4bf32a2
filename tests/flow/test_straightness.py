"""Straightness and path energy of flows whose paths are known, and the exact W_2 between sets of points."""

import itertools
import math
import sys

import pytest
import torch

from latentfm.flow.analytic import GaussianMixture
from latentfm.flow.grids import uniform_grid
from latentfm.flow.ode import Euler
from latentfm.flow.schedules import CondOT, Cosine
from latentfm.flow.straightness import measure_paths, normalized_path_energy, wasserstein2


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(omega):
    return lambda x, t: omega * torch.stack([-x[:, 1], x[:, 0]], 1)


@pytest.mark.parametrize("grid", [uniform_grid(1), uniform_grid(7, 3.0), uniform_grid(50)], ids=len)
def test_a_constant_field_is_straight_on_any_grid(grid):
    c, x_0 = torch.tensor([1.0, -2.0, 0.5]).double(), normal(5, 3)
    paths = measure_paths(lambda x, t: c.expand_as(x), x_0, grid)
    torch.testing.assert_close(paths.x_1, x_0 + c, rtol=0, atol=1e-12)
    torch.testing.assert_close(paths.energy, torch.full((5,), 5.25).double(), rtol=0, atol=1e-12)
    assert paths.straightness.max() < 1e-24


def test_straight_at_an_uneven_pace_is_not_straight():
    """u = 2 t c: the line to x_0 + c, for which S = |c|^2 int (1 - 2 t)^2 = |c|^2 / 3."""
    c, x_0 = torch.tensor([3.0, 4.0]).double(), normal(5, 2)
    paths = measure_paths(lambda x, t: 2 * t * c.expand_as(x), x_0, uniform_grid(200))
    torch.testing.assert_close(paths.x_1, x_0 + c, rtol=0, atol=1e-6)
    torch.testing.assert_close(paths.straightness, torch.full((5,), 25 / 3).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("omega", [0.5, math.pi, 2 * math.pi])
def test_a_rotation_in_closed_form(omega):
    """The speed is omega |x|, the chord 2 sin(omega / 2) |x|; a whole turn moves nothing at full expense."""
    x_0 = normal(6, 2)
    paths = measure_paths(rotation(omega), x_0, uniform_grid(400))
    radius = x_0.square().sum(1)
    torch.testing.assert_close(paths.energy, omega**2 * radius, rtol=1e-4, atol=0)
    torch.testing.assert_close(paths.straightness, (omega**2 - 4 * math.sin(omega / 2) ** 2) * radius, rtol=5e-4, atol=0)


def test_the_error_is_the_one_stated():
    """h^2 / 12 times the mean squared acceleration, omega^4 |x|^2: a fourth for half the step."""
    x_0, omega = normal(6, 2), 2.0
    for steps in (20, 40):
        missing = omega**2 * x_0.square().sum(1) - measure_paths(rotation(omega), x_0, uniform_grid(steps)).energy
        torch.testing.assert_close(missing, omega**4 / (12 * steps**2) * x_0.square().sum(1), rtol=0.01, atol=0)


@pytest.mark.parametrize("std", [0.2, 1.0, 3.0])
def test_gaussian_to_gaussian_in_closed_form(std):
    """CondOT to N(m, s^2 I) has x_t = t m + c x_0, c^2 = t^2 s^2 + (1 - t)^2, and int c'^2 = 1 + s^2 - s pi / 2.

    So S = s (2 - pi / 2) |x_0|^2: the independent coupling bends every path but that from 0, even where s = 1 and
    m alone would do. The shortest paths shrink and shift: W_2^2 = |m|^2 + D (1 - s)^2.
    """
    m, x_0 = torch.tensor([[1.5, -0.5, 1.0]]).double(), normal(2000, 3)
    paths = measure_paths(GaussianMixture(m, std).field(), x_0, uniform_grid(400))
    square, bend = x_0.square().sum(1), std * (2 - math.pi / 2)
    torch.testing.assert_close(paths.x_1, m + std * x_0, rtol=0, atol=1e-5)
    torch.testing.assert_close(paths.straightness, bend * square, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(paths.energy, (m + (std - 1) * x_0).square().sum(1) + bend * square, rtol=1e-3, atol=1e-6)

    w2 = math.sqrt(m.square().sum() + 3 * (1 - std) ** 2)
    expected = 3 * bend / w2**2
    # the energy's mean over 2,000 starts, within 4 of its standard errors
    error = paths.energy.std() / 2000**0.5 / w2**2
    assert (normalized_path_energy(paths.energy, w2) - expected).abs() < 4 * error


@pytest.mark.parametrize("schedule", [CondOT(), Cosine()], ids=str)
def test_energy_is_the_squared_distance_and_the_straightness(schedule):
    data = GaussianMixture(normal(3, 2, 2, seed=1), 0.4)
    for grid in (uniform_grid(3), uniform_grid(40, 3.0)):
        x_0 = normal(8, 2, 2)
        paths = measure_paths(data.field(schedule), x_0, grid)
        assert paths.x_1.shape == x_0.shape and paths.energy.shape == paths.straightness.shape == (8,)
        distance = (paths.x_1 - x_0).square().flatten(1).sum(1)
        torch.testing.assert_close(paths.energy, distance + paths.straightness, rtol=1e-6, atol=1e-9)


def test_the_optimal_transport_has_no_excess_energy():
    """x_t = (1 - t) x_0 + t (m + s x_0): its field is affine, its NPE 0."""
    m, s, x_0 = torch.tensor([1.0, -1.0]).double(), 0.4, normal(20_000, 2)
    paths = measure_paths(lambda x, t: m + (s - 1) * (x - t * m) / (1 + (s - 1) * t), x_0, uniform_grid(20))
    assert paths.straightness.max() < 1e-6
    w2 = math.sqrt(2 + 2 * (1 - s) ** 2)
    error = paths.energy.std() / 20_000**0.5 / w2**2
    assert normalized_path_energy(paths.energy, w2) < 4 * error < 0.05


def test_reflow_straightens():
    """In one dimension a flow keeps the order of its points, so that the lines between its ends do not cross: reflowed
    once, it is straight, and has carried every point to where it was carried before.

    The reflowed field is exact too: at (x, t) it is x_1 - x_0 of the one line through there, found between neighbours.
    """
    data = GaussianMixture(torch.tensor([[-1.0], [1.2]]).double(), 0.5, torch.tensor([1.0, 2.0]))
    x_0 = torch.linspace(-6, 6, 2001, dtype=torch.float64)[:, None]
    first = measure_paths(data.field(), x_0, uniform_grid(200))
    starts, speeds = x_0[:, 0], (first.x_1 - x_0)[:, 0]

    def reflowed(x, t):
        line = starts + t * speeds
        right = torch.searchsorted(line, x[:, 0].contiguous()).clamp(1, len(line) - 1)
        share = (x[:, 0] - line[right - 1]) / (line[right] - line[right - 1])
        return torch.lerp(speeds[right - 1], speeds[right], share)[:, None]

    kept = normal(500, 1).clamp(-5, 5)
    before = measure_paths(data.field(), kept, uniform_grid(200))
    after = measure_paths(reflowed, kept, uniform_grid(200))
    torch.testing.assert_close(after.x_1, before.x_1, rtol=0, atol=2e-3)
    assert before.straightness.mean() > 0.3
    assert after.straightness.mean() < 1e-3 * before.straightness.mean()
    one_step = measure_paths(reflowed, kept, uniform_grid(1), Euler())
    torch.testing.assert_close(one_step.x_1, before.x_1, rtol=0, atol=2e-3)


def test_measures_are_each_paths_own():
    data = GaussianMixture(normal(3, 2, seed=1), 0.4)
    x_0, grid = normal(5, 2), uniform_grid(10)
    together = measure_paths(data.field(), x_0, grid)
    for i in range(5):
        alone = measure_paths(data.field(), x_0[i : i + 1], grid)
        for one, several in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], several[i])
    assert measure_paths(data.field(), x_0.float(), grid).energy.dtype == torch.float32


def test_wasserstein2_in_one_dimension_pairs_the_sorted_points():
    a, b = normal(200, 1), 0.5 * normal(200, 1, seed=1) + 2
    expected = (a.sort(0).values - b.sort(0).values).square().mean().sqrt()
    torch.testing.assert_close(wasserstein2(a, b), expected)


def test_wasserstein2_is_the_best_of_all_pairings():
    a, b = normal(6, 2, 2), normal(6, 2, 2, seed=1)
    best = min((a - b[list(order)]).square().flatten(1).sum(1).mean() for order in itertools.permutations(range(6)))
    torch.testing.assert_close(wasserstein2(a, b), best.sqrt())


def test_wasserstein2_is_a_distance_between_sets():
    a = normal(50, 3)
    assert wasserstein2(a, a.flip(0)) < 1e-12
    torch.testing.assert_close(wasserstein2(a, a.flip(0) + torch.tensor([3.0, 0.0, 4.0])), torch.tensor(5.0).double())
    torch.testing.assert_close(wasserstein2(1e4 + a, 1e4 + 2 * a), wasserstein2(a, 2 * a))
    b = normal(50, 3, seed=1)
    torch.testing.assert_close(wasserstein2(a, b), wasserstein2(b, a))


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        wasserstein2(normal(2, 1), normal(2, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: measure_paths(lambda x, t: x, x, torch.tensor([0.0, 0.5])), r"from 0 to 1, got \[0.0, 0.5\]"),
        (lambda x: measure_paths(lambda x, t: x, x, torch.tensor([1.0, 0.0])), r"got \[1.0, 0.0\]"),
        (lambda x: measure_paths(lambda x, t: x, x, torch.tensor([0.0])), r"got \[0.0\]"),
        (lambda x: measure_paths(lambda x, t: x, x.long(), uniform_grid(2)), "int64"),
        (lambda x: measure_paths(lambda x, t: x[:1], x, uniform_grid(2)), r"\(1, 2\)"),
        (lambda x: normalized_path_energy(x[:, 0], 0.0), "w2 must be positive, got 0.0"),
        (lambda x: normalized_path_energy(x[:, 0], math.nan), "nan"),
        (lambda x: wasserstein2(x, x[:2]), r"\(3, 2\) and \(2, 2\)"),
    ],
)
def test_bad_inputs_are_refused_with_their_values(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 2))
