"""The cache: what is written comes back to the bit or not at all, whoever writes beside, and nothing damaged is ever taken for good."""

import multiprocessing
import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest
import torch
from data.cache.filling import drop, fill_missing, read, whole
from faults import files_no_larger_than
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentfm.data.cache import entries as entries_module
from latentfm.data.cache import fill as filling
from latentfm.data.cache.shard import Damaged, Layout, read_shard, write_shard
from latentfm.data.cache.store import Cache, key_of
from latentfm.errors import InputError

KEY, OTHER, THIRD = key_of("one"), key_of("two"), key_of("three")


def entry(seed=0, shape=(4, 3, 3)):
    generator = torch.Generator().manual_seed(seed)
    return {"moments": torch.randn(shape, generator=generator), "more": torch.randn(5, generator=generator)}


def same(first, second):
    return first.keys() == second.keys() and all(a.dtype == second[n].dtype and torch.equal(a, second[n]) for n, a in first.items())


def files_in(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def flip(path, place, bit=0x10):
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ bit]))


def place_of(path, key):
    """The first byte of an entry in its shard."""
    (row,) = [row for row in read_shard(path).rows if row["key"].ljust(32, b"\0").hex() == key]
    return int(row["offset"])


# Entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_an_entry_comes_back_to_the_bit(tmp_path, dtype):
    cache = Cache(tmp_path)
    tensors = {"a": torch.arange(12).view(3, 4).T, "scalar": torch.tensor(3), "empty": torch.zeros(0), "wide": torch.arange(7)}
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    assert not whole(cache, KEY)
    with pytest.raises(KeyError):
        read(cache, KEY)
    path = cache.write("prompts", {KEY: tensors, OTHER: {"unreadable": torch.zeros(0, dtype=dtype)}})
    for reading in (cache, Cache(tmp_path)):
        assert whole(reading, KEY) and same(read(reading, KEY), tensors)
        assert same(read(reading, OTHER), {"unreadable": torch.zeros(0, dtype=dtype)})
    assert path.parent == tmp_path / "prompts" and len(path.stem) == 32 and files_in(tmp_path) == [path.name]


def test_a_shard_is_a_safetensors_file_that_names_its_entries(tmp_path):
    made = {KEY: entry(0), OTHER: entry(1, (2, 2, 7)), THIRD: {"unreadable": torch.zeros(0)}}
    path = Cache(tmp_path).write("moments", made)
    loaded = load_file(path)
    assert loaded.pop("table").dtype == torch.uint8
    assert same(loaded, {f"{key}/{name}": value for key, tensors in made.items() for name, value in tensors.items()})
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor(f"{OTHER}/more"), made[OTHER]["more"])


