"""What people start from: each run of configs/ is dry-run at its true size, Accelerate reads each launcher, the SLURM script runs."""

import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import namedtuple
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env
from hollow import hollow_pipeline
from PIL import Image
from torch.distributed.fsdp import CPUOffloadPolicy

from latentfm.bundled import bundled_model
from latentfm.config import load_config
from latentfm.models.mmdit import MMDiT
from latentfm.planning.devices import GIB, GPUS, Device
from latentfm.planning.run import Parallelism
from latentfm.training import dry_run as room
from latentfm.training.dry_run import dry_run

ROOT = Path(__file__).resolve().parents[1]
VAE = ROOT / "configs" / "vae.yaml"
CONFIGS = sorted(file for file in (ROOT / "configs").glob("*.yaml") if file != VAE)
LAUNCHERS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
NETWORKS = {  # whose pipeline folder a configuration names
    "models/stable-diffusion-3-medium-diffusers": "sd3-medium", "models/stable-diffusion-3.5-medium": "sd3.5-medium",
    "models/stable-diffusion-3.5-large": "sd3.5-large",
}  # fmt: skip
EXPECTED = re.compile(r"# By the dry run's closed forms: ([\d.]+) GiB on (\d+) x (\S+), about ([\d.]+) images/s at 40 % of")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs") / "pictures"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (640, 480) if number % 2 else (64, 64), (20 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}", "utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The pipeline folder of the bundled model, and those of SD3's sizes, by the names that the configurations have for them."""
    root = tmp_path_factory.mktemp("hollow")
    return {None: bundled_model()} | {path: hollow_pipeline(root / preset, preset) for path, preset in NETWORKS.items()}


@pytest.fixture
def dry(pictures, folders, tmp_path, monkeypatch):
    """dry(file, gpu, parallelism, *overrides) -> the dry run of a configuration on twelve pictures, with room on the disk."""
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(10**15, 0, 10**15))

    def run(file, gpu="h100", parallelism=None, *overrides):
        given = load_config(file, ["data.folder=unknown"] if "sources" not in file.read_text("utf-8") else [])
        data = f"data.folder={pictures}" if given.data.folder else f"data.sources=[{{path: {pictures}}}]"
        held_out = f"validation.held_out={min(2, given.validation.held_out)}"
        pipeline = folders.get(given.model.pipeline, bundled_model())
        more = [data, held_out, f"model.pipeline={pipeline}", f"output.folder={tmp_path / 'run'}", f"data.cache={tmp_path / 'cache'}"]
        return dry_run(load_config(file, [*more, *overrides]), parallelism=parallelism or Parallelism(), device=Device.of(GPUS[gpu]))

    return run


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_configuration_is_one_that_runs(dry, file):
    stated = EXPECTED.search(file.read_text("utf-8"))
    found = dry(file, "h100", Parallelism(int(stated[2]) if stated else 1))
    assert found["memory"]["fits"] and found["data"]["pictures"] >= 10
    assert f"configs/{file.name}" in file.read_text("utf-8") or file.stem == "emoji"  # how to launch it


@pytest.mark.parametrize("file", [file for file in CONFIGS if EXPECTED.search(file.read_text("utf-8"))], ids=lambda file: file.stem)
def test_the_memory_and_speed_that_a_configuration_states_are_the_dry_runs(dry, file):
    memory, gpus, gpu, speed = EXPECTED.search(file.read_text("utf-8")).groups()
    found = dry(file, gpu, Parallelism(int(gpus)))
    assert found["memory"]["total"] / GIB == pytest.approx(float(memory), abs=0.06) and found["memory"]["fits"]
    assert found["time"]["images a second"] == pytest.approx(float(speed), rel=0.03)


def test_the_configurations_of_large_models_state_theirs():
    stated = {file.stem for file in CONFIGS if EXPECTED.search(file.read_text("utf-8"))}
    assert stated >= {"sd3-medium-lora", "sd35-medium-lora", "sd35-medium-full", "sd35-large-lora", "scratch-256"}


