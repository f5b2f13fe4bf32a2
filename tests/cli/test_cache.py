"""`latentfm cache` from the command line: filled once, by one process or several, checked and pruned."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import latentfm
from latentfm.cli.main import app
from latentfm.data.cache.shard import read_shard
from latentfm.data.cache.stat_cache import GRAIN

ROOT = Path(latentfm.__file__).resolve().parent.parent
COUNT = 24
CONDITIONS = 8 + 1  # the prompts that a training draws from, and the null condition


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(COUNT):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"a picture of {index}")
    time.sleep(2 * GRAIN / 1e9)  # what was written just now would be read again
    return folder


@pytest.fixture
def arguments(pictures, tmp_path, tiny_folder):
    return [
        f"data.folder={pictures}", f"data.cache={tmp_path / 'cache'}", f"model.pipeline={tiny_folder}",
        f"output.folder={tmp_path / 'run'}", "data.t5_lengths={8: 1}",
    ]  # fmt: skip


def environment():
    kept = {name: value for name, value in os.environ.items() if name != "LATENTFM_DEBUG"}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(*words, launcher=()):
    command = [sys.executable, "-m", *launcher, *(("-m",) if launcher else ()), "latentfm", "cache", *words]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def cache(*words):
    """In this process: what it printed, and its exit code."""
    done = CliRunner().invoke(app, ["cache", *words])
    return done.output, done.exit_code


def rows(folder):
    return [row["key"] for path in folder.rglob("*.safetensors") for row in read_shard(path).rows]


def test_what_was_made_and_what_was_there_is_said(arguments, tmp_path, pictures):
    told, code = cache(*arguments)
    assert code == 0, told
    assert f"{COUNT} pictures, {COUNT} captions in {pictures}" in told
    assert re.search(rf"moments: {COUNT} entries, [\d.]+ MiB; {COUNT} made now, 0 were there", told)
    assert re.search(rf"prompts: {COUNT} entries, [\d.]+ MiB; {COUNT} made now, 0 were there", told)
    assert re.search(r"[\d.]+ MiB in .*cache, [\d.]+ s, [\d.]+ images/s", told)
    assert not (tmp_path / "run").exists()
    (pictures / "00.png").write_bytes((pictures / "01.png").read_bytes())
    (pictures / "02.txt").write_text("another caption")
    told, code = cache(*arguments)
    assert re.search(rf"moments: {COUNT - 1} entries, .*; 0 made now, {COUNT - 1} were there", told)  # two files, one picture
    assert re.search(rf"prompts: {COUNT} entries, .*; 1 made now, {COUNT - 1} were there", told) and code == 0


def test_a_training_finds_everything_there(arguments, tmp_path):
    from accelerate.state import AcceleratorState, GradientState

    assert cache(*arguments)[1] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    more = ["train.steps=1", "train.batch_size=2", "data.workers=0", "sample.steps=1", "train.mixed_precision=no"]
    done = CliRunner().invoke(app, ["train", *arguments, *more])
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def test_two_processes_make_each_entry_once(arguments, tmp_path):
    port = str(29500 + os.getpid() % 90)
    done = start(*arguments, launcher=["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port])
    told, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors[-2000:]
    assert f"moments: {COUNT} entries" in told and told.count("images/s") == 1  # one of them speaks
    found = rows(tmp_path / "cache")
    assert len(found) == 2 * COUNT + CONDITIONS == len(set(found))
    assert "; 0 made now" in cache(*arguments)[0]


def test_damage_is_found_and_repaired_and_leftovers_are_removed(arguments, tmp_path):
    cache(*arguments)
    told, code = cache("--verify", *arguments)
    assert code == 0 and f"{2 * COUNT + CONDITIONS} entries in 4 shards" in told and "0 damaged" in told
    (shard,) = (tmp_path / "cache" / "moments").iterdir()
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    (prompts,) = (tmp_path / "cache" / "prompts").iterdir()
    prompts.write_bytes(prompts.read_bytes()[:-100])
    told, code = cache("--verify", *arguments)
    assert code == 1 and f"{COUNT + CONDITIONS} entries in 3 shards of" in told
    assert "1 damaged" in told and "1 damaged shard is set aside" in told
    told, code = cache(*arguments)
    assert code == 0 and f"; {COUNT} made now, 0 were there" in told and f"; 1 made now, {COUNT - 1} were there" in told
    (tmp_path / "cache" / "moments" / f"{'0' * 32}.safetensors.partial").write_bytes(b"cut")
    told, code = cache("--prune", *arguments)
    assert code == 0 and "removed 2 files" in told
    told, code = cache("--verify", *arguments)
    assert code == 0 and f"{2 * COUNT + CONDITIONS} entries in 5 shards" in told


@pytest.mark.parametrize("change, message", [
    ("data.folder=nowhere", "there is no folder 'nowhere'"), ("data.online=true", "without a cache"), ("data.size=30", "multiple of 8"),
    ("data.cashe=x", "unknown option 'data.cashe' (did you mean 'cache'"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments, change, message):
    told, code = cache(*arguments, change)
    assert code == 2 and message in told.splitlines()[-1], told


def test_what_cannot_be_read_is_not_counted_as_made(arguments, pictures, tmp_path):
    (pictures / "03.png").write_bytes(b"no picture")
    (pictures / "lone.png").write_bytes((pictures / "04.png").read_bytes())
    for made, there in ((COUNT - 1, 0), (0, COUNT - 1)):
        told, code = cache(*arguments)
        assert code == 0 and f"1 of {COUNT + 1} pictures cannot be read and is left out" in told
        for kind in ("moments", "prompts"):
            assert re.search(rf"{kind}: {COUNT - 1} entries, .*; {made} made now, {there} were there", told)
        assert f"\n{COUNT - 1} pictures, {COUNT - 1} captions" in told
    for path in pictures.iterdir():
        if path.stem != "05":
            path.unlink()
    told, code = cache(*arguments)
    assert "moments: 1 entry, " in told and "; 0 made now, 1 was there" in told and "\n1 picture, 1 caption\n" in told


def test_a_cache_that_is_complete_need_not_be_written(arguments, tmp_path, monkeypatch):
    assert cache(*arguments)[1] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(tmp_path / "cache")) or mode == os.R_OK)
    told, code = cache(*arguments)
    assert code == 0 and "; 0 made now" in told
    done = CliRunner().invoke(app, ["train", *arguments, "train.steps=1", "train.batch_size=2", "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def test_two_runs_at_once_share_the_work_and_the_one_that_waits_says_so(arguments, tmp_path, pictures):
    for index in range(COUNT, 20 * COUNT):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{index:03d}.png")
        (pictures / f"{index:03d}.txt").write_text(f"a picture of {index}")
    runs = [start(*arguments) for _ in range(2)]
    told = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    found = rows(tmp_path / "cache")
    assert len(found) == 2 * 20 * COUNT + CONDITIONS == len(set(found))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["conditions", "listings", "moments", "prompts"]


def test_a_cache_that_others_may_write_is_said(arguments, tmp_path, caplog):
    cache(*arguments)
    os.chmod(tmp_path / "cache" / "moments", 0o1777)
    caplog.clear()
    assert cache(*arguments)[1] == 0 and "moments can be written by everybody" in caplog.text
    assert "moments can be written by everybody" in cache("--verify", *arguments)[0]