@pytest.mark.parametrize("tensors", [
    {"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.int64)}, {"a": torch.zeros(1, dtype=torch.float64)}, {},
])  # fmt: skip
def test_an_entry_has_one_dtype_that_the_cache_keeps(tmp_path, tensors):
    with pytest.raises(ValueError, match="one dtype of F32, BF16"):
        Cache(tmp_path).write("moments", {KEY: tensors})
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("system", ["Linux", "macOS"])
def test_a_batch_is_the_entries_in_the_order_asked_for(tmp_path, monkeypatch, system):
    if system == "macOS":
        monkeypatch.delattr(os, "preadv")
    cache, keys = Cache(tmp_path), [key_of(str(i)) for i in range(40)]
    for part in range(4):
        cache.write("moments", {key: entry(i) for i, key in enumerate(keys) if i % 4 == part})
    entries = cache.entries(keys)
    batch = entries.stack([7, 0, 39, 7])
    for row, i in enumerate([7, 0, 39, 7]):
        assert same({name: value[row] for name, value in batch.items()}, entry(i))
    assert same(pickle.loads(pickle.dumps(entries)).read(5), entry(5))
    with pytest.raises(KeyError, match=key_of("none")):
        cache.entries([*keys, key_of("none")])
    cache.write("moments", {KEY: entry(0, (1, 2, 2))})
    with pytest.raises(ValueError, match="one layout"):
        cache.entries([keys[0], KEY]).stack([0, 1])


def test_few_files_are_open_however_many_shards_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(entries_module, "OPEN_FILES", 3)
    cache, keys = Cache(tmp_path), [key_of(str(i)) for i in range(20)]
    for i, key in enumerate(keys):
        cache.write("moments", {key: entry(i)})
    entries, before = cache.entries(keys), len(os.listdir("/proc/self/fd"))
    for i in [*range(20), *range(20)]:
        assert same(entries.read(i), entry(i))
    assert len(os.listdir("/proc/self/fd")) == before + 3
    del entries
    assert len(os.listdir("/proc/self/fd")) == before


def test_keys_that_end_in_zeros_or_share_their_beginning_are_kept_apart(tmp_path):
    cache = Cache(tmp_path)
    keys = ["00" * 32, "ab" + "00" * 31, "ab00" + "00" * 29 + "01", "ab" * 32, "ab" * 31 + "00", "ff" * 32]
    cache.write("moments", {key: entry(i) for i, key in enumerate(keys)})
    for i, key in enumerate(keys):
        assert same(read(cache, key), entry(i))
        assert cache.entries([key]).key(0).hex() == key
    assert cache.find(["ab" * 30 + "0000", "00" * 31 + "01"]).tolist() == [-1, -1]


# Damage


def test_every_changed_byte_of_a_shard_is_noticed_or_changes_nothing(tmp_path):
    made = {KEY: entry(0, (2, 2, 2)), OTHER: entry(1, (2, 2, 2))}
    path = Cache(tmp_path).write("moments", made)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    data = min(place_of(path, key) for key in made)
    for place in (*range(8), *range(8, header, 11), *range(header, len(good))):
        for leftover in path.parent.iterdir():
            leftover.unlink()
        path.write_bytes(good)
        flip(path, place)
        cache = Cache(tmp_path)
        for key, tensors in made.items():
            try:
                assert same(read(cache, key), tensors)
            except (KeyError, InputError):
                assert not whole(cache, key) and place not in range(8, header)  # the names are for other readers, ours are in the table
            else:
                inside = place_of(path, key)
                assert not inside <= place < inside + 52 and not header <= place < data


@pytest.mark.parametrize("keep", [0, 5, 40, 0.5, -1])
def test_a_truncated_shard_is_set_aside_by_name_and_its_entries_are_made_again(tmp_path, keep, caplog):
    cache = Cache(tmp_path)
    path = cache.write("moments", {KEY: entry(), OTHER: entry(1)})
    kept = cache.write("moments", {THIRD: entry(2)})
    good = path.read_bytes()
    path.write_bytes(good[: int(len(good) * keep) if isinstance(keep, float) else keep])
    again, asked = Cache(tmp_path), []
    wanted = [(KEY, 0), (OTHER, 1), (THIRD, 2)]
    assert fill_missing(again, wanted, lambda items: asked.extend(items) or [entry(i) for i in items], batch_size=4) == 2
    assert asked == [0, 1] and str(path) in caplog.text and "set aside" in caplog.text
    assert all(same(read(again, key), entry(i)) for key, i in wanted)
    assert {f"{path.name}.damaged", kept.name} < set(files_in(tmp_path)) and len(files_in(tmp_path)) == 3
    assert again.leftovers() == [path.with_name(f"{path.name}.damaged")]


def test_a_longer_shard_is_not_trusted(tmp_path):
    path = Cache(tmp_path).write("moments", {KEY: entry()})
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(Damaged, match="1 bytes follow its end"):
        read_shard(path)
    assert not whole(Cache(tmp_path), KEY)


def test_a_damaged_entry_is_made_again_and_the_new_one_wins_whatever_the_clock_says(tmp_path, caplog):
    cache = Cache(tmp_path)
    path = cache.write("moments", {KEY: entry(0), OTHER: entry(1)})
    flip(path, place_of(path, OTHER) + 7)
    os.utime(path, (2**31, 2**31))  # written in the future
    asked, wanted = [], [(KEY, 0), (OTHER, 1)]
    for run, made in enumerate((1, 0)):
        again = Cache(tmp_path)
        assert fill_missing(again, wanted, lambda items: asked.extend(items) or [entry(i) for i in items], 4) == made, run
        for new in set((tmp_path / "moments").glob("*.safetensors")) - {path}:
            os.utime(new, (0, 0))
    assert asked == [1] and same(read(Cache(tmp_path), OTHER), entry(1)) and same(read(Cache(tmp_path), KEY), entry(0))
    assert path.with_suffix(".lost").read_text().split() == [OTHER] and OTHER in caplog.text and str(path) in caplog.text


def test_an_entry_with_another_good_copy_is_read_from_there(tmp_path):
    cache = Cache(tmp_path)
    paths = [cache.write("moments", {KEY: entry()}) for _ in range(3)]
    entries = cache.entries([KEY])
    for path in paths[:2]:
        flip(path, place_of(path, KEY))
    assert same(entries.read(0), entry()) and same(entries.read(0), entry())
    assert same(read(cache, KEY), entry())
    flip(paths[2], place_of(paths[2], KEY))
    with pytest.raises(InputError, match=f"{KEY} in .* is damaged .*made anew"):
        read(Cache(tmp_path), KEY)


def test_damage_on_a_disk_that_cannot_be_written_is_still_damage(tmp_path, monkeypatch, caplog):
    cache = Cache(tmp_path)
    path = cache.write("moments", {KEY: entry()})
    flip(path, place_of(path, KEY))
    path.with_suffix(".lost").mkdir()  # in the way of the note
    with pytest.raises(InputError, match="damaged"):
        read(cache, KEY)
    assert fill_missing(Cache(tmp_path), [(KEY, 0)], lambda items: [entry(i) for i in items], 1) == 1
    assert same(read(cache, KEY), entry()) and "could not note" in caplog.text


def test_a_shard_that_went_while_it_was_used_is_an_error_that_names_it(tmp_path):
    cache = Cache(tmp_path)
    path = cache.write("moments", {KEY: entry()})
    entries = cache.entries([KEY])
    path.unlink()
    with pytest.raises(InputError, match=f"{path} is damaged .No such file"):
        entries.read(0)


def test_without_verify_only_presence_and_size_are_looked_at(tmp_path):
    cache = Cache(tmp_path)
    path = cache.write("moments", {KEY: entry(), OTHER: entry(1)})
    flip(path, place_of(path, KEY))
    wanted = [(KEY, 0), (OTHER, 1)]
    assert fill_missing(Cache(tmp_path), wanted, lambda items: [entry(i) for i in items], 4, verify=False) == 0
    with pytest.raises(InputError, match="damaged"):
        read(Cache(tmp_path), KEY)
    assert fill_missing(Cache(tmp_path), wanted, lambda items: [entry(i) for i in items], 4, verify=False) == 1


def test_no_entry_is_taken_for_another(tmp_path):
    """A table whose rows point to each other's bytes, with a good checksum of its own."""
    path = tmp_path / "moments" / f"{'0' * 32}.safetensors"
    write_shard(path, {KEY: entry(0), OTHER: entry(1)})
    shard = read_shard(path)
    entries = Cache(tmp_path).entries([KEY, OTHER])
    entries.rows["offset"] = entries.rows["offset"][::-1].copy()
    for number in (0, 1):
        assert entries.check(number) == "it fails its checksum"
    entries.rows["crc"] = entries.rows["crc"][::-1].copy()  # the bytes' own checksum: the key is part of it
    for number in (0, 1):
        assert entries.check(number) == "it fails its checksum"
    assert len(shard.layouts) == 1


def test_the_checksum_covers_key_names_types_shapes_and_values():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(2)}, {"c": torch.zeros(2, 3), "b": torch.ones(2)}, {"a": torch.zeros(2, 3)},
        {name: value.to(torch.bfloat16) for name, value in base.items()}, {"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 2.0])},
    ]  # fmt: skip

    def crc(tensors, key=KEY):
        layout = Layout.of(tensors)
        return layout.crc(bytes.fromhex(key), *(tensors[name].view(torch.uint8).numpy().tobytes() for name, _ in layout.shapes))

    assert len({*map(crc, (base, *others)), crc(base, OTHER)}) == 7
    assert crc(dict(reversed(base.items()))) == crc(base)