def test_other_figures_in_their_comments_hold(dry):
    configs = {file.stem: file for file in CONFIGS}
    sixteen = dry(configs["sd3-medium-lora"], "4090", Parallelism(), "train.gradient_checkpointing=true")["memory"]
    assert sixteen["fullest at"] == "filling the cache" and sixteen["total"] / GIB == pytest.approx(13.2, abs=0.06)
    assert dry(configs["sd3-medium-lora"])["parameters"]["trained"] == pytest.approx(9.4e6, rel=0.01)
    split = dry(configs["sd35-medium-full"], "l40s", Parallelism(8, 1, 8))["memory"]
    assert split["fits"] and not dry(configs["sd35-medium-full"], "l40s", Parallelism(8))["memory"]["fits"]
    half = dry(configs["sd35-medium-lora"], "4090", Parallelism(), "train.gradient_checkpointing=0.5")["memory"]
    assert 21 < half["total"] / GIB < 22.5
    large = dry(configs["sd35-large-lora"], "4090", Parallelism(), "data.size=1440", "train.gradient_checkpointing=true")["memory"]
    assert large["fits"]
    scratch = configs["scratch-256"]
    rates = [dry(scratch, "h100", Parallelism(8), *more)["time"]["images a second"] for more in ((), ("train.token_routing=null",))]
    assert rates[0] / rates[1] == pytest.approx(1.3, abs=0.02)
    assert dry(scratch)["P(no condition)"] == pytest.approx(0.1, abs=0.001)


def test_the_large_model_fits_24_gb_as_its_configuration_says(dry):
    """The claim of sd35-large-lora: every moment of the run, the cache's filling included, in 24 GiB less what is to be left free."""
    found = dry(ROOT / "configs" / "sd35-large-lora.yaml", "4090")
    assert max(found["memory"]["at"].values()) + found["memory"]["reserve"] <= 24 * GIB
    assert set(found["memory"]["at"]) >= {"filling the cache", "backward pass", "optimizer step", "drawing sample pictures"}


def test_the_autoencoders_configuration_is_one_that_runs(pictures, tmp_path):
    from latentfm.training.vae.dry_run import dry_run as look
    from latentfm.training.vae.options import VAEConfig

    own = [f"data.folder={pictures}", f"data.cache={tmp_path / 'cache'}", f"output.folder={tmp_path / 'run'}", "validation.held_out=2"]
    found = look(load_config(VAE, own, VAEConfig), device=Device.of(GPUS["4090"]))
    assert found["memory"]["fits"] and found["pictures"] == 10 and found["factor"] == 8 and not list(tmp_path.iterdir())
    assert "configs/vae.yaml" in VAE.read_text("utf-8")


# Accelerate's configurations


def arguments(file: Path, *more: str) -> Namespace:
    """What accelerate launch makes of a configuration file."""
    return _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), *more, "train.py"]))[0]


@pytest.mark.parametrize("file", LAUNCHERS, ids=lambda file: file.stem)
def test_accelerate_reads_every_launcher(file):
    read = load_config_from_file(str(file))  # refuses an unknown key
    known = vars(launch_command_parser().parse_args(["train.py"]))
    for section in (read.fsdp_config, read.parallelism_config):  # whose keys it does not look at
        assert all(key in known for key in section), set(section) - set(known)
    assert read.mixed_precision == "no"  # precision is the run's
    assert f"configs/accelerate/{file.name}" in file.read_text("utf-8")  # how to launch it


@pytest.mark.parametrize("file", [f for f in LAUNCHERS if f.stem.startswith("fsdp")], ids=lambda file: file.stem)
def test_fsdp_is_set_up_as_the_trainer_needs_it(file, monkeypatch):
    environment = prepare_multi_gpu_env(arguments(file))
    sharded = {name: value for name, value in environment.items() if name.startswith(("FSDP_", "ACCELERATE_USE", "PARALLELISM_CONFIG"))}
    for name in [name for name in os.environ if name.startswith(("FSDP_", "PARALLELISM_CONFIG"))]:
        monkeypatch.delenv(name)
    with patch_environment(**sharded):
        plugin = FullyShardedDataParallelPlugin()
        plugin.set_auto_wrap_policy(MMDiT(num_layers=1, num_attention_heads=1, attention_head_dim=8, caption_projection_dim=8))
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True and not plugin.cpu_ram_efficient_loading
    assert {block.__name__ for block in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]} == {"Block"}
    world = {"WORLD_SIZE": str(yaml.safe_load(file.read_text("utf-8"))["num_processes"]), "LOCAL_WORLD_SIZE": "8"}
    found, offload = Parallelism.here(sharded | world), "offload" in file.stem
    assert found.shards == int(file.stem[-1]) and found.splits and found.offload == offload
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) == offload


def test_two_processes_start_without_a_gpu(tmp_path):
    (tmp_path / "told.py").write_text("import os, sys; open(sys.argv[1] + os.environ['RANK'], 'w').write(os.environ['WORLD_SIZE'])")
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "accelerate" / "cpu-2.yaml"),
         str(tmp_path / "told.py"), f"{tmp_path}/rank"],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["2", "2"]


# The SLURM script, among programs that answer as SLURM's and Accelerate's do

SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo node1; else echo "$@" >> "$LOG"; fi
"""
ACCELERATE = """#!/bin/bash
echo "launched: $*" >> "$LOG"
python "$TRAINING" &
wait $!
"""
LISTENING = """
import json, os, pathlib, signal, sys, time
out = pathlib.Path(os.environ["OUT"])
def save(*_):
    (out / "checkpoints" / "step-00000007").mkdir(parents=True)
    (out / "checkpoints" / "step-00000007" / "state.json").write_text("{}")
    sys.exit(0)
"""
READY = """
open(os.environ["LOG"], "a").write("ready\\n")
time.sleep(4)
"""
TRAININGS = {  # a program each; bash could not listen to a signal that it was started deaf to
    "saves": LISTENING + "signal.signal(signal.SIGUSR1, save)" + READY, "is deaf": LISTENING + READY,
    "finishes": LISTENING + "(out / 'model').mkdir(parents=True)", "fails": "raise SystemExit(3)",
}  # fmt: skip


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """slurm(training, *arguments, stop) -> (exit code, lines of the log, output) of the script; `stop` sends SIGUSR1 to it on the way."""
    programs = tmp_path / "programs"
    programs.mkdir()
    python = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'  # a link would be the Python outside its virtual environment
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("accelerate", ACCELERATE), ("python", python)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    config = tmp_path / "run.yaml"
    config.write_text(f"data: {{folder: {tmp_path}}}\noutput: {{folder: {tmp_path / 'run'}}}\n")

    def run(training, *more, stop=False, nodes="1"):
        log = tmp_path / "log"
        log.write_text("")
        (tmp_path / "training.py").write_text(TRAININGS[training])
        environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}", "LOG": str(log), "TRAINING": str(tmp_path / "training.py"),
            "GRACE": "1" if training == "is deaf" else "20",
            "OUT": str(tmp_path / "run"), "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": nodes,
            "SLURM_GPUS_ON_NODE": "4", "SLURM_NODEID": "0", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        script = subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "slurm.sh"), "--config", str(config), *more], env=environment, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while stop and "ready" not in log.read_text() and time.monotonic() < deadline:
                time.sleep(0.02)
            if stop:
                script.send_signal(signal.SIGUSR1)
            said, _ = script.communicate(timeout=120)
        finally:
            if script.poll() is None:
                os.killpg(script.pid, signal.SIGKILL)
        return script.returncode, log.read_text().splitlines(), said

    return run


def test_the_slurm_script_is_bash():
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts" / "slurm.sh")], check=False).returncode == 0
    text = (ROOT / "scripts" / "slurm.sh").read_text("utf-8")
    assert "#SBATCH --signal=B:USR1@" in text and "#SBATCH --requeue" in text and "#SBATCH --ntasks-per-node=1" in text


def test_a_job_whose_time_is_up_saves_goes_back_into_the_queue_and_resumes(slurm):
    code, log, said = slurm("saves", "train.seed=5", stop=True, nodes="2")
    assert code == 0, said
    launched = next(line for line in log if line.startswith("launched"))
    for part in (
        "--num_machines 2", "--num_processes 8", "--machine_rank 0", "--main_process_ip node1", "--main_process_port 20042",
        "multi-node.yaml", "-m latentfm train --config", "train.seed=5",
    ):  # fmt: skip
        assert part in launched, launched
    assert not launched.endswith("--resume") and log[-1] == "requeue 42"
    code, log, said = slurm("finishes", "train.seed=5")
    assert code == 0 and next(line for line in log if line.startswith("launched")).endswith("train.seed=5 --resume")
    assert not any(line.startswith("requeue") for line in log)
    code, log, said = slurm("finishes")
    assert code == 0 and log == [] and "finished already" in said


def test_a_finished_job_asked_for_more_goes_on_and_is_put_back_when_its_time_is_up(slurm, tmp_path):
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "latentfm.json").write_text('{"trained": {"steps": 5}}')
    code, log, said = slurm("finishes", "train.steps=5")
    assert code == 0 and log == [] and "finished already" in said
    code, log, said = slurm("saves", "train.steps=9", stop=True)
    assert any(line.startswith("launched") for line in log) and log[-1] == "requeue 42", said
    code, log, _ = slurm("is deaf", "train.steps=9")
    assert next(line for line in log if line.startswith("launched")).endswith("train.steps=9 --resume")


def test_a_job_that_fails_is_not_put_back(slurm):
    code, log, _ = slurm("fails")
    assert code == 3 and not any(line.startswith("requeue") for line in log)


def test_a_job_too_busy_to_listen_is_put_back_nevertheless(slurm):
    """As while it fills its cache; scontrol requeue itself ends what still runs."""
    _, log, said = slurm("is deaf", stop=True)
    assert "requeue 42" in log and "still busy" in said
