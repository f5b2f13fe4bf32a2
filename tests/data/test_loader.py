"""The stream of samples and their draws: every sample once an epoch, and randomness that knows nothing of batches, ranks or workers."""

import collections
import math

import numpy as np
import pytest
import torch

from latentfm.data.cache import Cache, key_of
from latentfm.data.loader import CachedSamples, Dropout, Routing, Stream, batches, generator_for
from latentfm.data.sources import Sample

NO_DROPOUT = Dropout(0.0, 0.0)
ENCODERS = ("clip_1", "clip_2", "t5")


def image_key(sample, flip):
    return key_of("image", sample.id, str(flip))


def caption_key(caption, length):
    return key_of("caption", caption, str(length))


class Shelf:
    """A cache in memory whose entries say what they are: moments of a value a picture and side, prompts of a value a caption."""

    def __init__(self, samples, lengths=(4, 6), side=2):
        self.entries = {}
        for index, sample in enumerate(samples):
            for flip in (False, True):
                self.entries[image_key(sample, flip)] = {"moments": torch.full((4, side, side), index + 0.5 * flip)}
            for number, caption in enumerate(sample.captions):
                for length in lengths:
                    parts = {"clip_1": torch.full((3, 2), float(number)), "pooled_1": torch.full((2,), float(number))}
                    self.entries[caption_key(caption, length)] = parts | {"t5": torch.full((length, 5), float(number))}

    def read(self, key):
        return {name: value.clone() for name, value in self.entries[key].items()}


def samples_of(count, captions=1):
    return tuple(Sample(None, tuple(f"caption {c} of {i}" for c in range(captions)), f"{i:03d}.png") for i in range(count))


def reader(count=7, captions=1, seed=3, dropout=NO_DROPOUT, flip=False, routing=None, side=2):
    samples = samples_of(count, captions)
    return CachedSamples(samples, Shelf(samples, side=side), image_key, caption_key, seed, dropout, flip, routing)


def every_batch(data, batch_size, steps, *, shares=None, start=0, accumulation=1, rank=0, world=1, workers=0):
    stream = Stream(len(data.samples), batch_size, data.seed)
    return list(batches(data, stream, shares or {4: 1.0}, start, steps, accumulation, rank, world, workers))


def rows(found):
    """Each row of some batches as (id, its tensors)."""
    return [
        (name, [value[i] for value in (b.moments, b.u, b.vae_noise, b.eps, *b.dropped.values(), *(part for _, part in b.parts.items()))])
        for b in found
        for i, name in enumerate(b.ids)
    ]


def assert_same_rows(first, second):
    assert [name for name, _ in first] == [name for name, _ in second]
    for (name, mine), (_, theirs) in zip(first, second, strict=True):
        assert len(mine) == len(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs)), name


# The order


@pytest.mark.parametrize("count, batch_size", [(10, 4), (7, 3), (5, 8), (1, 3), (8, 4)])
def test_every_sample_comes_exactly_once_an_epoch(count, batch_size):
    epochs = 6
    stream = Stream(count, batch_size, seed=1)
    seen = [member for step in range(math.ceil(epochs * count / batch_size)) for member in stream.positions(step)]
    for epoch in range(epochs):
        members = seen[epoch * count : (epoch + 1) * count]
        assert {e for e, _ in members} == {epoch}
        assert sorted(index for _, index in members) == list(range(count))


def test_epochs_and_seeds_have_their_own_orders_and_a_step_its_own_place():
    stream = Stream(50, 7, seed=1)
    assert not np.array_equal(stream.order(0), stream.order(1))
    assert not np.array_equal(Stream(50, 7, seed=2).order(0), stream.order(0))
    backwards = [Stream(50, 7, seed=1).positions(step) for step in reversed(range(30))]
    assert backwards[::-1] == [stream.positions(step) for step in range(30)]


def test_every_place_of_the_order_is_equally_likely():
    first = collections.Counter(int(Stream(5, 1, seed).order(0)[0]) for seed in range(2000))
    assert all(abs(first[i] - 400) < 4 * math.sqrt(2000 * 0.2 * 0.8) for i in range(5))


