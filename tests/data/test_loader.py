"""The stream of samples and their draws: every sample once an epoch, and randomness that knows nothing of batches, ranks or workers."""

import collections
import hashlib
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from latentfm.data.cache.store import Cache, key_of
from latentfm.data.cached import CachedReader
from latentfm.data.loader import AHEAD, Batch, Draws, Dropout, Loader, Routing
from latentfm.data.mixture import Mixture
from latentfm.data.sources import Sample, Share
from latentfm.data.stream import Stream
from latentfm.data.table import SampleTable
from latentfm.errors import InputError

NO_DROPOUT = Dropout(0.0, 0.0)
ENCODERS = ("clip_1", "clip_2", "t5")


def samples_of(count, captions=1):
    return tuple(Sample(None, tuple(f"caption {c} of {i}" for c in range(captions)), f"{i:03d}.png") for i in range(count))


def cached(folder, samples, draws, lengths=(4, 6), side=2, masks=None):
    """A reader whose entries say what they are: moments of a value a picture and side, prompts of a value a caption."""
    cache, flips = Cache(folder), (False, True) if draws.flip else (False,)

    def entries(kind, tensors):
        keys = {key_of(str(folder), kind, str(what)): value for what, value in tensors.items()}
        cache.write(kind.split()[0], keys)
        return cache.entries(list(keys))

    table = SampleTable.of(samples)
    sides = [side] * len(samples) if isinstance(side, int) else side
    moments = {(i, flip): {"moments": torch.full((4, sides[i], sides[i]), i + 0.5 * flip)} for i in range(len(samples)) for flip in flips}
    prompts = {}
    for length in lengths:
        values = [float(table.texts[number].split()[1]) for number in range(len(table.texts))]
        prompts[length] = entries(f"prompts {length}", {
            number: {"clip_1": torch.full((3, 2), v), "pooled_1": torch.full((2,), v), "t5": torch.full((length, 5), v)}
            for number, v in enumerate(values)
        })  # fmt: skip
    mask_of, mask_entries = None, None
    if masks:
        mask_of = np.full((len(samples), len(flips)), -1, np.int32)
        for number, (i, flip) in enumerate((i, flip) for i in masks for flip in flips):
            mask_of[i, int(flip)] = number
        shapes = {(i, flip): {"mask": torch.full((1, sides[i], sides[i]), (i + 1) / 10 + flip / 100)} for i in masks for flip in flips}
        mask_entries = entries("masks", shapes)
    return CachedReader(table, draws, entries("moments", moments), prompts, mask_entries, mask_of)


@pytest.fixture
def reader(tmp_path):
    """reader(count, captions, seed, ...) -> a reader over a cache of its own, with `samples`."""
    number = iter(range(1000))

    def build(count=7, captions=1, seed=3, dropout=NO_DROPOUT, flip=False, routing=None, side=2, samples=None, masks=None):
        samples = samples or samples_of(count, captions)
        data = cached(tmp_path / str(next(number)), samples, Draws(seed, dropout, flip, routing), side=side, masks=masks)
        data.samples = samples
        return data

    return build


def stream_of(data, batch_size, buckets=None):
    return Stream(Mixture.of(data.samples, data.draws.seed, buckets), batch_size, data.draws.seed)


def every_batch(data, batch_size, steps, *, shares=None, start=0, accumulation=1, rank=0, world=1, workers=0):
    loader = Loader(data, stream_of(data, batch_size), shares or {4: 1.0}, steps, accumulation, rank, world, workers)
    loader.load_state_dict(loader.stream.state(start))
    return list(loader)


def one(data, epoch, index, turn=0, length=4):
    """A sample's tensors and draws, by name."""
    batch = data[[(epoch, index, turn)], length]
    found = {name: getattr(batch, name)[0] for name in ("moments", "u", "vae_noise", "eps", "kept") if getattr(batch, name) is not None}
    return found | {"dropped": {name: bool(value) for name, value in batch.dropped.items()}, "parts": batch.parts.map(lambda v: v[0])}


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


# The slices


def test_a_step_has_one_length_for_every_rank_and_micro_batch(reader):
    data, shares = reader(count=9), {4: 0.5, 6: 0.5}
    alone = [b.t5_length for b in every_batch(data, 8, 20, shares=shares)]
    assert set(alone) == {4, 6}
    for rank in (0, 1):
        found = every_batch(data, 8, 20, shares=shares, rank=rank, world=2, accumulation=2)
        assert [b.t5_length for b in found] == [length for length in alone for _ in range(2)]
        assert all(b.parts.t5.shape[1] == b.t5_length for b in found)