# Filling


def test_fill_makes_what_is_missing_in_batches_and_reports_all(tmp_path):
    cache, calls, settled = Cache(tmp_path), [], []
    wanted = [(key_of(str(i)), i) for i in range(10)]

    def make(items):
        calls.append(list(items))
        return [entry(i) for i in items]

    cache.write("moments", {wanted[3][0]: entry(3)})
    assert fill_missing(cache, wanted, make, 4, settled.append) == 9
    assert calls == [[0, 1, 2, 4], [5, 6, 7, 8], [9]] and sum(settled) == 10
    assert all(same(read(cache, key), entry(i)) for key, i in wanted)
    assert fill_missing(cache, wanted, make, 4) == 0 and len(calls) == 3
    assert len(files_in(tmp_path)) == 2


def test_items_are_loaded_ahead_in_order_and_only_the_missing_ones(tmp_path):
    cache, loaded = Cache(tmp_path), []
    wanted = [(key_of(str(i)), i) for i in range(30)]
    cache.write("moments", {key: entry(i) for key, i in wanted[::2]})

    def load(i):
        time.sleep(0.01 * (i % 5))
        loaded.append(i)
        return i

    assert fill_missing(cache, wanted, lambda items: [entry(i) for i in items], 4, load=load, threads=3) == 15
    assert sorted(loaded) == list(range(1, 30, 2)) and all(same(read(cache, key), entry(i)) for key, i in wanted)


