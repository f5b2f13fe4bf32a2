"""The cache: a changed input is a miss, an unchanged one a hit, a damaged entry is made again, and nothing is half-written."""

import copy
import multiprocessing
import shutil
import threading

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from faults import files_no_larger_than
from PIL import Image

from latentfm.config import DataOptions, ModelOptions
from latentfm.data.cache import Cache, checksum, fingerprint, key_of, tokenizer_fingerprint
from latentfm.data.sources import read_folder
from latentfm.errors import InputError
from latentfm.training.prepare import CachedDataset, load_models

KEY, OTHER = key_of("one"), key_of("two")


def entry(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"moments": torch.randn(4, 3, 3, generator=generator), "half": torch.randn(5, generator=generator).to(torch.bfloat16)}


def same(first, second):
    return first.keys() == second.keys() and all(a.dtype == second[n].dtype and torch.equal(a, second[n]) for n, a in first.items())


def files_in(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


# Entries


def test_an_entry_comes_back_to_the_bit(tmp_path):
    cache = Cache(tmp_path)
    tensors = entry() | {"scalar": torch.tensor(3.0), "empty": torch.zeros(0), "turned": torch.arange(6.0).view(2, 3).T}
    assert not cache.whole(KEY)
    with pytest.raises(KeyError):
        cache.read(KEY)
    cache.write(KEY, tensors)
    assert cache.whole(KEY) and same(cache.read(KEY), tensors)
    assert cache.path(KEY) == tmp_path / KEY[:2] / f"{KEY}.safetensors"
    cache.write(KEY, entry(1))
    assert same(cache.read(KEY), entry(1)) and files_in(tmp_path) == [f"{KEY}.safetensors"]


def test_every_changed_byte_of_an_entry_is_noticed(tmp_path):
    cache = Cache(tmp_path)
    cache.write(KEY, entry())
    good = cache.path(KEY).read_bytes()
    data = len(good) - sum(value.numel() * value.element_size() for value in entry().values())
    for place in (*range(0, data, 7), *range(data, len(good))):
        bad = bytearray(good)
        bad[place] ^= 0x10
        cache.path(KEY).write_bytes(bad)
        try:
            got = cache.read(KEY)
        except InputError as error:
            assert str(cache.path(KEY)) in str(error) and "made anew" in str(error)
        else:
            assert place < data and same(got, entry())  # white space of the header; no value can differ
    cache.path(KEY).write_bytes(good)
    assert cache.whole(KEY)


@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_a_truncated_entry_is_noticed_and_repaired(tmp_path, keep):
    cache = Cache(tmp_path)
    cache.write(KEY, entry())
    cache.write(OTHER, entry(1))
    good = cache.path(KEY).read_bytes()
    cache.path(KEY).write_bytes(good[: int(len(good) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match="damaged"):
        cache.read(KEY)
    assert not cache.whole(KEY)
    asked = []
    assert cache.fill([(KEY, 0), (OTHER, 1)], lambda items: asked.extend(items) or [entry(i) for i in items], batch_size=4) == 1
    assert asked == [0] and same(cache.read(KEY), entry()) and cache.path(KEY).read_bytes() == good


def test_an_entry_without_a_checksum_is_not_trusted(tmp_path):
    from safetensors.torch import save_file

    cache = Cache(tmp_path)
    cache.path(KEY).parent.mkdir()
    save_file(entry(), cache.path(KEY))
    with pytest.raises(InputError, match="checksum"):
        cache.read(KEY)


def test_the_checksum_covers_names_types_shapes_and_values():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(2)}, {"c": torch.zeros(2, 3), "b": torch.ones(2)}, {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(2)}, {"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 2.0])},
    ]  # fmt: skip
    assert len({checksum(tensors) for tensors in (base, *others)}) == 6
    assert checksum(dict(reversed(base.items()))) == checksum(base)


def test_a_full_disk_leaves_no_half_entry_and_the_old_one(tmp_path):
    cache = Cache(tmp_path)
    cache.write(KEY, entry())
    for key in (KEY, OTHER):
        with files_no_larger_than(10_000), pytest.raises(OSError, match=f"{cache.path(key)}.*free some space"):
            cache.write(key, {"moments": torch.zeros(100_000)})
    assert files_in(tmp_path) == [f"{KEY}.safetensors"] and same(cache.read(KEY), entry())


def test_an_entry_that_cannot_be_put_in_its_place_leaves_nothing(tmp_path):
    cache = Cache(tmp_path)
    (cache.path(KEY) / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match="could not write the cache entry"):
        cache.write(KEY, entry())
    assert files_in(tmp_path) == []


def write_often(folder, seed, barrier):
    cache = Cache(folder)
    barrier.wait()
    for _ in range(60):
        cache.write(KEY, entry(seed))


def test_writers_of_one_entry_at_once_do_not_disturb_each_other(tmp_path):
    """Three threads and two processes; a reader meanwhile sees nothing, or one whole version."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(5)
    failed = []

    def thread(seed):
        try:
            write_often(tmp_path, seed, barrier)
        except Exception as error:
            failed.append(error)

    workers = [context.Process(target=write_often, args=(tmp_path, seed, barrier)) for seed in (0, 1)]
    for worker in workers:
        worker.start()
    workers += [threading.Thread(target=thread, args=(seed,)) for seed in (2, 3, 4)]
    for worker in workers[2:]:
        worker.start()
    cache, seen = Cache(tmp_path), set()
    while any(worker.is_alive() for worker in workers):
        try:
            got = cache.read(KEY)
        except KeyError:
            continue
        (version,) = [seed for seed in range(5) if same(got, entry(seed))]
        seen.add(version)
    for worker in workers:
        worker.join()
    assert not failed and all(worker.exitcode == 0 for worker in workers[:2])
    assert seen and files_in(tmp_path) == [f"{KEY}.safetensors"]


def test_fill_makes_what_is_missing_in_batches_and_reports_all(tmp_path):
    cache, calls, settled = Cache(tmp_path), [], []
    wanted = [(key_of(str(i)), i) for i in range(10)]

    def make(items):
        calls.append(list(items))
        return [entry(i) for i in items]

    cache.write(wanted[3][0], entry(3))
    assert cache.fill(wanted, make, 4, settled.append) == 9
    assert calls == [[0, 1, 2, 4], [5, 6, 7, 8], [9]] and sum(settled) == 10
    assert all(same(cache.read(key), entry(i)) for key, i in wanted)
    assert cache.fill(wanted, make, 4) == 0 and len(calls) == 3


def test_a_fill_that_fails_keeps_what_was_made(tmp_path):
    cache = Cache(tmp_path)

    def make(items):
        if 3 in items:
            raise RuntimeError("stop")
        return [entry(i) for i in items]

    with pytest.raises(RuntimeError, match="stop"):
        cache.fill([(key_of(str(i)), i) for i in range(4)], make, 2)
    assert [cache.whole(key_of(str(i))) for i in range(4)] == [True, True, False, False]


# Keys


def test_a_key_keeps_its_parts_apart():
    assert len({key_of("ab", "c"), key_of("a", "bc"), key_of("abc"), key_of("a", "b", "c"), key_of("c", "ab")}) == 5
    assert key_of("é", "x") == key_of("é", "x") and len(key_of("x")) == 64


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


def cached(pictures, models, lengths=(8,), **options):
    given = DataOptions(folder=str(pictures), cache=str(pictures.parent / "cache"), **options)
    return CachedDataset(read_folder(pictures), models, given, lengths)


def keys(data):
    """Every key of a dataset, by what it is for."""
    images = {(sample.id, flip): data.image_key(sample, flip) for sample in data.dataset.samples for flip in data.flips}
    texts = {(c, n): data.caption_key(c, n) for sample in data.dataset.samples for c in sample.captions for n in data.lengths}
    return images | texts


class Quiet:
    def __getattr__(self, name):
        return lambda *arguments, **more: 0


def fill(data):
    """Fills the cache; returns how many entries were made."""
    before = {p: p.stat().st_mtime_ns for p in data.cache.folder.rglob("*.safetensors")}
    data.fill(Accelerator(cpu=True), Quiet())
    return sum(before.get(p) != p.stat().st_mtime_ns for p in data.cache.folder.rglob("*.safetensors"))


def test_nothing_changed_is_a_hit(pictures, models):
    assert fill(cached(pictures, models)) == 5  # two pictures, three captions
    assert fill(cached(pictures, models)) == 0
    moved = pictures.parent / "moved" / "deeper"
    shutil.copytree(pictures, moved)
    (moved / "0.png").rename(moved / "renamed.png")
    (moved / "0.txt").rename(moved / "renamed.txt")
    again = CachedDataset(read_folder(moved), models, DataOptions(folder=str(moved), cache=str(pictures.parent / "cache")), (8,))
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
    sample = data.dataset.samples[0]
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


@pytest.mark.parametrize("which", [0, 1, 2])
def test_another_weight_of_an_encoder_is_a_miss_for_captions_alone(pictures, models, which):
    before = keys(cached(pictures, models))
    changed = copy.copy(models)
    changed.encoder = copy.copy(models.encoder)
    encoders = [copy.deepcopy(e) for e in models.encoder.encoders]
    changed.encoder.encoders = tuple(encoders)
    assert keys(cached(pictures, changed)) == before
    with torch.no_grad():
        parameter = list(encoders[which].parameters())[-1]
        parameter.view(-1)[0] = torch.nextafter(parameter.view(-1)[0], torch.tensor(9.0))  # the last bit of one weight
    after = keys(cached(pictures, changed))
    assert {name for name in before if before[name] == after[name]} == {("0.png", False), ("1.png", False)}


def test_another_vae_is_a_miss_for_pictures_alone(pictures, models):
    before = keys(cached(pictures, models))
    changed = copy.copy(models)
    changed.vae = copy.deepcopy(models.vae)
    with torch.no_grad():
        changed.vae.encoder.conv_in.bias[0] += 1e-6
    after = keys(cached(pictures, changed))
    assert {name for name in before if before[name] != after[name]} == {("0.png", False), ("1.png", False)}


@pytest.mark.parametrize("change", ["vocabulary", "padding", "length", "absent"])
def test_another_tokenizer_is_a_miss_for_captions_alone(pictures, models, change):
    before = keys(cached(pictures, models))
    tokenizer = copy.deepcopy(models.encoder.tokenizers[1])
    if change == "vocabulary":
        tokenizer.add_tokens(["apple-like"])
    elif change == "padding":
        tokenizer.pad_token = "a"
    elif change == "length":
        tokenizer.model_max_length = 15
    changed = copy.copy(models)
    changed.encoder = copy.copy(models.encoder)
    changed.encoder.tokenizers = (models.encoder.tokenizers[0], None if change == "absent" else tokenizer, models.encoder.tokenizers[2])
    after = keys(cached(pictures, changed))
    assert {name for name in before if before[name] == after[name]} == {("0.png", False), ("1.png", False)}


def test_using_a_tokenizer_does_not_change_its_fingerprint(models):
    for tokenizer in models.encoder.tokenizers:
        before = tokenizer_fingerprint(tokenizer)
        tokenizer(["a red apple"], padding="max_length", max_length=5, truncation=True)
        assert tokenizer_fingerprint(tokenizer) == before
    assert len({tokenizer_fingerprint(t) for t in models.encoder.tokenizers}) == 3
    assert tokenizer_fingerprint(None) == fingerprint(None) == "absent"


def test_a_fingerprint_sees_configuration_names_types_and_scalars(models):
    class Module(torch.nn.Module):
        def __init__(self, config, **buffers):
            super().__init__()
            self.config = config
            for name, value in buffers.items():
                self.register_buffer(name, value)

    made = [
        Module({"a": 1}, x=torch.zeros(2)), Module({"a": 2}, x=torch.zeros(2)), Module({"a": 1}, y=torch.zeros(2)),
        Module({"a": 1}, x=torch.zeros(2, dtype=torch.int32)), Module({"a": 1}, x=torch.tensor(0.0)), Module({"a": 1}, x=torch.tensor(1.0)),
    ]  # fmt: skip
    assert len({fingerprint(module) for module in made}) == 6
    assert fingerprint(Module({"a": 1, "_name_or_path": "here"}, x=torch.zeros(2))) == fingerprint(made[0])
    assert fingerprint(models.vae) == fingerprint(copy.deepcopy(models.vae))


def test_entries_are_what_the_encoders_give(pictures, models):
    data = cached(pictures, models, lengths=(8, 5))
    fill(data)
    for sample in data.dataset.samples:
        with Image.open(sample.path) as picture:
            pixels = torch.from_numpy(np.array(picture.crop((0, 4, 32, 36)))).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            posterior = models.vae.encode(pixels).latent_dist
        moments = data.cache.read(data.image_key(sample, False))["moments"]
        torch.testing.assert_close(moments[None], torch.cat([posterior.mean, posterior.logvar], dim=1), rtol=1e-4, atol=1e-5)
        for caption in sample.captions:
            for length in (8, 5):
                parts = models.encoder.encode([caption], length)
                got = data.cache.read(data.caption_key(caption, length))
                assert got.keys() == {name for name, _ in parts.items()}
                for name, value in parts.items():
                    torch.testing.assert_close(got[name].float(), value[0], rtol=1e-2, atol=1e-3)  # kept in bfloat16
                    assert got[name].dtype == torch.bfloat16


def test_a_damaged_entry_of_a_dataset_is_repaired_by_the_next_run(pictures, models):
    data = cached(pictures, models)
    fill(data)
    good = {p: p.read_bytes() for p in data.cache.folder.rglob("*.safetensors")}
    image, text = data.image_key(data.dataset.samples[1], False), data.caption_key("two cars", 8)
    for key in (image, text):
        bad = bytearray(good[data.cache.path(key)])
        bad[-1] ^= 1
        data.cache.path(key).write_bytes(bad)
    assert fill(cached(pictures, models)) == 2
    assert same(data.cache.read(image), cached(pictures, models).cache.read(image))
    repaired = {p: p.read_bytes() for p in data.cache.folder.rglob("*.safetensors")}
    assert repaired[data.cache.path(text)] == good[data.cache.path(text)] and repaired.keys() == good.keys()
    assert {p.name for p in pictures.iterdir()} == {"0.png", "0.txt", "1.png", "1.txt"}  # the user's files are not touched
