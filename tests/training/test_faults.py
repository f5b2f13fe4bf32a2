"""What goes wrong in a month of training, made to happen to real runs: what is told, what is lost, and that nothing wrong goes on.

Elsewhere: unreadable pictures, test_prepare; every byte of a shard and a full disk while it is written, test_cache; a folder edited
between two runs, a sample or a gradient that is not finite, kills and Ctrl-C, test_trainer and test_torture; a full disk at each part of a
checkpoint, test_checkpoint.
"""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import psutil
import pytest
import torch
from data.cache.filling import drop, read
from faults import files_no_larger_than

from latentfm.data.cache.shard import read_shard
from latentfm.errors import InputError
from latentfm.randomness import permutation
from latentfm.training.checkpoint import storage
from latentfm.training.checkpoint.claim import claimed
from latentfm.training.records import json_lines

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
EVERY_STEP = ["train.steps=6", "output.checkpoint_every=1", "sample.every=3", "train.decay=constant"]


def rows_of(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def column(out, name):
    return [row[name] for row in rows_of(out)]


def events(out):
    return [row["what"] for row in rows_of(out, "events.jsonl")]


def state_of(out):
    tensors, _ = storage.load(storage.checkpoints(out / "checkpoints")[-1])
    return {name: stored.load() for name, stored in tensors.items()}


def names_of(out):
    return [path.name for path in storage.checkpoints(out / "checkpoints")]


def same_run(out, whole):
    """Whether a run came out as another did, to the bit."""
    mine, theirs = state_of(out), state_of(whole)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    return all(column(out, name) == column(whole, name) for name in ("step", "loss", "gradient_norm", "loss_by_t", "count_by_t"))


@pytest.fixture(scope="module")
def whole_cache(tmp_path_factory):
    """A cache with what one run needs and nothing of other tests."""
    return tmp_path_factory.mktemp("whole cache")


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory, whole_cache):
    """The run to which nothing happens."""
    return run(tmp_path_factory.mktemp("whole") / "run", *EVERY_STEP, f"data.cache={whole_cache}")


@pytest.fixture
def own_cache(tmp_path, whole, whole_cache):
    """A copy of the filled cache, to be damaged."""
    shutil.copytree(whole_cache, tmp_path / "cache")
    return tmp_path / "cache"


def before_step(trainer, actions):
    """Has the trainer call actions[step] before that step, counted from 1."""
    train_step = trainer.train_step

    def act(batches):
        actions.get(trainer.step + 1, lambda: None)()
        return train_step(batches)

    trainer.train_step = act


# The cache


def flip_a_byte(path, place):
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def cut(path, place):
    os.truncate(path, place)


