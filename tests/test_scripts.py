"""The scripts that draw and compare in the plane, and the pipelines' speed, run small."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from latentfm import bundled_model, flow
from latentfm.models.folder import read_info, t5_length

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


@pytest.fixture
def classes(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import classes

    return classes


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_the_networks_of_the_notes_learn_digits_by_label(classes, name):
    known, unseen = classes.load_digits()
    assert len(known.labels) == 1500 and len(unseen.labels) == 297 and known.images.min() == -1 and known.images.max() == 1
    objective = classes.OBJECTIVES["CFM"]
    z, y, eps = known.images[:64], known.labels[:64], torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.05, 0.95, 64)
    x_t, velocity = flow.sample_path(z, eps, t)
    losses = {steps: flow.cfm_loss(classes.train(name, objective, known, steps)(x_t, t, y), velocity).mean() for steps in (2, 25)}
    assert losses[25] < 0.85 * losses[2]


def test_guidance_of_classes_is_eq_65_of_what_is_predicted_and_label_none_is_one_of_its_own(classes):
    known, _ = classes.load_digits()
    y, x, t = known.labels[:6], torch.randn(6, 1, 8, 8), torch.tensor(0.4)
    for objective in classes.OBJECTIVES.values():
        network = classes.train("dit", objective, known, steps=3)
        strong, weak = (classes.guided_field(network, objective, labels, 1.0)(x, t) for labels in (y, torch.full_like(y, classes.NULL)))
        assert (strong - weak).abs().max() > 1e-4
        guided = classes.guided_field(network, objective, y, 2.5)(x, t)
        torch.testing.assert_close(guided, -1.5 * weak + 2.5 * strong, rtol=1e-3, atol=1e-3)


def test_what_ddpm_draws_stays_in_range_and_a_field_that_is_there_stays_as_it_is(classes):
    schedule, t = flow.VariancePreserving(), torch.tensor(0.3)
    z, eps = torch.linspace(-2, 2, 64).view(1, 1, 8, 8), torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = flow.sample_path(z, eps, t[None], schedule).x_t
    field = classes.within_range(lambda x, t: flow.conditional_velocity(x, z, t, schedule), schedule)
    wanted = flow.conditional_velocity(x, z.clamp(-1, 1), t, schedule)
    torch.testing.assert_close(field(x, t), wanted, rtol=1e-4, atol=1e-4)


def test_classes_are_sampled_by_ode_and_sde_judged_and_drawn(classes, tmp_path, monkeypatch, capsys):
    options = ["--networks", "dit", "--steps", "4", "--sampling-steps", "6", "--per-digit", "4", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["classes.py", *options])
    classes.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sorted(row[2] for row in rows[2:-1]) == ["ODE"] * 9 + ["SDE"] * 6
    assert float(rows[1][-2].rstrip("%")) > 90  # who judges can read
    with Image.open(tmp_path / "classes.png") as picture:
        assert picture.width > 500 and len(picture.getcolors(2**24)) > 100


@pytest.fixture
def bench_pipeline(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_pipeline

    return bench_pipeline


def rows(printed: str) -> list[list[str]]:
    """The cells of the tables' rows, headings left out."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("| ")]


def test_warm_pipelines_are_compared(bench_pipeline, capsys, monkeypatch):
    small = ["--parts", "warm", "--steps", "1", "--repeats", "1", "--pictures", "1", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["bench_pipeline.py", *small])
    bench_pipeline.main()
    printed = capsys.readouterr().out
    _, defaults, own = rows(printed)
    assert defaults[:3] == ["stock's defaults", "float32", "1"] and "median of 1" in printed
    assert own[0] == f"{t5_length(read_info(bundled_model()))} tokens"
    assert all(float(cell) > 0 for row in (defaults, own) for cell in row[3:])


def test_a_whole_process_is_measured_and_its_failure_told(bench_pipeline, tmp_path):
    wall, used, memory = bench_pipeline.whole_process([sys.executable, "-c", "kept = bytes(50_000_000); sum(range(10**6))"], tmp_path)
    assert wall > 0.01 and used > 0.01 and memory > 50
    with pytest.raises(RuntimeError, match="told so"):
        bench_pipeline.whole_process([sys.executable, "-c", "raise SystemExit('told so')"], tmp_path)


@pytest.mark.slow
def test_whole_processes_are_compared(bench_pipeline, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_pipeline.py", "--parts", "cold", "--steps", "1", "--repeats", "1"])
    bench_pipeline.main()
    _, *found = rows(capsys.readouterr().out)
    others = ["latentfm train --dry-run", "latentfm data check"]
    assert [row[0].split(",")[0] for row in found] == ["stock", "latentfm generate"] * 2 + others
    assert all(float(cell.replace(",", "")) > 0 for row in found for cell in row[1:4])
