"""Draws of randomness by seed, purpose and place."""

import numpy as np
import pytest
import torch

from latentfm.randomness import generator, permutation, seed_of, uniform

SEED = 9028268622716166970


def test_each_part_of_the_place_counts_and_none_runs_into_the_next():
    places = [
        (0, "a", 1), (1, "a", 0), (0, "b", 1), (0, "a", 11), (0, "a1", 1), (0, "a", 1, 1), (0, "a", 1, ""), (0, "a", "1\0"), (0, "a"),
        (0, "", "a", 1), (0, "a", "1:1"), (0, "a", -1),
    ]  # fmt: skip
    seeds = {seed_of(*place) for place in places}
    assert len(seeds) == len(places) and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(5, "eps", 6, "ü.png") == seed_of(5, "eps", 6, "ü.png") == seed_of(5, "eps", "6", "ü.png")


def test_the_numbers_are_what_they_were():
    """A run that is resumed by another version draws the same."""
    assert seed_of(0, "eps", 0, "a.png") == SEED
    assert uniform(0, "eps", 0, "a.png") == (SEED >> 39) / 2**24
    assert generator(0, "eps", 0, "a.png").initial_seed() == SEED


def test_uniform_numbers_are_uniform_and_exact_in_float32():
    u = np.sort([uniform(3, "t", epoch, name) for epoch in range(100) for name in "abcdefghij"])
    assert u[0] >= 0 and u[-1] < 1 and np.array_equal(u.astype(np.float32), u)
    assert np.abs(u - (np.arange(1000) + 0.5) / 1000).max() < 1.95 / 1000**0.5  # Kolmogorov-Smirnov at 0.1 %


def test_purposes_are_independent():
    u, v = (np.array([uniform(0, purpose, epoch) for epoch in range(2000)]) for purpose in ("flip", "caption"))
    assert abs(np.corrcoef(u, v)[0, 1]) < 4 / 2000**0.5


def test_nothing_is_drawn_from_anybodys_generator():
    torch.manual_seed(7)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    generator(0, "a"), permutation(10, 0, "a"), uniform(0, "a")
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpys)
    assert sorted(permutation(10, 0, "a")) == list(range(10))
    assert list(permutation(10, 0, "a")) != list(permutation(10, 1, "a"))


@pytest.mark.gpu
def test_a_generator_of_another_device_has_the_same_seed():
    assert generator(0, "a", device="cuda").initial_seed() == seed_of(0, "a")
