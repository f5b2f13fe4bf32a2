"""How often samples are drawn: repeats, weights, and captions by weight."""

import collections
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from latentfm.data.loader import Draws, Dropout
from latentfm.data.mixture import Group, Mixture
from latentfm.data.sources import Sample, Share
from latentfm.data.stream import Stream
from latentfm.data.table import SampleTable


def samples_of(**sources):
    """sources: name=(count, rate)."""
    return tuple(
        Sample(None, ("x",), f"{name}/{i}", share=Share(name, rate)) for name, (count, rate) in sources.items() for i in range(count)
    )


def draws_of(mixture, epoch):
    """(sample index, turn) of every draw of an epoch, bucket by bucket."""
    found = [mixture.draws(epoch, bucket) for bucket in mixture.buckets]
    return [draw for indices, turns in found for draw in zip(indices.tolist(), turns.tolist(), strict=True)]


def counts(samples, epoch, seed=1):
    return collections.Counter(index for index, _ in draws_of(Mixture.of(samples, seed), epoch))


def test_without_weights_a_draw_is_a_sample():
    mixture = Mixture.of(samples_of(a=(3, 1), b=(4, 1)), seed=5)
    assert mixture.per_epoch() == 7 and all(draws_of(mixture, epoch) == [(i, 0) for i in range(7)] for epoch in range(3))
    parted = Mixture.of(samples_of(a=(3, 1), b=(4, 1)), 5, [0, 2, 0, 0, 2, 2, 0])
    assert parted.buckets == [0, 2]
    assert [parted.draws(4, bucket)[0].tolist() for bucket in (0, 2)] == [[0, 2, 3, 6], [1, 4, 5]]


@pytest.mark.parametrize("rate", [1, 1.5])
def test_a_sample_in_a_bucket_below_zero_is_never_drawn(rate):
    mixture = Mixture.of(samples_of(a=(6, rate)), 1, [0, -1, 1, -1, 0, 1])
    assert mixture.buckets == [0, 1] and mixture.per_epoch() == 4 * rate
    assert {index for epoch in range(4) for index, _ in draws_of(mixture, epoch)} == {0, 2, 4, 5}


def test_a_bucket_for_each_sample_or_none():
    with pytest.raises(ValueError, match="7 samples and 3 buckets"):
        Mixture.of(samples_of(a=(7, 2)), 1, [0, 1, 0])


def test_repeats_are_exact_and_numbered():
    samples = samples_of(a=(3, 4), b=(5, 1))
    mixture = Mixture.of(samples, 1)
    assert mixture.per_epoch() == 17
    for epoch in range(3):
        assert sorted(draws_of(mixture, epoch)) == [(i, turn) for i in range(3) for turn in range(4)] + [(i, 0) for i in range(3, 8)]


@pytest.mark.parametrize("size", [1, 3, 8, 50])
@pytest.mark.parametrize("rate", ["1/4", "1/10", "3/2", "13/5", "99/100", "7/3", "1/1000"])
def test_a_rate_is_exact_in_the_long_run(rate, size):
    """After every epoch the group has had floor(E n r) draws, and no sample more than one more than another."""
    rate = Fraction(rate)
    mixture, total = Mixture.of(samples_of(a=(size, float(rate))), 1), collections.Counter({i: 0 for i in range(size)})
    for epoch in range(60):
        drawn = draws_of(mixture, epoch)
        assert sorted(collections.Counter(i for i, _ in drawn).items()) == sorted(  # turns count from 0, each once
            (i, 1 + max(turn for j, turn in drawn if j == i)) for i in {i for i, _ in drawn}
        )
        total.update(i for i, _ in drawn)
        assert total.total() == (epoch + 1) * size * rate // 1 == mixture.before(epoch + 1, 0)
        assert max(total.values()) - min(total.values()) <= 1
        assert all(count >= int(rate) for count in collections.Counter(i for i, _ in drawn).values())


def test_rates_are_read_as_they_are_written():
    """3 x 0.1 is a little more than 3/10 in floating point, 2.3 - 2 a little less: no draw more or fewer for that."""
    for rate, epochs, draws in ((3 * 0.1, 10**9, 3 * 10**9), (2.3, 10**9, 23 * 10**9)):
        assert Mixture.of(samples_of(a=(10, rate)), 1).before(epochs, 0) == draws
    assert Mixture.of(samples_of(a=(10, 1e-12)), 1).before(10**12, 0) in (10, 9)  # rare, but not never


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


def test_sources_keep_their_rates_in_every_bucket():
    samples = samples_of(a=(30, 2), b=(50, 0.5))
    mixture = Mixture.of(samples, 1, [i % 3 for i in range(80)])
    for bucket in range(3):
        drawn = collections.Counter(int(i) for epoch in range(40) for i in mixture.draws(epoch, bucket)[0])
        assert drawn == {i: 80 if i < 30 else drawn[i] for i in range(80) if i % 3 == bucket}
        assert all(drawn[i] in (19, 20) for i in drawn if i >= 30)


def test_a_source_of_others_size_changes_no_draw_of_its_neighbour():
    small, large = samples_of(a=(10, 0.3), b=(2, 1)), samples_of(a=(10, 0.3), b=(9, 1))
    for epoch in range(10):
        assert {i for i in counts(small, epoch) if i < 10} == {i for i in counts(large, epoch) if i < 10}


def test_millions_of_draws_are_two_small_arrays_and_late_epochs_cost_no_more():
    mixture = Mixture((Group(np.arange(400_000, dtype=np.int32), Fraction(5, 2), 1),))
    tracemalloc.start()
    for epoch in (0, 1001):
        indices, turns = mixture.draws(epoch, 0)
        assert len(indices) == len(turns) == 1_000_000 and indices.nbytes + turns.nbytes == 8_000_000
        assert np.unique(np.bincount(indices, minlength=400_000)).tolist() == [2, 3]
        assert tracemalloc.get_traced_memory()[1] < 70e6
    tracemalloc.stop()


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_over_all_ranks_is_its_draws_each_with_noise_of_its_own(world):
    samples = samples_of(a=(3, 2), b=(4, 0.5))  # 8 draws an epoch
    mixture, table, draws = Mixture.of(samples, 3), SampleTable.of(samples), Draws(3, Dropout(0, 0), False, None)
    for epoch in range(4):
        parts = [
            Stream(mixture, 4, 3).members(step)[rank * 4 // world :][: 4 // world]
            for step in (2 * epoch, 2 * epoch + 1)
            for rank in range(world)
        ]
        batches = [draws.make(table, part, (2, 2, 2))[0] for part in parts]
        wanted = collections.Counter(samples[index].id for index, _ in draws_of(mixture, epoch))
        assert collections.Counter(name for batch in batches for name in batch.ids) == wanted
        assert len({round(u.item(), 6) for batch in batches for u in batch.u}) == 8


# Captions by weight


def choose_caption(sample, u):
    """The caption that u chooses, as the loader's table has it."""
    table = SampleTable.of([sample])
    return table.texts[table.caption(0, u)]


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
