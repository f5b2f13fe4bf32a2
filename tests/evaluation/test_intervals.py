"""Intervals that hold what they say: simulated many times, 95 % of them have the truth within."""

import numpy as np
import pytest
import torch

from latentfm.evaluation import distances, intervals

ROUNDS = 400
ENOUGH = 0.95 - 3 * (0.95 * 0.05 / ROUNDS) ** 0.5  # what 400 rounds of a 95 % interval may come to


def covered(made, truth: float) -> float:
    """How often the interval that is made of a generator's draws has the truth within."""
    found = [made(np.random.default_rng(number)) for number in range(ROUNDS)]
    return np.mean([low <= truth <= high for low, high in found])


def ends(figure: dict) -> tuple[float, float]:
    return figure["low"], figure["high"]


def test_wilson_is_newcombes():
    """Newcombe 1998, table I: the interval of 81 in 263 is 0.2553 to 0.3662; none of 20 has an upper end of 0.1611."""
    assert intervals.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert intervals.wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


@pytest.mark.parametrize("mean", [0.03, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("alike", [0.2, 50.0])  # a prompt's pictures nearly all alike, or nearly independent
def test_the_share_of_pictures_that_are_right(mean, alike):
    def made(draws: np.random.Generator) -> tuple[float, float]:
        each = draws.beta(mean * alike, (1 - mean) * alike, size=40)
        right = draws.random((40, 4)) < each[:, None]
        return ends(intervals.share(right.ravel(), np.repeat(np.arange(40), 4)))

    assert covered(made, mean) >= ENOUGH


def test_a_score_over_tasks_is_the_mean_of_their_shares():
    tasks = {"single": (0.95, 30), "counting": (0.4, 20), "position": (0.1, 10)}
    names = np.concatenate([np.full(number * 2, name) for name, (_, number) in tasks.items()])
    prompts = np.repeat(np.arange(60), 2)

    def made(draws: np.random.Generator) -> tuple[float, float]:
        each = np.concatenate([np.full(number, mean) for mean, number in tasks.values()])
        right = draws.random((60, 2)) < each[:, None]
        return ends(intervals.share(right.ravel(), prompts, names))

    assert covered(made, np.mean([mean for mean, _ in tasks.values()])) >= ENOUGH
    right = np.isin(names, ["single"])
    assert intervals.share(right, prompts, names)["value"] == pytest.approx(1 / 3)


def test_all_or_none_right_is_not_certain():
    none, all_of_one = intervals.share([False] * 40, np.repeat(np.arange(10), 4)), intervals.share([True] * 4, [0] * 4)
    assert none["low"] == 0 and 0.2 < none["high"] < 0.4  # ten prompts, not forty pictures
    assert all_of_one["high"] == 1 and all_of_one["low"] < 0.2


def test_the_mean_over_prompts():
    def made(draws: np.random.Generator) -> tuple[float, float]:
        values = draws.normal(2, 1, size=(12, 1)) + draws.normal(0, 0.5, size=(12, 3))
        return ends(intervals.mean(values.ravel(), np.repeat(np.arange(12), 3)))

    assert 0.98 >= covered(made, 2.0) >= ENOUGH


def test_fid_without_its_bias():
    truth = 4 * 0.5**2 + 4 * 0.2**2  # of a Gaussian moved by 0.5 and widened to 1.2, in four dimensions
    known = (torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    biased = []

    def made(draws: np.random.Generator) -> tuple[float, float]:
        features = torch.from_numpy(draws.normal(0.5, 1.2, size=(160, 4)))
        of = np.repeat(np.arange(80), 2)

        def statistic(kept: np.ndarray) -> dict[str, float]:
            return {"fid": distances.frechet(known, distances.gaussian(features[torch.from_numpy(np.isin(of, kept))]))}

        figure = intervals.jackknife(statistic, of, 160)["fid"]
        biased.append(figure["value"] - truth)
        return ends(figure)

    assert covered(made, truth) >= ENOUGH - 0.02  # the jackknife is right in the limit
    assert np.mean(biased) > 0


def test_signs_turned_a_few_at_a_time_are_those_turned_at_once(monkeypatch):
    draws = np.random.default_rng(0)
    before, after = draws.normal(0, 1, 40), draws.normal(0.2, 1, 40)
    apart = after - before
    signs = np.random.default_rng(0).choice((-1, 1), size=(intervals.PERMUTATIONS, 40))
    wanted = ((np.abs(signs @ apart) >= abs(apart.sum())).sum() + 1) / (intervals.PERMUTATIONS + 1)
    assert 0.01 < wanted < 0.99
    for at_once in (7, 1234, 10**9):  # one row, a number that divides nothing, all
        monkeypatch.setattr(intervals, "AT_ONCE", at_once)
        assert intervals.paired(before, after)["p"] == wanted


def test_a_difference_that_is_there_is_found_and_one_that_is_not_is_not():
    def p(draws: np.random.Generator, apart: float) -> float:
        prompt = draws.normal(0, 3, size=30)  # prompts differ more than models: pairing takes that out
        return intervals.paired(prompt + draws.normal(0, 1, 30), prompt + apart + draws.normal(0, 1, 30))["p"]

    none = [p(np.random.default_rng(number), 0.0) for number in range(150)]
    there = [p(np.random.default_rng(number), 1.5) for number in range(20)]
    assert np.mean(np.array(none) < 0.05) < 0.11 and max(there) < 0.01
    assert intervals.paired(np.ones(5), np.ones(5)) == {"value": 0.0, "low": 0.0, "high": 0.0, "of": 5, "p": 1.0}


def test_few_prompts_are_turned_in_every_way():
    figure = intervals.paired(np.zeros(4), np.array([1.0, 2.0, 3.0, 4.0]))
    assert figure["p"] == 2 / 16 and figure["value"] == 2.5  # all as they are, and all turned
