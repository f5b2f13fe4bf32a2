"""The stream: every draw exactly once an epoch, a batch of one bucket, and nothing but (seed, step) behind it."""

import collections
import math

import numpy as np
import pytest

from latentfm.data.mixture import Mixture
from latentfm.data.sources import Sample, Share
from latentfm.data.stream import Stream
from latentfm.errors import InputError
from latentfm.randomness import permutation


def samples_of(counts, rates):
    """counts[i] samples of source i, drawn rates[i] times an epoch."""
    return [
        Sample(None, ("x",), f"{source}/{i}", share=Share(str(source), rate))
        for source, (count, rate) in enumerate(zip(counts, rates, strict=True))
        for i in range(count)
    ]


def plain(count, batch_size, seed=1, buckets=None):
    return Stream(Mixture.plain(count, buckets), batch_size, seed)


def members_of(stream, steps):
    return [member for step in range(steps) for member in stream.members(step)]


# One bucket


@pytest.mark.parametrize("count, batch_size", [(10, 4), (7, 3), (5, 8), (1, 3), (8, 4)])
def test_every_sample_comes_exactly_once_an_epoch_in_the_epochs_order(count, batch_size):
    epochs = 6
    seen = members_of(plain(count, batch_size), math.ceil(epochs * count / batch_size))
    wanted = [(e, int(i), 0) for e in range(epochs) for i in permutation(count, 1, "order", e, 0)]
    assert seen[: len(wanted)] == wanted