@pytest.mark.parametrize("damage, told", [(flip_a_byte, "fails its checksum"), (cut, "cut short by")], ids=["a byte flipped", "cut short"])
def test_a_cache_damaged_before_a_start_is_repaired_and_told(tmp_path, run, whole, own_cache, caplog, damage, told):
    shards = sorted((own_cache / "moments").glob("*.safetensors"))
    for shard in shards:
        damage(shard, int(read_shard(shard).rows["offset"][-1]) + 5)
    out = run(tmp_path / "out", *EVERY_STEP, f"data.cache={own_cache}")
    assert same_run(out, whole)
    assert sum(told in message and "made again" in message for message in caplog.messages) == len(shards)
    again = run(tmp_path / "again", "train.steps=1", f"data.cache={own_cache}")  # and it stays repaired
    assert column(again, "loss") == column(whole, "loss")[:1]
    assert sum("made again" in message for message in caplog.messages) == len(shards)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_damaged_during_a_run_stops_it_by_name_and_resume_repairs_it(tmp_path, start, run, whole, own_cache, workers):
    out, more = tmp_path / "out", [*EVERY_STEP, f"data.cache={own_cache}", f"data.workers={workers}", "train.steps=40"]
    trainer = start(out, *more)

    def damage_all():
        for shard in (own_cache / "moments").glob("*.safetensors"):
            for offset in read_shard(shard).rows["offset"]:
                flip_a_byte(shard, int(offset) + 9)

    before_step(trainer, {4: damage_all})
    with pytest.raises(InputError, match=r"the cache entry [0-9a-f]{64} in .* is damaged \(it fails its checksum\); start again"):
        trainer.train()
    done = len(rows_of(out))
    assert 3 <= done < 40 and names_of(out)[-1] == f"step-{done:08d}" and "is damaged" in events(out)[-1]
    assert column(out, "loss")[:6] == column(whole, "loss")[:done]  # nothing damaged was trained on
    trainer = start(out, *more, resume=True)
    before_step(trainer, {done + 2: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(Exception, match="go on with --resume"):
        trainer.train()
    assert column(out, "loss")[:6] == column(whole, "loss")[: done + 2]


def test_a_picture_that_goes_while_it_is_cached_stops_the_run_and_what_was_made_stays(tmp_path, run, pictures, whole, after_listing):
    data, more = tmp_path / "pictures", [*EVERY_STEP, f"data.cache={tmp_path / 'cache'}"]
    shutil.copytree(pictures, data)
    after_listing(lambda: (data / "04.png").unlink(missing_ok=True))
    with pytest.raises(InputError, match=r"04\.png.*No such file.*was there when it was listed"):
        run(tmp_path / "out", *more, f"data.folder={data}")
    after_listing(lambda: None)
    assert (tmp_path / "cache" / "prompts").is_dir() and not (tmp_path / "out" / "metrics.jsonl").exists()
    shutil.copy(pictures / "04.png", data)
    assert same_run(run(tmp_path / "out", *more, f"data.folder={data}"), whole)


def test_a_disk_that_is_full_for_the_cache_stops_the_run_before_its_first_step(tmp_path, run, whole, capsys):
    more = [*EVERY_STEP, f"data.cache={tmp_path / 'cache'}"]
    with files_no_larger_than(2000), pytest.raises(InputError, match=f"could not write {tmp_path / 'cache'}.*free some space"):
        run(tmp_path / "out", *more)
    assert not (tmp_path / "out" / "checkpoints").exists() and not list((tmp_path / "cache").rglob("*.partial"))
    assert same_run(run(tmp_path / "out", *more), whole)


# The disk of the output folder


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer, which is given up
def test_a_disk_that_is_full_for_a_while_costs_pictures_and_checkpoints_but_no_step(tmp_path, start, run, whole, capsys):
    """From step 2 to 4 nothing can be written at all, not a row of the log."""
    trainer, full = start(tmp_path / "out", *EVERY_STEP), ExitStack()
    before_step(trainer, {2: lambda: full.enter_context(files_no_larger_than(1)), 5: full.close})
    with full:
        trainer.train()
    said = capsys.readouterr().out
    assert same_run(tmp_path / "out", whole)  # the rows that waited for room are there too
    assert names_of(tmp_path / "out") == names_of(whole) and (tmp_path / "out" / "model").is_dir()
    for told in ("the rows wait for room", "step-00000002", "next attempt is at the next checkpoint", "no pictures at step 3"):
        assert told in said, told
    assert "warning: tensorboard: " in said
    happened = " ".join(events(tmp_path / "out"))
    assert all(part in happened for part in ("not saved: ", "no pictures: ", "no more for tensorboard"))
    pictures = [sorted(path.name for path in (out / "samples").glob("step-*")) for out in (tmp_path / "out", whole)]
    assert set(pictures[1]) - set(pictures[0]) == {"step-00000003.png"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_at_the_end_is_an_error_and_leaves_the_checkpoint_before(tmp_path, start, run, whole, capsys):
    trainer, full = start(tmp_path / "out", *EVERY_STEP), ExitStack()
    before_step(trainer, {6: lambda: full.enter_context(files_no_larger_than(1))})
    with full, pytest.raises(InputError, match="step-00000006.*nothing saved earlier was touched; free some space"):
        trainer.train()
    assert names_of(tmp_path / "out") == ["step-00000004", "step-00000005"] and not (tmp_path / "out" / "model").exists()
    run(tmp_path / "out", *EVERY_STEP, resume=True)
    assert same_run(tmp_path / "out", whole)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_output_folder_that_is_removed_is_made_again_and_the_run_goes_on(tmp_path, start, whole, capsys):
    out = tmp_path / "out"
    trainer = start(out, *EVERY_STEP)
    before_step(trainer, {4: lambda: shutil.rmtree(out)})
    trainer.train()
    assert f"{out} is gone; it is made again" in capsys.readouterr().out
    assert column(out, "step") == [4, 5, 6] and column(out, "loss") == column(whole, "loss")[3:]
    assert all(torch.equal(value, state_of(whole)[name]) for name, value in state_of(out).items())
    assert names_of(out) == ["step-00000005", "step-00000006"] and (out / "config.json").is_file() and (out / "model").is_dir()


# Numbers


def test_a_loss_that_is_not_finite_stops_the_run_by_name_and_resume_goes_on_exactly(tmp_path, start, run, whole):
    """Unlike a latent that is not finite, this may come of the hardware: gone, the run is what it would have been."""
    trainer = start(tmp_path / "out", *EVERY_STEP)

    def poison():
        trainer.models.network.proj_out.bias.data[3] = float("nan")

    before_step(trainer, {5: poison})
    with pytest.raises(InputError, match=r"the loss is not finite at step 5 for \d\d\.png, .*untouched"):
        trainer.train()
    assert column(tmp_path / "out", "step") == [1, 2, 3, 4] and names_of(tmp_path / "out")[-1] == "step-00000004"
    assert all(value.isfinite().all() for value in state_of(tmp_path / "out").values())
    assert "not finite" in events(tmp_path / "out")[-1]
    run(tmp_path / "out", *EVERY_STEP, resume=True)
    assert same_run(tmp_path / "out", whole)
    assert any("not finite" in what for what in events(tmp_path / "out"))  # what happened stays written


# Processes


def test_a_loader_process_that_is_killed_ends_the_run_which_resumes_exactly(tmp_path, start, run, whole):
    more = [*EVERY_STEP, "data.workers=1", "train.steps=40"]
    trainer = start(tmp_path / "out", *more)
    before_step(trainer, {4: lambda: [os.kill(child.pid, signal.SIGKILL) for child in multiprocessing.active_children()]})
    with pytest.raises(InputError, match=r"reads batches ahead died \(pid \d+, signal 9\).*--resume"):
        trainer.train()
    done = len(rows_of(tmp_path / "out"))
    assert done >= 3 and names_of(tmp_path / "out")[-1] == f"step-{done:08d}"  # nothing is lost
    trainer = start(tmp_path / "out", *more, resume=True)
    before_step(trainer, {done + 3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(Exception, match="go on with --resume"):
        trainer.train()
    assert column(tmp_path / "out", "loss")[:6] == column(whole, "loss")


def hold(folder, held):
    with claimed(folder):
        held.set()
        time.sleep(600)


def test_a_second_run_into_the_folder_of_a_running_one_is_refused(tmp_path, start, run, whole):
    out, context = tmp_path / "out", multiprocessing.get_context("fork")
    held = context.Event()
    first = context.Process(target=hold, args=(out, held))
    first.start()
    assert held.wait(60)
    with pytest.raises(InputError, match=rf"a run is writing to {out} \(process {first.pid} on .*\); wait for its end"):
        run(out, *EVERY_STEP)
    assert [path.name for path in out.iterdir()] == ["running.lock"]
    os.kill(first.pid, signal.SIGKILL)  # a claim ends with its process
    first.join()
    assert same_run(run(out, *EVERY_STEP), whole)
    assert not (out / "running.lock").exists()


@pytest.fixture
def launch(options, environment):
    """launch(out, *overrides, resume=False, sharded=False) -> a training by two processes that has begun."""

    def start(out, *more, resume=False, sharded=False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port", port, "-m", "latentfm", "train"]
        command += [*(["--resume"] if resume else []), *options(out, *more)]
        settings = environment | (FSDP2 if sharded else {})
        return subprocess.Popen([sys.executable, *command], env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def rank_of(launched, rank):
    """A process of a launched training."""
    return next(child for child in psutil.Process(launched.pid).children() if child.environ().get("RANK") == str(rank))


def wait_until(there, launched):
    while not there():
        assert launched.poll() is None, launched.communicate()[1][-3000:]
        time.sleep(0.01)


def written(path):
    return path.read_text() if path.exists() else ""


def test_a_rank_that_is_killed_ends_the_others_and_the_run_resumes_exactly(tmp_path, run, launch):
    more = [*EVERY_STEP, "train.steps=60", "output.checkpoint_every=4"]
    one, out = run(tmp_path / "one", *more), tmp_path / "out"
    launched = launch(out, *more)
    wait_until(lambda: written(out / "metrics.jsonl").count("\n") >= 10, launched)
    main, other = rank_of(launched, 0), rank_of(launched, 1)
    other.kill()
    _, error = launched.communicate(timeout=120)
    assert launched.returncode != 0 and "Signal 9 (SIGKILL)" in error  # the launcher tells, and leaves nobody behind
    assert not main.is_running()
    before = json_lines.rows_of(out / "metrics.jsonl")
    kept = int(names_of(out)[-1][5:])
    assert 10 <= len(before) < 60 and kept > len(before) - 5  # at most the steps since the last checkpoint
    resumed = launch(out, *more, resume=True)
    assert resumed.communicate(timeout=300) and resumed.returncode == 0 and (out / "model").is_dir()
    again = rows_of(out)
    assert [row["step"] for row in again] == list(range(1, 61))
    for first, second in zip(before, again):
        assert all(first[name] == second[name] for name in ("loss", "gradient_norm", "loss_by_t"))  # to the bit, made twice or not
    assert column(out, "loss") == pytest.approx(column(one, "loss"), rel=0, abs=1e-5)
    assert column(out, "count_by_t") == column(one, "count_by_t")


@pytest.mark.slow
def test_a_disk_that_is_full_stops_neither_of_two_processes_that_share_the_weights(tmp_path, run, launch):
    """The main process alone meets the full disk, while each writes its own rows."""
    more = [*EVERY_STEP, "train.steps=80", "output.checkpoint_every=4"]
    one, out = run(tmp_path / "one", *more), tmp_path / "out"
    launched = launch(out, *more, sharded=True)
    wait_until(lambda: written(out / "metrics.jsonl").count("\n") >= 10, launched)
    main = rank_of(launched, 0)
    before = main.rlimit(psutil.RLIMIT_FSIZE)
    main.rlimit(psutil.RLIMIT_FSIZE, (100_000, before[1]))
    wait_until(lambda: "not saved" in written(out / "events.jsonl"), launched)
    main.rlimit(psutil.RLIMIT_FSIZE, before)
    said, error = launched.communicate(timeout=300)
    assert launched.returncode == 0, error[-3000:]
    assert "The training goes on, the next attempt is at the next checkpoint" in said
    assert column(out, "loss") == pytest.approx(column(one, "loss"), rel=0, abs=1e-5)
    assert names_of(out) == ["step-00000076", "step-00000080"] and (out / "model").is_dir()


@pytest.mark.slow
def test_a_latent_that_is_not_finite_in_one_process_ends_both_by_its_name(tmp_path, start, launch, own_cache):
    trainer = start(tmp_path / "unused", f"data.cache={own_cache}")
    data = trainer.data
    sample = data.samples[permutation(10, 0, "order", 0, 0)[5]]  # the second of the second step
    key = data.image_key(sample, False)
    moments = read(data.cache, key)["moments"]
    moments[0, 3, 3] = float("nan")
    drop(data.cache, key)
    data.cache.write("moments", {key: {"moments": moments}})
    launched = launch(tmp_path / "out", *EVERY_STEP, f"data.cache={own_cache}")
    _, error = launched.communicate(timeout=120)
    assert launched.returncode != 0
    assert error.count(f"the loss is not finite at step 2 for {sample.id};") >= 2  # each process says so
    assert column(tmp_path / "out", "step") == [1] and names_of(tmp_path / "out") == ["step-00000001"]
    assert all(value.isfinite().all() for value in state_of(tmp_path / "out").values())


# Time, and what a run finds when it comes back


def test_no_clock_matters(tmp_path, start, run, whole, own_cache, monkeypatch):
    """The clock goes back a day while a run goes on, and a year before it is resumed; files come from the future and from 1970."""
    more, now = [*EVERY_STEP, f"data.cache={own_cache}"], time.time()
    trainer = start(tmp_path / "out", *more)

    def back(seconds):
        monkeypatch.setattr(time, "time", lambda: now - seconds)

    before_step(trainer, {2: lambda: back(86_400), 4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(Exception, match="stopped after step 4 of 6"):
        trainer.train()
    back(365 * 86_400)
    files = [path for folder in (own_cache, tmp_path / "out") for path in sorted(folder.rglob("*"))]
    for number, path in enumerate(files):
        os.utime(path, (0, 0) if number % 2 else (now + 1e9, now + 1e9))
    oldest, newest = storage.checkpoints(tmp_path / "out" / "checkpoints")
    os.utime(oldest, (now + 1e9, now + 1e9))
    os.utime(newest, (0, 0))
    shards = len(list(own_cache.rglob("*.safetensors")))
    run(tmp_path / "out", *more, resume=True)
    assert same_run(tmp_path / "out", whole)
    assert len(list(own_cache.rglob("*.safetensors"))) == shards  # nothing was made again
    seconds = column(tmp_path / "out", "seconds")
    assert all(a < b for a, b in zip(seconds, seconds[1:]))


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(tmp_path, run, whole, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    flip_a_byte(out / "checkpoints" / "step-00000006" / "state.safetensors", 70_000)
    run(out, *EVERY_STEP, resume=True)
    said = capsys.readouterr().out
    assert "step-00000006 cannot be read (state.safetensors: not what was written)" in said and "resuming after step 5" in said
    assert same_run(out, whole)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000005", "step-00000006", "step-00000006.damaged"]


def test_rows_that_were_cut_are_written_again(tmp_path, run, whole):
    """As a machine that loses its power leaves them: rows of the log may be behind the checkpoint, the last one cut anywhere."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss_by_t": [0.1], "odd": {}')
    with (out / "validation.jsonl").open("a") as file:
        file.write('{"step": 5, "by_t": {"0.5": 1}\n')
    run(out, *EVERY_STEP, resume=True)
    assert same_run(out, whole)


def test_a_new_start_takes_no_validation_of_an_attempt_before_it(tmp_path, run):
    """An attempt that ended before its first checkpoint leaves a validation of step 0, which may be of other data."""
    more, stale = [*EVERY_STEP, "train.steps=1", "validation.held_out=2"], {"step": 0, "validation_loss": 12345.0, "by_t": {}}
    out = tmp_path / "out"
    out.mkdir()
    (out / "validation.jsonl").write_text(json.dumps(stale) + "\n")
    found = rows_of(run(out, *more), "validation.jsonl")
    assert [row["step"] for row in found] == [0, 1] and all(row["validation_loss"] < 100 for row in found)