@pytest.mark.parametrize("world, accumulation", [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (4, 2), (1, 8)])
def test_the_slices_of_all_ranks_make_up_the_global_batch(world, accumulation, reader):
    data, steps = reader(count=7, captions=2, dropout=Dropout(0.3, 0.3), flip=True), 5
    whole = rows(every_batch(data, 8, steps))
    parts = [every_batch(data, 8, steps, accumulation=accumulation, rank=rank, world=world) for rank in range(world)]
    assert all(len(found) == steps * accumulation for found in parts)
    assert all(len(b.ids) == 8 // (world * accumulation) for found in parts for b in found)
    ordered = [found[m] for m in range(steps * accumulation) for found in parts]  # m-th micro-batch, rank by rank
    assert_same_rows(rows(ordered), whole)


def test_a_run_resumed_at_a_step_reads_what_it_would_have_read(reader):
    data = reader(count=7, captions=3, dropout=Dropout(0.2, 0.2), flip=True)
    assert_same_rows(rows(every_batch(data, 4, 12, start=5)), rows(every_batch(data, 4, 12)[5:]))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(reader, workers):
    data = reader(count=6, captions=2, dropout=Dropout(0.3, 0.3), flip=True)
    torch.manual_seed(workers)  # the process's own generator is nobody's business
    assert_same_rows(rows(every_batch(data, 4, 8, workers=workers)), rows(every_batch(data, 4, 8)))


# The draws


def test_a_samples_draws_depend_on_seed_epoch_and_id_alone(reader):
    draws = {}
    for count, batch_size in ((7, 4), (7, 1), (7, 7)):
        data = reader(count=count, captions=3, dropout=Dropout(0.3, 0.3), flip=True)
        stream = stream_of(data, batch_size)
        for step, batch in enumerate(every_batch(data, batch_size, 4 * 7 // batch_size)):
            for (epoch, _, _), row in zip(stream.members(step), rows([batch]), strict=True):
                assert_same_rows([row], [draws.setdefault((epoch, row[0]), row)])
    assert len(draws) == 28
    values = [row[1][1].item() for row in draws.values()]
    assert len(set(values)) == 28  # u differs between samples and between epochs
    noises = torch.stack([torch.cat([row[1][2].flatten(), row[1][3].flatten()]) for row in draws.values()])
    assert (torch.cdist(noises, noises) + 100 * torch.eye(28)).min() > 0.5


def test_a_samples_draws_survive_changes_to_the_other_samples(reader):
    """The same id has the same draws whatever else is in the folder, and wherever it stands."""
    small, large = reader(count=2, captions=2, flip=True), reader(count=9, captions=2, flip=True)
    for epoch in range(5):
        first, second = one(small, epoch, 1), one(large, epoch, 1)
        assert torch.equal(first["eps"], second["eps"]) and torch.equal(first["u"], second["u"])
    assert not torch.equal(one(reader(seed=4), 0, 1)["eps"], one(small, 0, 1)["eps"])


def many_draws(data, epochs=600):
    return [one(data, epoch, index) for epoch in range(epochs) for index in range(len(data.samples))]


def frequency_is(found, p, n):
    return abs(found - n * p) <= 4 * math.sqrt(n * p * (1 - p)) + 1e-9


def test_captions_and_sides_are_drawn_uniformly_and_t_too(reader):
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
def test_labels_are_dropped_with_their_probabilities(joint, each, reader):
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


def test_dropout_and_draws_do_not_disturb_one_another(reader):
    plain, dropped = reader(captions=3, flip=True), reader(captions=3, flip=True, dropout=Dropout(0.5, 0.5))
    for epoch in range(10):
        first, second = one(plain, epoch, 2), one(dropped, epoch, 2)
        for name in ("u", "eps", "vae_noise", "moments"):
            assert torch.equal(first[name], second[name])
        assert torch.equal(first["parts"].t5, second["parts"].t5)


def test_a_batch_has_the_shapes_it_says(reader):
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
def test_kept_tokens_depend_on_seed_epoch_and_id_alone(world, accumulation, batch_size, reader):
    data, alone = (reader(routing=Routing(0.5, 1), side=4) for _ in range(2))
    stream = stream_of(data, batch_size)
    for rank in range(world):
        found = every_batch(data, batch_size, 3, accumulation=accumulation, rank=rank, world=world)
        micro = batch_size // (world * accumulation)
        for number, batch in enumerate(found):
            step, m = divmod(number, accumulation)
            members = stream.members(step)[(m * world + rank) * micro :][:micro]
            assert batch.kept.shape == (micro, 8) and batch.kept.dtype == torch.int64
            for (epoch, index, _), kept in zip(members, batch.kept, strict=True):
                assert torch.equal(kept, one(alone, epoch, index)["kept"])
    other_seed = one(reader(routing=Routing(0.5, 1), side=4, seed=4), 0, 1)["kept"]
    draws = [one(alone, 0, 1)["kept"], one(alone, 1, 1)["kept"], one(alone, 0, 2)["kept"], other_seed]
    assert len({tuple(kept.tolist()) for kept in draws}) == 4


def test_routing_changes_no_other_draw(reader):
    plain, routed = (reader(captions=3, flip=True, dropout=Dropout(0.3, 0.3), routing=r) for r in (None, Routing(0.5, 1)))
    first, second = every_batch(plain, 4, 6), every_batch(routed, 4, 6)
    assert_same_rows(rows(first), rows(second))
    assert all(batch.kept is None for batch in first) and all(batch.kept.shape == (4, 2) for batch in second)


def test_every_set_of_tokens_is_equally_likely(reader):
    draws = many_draws(reader(count=5, routing=Routing(0.5, 1)))  # 2 of 4 tokens: six sets
    found = collections.Counter(tuple(d["kept"].tolist()) for d in draws)
    assert set(found) == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
    assert all(frequency_is(count, 1 / 6, len(draws)) for count in found.values())


@pytest.mark.parametrize("keep, patch, size, counts", [(0.5, 2, (8, 6), (6, 12)), (1.0, 1, (2, 2), (4, 4)), (0.01, 2, (8, 8), (0, 16))])
def test_tokens_are_counted_in_patches(keep, patch, size, counts):
    assert Routing(keep, patch).counts(*size) == counts
    assert len(Routing(keep, patch).draw(*size, torch.Generator())) == counts[0]


# What a batch is made of


@pytest.mark.parametrize("routing", [None, Routing(0.5, 1)])
@pytest.mark.parametrize("side", [2, 5])
def test_the_draws_are_these_numbers(reader, routing, side):
    """Written out with a generator of its own for each sample and purpose: other numbers would change every run that is resumed."""
    data = reader(count=5, captions=3, seed=11, dropout=Dropout(0.3, 0.4), flip=True, routing=routing, side=side)
    members = [(0, 3, 0), (2, 1, 0), (2, 1, 1), (7, 4, 2), (-1, 0, 0)]
    batch = data[members, 6]
    for row, (epoch, index, turn) in enumerate(members):
        name = f"{index:03d}.png"
        place = name + (f"\0{turn}" if turn else "")

        def seed(purpose):
            text = "".join(f"{len(part)}:{part}" for part in ("11", purpose, str(epoch), place))  # noqa: B023
            return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

        def normal(purpose):
            return torch.randn(2, side, side, generator=torch.Generator().manual_seed(seed(purpose)))  # noqa: B023

        def u(purpose):
            return (seed(purpose) >> 39) / 2**24  # noqa: B023

        assert batch.ids[row] == name and batch.u[row] == u("t")
        assert torch.equal(batch.vae_noise[row], normal("vae_noise")) and torch.equal(batch.eps[row], normal("eps"))
        assert batch.parts.t5[row].unique().item() == int(u("caption") * 3)
        assert batch.moments[row].unique().item() == index + 0.5 * bool(u("flip") < 0.5)
        names = ("clip_1", "clip_2", "t5")
        assert [bool(batch.dropped[n][row]) for n in names] == [bool(u("dropout") < 0.3 or u(f"dropout/{n}") < 0.4) for n in names]
        if routing:
            tokens, drawn = side * side, torch.Generator().manual_seed(seed("routing"))
            assert batch.kept[row].tolist() == sorted(torch.randperm(tokens, generator=drawn)[: round(tokens / 2)].tolist())


def test_masks_stay_with_their_pictures_and_their_sides(reader):
    data = reader(count=4, flip=True, masks=(1, 3), side=3)
    seen = set()
    for epoch in range(12):
        batch = data[[(epoch, index, 0) for index in range(4)], 4]
        assert batch.mask.shape == (4, 1, 3, 3)
        for index, (mask, moments) in enumerate(zip(batch.mask, batch.moments, strict=True)):
            flip = float(moments[0, 0, 0]) % 1 == 0.5
            assert mask.unique().item() == pytest.approx((index + 1) / 10 + flip / 100 if index in (1, 3) else 1)
            seen.add((index, flip))
        assert data[[(epoch, 0, 0), (epoch, 2, 0)], 4].mask is None
    assert len(seen) == 8


def test_which_samples_are_a_regularisation_set_is_in_the_batch(reader):
    samples = [replace(sample, share=Share("x", 1.0, index % 2 == 1)) for index, sample in enumerate(samples_of(4))]
    data = reader(samples=tuple(samples))
    assert data[[(0, index, 0) for index in (1, 0, 3)], 4].prior.tolist() == [True, False, True]
    assert data[[(0, 0, 0), (0, 2, 0)], 4].prior is None


def test_captions_come_by_their_weights_and_shared_texts_are_read_once(reader):
    weighted = Sample(None, ("caption 0 x", "caption 1 x", "caption 2 x"), "a", (1.0, 6.0, 3.0))
    data = reader(samples=(weighted, Sample(None, ("caption 1 x", "caption 0 x"), "b")))
    assert len(data.table.texts) == 3 and len(data.prompts[4]) == 3
    drawn = collections.Counter(int(one(data, epoch, 0)["parts"].t5[0, 0]) for epoch in range(1500))
    assert all(frequency_is(drawn[number], share, 1500) for number, share in enumerate((0.1, 0.6, 0.3)))
    drawn = collections.Counter(int(one(data, epoch, 1)["parts"].t5[0, 0]) for epoch in range(500))
    assert drawn.keys() == {0, 1} and frequency_is(drawn[0], 0.5, 500)


def test_a_batch_has_one_shape_and_each_bucket_its_own(reader):
    sides = [2, 3, 2, 3, 3, 2, 3]
    data = reader(count=7, side=sides)
    with pytest.raises(ValueError, match="one layout"):
        data[[(0, 0, 0), (0, 1, 0)], 4]
    stream = stream_of(data, 2, [side - 2 for side in sides])
    found = list(Loader(data, stream, {4: 1.0}, 14))
    seen = collections.Counter(name for batch in found for name in batch.ids)
    assert set(seen.values()) <= {3, 4, 5} and {batch.eps.shape[-1] for batch in found} == {2, 3}
    for batch in found:
        assert {sides[int(name[:3])] for name in batch.ids} == {batch.moments.shape[-1]}


def test_a_batch_moves_as_a_whole(reader):
    batch = reader(count=4, masks=(0,), routing=Routing(0.5, 1))[[(0, 0, 0), (0, 1, 0)], 4]
    touched = []
    doubled = batch.map(lambda value: touched.append(value) or value.clone())
    tensors = [getattr(batch, f.name) for f in fields(Batch) if isinstance(getattr(batch, f.name), torch.Tensor)]
    assert len(touched) == len(tensors) + len(batch.dropped) + len(batch.parts.items()) == 6 + 3 + 3
    assert_same_rows(rows([doubled]), rows([batch]))
    moved = batch.to(torch.device("meta"))
    assert moved.parts.t5.device.type == moved.dropped["t5"].device.type == moved.kept.device.type == "meta"
    assert (moved.ids, moved.t5_length) == (batch.ids, 4)


# The loader's place


def test_the_loader_goes_on_where_its_state_was_taken(reader):
    data = reader(count=7, captions=2, flip=True)
    whole = every_batch(data, 4, 10, accumulation=2)
    loader = Loader(data, stream_of(data, 4), {4: 1.0}, 10, accumulation=2)
    batches, states = iter(loader), [loader.state_dict()]
    for _ in range(7):  # three steps and a half
        next(batches)
        states.append(loader.state_dict())
    assert [state["step"] for state in states] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert states[4].keys() >= {"seed", "epoch", "cursor", "step"}
    for state in (states[7], {name: states[7][name] for name in ("seed", "epoch", "cursor", "step")}):
        other = Loader(data, stream_of(data, 4), {4: 1.0}, 10, accumulation=2)
        other.load_state_dict(state)
        assert_same_rows(rows(other), rows(whole[6:]))
    assert list(loader)  # the same object goes on too, from the step it stood in
    assert loader.state_dict()["step"] == 10 and list(loader) == []


@pytest.mark.parametrize("change, message", [
    ({"seed": 4}, "seed"), ({"batch": 2}, "batch_size was 4, is 2"), ({"count": 8}, "samples was"), ({"captions": 2}, "samples was"),
])  # fmt: skip
def test_the_state_of_another_run_is_refused(reader, change, message):
    first = reader(count=7, seed=3)
    loader = Loader(first, stream_of(first, 4), {4: 1.0}, 10)
    next(iter(loader))
    batch = change.pop("batch", 4)
    other = reader(**({"count": 7, "seed": 3} | change))
    with pytest.raises(InputError, match=message):
        Loader(other, stream_of(other, batch), {4: 1.0}, 10).load_state_dict(loader.state_dict())


def test_a_batch_that_does_not_divide_is_refused(reader):
    data = reader()
    with pytest.raises(ValueError, match="6 does not divide by 2 processes x 2"):
        Loader(data, stream_of(data, 6), {4: 1.0}, 3, accumulation=2, world=2)


# Loader processes


def test_a_process_reads_no_further_ahead_than_it_should(reader):
    data = reader()
    loader = Loader(data, stream_of(data, 4), {4: 1.0}, 1000, workers=2)
    asked, requests = [], loader.requests
    loader.requests = lambda: (asked.append(1) or request for request in requests())
    batches = iter(loader)
    for number in range(1, 6):
        next(batches)
        assert len(asked) <= number + 2 * AHEAD
    batches.close()


def test_a_reader_process_that_dies_is_named(reader):
    data = reader()
    batches = iter(Loader(data, stream_of(data, 4), {4: 1.0}, 100_000, workers=2))
    next(batches)
    victim = multiprocessing.active_children()[0].pid
    handler = signal.getsignal(signal.SIGCHLD)
    os.kill(victim, signal.SIGKILL)
    time.sleep(0.1)  # nothing is raised here, where a training may be saving
    with pytest.raises(InputError, match=rf"ahead died \(pid {victim}, signal 9\).*lower data.workers \(now 2\).*--resume"):
        for _ in batches:
            pass
    assert handler in (signal.SIG_DFL, signal.SIG_IGN, None)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_entry_is_an_error_of_one_line_that_names_it(reader, workers):
    data = reader(count=3)
    path = data.moments.paths[data.moments.rows["shard"][1]]
    with open(path, "r+b") as file:
        file.seek(int(data.moments.rows["offset"][1]) + 3)
        file.write(b"\x99")
    key = data.moments.key(1).hex()
    with pytest.raises(InputError, match=f"{key} in {path} is damaged .*start again and it will be made anew$") as raised:
        every_batch(data, 3, 2, workers=workers)
    assert "\n" not in str(raised.value)
    with pytest.raises(KeyError):  # noted: the next run makes it again
        Cache(data.moments.folder).entries([key])


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="reads Linux's /proc")
def test_memory_is_flat_over_an_epoch(tmp_path):
    """Memory of its own (not shared with others) of this process and of its two loader processes, over 24,000 draws of 12,000 samples."""
    script = f"""
import sys; sys.path.insert(0, {str(os.path.dirname(__file__))!r})
import os, numpy as np, torch
from pathlib import Path
from test_loader import *
torch.set_num_threads(1)
samples = samples_of(12_000)
data = cached(Path({str(tmp_path)!r}), samples, Draws(0, NO_DROPOUT), lengths=(4,))
data.samples = samples
def own():
    pids = [os.getpid(), *map(int, open(f"/proc/self/task/{{os.getpid()}}/children").read().split())]
    total = 0
    for pid in pids:
        for line in open(f"/proc/{{pid}}/smaps_rollup"):
            if line.startswith("Private"):
                total += int(line.split()[1])
    return total / 1024
seen = []
for number, batch in enumerate(Loader(data, stream_of(data, 50), {{4: 1.0}}, 480, workers=2)):
    if number in (40, 239, 479):
        seen.append(own())
print(*seen)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    early, middle, late = map(float, done.stdout.split())
    assert late - early < 3 and late - middle < 1.5, done.stdout  # MiB; of 12,000 samples kept as Python objects it is 20
