"""Before a run's first step: keys that notice every change, shapes, what is left out by name, and a cache that many processes fill."""

import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from data.preparing import Quiet, data_of
from diffusers import AutoencoderKL
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from latentfm.config import DataOptions, ModelOptions
from latentfm.data import prepared
from latentfm.data.cache import fill as filling
from latentfm.data.cache.processes import ONE_PROCESS, Processes
from latentfm.data.cache.shard import read_shard
from latentfm.data.loader import Dropout, Loader, Routing
from latentfm.data.mixture import Mixture
from latentfm.data.online import OnlineData
from latentfm.data.sources import read_folder
from latentfm.data.stream import Stream
from latentfm.errors import InputError
from latentfm.interchange import components, frozen
from latentfm.models.tokenizers import load_tokenizer
from latentfm.training.models import load_models

CPU = torch.device("cpu")
NO_DROPOUT = Dropout(0.0, 0.0)


@pytest.fixture(scope="module")
def models(tiny_folder):
    return load_models(ModelOptions(pipeline=str(tiny_folder)))


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, caption in enumerate(("a red apple", "a blue car\ntwo cars")):
        rng = np.random.default_rng(index)
        Image.fromarray(rng.integers(0, 256, (40, 32, 3), np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption)
    return folder


def cached(pictures, models, lengths=(8,), processes=ONE_PROCESS, **options):
    given = DataOptions(folder=str(pictures), cache=str(pictures.parent / "cache"), **options)
    return data_of(read_folder(pictures), models, given, lengths, processes)


def keys(data):
    """Every key of a dataset, by what it is for."""
    images = {(sample.id, flip): data.image_key(sample, flip) for sample in data.inventory.dataset.samples for flip in data.inventory.flips}
    texts = {(c, n): data.caption_key(c, n) for sample in data.inventory.dataset.samples for c in sample.captions for n in data.lengths}
    return images | texts


def fill(data):
    """Fills the cache; returns how many entries were made."""
    return sum(map(len, data.prepare(Quiet()).values()))


def entry_of(data, key):
    return data.cache.read(key)


def shards(folder):
    return sorted(folder.rglob("*.safetensors"))


def damage(folder, key):
    """Flips a bit of the entry `key`."""
    for path in shards(folder):
        for row in read_shard(path).rows:
            if row["key"].ljust(32, b"\0").hex() == key:
                data = bytearray(path.read_bytes())
                data[int(row["offset"]) + 5] ^= 1
                path.write_bytes(data)
                return path


def test_nothing_changed_is_a_hit(pictures, models):
    assert fill(cached(pictures, models)) == 5  # two pictures, three captions
    assert fill(cached(pictures, models)) == 0
    moved = pictures.parent / "moved" / "deeper"
    shutil.copytree(pictures, moved)
    (moved / "0.png").rename(moved / "renamed.png")
    (moved / "0.txt").rename(moved / "renamed.txt")
    again = data_of(read_folder(moved), models, DataOptions(folder=str(moved), cache=str(pictures.parent / "cache")), (8,))
    assert fill(again) == 0  # paths and names are no part of a key


def test_a_changed_byte_of_a_picture_is_a_miss_and_only_its_own(pictures, models):
    before = keys(cached(pictures, models))
    fill(cached(pictures, models))
    with (pictures / "0.png").open("ab") as file:
        file.write(b"\0")
    after = keys(cached(pictures, models))
    assert {name for name in before if before[name] != after[name]} == {("0.png", False)}
    assert fill(cached(pictures, models)) == 1


def test_two_pictures_of_one_stem_or_swapped_names_never_share(pictures, models):
    before = keys(cached(pictures, models))
    (pictures / "0.png").rename(pictures / "x.png")
    (pictures / "1.png").rename(pictures / "0.png")
    (pictures / "x.png").rename(pictures / "1.png")
    after = keys(cached(pictures, models))
    assert after[("0.png", False)] == before[("1.png", False)] != before[("0.png", False)]


@pytest.mark.parametrize("options", [{"size": 24}, {"size": (32, 24)}, {"size": (24, 32)}])
def test_another_transform_is_a_miss_for_pictures_alone(pictures, models, options):
    before, after = keys(cached(pictures, models)), keys(cached(pictures, models, **options))
    assert {name for name in before if before[name] != after[name]} == {("0.png", False), ("1.png", False)}


def test_flips_have_their_own_entries_of_the_mirrored_picture(pictures, models):
    data = cached(pictures, models, flip=True)
    assert len(set(keys(data).values())) == 2 * 2 + 3
    assert fill(data) == 7
    sample = data.inventory.dataset.samples[0]
    plain, flipped = (data.cache.read(data.image_key(sample, flip))["moments"] for flip in (False, True))
    with Image.open(pictures / "0.png") as picture:
        picture.crop((0, 4, 32, 36)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(pictures / "0.png")
    mirrored = cached(pictures, models)
    fill(mirrored)
    torch.testing.assert_close(mirrored.cache.read(mirrored.image_key(sample, False))["moments"], flipped)
    assert (plain - flipped).abs().max() > 0.1


def test_another_caption_or_length_is_a_miss_of_its_own(pictures, models):
    before = keys(cached(pictures, models))
    (pictures / "1.txt").write_text("a blue car\ntwo cars ")  # white space at the end is removed by the reader
    assert keys(cached(pictures, models)) == before
    (pictures / "1.txt").write_text("a blue car\nTwo cars")
    after = keys(cached(pictures, models))
    assert set(before) ^ set(after) == {("two cars", 8), ("Two cars", 8)}
    assert after[("Two cars", 8)] not in before.values()
    longer = keys(cached(pictures, models, lengths=(8, 9)))
    assert longer[("a blue car", 9)] != longer[("a blue car", 8)] == before[("a blue car", 8)]


def altered(folder, copy, name, change):
    """The models of a copy of a pipeline folder, one of whose components' tensors `change` has changed."""
    shutil.copytree(folder, copy)
    (file,) = (copy / name).glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return load_models(ModelOptions(pipeline=str(copy)), weights=False)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_another_weight_of_an_encoder_is_a_miss_for_captions_alone(pictures, models, tiny_folder, tmp_path, which):
    before, name = keys(cached(pictures, models)), ("text_encoder", "text_encoder_2", "text_encoder_3")[which]
    assert keys(cached(pictures, altered(tiny_folder, tmp_path / "same", name, lambda tensors: None))) == before

    def change(tensors):
        value = tensors[max(tensors)].view(-1)
        value[0] = torch.nextafter(value[0], torch.tensor(9.0))  # the last bit of one weight

    after = keys(cached(pictures, altered(tiny_folder, tmp_path / "other", name, change)))
    assert {name for name in before if before[name] == after[name]} == {("0.png", False), ("1.png", False)}


def test_another_vae_is_a_miss_for_pictures_alone(pictures, models, tiny_folder, tmp_path):
    before = keys(cached(pictures, models))

    def change(tensors):
        tensors["encoder.conv_in.bias"][0] += 1e-6

    after = keys(cached(pictures, altered(tiny_folder, tmp_path / "other", "vae", change)))
    assert {name for name in before if before[name] != after[name]} == {("0.png", False), ("1.png", False)}


@pytest.mark.parametrize("change", ["vocabulary", "padding", "length", "absent"])
def test_another_tokenizer_is_a_miss_for_captions_alone(pictures, models, tiny_folder, tmp_path, monkeypatch, change):
    before = keys(cached(pictures, models))
    shutil.copytree(tiny_folder, tmp_path / "other")
    tokenizer = load_tokenizer(tmp_path / "other" / "tokenizer_2")
    if change == "vocabulary":
        tokenizer.add_tokens(["apple-like"])
    elif change == "padding":
        tokenizer.pad_token = "a"
    elif change == "length":
        tokenizer.model_max_length = 15
    found = None if change == "absent" else tokenizer
    monkeypatch.setattr(frozen, "load_tokenizer", lambda path: found if path.name == "tokenizer_2" else load_tokenizer(path))
    after = keys(cached(pictures, load_models(ModelOptions(pipeline=str(tmp_path / "other")), weights=False)))
    assert {name for name in before if before[name] == after[name]} == {("0.png", False), ("1.png", False)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_entries_are_what_the_encoders_give(pictures, models, dtype):
    data = cached(pictures, models, lengths=(8, 5), cache_dtype=dtype)
    fill(data)
    for sample in data.inventory.dataset.samples:
        with Image.open(sample.path) as picture:
            pixels = torch.from_numpy(np.array(picture.crop((0, 4, 32, 36)))).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            posterior = models.vae.encode(pixels).latent_dist
        moments = entry_of(data, data.image_key(sample, False))["moments"]
        assert moments.dtype == getattr(torch, dtype)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 2**-8, "atol": 1e-4}
        torch.testing.assert_close(moments[None].float(), torch.cat([posterior.mean, posterior.logvar], dim=1), **tolerance)
        for caption in sample.captions:
            for length in (8, 5):
                parts = models.encoder.encode([caption], length)
                got = entry_of(data, data.caption_key(caption, length))
                assert got.keys() == {name for name, _ in parts.items()}
                for name, value in parts.items():
                    torch.testing.assert_close(got[name].float(), value[0], rtol=1e-2, atol=1e-3)  # kept in bfloat16
                    assert got[name].dtype == torch.bfloat16


def test_the_dtype_of_the_cache_is_part_of_a_pictures_key_alone(pictures, models):
    before, after = keys(cached(pictures, models)), keys(cached(pictures, models, cache_dtype="float32"))
    assert {name for name in before if before[name] != after[name]} == {("0.png", False), ("1.png", False)}


def test_a_damaged_entry_of_a_dataset_is_repaired_by_the_next_run_to_the_bit(pictures, models, caplog):
    data = cached(pictures, models)
    assert fill(data) == 5
    image, text = data.image_key(data.inventory.dataset.samples[1], False), data.caption_key("two cars", 8)
    before = {key: entry_of(data, key) for key in (image, text)}
    for key in (image, text):
        damage(data.cache.folder, key)
    again = cached(pictures, models)
    assert fill(again) == 2 and image in caplog.text and text in caplog.text
    for key, tensors in before.items():  # made with other neighbours in its batch, and the same
        assert all(torch.equal(value, tensors[name]) for name, value in entry_of(again, key).items())
    assert {p.name for p in pictures.iterdir()} == {"0.png", "0.txt", "1.png", "1.txt"}  # the user's files are not touched


def test_an_old_cache_is_told_of_once_and_left(pictures, models, caplog):
    folder = pictures.parent / "cache" / "ab"
    folder.mkdir(parents=True)
    (folder / f"{'ab' * 32}.safetensors").write_bytes(b"old")
    fill(cached(pictures, models))
    assert caplog.text.count("earlier version") == 1 and "rm -r" in caplog.text and len(list(folder.iterdir())) == 1


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


def test_ranks_share_the_work_and_wait_for_each_other(some_corrupt, models, tiny_folder, monkeypatch):
    monkeypatch.setattr(filling, "SECONDS_BETWEEN_POLLS", 0.02)
    data = [loaded_again(some_corrupt, tiny_folder, rank, 3) for rank in range(3)]
    made, order = {}, []

    def run(rank):
        time.sleep(0.3 * rank)
        made[rank] = data[rank].prepare(Quiet())
        order.append(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
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
    threads = [threading.Thread(target=fill, args=(mine,)) for mine in data]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
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

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(made.values()) == 1
    batches = [d.reader(0, NO_DROPOUT)[[(0, 5, 0)], 8].moments for d in data]
    assert torch.equal(*batches)


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


# The models


def test_a_cache_is_filled_without_the_networks_weights(pictures, models, tiny_folder):
    light = load_models(ModelOptions(pipeline=str(tiny_folder)), weights=False)
    assert {parameter.device.type for parameter in light.network.parameters()} == {"meta"}
    assert {k: v for k, v in models.network.config.items() if k != "_name_or_path"} == dict(light.network.config)
    assert keys(cached(pictures, light)) == keys(cached(pictures, models))
    fill(cached(pictures, light))
    assert fill(cached(pictures, models)) == 0


def test_a_new_networks_widths_are_known_without_its_weights(tiny_folder, monkeypatch):
    from latentfm.models import presets

    monkeypatch.setitem(presets.PRESETS, "atom", presets.size(2, 1, sample_size=8, pos_embed_max_size=8))
    whole, light = (load_models(ModelOptions(pipeline=str(tiny_folder), preset="atom"), weights=weights) for weights in (True, False))
    assert light.network.pos_embed.proj.weight.is_meta and dict(light.network.config) == dict(whole.network.config)
    assert light.encoder.joint_dim == whole.encoder.joint_dim == 48


def test_text_encoders_load_in_the_precision_asked_for(pictures, models, tiny_folder):
    half = load_models(ModelOptions(pipeline=str(tiny_folder), text_encoders="bfloat16"))
    assert {p.dtype for encoder in half.encoder.encoders for p in encoder.parameters()} == {torch.bfloat16}
    assert next(half.vae.parameters()).dtype == torch.float32
    before, after = keys(cached(pictures, models)), keys(cached(pictures, half))
    assert {name for name in before if before[name] == after[name]} == {("0.png", False), ("1.png", False)}
    data = cached(pictures, half)
    assert fill(data) == 5
    exact = models.encoder.encode(["two cars"], 8)
    for name, value in entry_of(data, data.caption_key("two cars", 8)).items():
        torch.testing.assert_close(value.float(), getattr(exact, name)[0], rtol=0.1, atol=0.05)


def test_a_full_cache_loads_neither_encoders_nor_vae(pictures, tiny_folder, monkeypatch):
    """Nor does anything else of theirs: what they are is told by files that did not change, what they said is kept."""

    def conditions(data):
        return dict(data.encode(["a red apple", "x"], 8).items()), data.null([8, 12], CPU)

    def light():
        return cached(pictures, load_models(ModelOptions(pipeline=str(tiny_folder)), weights=False))

    first = light()
    fill(first)
    prompts, null = conditions(first)
    assert first.models._vae is not None and first.models._encoder is not None
    first.release()
    assert first.models._vae is None and first.models._encoder is None and "null" not in first.models.__dict__
    for module, name in ((frozen, "load_component"), (frozen, "load_text_encoders"), (frozen, "open_component"), (frozen, "load_tokenizer"),
                         (components, "load_part"), (AutoencoderKL, "from_pretrained"), (T5EncoderModel, "from_pretrained"),
                         (CLIPTextModelWithProjection, "from_pretrained"), (prepared, "load_tokenizers")):  # fmt: skip
        monkeypatch.setattr(module, name, None)  # calling it is a TypeError
    again = light()
    assert fill(again) == 0 and again.identity() == first.identity()
    assert again.reader(0, NO_DROPOUT)[[(0, 1, 0)], 8].moments.shape == (1, 8, 8, 8)
    found, kept = conditions(again)
    assert all(torch.equal(value, prompts[name]) for name, value in found.items())
    assert kept.prints == null.prints and [len(kept.parts(length).t5[0]) for length in (8, 12)] == [8, 12]
    assert all(torch.equal(value, getattr(null.parts(12), name)) for name, value in kept.parts(12).items())
    (pictures / "0.txt").write_text("another caption")
    with pytest.raises(TypeError):
        fill(light())


def test_conditions_are_what_the_encoders_give_unrounded(pictures, models):
    data = cached(pictures, models)
    fill(data)
    for name, value in models.encoder.encode(["a red apple", "two cars"], 8).items():
        torch.testing.assert_close(getattr(data.encode(["a red apple", "two cars"], 8), name), value, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, getattr(data.null([8], CPU).parts(8), name)) for name, value in models.encoder.encode([""], 8).items())


def test_a_full_cache_that_cannot_be_written_serves_new_prompts_too(pictures, models, monkeypatch):
    data = cached(pictures, models)
    fill(data)
    before = {path: path.stat().st_mtime_ns for path in data.cache.folder.rglob("*")}
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert data.encode(["x", "y", "x"], 8).t5.shape[:2] == (3, 8)
    assert {path: path.stat().st_mtime_ns for path in data.cache.folder.rglob("*")} == before