def test_shards_are_bounded_in_size_and_in_the_work_they_hold(tmp_path, monkeypatch):
    wanted = [(key_of(str(i)), i) for i in range(12)]
    monkeypatch.setattr(filling, "SHARD_BYTES", 3 * 41 * 4)
    fill_missing(Cache(tmp_path / "size"), wanted, lambda items: [entry(i) for i in items], 12)
    shards = [read_shard(path) for path in (tmp_path / "size").rglob("*.safetensors")]
    assert [len(shard.rows) for shard in shards] == [3] * 4
    monkeypatch.setattr(filling, "SHARD_BYTES", 2**30)
    monkeypatch.setattr(filling, "SHARD_SECONDS", 0.05)

    def slowly(items):
        time.sleep(0.03)
        return [entry(i) for i in items]

    fill_missing(Cache(tmp_path / "time"), wanted, slowly, 1)
    assert all(len(read_shard(path).rows) <= 4 for path in (tmp_path / "time").rglob("*.safetensors"))
    mixed = [(key_of(str(i)), torch.float32 if i % 2 else torch.bfloat16) for i in range(4)]
    fill_missing(Cache(tmp_path / "types"), mixed, lambda items: [{"a": torch.zeros(1, dtype=dtype)} for dtype in items], 4)
    assert all(len(read_shard(path).layouts) == 1 for path in (tmp_path / "types").rglob("*.safetensors"))


def test_a_fill_that_fails_keeps_what_was_made(tmp_path):
    cache = Cache(tmp_path)

    def make(items):
        if 3 in items:
            raise RuntimeError("stop")
        return [entry(i) for i in items]

    with pytest.raises(RuntimeError, match="stop"):
        fill_missing(cache, [(key_of(str(i)), i) for i in range(4)], make, 2)
    assert [whole(cache, key_of(str(i))) for i in range(4)] == [True, True, False, False]


