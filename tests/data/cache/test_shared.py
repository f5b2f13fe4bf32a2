"""A cache that others write too: odd layouts are damage, a forged entry never wins, special files do no harm, work is done once."""

import json
import multiprocessing
import os
import signal
import socket
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from data.cache.filling import drop, fill_missing, read, whole

from latentfm.data.cache import fill as filling
from latentfm.data.cache import store as cache_module
from latentfm.data.cache.claims import Claims
from latentfm.data.cache.shard import DTYPES, PRELUDE, ROW, Damaged, Layout, read_shard, write_shard
from latentfm.data.cache.store import Cache, key_of
from latentfm.data.cache.trust import rank_of
from latentfm.errors import InputError

KEY, OTHER, THIRD = key_of("one"), key_of("two"), key_of("three")


def entry(seed=0):
    return {"moments": torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def forged(path, change):
    """Writes a shard of KEY and OTHER to `path`, its table changed by change(rows, layouts) and given a good checksum again."""
    write_shard(path, {KEY: entry(0), OTHER: entry(1)})
    data = path.read_bytes()
    base = 8 + int.from_bytes(data[:8], "little")
    magic, count, length, _ = PRELUDE.unpack_from(data, base)
    start = base + PRELUDE.size
    layouts = json.loads(data[start : start + length])
    rows = np.frombuffer(data, ROW, count, start + length).copy()
    text = change(rows, layouts)
    text = (json.dumps(layouts) if text is None else text).encode()
    text += b" " * (length - len(text))
    table = text[:length] + rows.tobytes()
    end = start + length + rows.nbytes
    path.write_bytes(data[:base] + PRELUDE.pack(magic, count, length, zlib.crc32(table)) + table + data[end:])
    return path


def set_row(column, value, row=1):
    def change(rows, layouts):
        rows[column][row] = value

    return change


def set_layout(value):
    return lambda rows, layouts: json.dumps(value)


# Odd layouts


LAYOUTS = [
    [["F99", [["moments", [2, 3]]]]], [["F32", [["moments", [-2, -3]]]]], [["F32", [["m", [2.0, 3]]]]], [["F32", [["moments", [True, 6]]]]],
    [["F32", [["m", [0, 2**62]]]]], [["F32", [["m", [2**40]]]]], [["F32", []]], [[]], [], {}, 7, [["F32", "x"]], [[[], []]],
    [["F32", [["a", [3]], ["a", [3]]]]], [["F32", [[1, [6]]]]],
]  # fmt: skip
ROWS = [
    ("offset", 2**64 - 100), ("offset", 2**63), ("offset", 0), ("length", 2**63), ("length", 2**64 - 1), ("length", 0), ("length", 25),
    ("layout", 1), ("layout", 2**32 - 1), ("key", bytes.fromhex(KEY)),
]  # fmt: skip


@pytest.mark.parametrize("change", [
    *(pytest.param(set_row(*row), id=f"{row[0]} {index}") for index, row in enumerate(ROWS)),
    *(pytest.param(set_layout(layout), id=f"layouts {index}") for index, layout in enumerate(LAYOUTS)),
    pytest.param(lambda rows, layouts: rows["offset"].__setitem__(1, rows["offset"][0]), id="two at one place"),
    pytest.param(lambda rows, layouts: rows["offset"].__setitem__(slice(None), rows["offset"][::-1].copy()), id="exchanged"),
    pytest.param(lambda rows, layouts: "[" * 40, id="no JSON"),
    pytest.param(lambda rows, layouts: "", id="no layouts"),
])  # fmt: skip
def test_a_table_that_no_writer_writes_is_damage_and_set_aside(tmp_path, change, caplog):
    path = forged(tmp_path / "moments" / f"{'0' * 32}.safetensors", change)
    with pytest.raises(Damaged):
        read_shard(path)
    cache = Cache(tmp_path)
    cache.write("moments", {OTHER: entry(1)})
    assert fill_missing(cache, [(KEY, 0), (OTHER, 1)], lambda items: [entry(i) for i in items], 2) == 1
    assert same(read(cache, KEY), entry(0)) and same(read(cache, OTHER), entry(1))
    assert not path.exists() and path.with_name(f"{path.name}.damaged").exists() and "set aside" in caplog.text


def test_a_table_without_end_is_not_read(tmp_path):
    path = tmp_path / "moments" / f"{'0' * 32}.safetensors"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 8) + b"x" * 8 + PRELUDE.pack(b"latentfm cache 1", 2**36, 2, 0))
        file.truncate(2**43)
    with pytest.raises(Damaged, match="its table would have"):
        read_shard(path)
    assert fill_missing(Cache(tmp_path), [(KEY, 0)], lambda items: [entry(0)], 1) == 1


