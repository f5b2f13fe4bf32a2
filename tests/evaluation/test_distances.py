"""FID, CMMD and their like, against what the papers write, written out here in another way."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.nn import functional as F

from latentfm.evaluation import distances


@pytest.fixture(autouse=True, params=[distances.PAIRS_AT_ONCE, 40], ids=["together", "in rows"])
def pairs_at_once(request, monkeypatch):
    """All pairs in one table, and one or a few rows of it at a time."""
    monkeypatch.setattr(distances, "PAIRS_AT_ONCE", request.param)


def sets(dimensions: int = 12, one: int = 60, other: int = 45) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(dimensions)
    mix = torch.randn(dimensions, dimensions, generator=draws, dtype=torch.float64) / dimensions**0.5
    first = torch.randn(one, dimensions, generator=draws, dtype=torch.float64)
    return first, torch.randn(other, dimensions, generator=draws, dtype=torch.float64) @ mix + 0.3


def fid(one: torch.Tensor, other: torch.Tensor) -> float:
    return distances.frechet(distances.gaussian(one), distances.gaussian(other))


@pytest.mark.parametrize("dimensions", [2, 12, 40])
def test_fid_is_the_papers_formula(dimensions):
    one, other = sets(dimensions)
    a, b = one.numpy(), other.numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root.real)
    assert fid(one, other) == pytest.approx(expected, rel=1e-6)


def test_fid_with_fewer_pictures_than_dimensions_is_still_one_of_gaussians():
    one, other = sets(64, 20, 30)
    first, second = (np.cov(each.numpy(), rowvar=False) for each in (one, other))
    scale, axes = np.linalg.eigh(first)
    half = axes * np.sqrt(scale.clip(0)) @ axes.T  # sqrtm of the product is imprecise where it lacks full rank
    values = np.linalg.eigvalsh(half @ second @ half).clip(0)
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum().item() + np.trace(first) + np.trace(second) - 2 * np.sqrt(values).sum()
    assert fid(one, other) == pytest.approx(expected, rel=1e-6)
    assert fid(one, one) == pytest.approx(0, abs=1e-9)


def test_fid_of_gaussians_that_differ_in_one_way():
    one, _ = sets()
    assert fid(one, one + 2.0) == pytest.approx(4.0 * one.shape[1], rel=1e-9)
    variance = (one - one.mean(0)).square().sum().item() / (len(one) - 1)
    scaled = one.mean(0) + 3 * (one - one.mean(0))
    assert fid(one, scaled) == pytest.approx((3 - 1) ** 2 * variance, rel=1e-9)


def test_cmmd_is_the_papers_double_sum():
    one, other = sets(8, 9, 7)
    a, b = (F.normalize(each, dim=-1).tolist() for each in (one, other))

    def kernel(x: list[float], y: list[float]) -> float:
        return math.exp(-sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) / (2 * 10.0**2))

    def mean(xs: list, ys: list) -> float:
        return sum(kernel(x, y) for x in xs for y in ys) / (len(xs) * len(ys))

    assert distances.cmmd(one, other) == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel=1e-6)
    assert distances.cmmd(one, one) == pytest.approx(0, abs=1e-12)


def test_precision_recall_density_and_coverage_by_loops():
    real, drawn = sets(3, 30, 25)
    k = distances.NEAREST

    def radius(points: torch.Tensor) -> list[float]:
        return [sorted((point - other).norm().item() for other in points)[k] for point in points]

    real_radius, drawn_radius = radius(real), radius(drawn)
    apart = [[(x - y).norm().item() for y in drawn] for x in real]
    inside = [[d < r for d in row] for row, r in zip(apart, real_radius, strict=True)]
    expected = {
        "precision": np.mean([any(row[j] for row in inside) for j in range(25)]),
        "recall": np.mean([any(d < r for d, r in zip(row, drawn_radius, strict=True)) for row in apart]),
        "density": np.sum(inside) / (k * 25),
        "coverage": np.mean([any(row) for row in inside]),
    }
    assert distances.prdc(real, drawn) == pytest.approx(expected)
    assert distances.prdc(real, real)["coverage"] == 1.0 and distances.prdc(real, real + 1e3) == dict.fromkeys(expected, 0.0)


def test_spread_and_nearest():
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    assert distances.spread(features) == pytest.approx(1 - 1 / 3)
    assert distances.spread(features[:1].repeat(4, 1)) == pytest.approx(0, abs=1e-12)
    apart, which = distances.nearest(torch.tensor([[0.1, 5.0], [2.0, 0.0]]), features)
    assert which.tolist() == [1, 0] and apart[1] == 0 and 0 < apart[0] < 1e-3
    assert distances.own_nearest(features).tolist() == pytest.approx([0, 1, 0], abs=1e-12)