@pytest.mark.parametrize("shares", [{16: 0.97, 256: 0.03}, {8: 1.0, 16: 1.0, 32: 2.0}, {77: 5.0}])
def test_lengths_are_chosen_with_their_shares(shares):
    steps = 4000
    chosen = collections.Counter(Stream(10, 2, seed=4).choose(step, shares) for step in range(steps))
    assert chosen.keys() <= shares.keys()
    for length, share in shares.items():
        p = share / sum(shares.values())
        assert abs(chosen[length] - steps * p) <= 4 * math.sqrt(steps * p * (1 - p))
    again = [Stream(99, 64, seed=4).choose(step, dict(reversed(shares.items()))) for step in range(50)]
    assert again == [Stream(10, 2, seed=4).choose(step, shares) for step in range(50)]


def test_a_step_has_one_length_for_every_rank_and_micro_batch():
    data, shares = reader(count=9), {4: 0.5, 6: 0.5}
    alone = [b.t5_length for b in every_batch(data, 8, 20, shares=shares)]
    assert set(alone) == {4, 6}
    for rank in (0, 1):
        found = every_batch(data, 8, 20, shares=shares, rank=rank, world=2, accumulation=2)
        assert [b.t5_length for b in found] == [length for length in alone for _ in range(2)]
        assert all(b.parts.t5.shape[1] == b.t5_length for b in found)


# The slices


@pytest.mark.parametrize("world, accumulation", [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (4, 2), (1, 8)])
def test_the_slices_of_all_ranks_make_up_the_global_batch(world, accumulation):
    data, steps = reader(count=7, captions=2, dropout=Dropout(0.3, 0.3), flip=True), 5
    whole = rows(every_batch(data, 8, steps))
    parts = [every_batch(data, 8, steps, accumulation=accumulation, rank=rank, world=world) for rank in range(world)]
    assert all(len(found) == steps * accumulation for found in parts)
    assert all(len(b.ids) == 8 // (world * accumulation) for found in parts for b in found)
    ordered = [found[m] for m in range(steps * accumulation) for found in parts]  # m-th micro-batch, rank by rank
    assert_same_rows(rows(ordered), whole)


def test_a_run_resumed_at_a_step_reads_what_it_would_have_read():
    data = reader(count=7, captions=3, dropout=Dropout(0.2, 0.2), flip=True)
    assert_same_rows(rows(every_batch(data, 4, 12, start=5)), rows(every_batch(data, 4, 12)[5:]))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path, workers):
    samples = samples_of(6, captions=2)
    cache = Cache(tmp_path)
    for key, entry in Shelf(samples).entries.items():
        cache.write(key, entry)
    data = CachedSamples(samples, cache, image_key, caption_key, 3, Dropout(0.3, 0.3), True)
    torch.manual_seed(workers)  # the process's own generator is nobody's business
    assert_same_rows(rows(every_batch(data, 4, 8, workers=workers)), rows(every_batch(data, 4, 8)))


# The draws