def test_every_layout_that_is_written_is_read(tmp_path):
    for name, dtype in DTYPES.items():
        shapes = {"scalar": (), "empty": (0, 7), "wide": (3, 2, 1)}
        tensors = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}
        layout = Layout.of(tensors)
        assert Layout.parse(json.loads(json.dumps(layout.written))) == layout and layout.written[0] == name
        path = tmp_path / f"{name}.safetensors"
        write_shard(path, {KEY: tensors})
        assert read_shard(path).layouts == (layout,)
    write_shard(tmp_path / "none", {})
    assert len(read_shard(tmp_path / "none").rows) == 0


# Forged entries


@pytest.mark.parametrize("name", ["0" * 32, "f" * 32])
def test_of_two_entries_of_a_key_that_differ_neither_is_used_whatever_its_name(tmp_path, name, caplog):
    cache = Cache(tmp_path)
    cache.write("moments", {KEY: entry(0), OTHER: entry(1)})
    write_shard(tmp_path / "moments" / f"{name}.safetensors", {KEY: entry(666), THIRD: entry(2)})
    again, asked = Cache(tmp_path), []
    assert not whole(again, KEY) and whole(again, OTHER) and whole(again, THIRD)
    assert "1 entry in several shards that differ" in caplog.text and name in caplog.text
    wanted = [(KEY, 0), (OTHER, 1), (THIRD, 2)]
    assert fill_missing(again, wanted, lambda items: asked.extend(items) or [entry(i) for i in items], 2) == 1 and asked == [0]
    for reader in (again, Cache(tmp_path)):
        assert all(same(read(reader, key), entry(i)) for key, i in wanted)
    caplog.clear()
    assert fill_missing(Cache(tmp_path), wanted, lambda items: [], 2) == 0 and not caplog.text


def test_equal_copies_are_no_conflict(tmp_path, caplog):
    cache = Cache(tmp_path)
    for _ in range(3):
        cache.write("moments", {KEY: entry(0)})
    assert same(read(Cache(tmp_path), KEY), entry(0)) and not caplog.text


@pytest.fixture
def strangers(monkeypatch):
    """A set of files (their inodes) that are another user's."""
    found = set()
    monkeypatch.setattr(cache_module, "rank_of", lambda status, open_to_all: (None if open_to_all else 1) if status.st_ino in found else 0)
    return found


