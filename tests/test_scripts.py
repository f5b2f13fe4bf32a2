"""The scripts that draw and compare in the plane, run small."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from latentfm import flow

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def toy2d(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import toy2d

    return toy2d


@pytest.mark.parametrize("name", ["checkerboard", "8gaussians", "moons"])
def test_toy_data_lie_around_the_origin_and_follow_their_generator(toy2d, name):
    draw = toy2d.DATA[name]
    points = draw(4000, torch.Generator().manual_seed(0))
    assert points.shape == (4000, 2) and points.dtype == torch.float32
    assert points.mean(0).abs().max() < 0.2 and 1.0 < points.std() < 5.0
    assert torch.equal(points, draw(4000, torch.Generator().manual_seed(0)))


def test_the_checkerboard_has_points_on_its_dark_squares_alone(toy2d):
    points = toy2d.checkerboard(4000, torch.Generator().manual_seed(1))
    squares = ((points + 4) / 2).floor().long()
    assert squares.min() == 0 and squares.max() == 3
    assert (squares.sum(1) % 2 == 0).all()
    assert len(squares.unique(dim=0)) == 8


def test_a_short_training_moves_noise_towards_the_data_and_is_drawn(toy2d, tmp_path):
    data = toy2d.DATA["8gaussians"]
    network = toy2d.train(data, flow.independent, flow.CondOT(), steps=400, batch=256, seed=0)
    found = toy2d.measure(network, data, points=256)
    start = torch.randn(256, 2, generator=torch.Generator().manual_seed(1))
    untrained = flow.wasserstein2(start, data(256, torch.Generator().manual_seed(2))).item()
    assert found["w2"] < untrained / 2
    assert found["energy"] >= (1 - 0.2) * untrained**2  # no flow costs less than the optimal transport; 0.2 for 256 points
    assert -8 < found["log_p"] < 0
    toy2d.draw("8gaussians", network, data, flow.CondOT(), tmp_path / "toy.png")
    with Image.open(tmp_path / "toy.png") as picture:
        assert picture.width == 1200 and len(picture.getcolors(2**24)) > 1000


def test_training_repeats_itself_from_its_seed(toy2d):
    first, second = (toy2d.train(toy2d.two_moons, flow.optimal_transport, flow.Cosine(), steps=3, batch=16, seed=5) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
