"""Real trainings in several processes on CPUs: DDP and FSDP2, stopped by the scheduler's signal, going on with other numbers."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentfm.training.checkpoint import storage
from latentfm.words import count

ROOT = Path(__file__).resolve().parents[3]
HELD_OUT = ["validation.held_out=2", "validation.every=2"]
ADAPTER = ["train.adapter={rank: 2}", "train.learning_rate=1e-2"]


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def column(out, name):
    return [row[name] for row in rows_of(out)]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def launch(options, tmp_path, monkeypatch):
    """launch(processes, out, *overrides, mode="DDP", resume=False) -> the started training, see tests/torture.py."""
    from torture import Started

    under_way = []

    def start(processes, out, *more, mode="DDP", resume=False):
        under_way.append(Started(options(out, *more), resume, tmp_path / f"{out.name} {mode} {processes}.log", processes, mode))
        return under_way[-1]

    yield start
    for started in under_way:
        started.kill()


def finished(started):
    code, said = started.finish(300), started.log.read_text()
    assert code == 0, said[-4000:]
    return said


@pytest.mark.parametrize(
    "mode, processes, more",
    [
        ("DDP", 4, ["train.gradient_accumulation=2", "train.token_routing={keep: 0.5, first: 0, last: 0}"]),
        ("FSDP2", 2, ["train.gradient_accumulation=2", *ADAPTER]),
        ("FSDP2", 4, HELD_OUT),
        ("FSDP2, CPU", 2, ["train.gradient_accumulation=2", "train.gradient_checkpointing=0.5", *HELD_OUT]),
        slow("FSDP2", 2, ["train.blocks=1", "train.ema_device=cpu"]),
        slow("FSDP2", 4, ["train.ema_device=cpu", "train.optimizer=lion", "train.learning_rate=1e-4"]),
        slow("FSDP2", 2, ["train.blocks=1", "train.adapter={rank: 2, kind: dora}", "train.learning_rate=1e-2"]),
        slow("FSDP2, CPU", 1, []),
        slow("FSDP2, CPU", 4, [*HELD_OUT, *ADAPTER]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_several_processes_train_as_one(tmp_path, run, launch, mode, processes, more):
    more = [*more, "train.batch_size=8", "train.steps=5", "train.dropout_each=0.2", "sample.every=5", "sample.prompts=[a, b, c]"]
    alone = [option for option in more if "accumulation" not in option]
    one, several = run(tmp_path / "one", *alone), tmp_path / "several"
    said = finished(launch(processes, several, *more, f"data.cache={tmp_path / 'cache'}", mode=mode))
    split = ", weights split by FSDP2" * (mode != "DDP") + ", on the CPU" * mode.endswith("CPU")
    assert f"{count(processes, 'process', 'processes')} on cpu{split}, " in said
    same(one, several)
    state = [file for file in storage.checkpoints(several / "checkpoints")[-1].iterdir() if file.is_file()]
    assert {file.suffix for file in state} == {".json", ".safetensors"}
    if mode != "DDP" and processes > 1:  # each process has written its share, at once
        sizes = {file.name[:11]: file.stat().st_size for file in state if file.suffix == ".safetensors"}
        assert sorted(sizes) == [f"shard-{rank:05d}" for rank in range(1, processes + 1)]
        whole = (storage.checkpoints(one / "checkpoints")[-1] / "state.safetensors").stat().st_size
        assert max(sizes.values()) < 0.8 * whole or "adapter" in str(more)  # of whose few numbers the names are the most


def same(one, several):
    assert column(several, "step") == [1, 2, 3, 4, 5]
    assert column(several, "loss") == pytest.approx(column(one, "loss"), rel=0, abs=1e-5)
    assert column(several, "gradient_norm") == pytest.approx(column(one, "gradient_norm"), rel=1e-4)
    assert column(several, "count_by_t") == column(one, "count_by_t")  # the same samples at the same times
    weights = [load_file(out / "model" / "transformer" / "diffusion_pytorch_model.safetensors") for out in (one, several)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)
    states = [storage.load(storage.checkpoints(out / "checkpoints")[-1])[0] for out in (one, several)]
    assert states[0].keys() == states[1].keys()
    for name, stored in states[0].items():
        torch.testing.assert_close(states[1][name].load(), stored.load(), rtol=1e-4, atol=1e-5)
    if (one / "validation.jsonl").exists():
        found = [[json.loads(line)["validation_loss"] for line in (out / "validation.jsonl").open()] for out in (one, several)]
        assert len(found[0]) == 4 and found[1] == pytest.approx(found[0], abs=1e-5)  # before the first step, after 2, 4 and 5
    assert (several / "samples" / "step-00000005.png").is_file() and (several / "run.html").is_file()


def test_accelerate_launches_it(tmp_path, run, options, environment):
    more = ["train.batch_size=8", "train.steps=5", "train.dropout_each=0.2", "sample.every=5", "sample.prompts=[a, b, c]"]
    one, two = run(tmp_path / "one", *more), tmp_path / "two"
    launcher = ["accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "accelerate" / "cpu-2.yaml")]
    command = [sys.executable, "-m", *launcher, "-m", "latentfm", "train", *options(two, *more)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2 processes on cpu" in done.stdout
    same(one, two)


def test_a_run_goes_on_with_other_numbers_of_processes_after_the_schedulers_signal(tmp_path, run, launch):
    """One process, then two under FSDP2 that offload, then four under FSDP2; each is stopped by SIGTERM, as a scheduler does."""
    more = ["train.batch_size=8", "train.steps=60", "output.checkpoint_every=1000", "train.dropout_each=0.2"]
    whole, parts = run(tmp_path / "whole", *more), tmp_path / "parts"
    for processes, mode in ((1, "DDP"), (2, "FSDP2, CPU"), (4, "FSDP2")):
        before = len(rows_of(parts)) if parts.exists() else 0
        started = launch(processes, parts, *more, mode=mode, resume=before > 0)
        if processes < 4:
            began = time.monotonic()
            while not (parts / "metrics.jsonl").exists() or len(rows_of(parts)) < before + 3:
                assert started.code() is None and time.monotonic() - began < 120, started.log.read_text()[-3000:]
                time.sleep(0.01)
            started.tell(signal.SIGTERM)  # the others are told by this one
            assert "SIGTERM: stopping after this step" in finished(started)
            done = len(rows_of(parts))
            assert before + 3 <= done < 60, "the run ended before the signal reached it"
            assert [p.name for p in storage.checkpoints(parts / "checkpoints")][-1] == f"step-{done:08d}"
        else:
            finished(started)
    assert column(parts, "step") == list(range(1, 61))
    assert column(parts, "count_by_t") == column(whole, "count_by_t")
    assert column(parts, "loss") == pytest.approx(column(whole, "loss"), rel=0, abs=1e-5)
    assert (parts / "model" / "model_index.json").is_file()


STUCK = """
import sys, time
sys.path.insert(0, {tests!r})
from latentfm.training.distributed import launcher
from latentfm.training.trainer import Trainer
launcher.SECONDS_TO_NOTICE = 1.0
step = Trainer.train_step
def train_step(self, batches):
    if self.step == 2 and self.accelerator.process_index == 1:
        raise KeyError("broken")
    if self.step == 2:
        time.sleep(600)  # as in a collective that waits for the other
    return step(self, batches)
Trainer.train_step = train_step
from latentfm.cli.main import main
main()
"""


def test_an_error_of_one_process_ends_the_other_that_waits_for_it(tmp_path, options, environment):
    """Without a launcher, which would end the others for it."""
    program = tmp_path / "program.py"
    program.write_text(STUCK.format(tests=str(ROOT / "tests")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, str(program), "train", *options(tmp_path / "out", "train.batch_size=8")]
    ranks = [
        subprocess.Popen(command, env=environment | meeting | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]  # fmt: skip
    other = ranks[1].communicate(timeout=120)[1]
    ended = time.monotonic()
    said = ranks[0].communicate(timeout=120)[1]
    assert "KeyError: 'broken'" in other and ranks[0].returncode == 1 and time.monotonic() - ended < 15
    assert "process 1 of 2: a process of this run ended by KeyError" in said and "--resume goes on" in said