def test_epochs_and_seeds_have_their_own_orders_and_a_step_its_own_place():
    stream = plain(50, 7)
    first, second = ([i for e, i, _ in members_of(stream, 15) if e == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert members_of(plain(50, 7, seed=2), 7) != members_of(stream, 7)
    backwards = [plain(50, 7).members(step) for step in reversed(range(30))]
    assert backwards[::-1] == [stream.members(step) for step in range(30)]


def test_every_place_of_the_order_is_equally_likely():
    first = collections.Counter(plain(5, 1, seed).members(0)[0][1] for seed in range(2000))
    assert all(abs(first[i] - 400) < 4 * math.sqrt(2000 * 0.2 * 0.8) for i in range(5))


# Several buckets


def random_case(number):
    """Samples of random sources, sizes, rates and buckets, and a batch size that may be more than a bucket has."""
    rng = np.random.default_rng(number)
    sources, kinds = int(rng.integers(1, 4)), int(rng.integers(1, 6))
    rates = [1.0] * sources if number % 2 else [float(rng.choice([0.25, 0.1, 1, 2, 1.5, 2.6])) for _ in range(sources)]
    samples = samples_of([int(n) for n in rng.integers(1, 60, sources)], rates)
    return samples, rng.integers(0, kinds, len(samples)), int(rng.choice([1, 3, 8, 16, 64]))


@pytest.mark.parametrize("number", range(24))
def test_every_draw_comes_exactly_once_over_many_epochs(number):
    """Per bucket the members of the steps, one after the other, are those of epoch 0, then of epoch 1, ...: none lost, padded, doubled."""
    samples, buckets, batch_size = random_case(number)
    mixture = Mixture.of(samples, 3, buckets)
    stream = Stream(mixture, batch_size, 3)
    steps, epochs = stream.steps_before(12), 12
    found = collections.defaultdict(list)
    for step in range(steps):
        members = stream.members(step)
        bucket = stream.batch(step)[0]
        assert len(members) == batch_size
        assert {int(buckets[index]) for _, index, _ in members} == {bucket}  # one shape a batch
        found[bucket] += members
    for bucket in mixture.buckets:
        seen, total = found[bucket], mixture.before(epochs, bucket)
        assert len(seen) == total // batch_size * batch_size  # what lacks is less than a batch
        assert [e for e, _, _ in seen] == sorted(e for e, _, _ in seen)
        for epoch in range(epochs):
            indices, turns = mixture.draws(epoch, bucket)
            wanted = sorted(zip([epoch] * len(indices), indices.tolist(), turns.tolist(), strict=True))
            mine = sorted(member for member in seen if member[0] == epoch)
            if len(seen) >= mixture.before(epoch + 1, bucket):
                assert mine == wanted
            else:
                assert not collections.Counter(mine) - collections.Counter(wanted)


@pytest.mark.parametrize("number", range(8))
def test_an_epochs_steps_are_those_that_are_completed_in_it(number):
    samples, buckets, batch_size = random_case(number)
    mixture = Mixture.of(samples, 3, buckets)
    stream = Stream(mixture, batch_size, 3)
    step = 0
    for epoch in range(8):
        done = collections.Counter(stream.batch(s)[0] for s in range(step, step + stream.steps_in(epoch)))
        for bucket in mixture.buckets:
            assert done[bucket] == mixture.before(epoch + 1, bucket) // batch_size - mixture.before(epoch, bucket) // batch_size
        for cursor in range(stream.steps_in(epoch)):
            assert stream.place(step) == (epoch, cursor)
            step += 1


def test_the_buckets_of_an_epoch_are_mixed_and_mixed_anew():
    stream = plain(1000, 5, buckets=np.arange(1000) % 4)
    labels = [[stream.batch(step)[0] for step in range(200 * epoch, 200 * epoch + 200)] for epoch in range(3)]
    assert all(sorted(found) == sorted([0, 1, 2, 3] * 50) for found in labels) and labels[0] != labels[1] != labels[2]
    runs = sum(a != b for a, b in zip(labels[0], labels[0][1:]))
    assert abs(runs - 199 * 0.754) < 4 * math.sqrt(199 * 0.754 * 0.246)  # as often as in a random order
    firsts = collections.Counter(plain(40, 5, seed, np.arange(40) % 4).batch(0)[0] for seed in range(1000))
    assert all(abs(firsts[b] - 250) < 4 * math.sqrt(1000 * 0.25 * 0.75) for b in range(4))


def test_a_bucket_smaller_than_the_batch_waits_for_its_batch_and_is_not_lost():
    buckets = np.array([0] * 40 + [1] * 3)
    stream = plain(43, 8, buckets=buckets)
    rare = [step for step in range(stream.steps_before(8)) if stream.batch(step)[0] == 1]
    assert len(rare) == 3 and [stream.place(step)[0] for step in rare] == [2, 5, 7]
    assert collections.Counter(i for step in rare for _, i, _ in stream.members(step)) == {40: 8, 41: 8, 42: 8}


def test_an_epoch_that_leaves_nothing_over_has_the_same_steps_each_time():
    stream = plain(48, 8, buckets=[0] * 32 + [1] * 16)
    assert [stream.steps_in(epoch) for epoch in range(5)] == [6] * 5
    for epoch in range(5):
        assert sorted(m for s in range(6 * epoch, 6 * epoch + 6) for m in stream.members(s)) == [(epoch, i, 0) for i in range(48)]


def test_a_sample_that_is_drawn_once_in_many_epochs_has_its_steps_found():
    stream = Stream(Mixture.of(samples_of([1], [1e-6]), 0), 2, 0)
    assert stream.members(0) == [(999_999, 0, 0), (1_999_999, 0, 0)] and stream.place(0) == (1_999_999, 0)
    assert stream.place(1) == (3_999_999, 0)


@pytest.mark.parametrize("world, accumulation", [(1, 4), (2, 1), (2, 2), (4, 1), (8, 1)])
def test_any_number_of_processes_sees_the_same_batches_none_short(world, accumulation):
    """Each process asks its own stream, as each does in a run."""
    samples, buckets, _ = random_case(5)
    streams = [Stream(Mixture.of(samples, 9, buckets), 8, 9) for _ in range(world)]
    micro = 8 // (world * accumulation)
    for step in range(60):
        whole = Stream(Mixture.of(samples, 9, buckets), 8, 9).members(step)
        slices = [streams[rank].members(step)[(m * world + rank) * micro :][:micro] for m in range(accumulation) for rank in range(world)]
        assert all(len(part) == micro for part in slices) and [member for part in slices for member in part] == whole


def test_a_step_is_the_same_whatever_was_asked_before():
    samples, buckets, _ = random_case(2)

    def fresh():
        return Stream(Mixture.of(samples, 4, buckets), 3, 4)

    used, order = fresh(), np.random.default_rng(0).permutation(200).tolist()
    assert {step: used.members(step) for step in order} == {step: fresh().members(step) for step in range(200)}


# State


def test_a_state_says_where_the_run_is_and_is_read_back():
    samples, buckets, _ = random_case(4)
    stream = Stream(Mixture.of(samples, 6, buckets), 3, 6)
    for step in (0, 1, 37, 200):
        state = stream.state(step)
        assert state.keys() == {"seed", "step", "epoch", "cursor"} and state["seed"] == 6 and state["step"] == step
        assert stream.steps_before(state["epoch"]) + state["cursor"] == step
        assert stream.step_of(state) == step


@pytest.mark.parametrize("other", [plain(50, 7, seed=2), plain(50, 8), plain(60, 7)])
def test_a_state_of_another_stream_is_refused(other):
    state = plain(50, 7).state(100)
    with pytest.raises(InputError, match=r"not the checkpoint's: at step 100 its (seed|epoch|cursor) is .* resume with the same seed"):
        other.step_of(state)


def test_a_state_with_something_missing_is_refused():
    with pytest.raises(InputError, match="should hold seed, step, epoch, cursor, not seed, step"):
        plain(5, 2).step_of({"seed": 1, "step": 3})
    with pytest.raises(ValueError, match="count from 0, not -1"):
        plain(5, 2).members(-1)
    for count, batch_size in ((0, 1), (3, 0)):
        with pytest.raises(ValueError, match="a stream needs samples"):
            plain(count, batch_size)


# The length of a step


@pytest.mark.parametrize("shares", [{16: 0.97, 256: 0.03}, {8: 1.0, 16: 1.0, 32: 2.0}, {77: 5.0}])
def test_lengths_are_chosen_with_their_shares(shares):
    steps = 4000
    chosen = collections.Counter(plain(10, 2, seed=4).choose(step, shares) for step in range(steps))
    assert chosen.keys() <= shares.keys()
    for length, share in shares.items():
        p = share / sum(shares.values())
        assert abs(chosen[length] - steps * p) <= 4 * math.sqrt(steps * p * (1 - p))
    again = [plain(99, 64, seed=4).choose(step, dict(reversed(shares.items()))) for step in range(50)]
    assert again == [plain(10, 2, seed=4).choose(step, shares) for step in range(50)]


def test_memory_does_not_grow_over_epochs():
    stream = plain(2000, 10, buckets=np.arange(2000) % 3)
    for epoch in range(30):
        stream.members(stream.steps_before(epoch))
    assert len([key for key in stream._kept if key[0] == "order"]) <= 2 * 3 and len(stream._kept) < 16
