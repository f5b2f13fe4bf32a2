"""Before a run's first step: shapes, what is left out by name, a cache that many processes fill, and none at all."""

import threading
import time

import numpy as np
import pytest
import torch
from data.preparing import CPU, NO_DROPOUT, Quiet, cached, damage, data_of, entry_of, fill, shards
from PIL import ExifTags, Image

from latentfm.config import DataOptions, ModelOptions
from latentfm.data.cache import fill as filling
from latentfm.data.cache.processes import Processes
from latentfm.data.cache.shard import read_shard
from latentfm.data.loader import Dropout, Loader, Routing
from latentfm.data.mixture import Mixture
from latentfm.data.online import OnlineData
from latentfm.data.sources import read_folder
from latentfm.data.stream import Stream
from latentfm.errors import InputError
from latentfm.training.models import load_models

# Shapes


def picture_of(folder, name, size, seed=0, **options):
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC).save(folder / name, **options)
    (folder / name).with_suffix(".txt").write_text(f"caption of {name}")


@pytest.fixture
def odd_sizes(tmp_path):
    """Squares, wide and tall pictures, one of them tall only by its EXIF orientation."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    sizes = {"a.png": (32, 32), "b.png": (64, 32), "c.png": (30, 70), "d.png": (33, 31), "e.png": (200, 90)}
    for seed, (name, size) in enumerate(sizes.items()):
        picture_of(folder, name, size, seed)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture_of(folder, "f.jpg", (64, 32), 7, exif=exif)
    return folder


def test_every_picture_is_brought_to_the_shape_that_crops_least_of_it(odd_sizes, models):
    data = cached(odd_sizes, models, buckets=3, flip=True)
    fill(data)
    shape = {sample.id: data.inventory.buckets.shapes[bucket] for sample, bucket in zip(data.samples, data.bucket_of, strict=True)}
    (wide,), (tall,) = ([s for s in data.inventory.buckets.shapes if (s[0] > s[1]) == w and s[0] != s[1]] for w in (True, False))
    assert shape == {"a.png": (32, 32), "b.png": wide, "c.png": tall, "d.png": (32, 32), "e.png": wide, "f.jpg": tall}
    for sample in data.samples:
        width, height = shape[sample.id]
        for flip in (False, True):
            assert entry_of(data, data.image_key(sample, flip))["moments"].shape == (8, height // 4, width // 4)
    assert data.inventory.transforms[data.bucket_of[1]][1].width == wide[0] and data.inventory.transforms[data.bucket_of[1]][1].flip
    one = cached(odd_sizes, models)
    assert one.inventory.buckets.shapes == ((32, 32),) and one.bucket_of.tolist() == [0] * 6


def test_a_run_with_buckets_reads_one_shape_a_batch_and_every_picture_once(odd_sizes, models):
    data = cached(odd_sizes, models, buckets=3)
    fill(data)
    stream = Stream(Mixture.of(data.samples, 0, data.bucket_of), 2, 0)
    seen = []
    for batch in Loader(data.reader(0, NO_DROPOUT, Routing(0.5, 2)), stream, {8: 1.0}, 12):
        height, width = batch.moments.shape[-2:]
        assert batch.moments.dtype == torch.float32 and batch.kept.shape == (2, height * width // 8)
        for name, moments in zip(batch.ids, batch.moments, strict=True):
            (sample,) = [s for s in data.samples if s.id == name]
            assert torch.equal(moments, entry_of(data, data.image_key(sample, False))["moments"].float())
        seen += batch.ids
    assert {seen.count(sample.id) for sample in data.samples} == {4}


def test_pictures_that_lose_too_much_are_left_out_by_name(odd_sizes, models, capsys):
    data = cached(odd_sizes, models, max_crop=0.4)
    assert [sample.id for sample in data.samples] == ["a.png", "d.png"]
    fill(data)
    told = capsys.readouterr().out
    assert "b.png (64 x 32) would lose 50% to the crop, data.max_crop is 40%" in told and "f.jpg (32 x 64) would lose 50%" in told
    assert "4 of 6 pictures would lose too much to the crop and are left out (named above)" in told
    assert len(data.bucket_of) == 2
    assert len(cached(odd_sizes, models, buckets=3, max_crop=0.4).samples) == 6
    with pytest.raises(InputError, match="none of the 6 pictures.*raise data.max_crop"):
        cached(odd_sizes, models, size=(24, 32), max_crop=0.01)


def test_masks_have_their_buckets_shape(odd_sizes, models):
    for name in ("b.png", "e.png"):
        with Image.open(odd_sizes / name) as picture:
            half = np.zeros(picture.size[::-1], np.uint8)
            half[:, : picture.size[0] // 2] = 255
        Image.fromarray(half).save(odd_sizes / name.replace(".png", ".mask.png"))
    data = cached(odd_sizes, models, buckets=3, flip=True)
    fill(data)
    reader = data.reader(0, NO_DROPOUT)
    wide = [index for index, sample in enumerate(data.samples) if sample.id in ("b.png", "e.png")]
    batch = reader[[(0, index, 0) for index in wide], 8]
    assert batch.mask.shape == (2, 1, *batch.eps.shape[-2:]) and batch.mask.float().mean() == pytest.approx(0.5, abs=0.05)
    assert reader[[(0, 0, 0)], 8].mask is None


# What cannot be read


@pytest.fixture
def some_corrupt(tmp_path):
    """Forty pictures: one cut off, one that is no picture, and the rest good."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(40):
        picture_of(folder, f"{index:02d}.png", (32, 32), index)
    cut = (folder / "07.png").read_bytes()
    (folder / "07.png").write_bytes(cut[: len(cut) // 2])
    (folder / "19.png").write_text("no picture")
    return folder


@pytest.mark.parametrize("options", [{}, {"buckets": 2}, {"online": True}, {"online": True, "buckets": 2, "flip": True}], ids=str)
def test_what_cannot_be_read_is_left_out_by_name(some_corrupt, models, capsys, options):
    before = {path.name: path.read_bytes() for path in some_corrupt.iterdir()}
    for _ in range(2):  # found, and then known from the cache
        given = DataOptions(folder=str(some_corrupt), cache=str(some_corrupt.parent / "cache"), **options)
        data = data_of(read_folder(some_corrupt), models, given, (8,))
        fill(data)
        told = capsys.readouterr().out
        assert "07.png: " in told and "19.png: not a picture in PNG" in told
        assert "2 of 40 pictures cannot be read and are left out (named above)" in told
        assert [sample.id for sample in data.samples] == [f"{i:02d}.png" for i in range(40) if i not in (7, 19)]
        assert len(data.bucket_of) == 38
    assert {path.name: path.read_bytes() for path in some_corrupt.iterdir()} == before


def test_a_folder_of_nothing_readable_is_refused(pictures, models):
    for index in (0, 1):
        (pictures / f"{index}.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="none of the 2 pictures.*can be read"):
        fill(cached(pictures, models))
    with pytest.raises(InputError, match="none of the 2 pictures.*can be read"):
        cached(pictures, models, buckets=2)


def test_a_picture_that_changes_while_it_is_cached_stops_it(pictures, models):
    data = cached(pictures, models)
    with (pictures / "1.png").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError, match="1.png changed while it was being cached; start again"):
        fill(data)


# Many processes: here threads, each with models of its own, as tokenizers are not for two at once


def loaded_again(folder, tiny_folder, rank=0, world=1):
    return cached(folder, load_models(ModelOptions(pipeline=str(tiny_folder)), weights=False), processes=Processes(rank, world))


def at_once(work, items):
    """work(item) of each in a thread of its own, until all have ended."""
    threads = [threading.Thread(target=work, args=(item,)) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_ranks_share_the_work_and_wait_for_each_other(some_corrupt, models, tiny_folder, monkeypatch):
    monkeypatch.setattr(filling, "SECONDS_BETWEEN_POLLS", 0.02)
    data = [loaded_again(some_corrupt, tiny_folder, rank, 3) for rank in range(3)]
    made, order = {}, []

    def run(rank):
        time.sleep(0.3 * rank)
        made[rank] = data[rank].prepare(Quiet())
        order.append(rank)

    at_once(run, range(3))
    assert sorted(order) == [0, 1, 2] and len({tuple(s.id for s in d.samples) for d in data}) == 1 and len(data[0].samples) == 38
    for kind in ("moments", "prompts"):
        counts = [len(made[rank][kind]) for rank in range(3)]
        assert sorted(counts) == ([13, 13, 14] if kind == "prompts" else [11, 13, 14])  # each once, and evenly; two could not be read
    assert sum(len(read_shard(path).rows) for path in shards(data[0].cache.folder)) == 80
    assert fill(cached(some_corrupt, models)) == 0
    pixels = [d.reader(0, NO_DROPOUT)[[(0, 3, 0)], 8].moments for d in data]
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])


def test_two_runs_at_once_on_one_folder_both_end_well(some_corrupt, models, tiny_folder):
    data = [loaded_again(some_corrupt, tiny_folder) for _ in range(2)]
    at_once(fill, data)
    assert fill(cached(some_corrupt, models)) == 0
    first, second = (mine.reader(0, NO_DROPOUT)[[(0, index, 0) for index in range(38)], 8] for mine in data)
    assert torch.equal(first.moments, second.moments) and torch.equal(first.parts.t5, second.parts.t5)


def test_damage_is_found_by_the_rank_whose_share_it_is_in(some_corrupt, models, tiny_folder, monkeypatch):
    monkeypatch.setattr(filling, "SECONDS_BETWEEN_POLLS", 0.02)
    first = cached(some_corrupt, models)
    fill(first)
    key = first.image_key(first.samples[5], False)
    damage(first.cache.folder, key)
    data, made = [loaded_again(some_corrupt, tiny_folder, rank, 2) for rank in range(2)], {}

    def run(rank):
        made[rank] = len(data[rank].prepare(Quiet())["moments"])

    at_once(run, range(2))
    assert sum(made.values()) == 1
    batches = [d.reader(0, NO_DROPOUT)[[(0, 5, 0)], 8].moments for d in data]
    assert torch.equal(*batches)


def test_a_picture_whose_damaged_entry_another_rank_is_making_again_is_not_left_out(some_corrupt, models):
    first = cached(some_corrupt, models)
    fill(first)
    key = first.image_key(first.samples[5], False)
    damage(first.cache.folder, key)
    data = [cached(some_corrupt, models, processes=Processes(rank, 2)) for rank in range(2)]
    (owner,) = [rank for rank in range(2) for job in data[rank].jobs() if key in dict(job.wanted[rank::2])]
    mine, other = data[owner], data[1 - owner]
    other.fill(other.jobs(), Quiet(), verify=True)  # whole, as far as its share goes
    mine.cache.refresh()
    assert mine.cache.verify() == 1  # found, and noted as lost
    other.leave_out(other.unusable())
    assert fill(mine) == 1
    assert [sample.id for sample in mine.samples] == [sample.id for sample in other.samples] and len(other.samples) == 38
    assert torch.equal(*(d.reader(0, NO_DROPOUT)[[(0, 5, 0)], 8].moments for d in data))


# Online


def both(folder, models, **options):
    """(what the cached run reads, what the online run encodes) for one batch of all pictures, in turn."""
    for online in (False, True):
        given = DataOptions(folder=str(folder), cache=str(folder.parent / f"cache{online}"), online=online, **options)
        data = data_of(read_folder(folder), models, given, (8,))
        fill(data)
        assert isinstance(data, OnlineData) == online
        reader = data.reader(3, Dropout(0.2, 0.2), Routing(0.5, 2))
        members = [(epoch, index, turn) for epoch in (0, 5) for index in range(len(data.samples)) for turn in (0, 1)]
        yield data, data.complete(reader[members, 8], CPU)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_online_is_the_cached_run_up_to_rounding(some_corrupt, models, dtype, tolerance):
    half = np.zeros((32, 32), np.uint8)
    half[:, :16] = 255
    Image.fromarray(half).save(some_corrupt / "03.mask.png")
    (_, first), (data, second) = both(some_corrupt, models, flip=True, cache_dtype=dtype)
    assert first.ids == second.ids and first.t5_length == second.t5_length == 8 and second.pixels is second.captions is None
    for name in ("u", "vae_noise", "eps", "kept", "mask"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert all(torch.equal(first.dropped[name], second.dropped[name]) for name in first.dropped)
    assert second.moments.dtype == torch.float32
    assert ((first.moments - second.moments).abs() <= tolerance * (1 + first.moments.abs())).all()
    for name, value in first.parts.items():
        other = getattr(second.parts, name)
        assert other.dtype == value.dtype == torch.bfloat16
        torch.testing.assert_close(other.float(), value.float(), rtol=2**-7, atol=1e-5)  # a rounding of bfloat16 at most
    assert {path.parent.name for path in shards(data.cache.folder)} == {"checks"}


def test_online_batches_come_from_loader_processes_too(odd_sizes, models):
    given = DataOptions(folder=str(odd_sizes), cache=str(odd_sizes.parent / "cache"), online=True, buckets=3)
    data = data_of(read_folder(odd_sizes), models, given, (8,))
    fill(data)
    reader = data.reader(0, NO_DROPOUT)
    found = []
    for workers in (0, 2):
        stream = Stream(Mixture.of(data.samples, 0, data.bucket_of), 2, 0)
        found.append(list(Loader(reader, stream, {8: 1.0}, 6, workers=workers)))
    for first, second in zip(*found, strict=True):
        assert first.captions == second.captions == [f"caption of {name}" for name in first.ids]
        assert first.pixels.dtype == torch.uint8 and torch.equal(first.pixels, second.pixels)
        moments = data.complete(second, CPU).moments
        assert moments.shape[-2:] == first.eps.shape[-2:] and moments.shape[-2] * 4 == first.pixels.shape[-2]
    (odd_sizes / "a.png").write_bytes((odd_sizes / "b.png").read_bytes())
    with pytest.raises(InputError, match="a.png changed"):
        list(Loader(reader, Stream(Mixture.of(data.samples, 0, data.bucket_of), 2, 0), {8: 1.0}, 6, workers=1))