def test_a_samples_draws_depend_on_seed_epoch_and_id_alone():
    draws = {}
    for count, batch_size in ((7, 4), (7, 1), (7, 7)):
        data = reader(count=count, captions=3, dropout=Dropout(0.3, 0.3), flip=True)
        stream = Stream(count, batch_size, 3)
        for step, batch in enumerate(every_batch(data, batch_size, 4 * 7 // batch_size)):
            for (epoch, _), row in zip(stream.positions(step), rows([batch]), strict=True):
                assert_same_rows([row], [draws.setdefault((epoch, row[0]), row)])
    assert len(draws) == 28
    values = [row[1][1].item() for row in draws.values()]
    assert len(set(values)) == 28  # u differs between samples and between epochs
    noises = torch.stack([torch.cat([row[1][2].flatten(), row[1][3].flatten()]) for row in draws.values()])
    assert (torch.cdist(noises, noises) + 100 * torch.eye(28)).min() > 0.5


def test_a_samples_draws_survive_changes_to_the_other_samples():
    """The same id has the same draws whatever else is in the folder, and wherever it stands."""
    small, large = reader(count=2, captions=2, flip=True), reader(count=9, captions=2, flip=True)
    for epoch in range(5):
        first, second = small.sample(epoch, 1, 4), large.sample(epoch, 1, 4)
        assert torch.equal(first["eps"], second["eps"]) and torch.equal(first["u"], second["u"])
    assert not torch.equal(reader(seed=4).sample(0, 1, 4)["eps"], small.sample(0, 1, 4)["eps"])


def test_generators_differ_in_each_of_their_three_parts():
    names = [(0, 1, "a"), (1, 0, "a"), (0, 1, "b"), (1, 11, "a"), (11, 1, "a"), (1, 1, "1a"), (0, 1, "a\0")]
    first = {generator_for(*name).initial_seed() for name in names}
    assert len(first) == len(names)
    assert generator_for(5, 6, "ü.png").initial_seed() == generator_for(5, 6, "ü.png").initial_seed() < 2**63


def many_draws(data, epochs=600):
    return [data.sample(epoch, index, 4) for epoch in range(epochs) for index in range(len(data.samples))]


def frequency_is(found, p, n):
    return abs(found - n * p) <= 4 * math.sqrt(n * p * (1 - p)) + 1e-9


def test_captions_and_sides_are_drawn_uniformly_and_t_too():
    data = reader(count=5, captions=3, flip=True)
    draws = many_draws(data)
    n = len(draws)
    captions = collections.Counter(int(d["parts"].t5[0, 0]) for d in draws)
    assert captions.keys() == {0, 1, 2} and all(frequency_is(captions[c], 1 / 3, n) for c in captions)
    flipped = torch.tensor([float(d["moments"][0, 0, 0] % 1 == 0.5) for d in draws])
    assert frequency_is(flipped.sum().item(), 0.5, n)
    u = torch.stack([d["u"] for d in draws]).sort().values
    assert u.min() >= 0 and u.max() < 1
    assert (u - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at 0.1 %
    assert not any(d["moments"][0, 0, 0] % 1 for d in many_draws(reader(count=5, captions=3), epochs=20))
    noise = torch.stack([torch.stack([d["vae_noise"], d["eps"]]) for d in draws])  # [n, 2, 2, 2, 2]
    assert noise.mean().abs() < 4 / math.sqrt(noise.numel()) and abs(noise.std() - 1) < 0.02
    assert abs((noise[:, 0] * noise[:, 1]).mean()) < 4 / math.sqrt(noise.numel() / 2)


@pytest.mark.parametrize("joint, each", [(0.1, 0.0), (0.0, 0.4), (0.2, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_labels_are_dropped_with_their_probabilities(joint, each):
    data = reader(count=5, dropout=Dropout(joint, each))
    draws = many_draws(data)
    n = len(draws)
    alone = joint + (1 - joint) * each
    for name in ENCODERS:
        assert frequency_is(sum(d["dropped"][name] for d in draws), alone, n)
    all_three = sum(all(d["dropped"].values()) for d in draws)
    assert frequency_is(all_three, Dropout(joint, each).p_unconditional(3), n)
    for first, second in (("clip_1", "clip_2"), ("clip_1", "t5"), ("clip_2", "t5")):
        both = sum(d["dropped"][first] and d["dropped"][second] for d in draws)
        assert frequency_is(both, joint + (1 - joint) * each**2, n)
    for index in range(5):  # each row by itself, and not the same rows each epoch
        assert frequency_is(sum(d["dropped"]["t5"] for d in draws[index::5]), alone, n // 5)


def test_the_sd3_papers_dropout_leaves_a_tenth_unconditional():
    assert Dropout(0.0, 0.464).p_unconditional(3) == pytest.approx(0.1, abs=1e-3)


def test_dropout_and_draws_do_not_disturb_one_another():
    plain, dropped = reader(captions=3, flip=True), reader(captions=3, flip=True, dropout=Dropout(0.5, 0.5))
    for epoch in range(10):
        first, second = plain.sample(epoch, 2, 4), dropped.sample(epoch, 2, 4)
        for name in ("u", "eps", "vae_noise", "moments"):
            assert torch.equal(first[name], second[name])
        assert torch.equal(first["parts"].t5, second["parts"].t5)


def test_a_batch_has_the_shapes_it_says():
    (batch,) = every_batch(reader(count=5), 5, 1, shares={6: 1.0})
    assert batch.moments.shape == (5, 4, 2, 2) and batch.vae_noise.shape == batch.eps.shape == (5, 2, 2, 2)
    assert batch.u.shape == (5,) and batch.u.dtype == torch.float32
    assert {name: (mask.shape, mask.dtype) for name, mask in batch.dropped.items()} == {n: ((5,), torch.bool) for n in ENCODERS}
    assert batch.parts.t5.shape == (5, 6, 5) and batch.parts.clip_1.shape == (5, 3, 2) and batch.parts.clip_2 is None
    assert batch.t5_length == 6 and sorted(batch.ids) == [f"{i:03d}.png" for i in range(5)]
    for name, moments in zip(batch.ids, batch.moments):
        assert moments.unique().item() == int(name[:3])  # a picture's id and its moments stay together


# Token routing


@pytest.mark.parametrize("world, accumulation, batch_size", [(1, 1, 8), (2, 2, 8), (1, 1, 1)])
def test_kept_tokens_depend_on_seed_epoch_and_id_alone(world, accumulation, batch_size):
    data, alone = (reader(routing=Routing(0.5, 1), side=4) for _ in range(2))
    stream = Stream(7, batch_size, data.seed)
    for rank in range(world):
        found = every_batch(data, batch_size, 3, accumulation=accumulation, rank=rank, world=world)
        micro = batch_size // (world * accumulation)
        for number, batch in enumerate(found):
            step, m = divmod(number, accumulation)
            members = stream.positions(step)[(m * world + rank) * micro :][:micro]
            assert batch.kept.shape == (micro, 8) and batch.kept.dtype == torch.int64
            for (epoch, index), kept in zip(members, batch.kept, strict=True):
                assert torch.equal(kept, alone.sample(epoch, index, 4)["kept"])
    other_seed = reader(routing=Routing(0.5, 1), side=4, seed=4).sample(0, 1, 4)["kept"]
    draws = [alone.sample(0, 1, 4)["kept"], alone.sample(1, 1, 4)["kept"], alone.sample(0, 2, 4)["kept"], other_seed]
    assert len({tuple(kept.tolist()) for kept in draws}) == 4


def test_routing_changes_no_other_draw():
    plain, routed = (reader(captions=3, flip=True, dropout=Dropout(0.3, 0.3), routing=r) for r in (None, Routing(0.5, 1)))
    first, second = every_batch(plain, 4, 6), every_batch(routed, 4, 6)
    assert_same_rows(rows(first), rows(second))
    assert all(batch.kept is None for batch in first) and all(batch.kept.shape == (4, 2) for batch in second)


def test_every_set_of_tokens_is_equally_likely():
    draws = many_draws(reader(count=5, routing=Routing(0.5, 1)))  # 2 of 4 tokens: six sets
    found = collections.Counter(tuple(d["kept"].tolist()) for d in draws)
    assert set(found) == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
    assert all(frequency_is(count, 1 / 6, len(draws)) for count in found.values())


@pytest.mark.parametrize("keep, patch, size, counts", [(0.5, 2, (8, 6), (6, 12)), (1.0, 1, (2, 2), (4, 4)), (0.01, 2, (8, 8), (0, 16))])
def test_tokens_are_counted_in_patches(keep, patch, size, counts):
    assert Routing(keep, patch).counts(*size) == counts
    assert len(Routing(keep, patch).draw(*size, torch.Generator())) == counts[0]