def test_whose_file_is_believed_how_far(tmp_path, monkeypatch):
    (tmp_path / "x").touch()
    status = list(os.stat(tmp_path / "x"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for uid, ranks in ((1000, (0, 0)), (0, (0, 0)), (1001, (1, None))):
        status[4] = uid
        assert tuple(rank_of(os.stat_result(status), wide) for wide in (False, True)) == ranks


@pytest.mark.parametrize("name", ["0" * 32, "f" * 32])
def test_ones_own_entry_goes_before_another_users(tmp_path, strangers, name, caplog):
    path = tmp_path / "moments" / f"{name}.safetensors"
    write_shard(path, {KEY: entry(666), OTHER: entry(1)})
    strangers.add(path.stat().st_ino)
    cache = Cache(tmp_path)
    cache.write("moments", {KEY: entry(0)})
    assert same(read(cache, KEY), entry(0)) and same(read(cache, OTHER), entry(1)) and "differ" not in caplog.text


def test_what_another_user_may_have_put_where_everybody_writes_is_not_used(tmp_path, strangers):
    path = tmp_path / "moments" / f"{'0' * 32}.safetensors"
    write_shard(path, {KEY: entry(666)})
    strangers.add(path.stat().st_ino)
    assert whole(Cache(tmp_path), KEY) and not any("not used" in said for said in Cache(tmp_path).distrust())
    for folder in (tmp_path, tmp_path / "moments"):
        mode = folder.stat().st_mode
        os.chmod(folder, 0o1777)
        cache = Cache(tmp_path)
        assert not whole(cache, KEY)
        assert any("everybody, who can exchange what a training sees; chmod o-w" in said for said in cache.distrust())
        assert any("1 shard of the cache not used" in said for said in cache.distrust())
        os.chmod(folder, mode)
    assert fill_missing(cache, [(KEY, 0)], lambda items: [entry(0)], 1) == 1


def test_who_may_write_is_said(tmp_path):
    cache = Cache(tmp_path)
    assert cache.distrust() == [] == Cache(tmp_path / "none").distrust()
    cache.write("moments", {KEY: entry()})
    os.chmod(tmp_path / "moments", 0o755)
    os.chmod(tmp_path, 0o755)
    assert cache.distrust() == []
    os.chmod(tmp_path, 0o775)
    (said,) = cache.distrust()
    assert said == f"{tmp_path} can be written by its group, who can exchange what a training sees; chmod g-w prevents it"
    assert whole(cache, KEY)  # as a cluster shares one


# Special files


def test_special_files_in_a_cache_do_no_harm(tmp_path, caplog):
    cache = Cache(tmp_path)
    path = cache.write("moments", {KEY: entry(0)})
    names = [f"{digit * 32}.safetensors" for digit in "abcd"]
    os.mkfifo(tmp_path / "moments" / names[0])
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path / "moments")  # a socket's name is short
        server.bind(names[1])
        os.chdir(here)
    (tmp_path / "moments" / names[2]).symlink_to("/dev/zero")
    (tmp_path / "moments" / names[3]).mkdir()
    os.mkfifo(path.with_suffix(".lost"))
    done = []

    def use():
        again = Cache(tmp_path)
        done.append(same(read(again, KEY), entry(0)))
        drop(again, KEY)
        done.append(fill_missing(again, [(KEY, 0)], lambda items: [entry(0)], 1) == 1 and same(read(again, KEY), entry(0)))

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(20)
    assert done == [True, True]
    assert all(kind in caplog.text for kind in ("named pipe", "socket", "device", "a folder")) and "could not note" in caplog.text


def test_a_note_of_damage_follows_no_link(tmp_path):
    cache = Cache(tmp_path)
    path = cache.write("moments", {KEY: entry(0)})
    (tmp_path / "mine").write_text("precious")
    path.with_suffix(".lost").symlink_to(tmp_path / "mine")
    drop(cache, KEY)
    assert (tmp_path / "mine").read_text() == "precious" and not whole(cache, KEY)


def test_a_shard_that_became_a_pipe_is_damage(tmp_path):
    cache = Cache(tmp_path)
    path = cache.write("moments", {KEY: entry()})
    entries = cache.entries([KEY])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="is damaged .*named pipe"):
        entries.read(0)


# Verdicts


def judged(key):
    return key_of("verdict", key)


def test_what_nothing_can_be_made_of_is_kept_under_the_verdicts_key(tmp_path, monkeypatch):
    wanted, asked, made = [(key_of(str(i)), i) for i in range(6)], [], []

    def make(items):
        asked.extend(items)
        return [None if i % 2 else entry(i) for i in items]

    for verdict, count in ((judged, 6), (judged, 0), (lambda key: judged(f"other decoders {key}"), 3)):
        asked.clear()
        settled = []
        monkeypatch.setattr(filling, "verdict_key", verdict)
        assert fill_missing(Cache(tmp_path), wanted, make, 4, settled.append, on_made=made.extend) == count == len(asked)
        assert sum(settled) == 6
    assert made == [key for key, i in wanted if i % 2 == 0] and asked == [1, 3, 5]
    assert [whole(Cache(tmp_path), key) for key, _ in wanted] == [True, False] * 3


