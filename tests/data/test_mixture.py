"""How often samples are drawn: repeats, weights, and captions by weight."""

import collections

import numpy as np
import pytest
import torch

from latentfm.data.loader import CachedSamples, Dropout, Stream, batches, choose_caption
from latentfm.data.mixture import Mixture
from latentfm.data.sources import Sample, Share


def samples_of(**sources):
    """sources: name=(count, rate)."""
    return tuple(
        Sample(None, ("x",), f"{name}/{i}", share=Share(name, rate)) for name, (count, rate) in sources.items() for i in range(count)
    )


def draws_of(mixture, epoch):
    return [mixture.draw(epoch, number) for number in range(mixture.count)]


def counts(samples, epoch, seed=1):
    return collections.Counter(index for index, _ in draws_of(Mixture.of(samples, seed), epoch))


def test_without_weights_a_draw_is_a_sample():
    mixture = Mixture.of(samples_of(a=(3, 1), b=(4, 1)), seed=5)
    assert mixture.count == 7 and all(draws_of(mixture, epoch) == [(i, 0) for i in range(7)] for epoch in range(3))


def test_repeats_are_exact_and_numbered():
    samples = samples_of(a=(3, 4), b=(5, 1))
    mixture = Mixture.of(samples, 1)
    assert mixture.count == 17
    for epoch in range(3):
        assert sorted(draws_of(mixture, epoch)) == [(i, turn) for i in range(3) for turn in range(4)] + [(i, 0) for i in range(3, 8)]


@pytest.mark.parametrize("rate, draws", [(0.25, 2), (0.1, 1), (1.5, 12), (2.6, 21), (0.99, 8)])
def test_a_fraction_goes_round(rate, draws):
    """floor(D / n) each, and the rest in rounds: over any n epochs every sample has had exactly D draws, and no epoch more than D."""
    samples = samples_of(a=(8, rate))
    total = collections.Counter()
    for epoch in range(8):
        found = counts(samples, epoch)
        assert sum(found.values()) == draws
        assert all(found[i] >= draws // 8 for i in range(8)) and max(found.values()) <= draws // 8 + 2
        total += found
    assert total == {i: draws for i in range(8)}
    seen = set().union(*(counts(samples, epoch) for epoch in range(-(-8 // draws))))
    assert seen == set(range(8))  # nobody waits longer than a round


def test_rest_is_another_each_round_and_for_each_seed():
    samples = samples_of(a=(20, 0.5))
    first = [frozenset(counts(samples, epoch)) for epoch in range(40)]
    assert len(set(first)) > 10 and first != [frozenset(counts(samples, epoch, seed=2)) for epoch in range(40)]
    assert first == [frozenset(counts(samples, epoch)) for epoch in range(40)]
    chance = collections.Counter(i for seed in range(2000) for i in counts(samples_of(a=(5, 0.2)), 0, seed))
    assert sum((chance[i] - 400) ** 2 / 400 for i in range(5)) < 18.5  # chi-square of 4 degrees at 0.1 %


def test_sources_are_drawn_in_the_ratio_of_their_rates():
    samples = samples_of(a=(10, 3), b=(40, 0.5))
    for epoch in range(4):
        found = counts(samples, epoch)
        assert sum(found[i] for i in range(10)) == 30 and sum(found[i] for i in range(10, 50)) == 20


def test_a_source_of_others_size_changes_no_draw_of_its_neighbour():
    small, large = samples_of(a=(10, 0.3), b=(2, 1)), samples_of(a=(10, 0.3), b=(9, 1))
    for epoch in range(10):
        assert {i for i in counts(small, epoch) if i < 10} == {i for i in counts(large, epoch) if i < 10}


def key(sample, flip):
    return sample.id


class Shelf:
    def read(self, key):
        return {"moments": torch.zeros(4, 2, 2)} if key != "text" else {"t5": torch.zeros(4, 5)}


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_over_all_ranks_is_its_draws_each_with_noise_of_its_own(world):
    samples = samples_of(a=(3, 2), b=(4, 0.5))  # 8 draws an epoch
    mixture = Mixture.of(samples, 3)
    data = CachedSamples(samples, Shelf(), key, lambda caption, length: "text", 3, Dropout(0, 0), False, None, mixture)
    stream = Stream(mixture.count, 4, 3)
    found = [list(batches(data, stream, {4: 1.0}, 0, 8, 1, rank, world, 0)) for rank in range(world)]
    for epoch in range(4):
        part = [batch for rank in found for batch in rank[2 * epoch : 2 * epoch + 2]]
        wanted = collections.Counter(samples[index].id for index, _ in draws_of(mixture, epoch))
        assert collections.Counter(name for batch in part for name in batch.ids) == wanted
        assert len({round(u.item(), 6) for batch in part for u in batch.u}) == 8
    assert all(batch.mask is None and batch.prior is None for rank in found for batch in rank)


# Captions by weight


def test_captions_are_chosen_by_their_weights():
    sample = Sample(None, ("a", "b", "c", "d"), "x", (5, 0.5, 3, 1.5))
    n = 20000
    found = collections.Counter(choose_caption(sample, u) for u in np.random.default_rng(0).random(n))
    expected = {"a": 0.5 * n, "b": 0.05 * n, "c": 0.3 * n, "d": 0.15 * n}
    assert sum((found[name] - e) ** 2 / e for name, e in expected.items()) < 16.3  # chi-square of 3 degrees at 0.1 %
    assert choose_caption(sample, 0.0) == "a" and choose_caption(sample, 1 - 1e-9) == "d"


def test_captions_without_weights_are_chosen_as_ever():
    sample = Sample(None, ("a", "b", "c"), "x")
    assert [choose_caption(sample, u) for u in (0, 0.33, 0.34, 0.66, 0.67, 0.999)] == ["a", "a", "b", "b", "c", "c"]
    equal = Sample(None, ("a", "b", "c"), "x", (2, 2, 2))
    assert [choose_caption(equal, u) for u in (0, 0.33, 0.34, 0.66, 0.67, 0.999)] == ["a", "a", "b", "b", "c", "c"]