def test_a_full_disk_leaves_no_half_shard_and_what_was_there(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    before = cache.write("moments", {KEY: entry()})
    monkeypatch.setattr(filling, "SHARD_BYTES", 200_000)
    wanted = [(key_of(f"large {i}"), i) for i in range(4)]
    with files_no_larger_than(300_000), pytest.raises(InputError, match=f"could not write {tmp_path}.*free some space"):
        fill_missing(cache, [(OTHER, 0), *wanted], lambda items: [{"a": torch.zeros(60_000 if i < 3 else 200_000)} for i in items], 1)
    assert sum(whole(cache, key) for key, _ in [(OTHER, 0), *wanted]) == 4  # those in shards that fitted
    assert same(read(cache, KEY), entry()) and before.name in files_in(tmp_path)
    assert all(name.endswith(".safetensors") for name in files_in(tmp_path)) and cache.leftovers() == []


def fill_slowly(folder, started, seconds):
    filling.SHARD_BYTES = 5 * 41 * 4  # five entries a shard

    def make(items):
        started.set()
        time.sleep(seconds)
        return [entry(i) for i in items]

    fill_missing(Cache(folder), [(key_of(str(i)), i) for i in range(40)], make, 2)


def test_a_fill_that_is_killed_loses_its_last_shard_alone(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    worker = context.Process(target=fill_slowly, args=(tmp_path, started, 0.02))
    worker.start()
    started.wait()
    while len(list(tmp_path.rglob("*.safetensors"))) < 3:
        time.sleep(0.005)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    kept = sum(len(read_shard(path).rows) for path in tmp_path.rglob("*.safetensors"))
    assert 15 <= kept < 40
    asked, wanted = [], [(key_of(str(i)), i) for i in range(40)]
    assert fill_missing(Cache(tmp_path), wanted, lambda items: asked.extend(items) or [entry(i) for i in items], 4) == 40 - kept
    assert asked == list(range(kept, 40)) and all(whole(Cache(tmp_path), key) for key, _ in wanted)


def write_often(folder, seed, barrier):
    cache = Cache(folder)
    barrier.wait()
    for number in range(20):
        cache.write("moments", {key_of(f"{seed} {number}"): entry(seed), KEY: entry(9)})


def test_writers_of_one_folder_at_once_do_not_disturb_each_other(tmp_path):
    """Three threads and two processes; a reader meanwhile sees whole entries only."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(5)
    workers = [context.Process(target=write_often, args=(tmp_path, seed, barrier)) for seed in (0, 1)]
    for worker in workers:
        worker.start()
    workers += [threading.Thread(target=write_often, args=(tmp_path, seed, barrier)) for seed in (2, 3, 4)]
    for worker in workers[2:]:
        worker.start()
    cache, seen = Cache(tmp_path), 0
    while any(worker.is_alive() for worker in workers):
        cache.refresh()
        for place in range(0, len(cache.index), 7):
            assert cache.at(np.array([place])).check(0) is None
            seen += 1
    for worker in workers:
        worker.join()
    assert seen and all(worker.exitcode == 0 for worker in workers[:2])
    assert all(same(read(cache, key_of(f"{seed} {number}")), entry(seed)) for seed in range(5) for number in (0, 19))
    assert len(files_in(tmp_path)) == 100 and same(read(cache, KEY), entry(9))


def read_all(folder, entries, order, failed):
    if not all(same(entries.read(i), entry(i)) for i in order):
        failed.set()


def test_forked_processes_read_the_same_entries_at_once(tmp_path):
    cache, keys = Cache(tmp_path), [key_of(str(i)) for i in range(60)]
    for part in range(3):
        cache.write("moments", {key: entry(i) for i, key in enumerate(keys) if i % 3 == part})
    entries = cache.entries(keys)
    assert same(entries.read(0), entry(0))  # its file is open before the fork
    context = multiprocessing.get_context("fork")
    failed = context.Event()
    orders = [np.random.default_rng(seed).permutation(60).tolist() * 5 for seed in range(4)]
    workers = [context.Process(target=read_all, args=(tmp_path, entries, order, failed)) for order in orders]
    for worker in workers:
        worker.start()
    read_all(tmp_path, entries, orders[0], failed)
    for worker in workers:
        worker.join()
    assert not failed.is_set() and all(worker.exitcode == 0 for worker in workers)


# What is not the cache's


def test_files_of_others_are_left_alone(tmp_path):
    cache = Cache(tmp_path)
    (tmp_path / "moments").mkdir()
    mine = tmp_path / "moments" / "my weights.safetensors"
    save_file({"a": torch.zeros(3)}, mine)
    (tmp_path / "notes.txt").write_text("mine")
    cache.write("moments", {KEY: entry()})
    drop(cache, KEY)
    assert not whole(cache, KEY) and fill_missing(cache, [(KEY, 0)], lambda items: [entry(0)], 1) == 1
    assert mine.exists() and (tmp_path / "notes.txt").read_text() == "mine" and cache.leftovers() == []


def test_entries_of_the_first_layout_are_noticed_and_left_alone(tmp_path):
    cache = Cache(tmp_path)
    cache.write("moments", {KEY: entry()})
    assert not cache.old_entries()
    old = tmp_path / KEY[:2] / f"{KEY}.safetensors"
    old.parent.mkdir()
    save_file(entry(), old)
    assert cache.old_entries() and old.exists()


# Keys


def test_a_key_keeps_its_parts_apart():
    assert len({key_of("ab", "c"), key_of("a", "bc"), key_of("abc"), key_of("a", "b", "c"), key_of("c", "ab")}) == 5
    assert key_of("é", "x") == key_of("é", "x") and len(key_of("x")) == 64