def test_entries_of_an_outdated_kind_are_made_again(tmp_path):
    Cache(tmp_path).write("moments", {KEY: {"unreadable": torch.zeros(0)}, OTHER: entry(1)})
    cache = Cache(tmp_path, outdated="unreadable")
    assert not whole(cache, KEY) and whole(cache, OTHER)
    assert fill_missing(cache, [(KEY, 0), (OTHER, 1)], lambda items: [entry(i) for i in items], 2) == 1
    assert same(read(Cache(tmp_path, outdated="unreadable"), KEY), entry(0))


# Work shared


def fill_slowly(folder, name, seconds, count):
    def make(items):
        with open(folder / name, "a") as file:
            file.write("".join(f"{i}\n" for i in items))
        time.sleep(seconds)
        return [entry(i) for i in items]

    filling.CLAIMED = 8
    cache, wanted = Cache(folder / "cache"), [(key_of(str(i)), i) for i in range(count)]
    while wanted:
        fill_missing(cache, wanted, make, 4)
        cache.refresh()
        wanted = [(key, i) for key, i in wanted if not whole(cache, key)]
        time.sleep(0.02)


def made_by(folder, name):
    return (folder / name).read_text().split() if (folder / name).exists() else []


def start(*arguments):
    worker = multiprocessing.get_context("fork").Process(target=fill_slowly, args=arguments)
    worker.start()
    return worker


def test_two_processes_on_one_cold_cache_make_each_entry_once(tmp_path):
    workers = [start(tmp_path, name, 0.02, 64) for name in ("one", "two")]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    one, two = made_by(tmp_path, "one"), made_by(tmp_path, "two")
    assert sorted(map(int, one + two)) == list(range(64)) and min(len(one), len(two)) > 8  # both work
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["moments"]  # claims leave nothing behind


def test_a_process_that_is_killed_leaves_nothing_to_wait_for(tmp_path):
    first = start(tmp_path, "one", 0.5, 40)
    while not made_by(tmp_path, "one"):
        time.sleep(0.01)
    second = start(tmp_path, "two", 0.01, 40)
    while not made_by(tmp_path, "two"):
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second.join(60)
    assert second.exitcode == 0 and sorted(map(int, made_by(tmp_path, "two"))) == list(range(40))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["moments"]


def test_claims_are_each_others_and_end(tmp_path):
    keys = np.array([bytes.fromhex(key_of(str(i))) for i in range(6)], "S32")
    none = keys[:0]
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take(keys[:4], none).all()
        assert second.take(keys, none).tolist() == [False] * 4 + [True] * 2
        assert first.take(keys[4:], keys[:2]).tolist() == [False] * 2  # it keeps the first two, gives up the next
        assert second.take(keys[:4], none).tolist() == [False, False, True, True]
        first.release()
        assert second.take(keys, none).all()
    assert not (tmp_path / "claims").exists()


@pytest.mark.parametrize("obstacle", ["file", "pipe", "link"])
def test_where_nothing_can_be_claimed_work_goes_on(tmp_path, obstacle):
    keys = np.array([bytes.fromhex(KEY)], "S32")
    if obstacle == "file":
        (tmp_path / "claims").write_text("in the way")
    else:
        (tmp_path / "claims").mkdir()
        os.mkfifo(tmp_path / "claims" / "x.claim")
        (tmp_path / "mine").write_bytes(b"precious")
        if obstacle == "link":
            (tmp_path / "claims" / "turn").symlink_to(tmp_path / "mine")
    with Claims(tmp_path) as claims:
        assert claims.take(keys, keys[:0]).all()
    assert obstacle == "file" or (tmp_path / "mine").read_bytes() == b"precious"
    assert fill_missing(Cache(tmp_path), [(KEY, 0)], lambda items: [entry(0)], 1) == 1
