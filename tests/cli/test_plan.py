"""`latentfm plan`: what it counts, that its ways out are ways out, and one clear line for bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from latentfm.bundled import bundled_model
from latentfm.cli.main import app
from latentfm.models.folder import read_info, t5_length
from latentfm.models.presets import PRESETS
from latentfm.planning.devices import GIB, GPUS, RESERVE


@pytest.fixture
def run(monkeypatch):
    """A function that runs `latentfm plan` with its arguments."""
    monkeypatch.delenv("LATENTFM_DEBUG", raising=False)
    return lambda *args: CliRunner().invoke(app, ["plan", *map(str, args)])


def bundled_tokens() -> tuple[int, int]:
    """Of a picture and of a prompt, by the bundled model's own files."""
    network, clip = (json.loads((bundled_model() / part / "config.json").read_text()) for part in ("transformer", "text_encoder"))
    return (network["sample_size"] // network["patch_size"]) ** 2, clip["max_position_embeddings"] + t5_length(read_info(bundled_model()))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mode", ["full", "lora", "generate"])
def test_every_preset_and_mode_has_a_plan(run, in_json, preset, mode):
    words = {"full": (), "lora": ("train.adapter={}",), "generate": ("--generate", 8)}[mode]
    answer = run("--preset", preset, *words)
    assert answer.exit_code == 0, answer.output
    for title in ("Parameters", "FLOP an image", "Memory of a GPU", "images/s at 40% of the peak"):
        assert title in answer.stdout
    found = in_json("--preset", preset, *words)
    image, text = bundled_tokens() if preset == "emoji" else (4096, 333)
    assert found["tokens"]["image"] == [image] and found["tokens"]["text"] == text


def test_the_sums_are_right_for_sd3_medium(in_json):
    found = in_json("--preset", "sd3-medium", "data.size=1024", "train.batch_size=64", "--gpus", 8, "train.steps=500", "sample.prompts=[a]")
    parameters, memory = found["parameters"], found["memory"]
    assert sum(parameters["network"].values()) == parameters["trained"] == 2_028_328_000
    assert memory["parts"]["weights"] == 4 * 2_028_328_000 and memory["parts"]["optimizer"] == 8 * 2_028_328_000
    flops = sum(found["FLOP an image"]["training"].values())
    assert found["time"]["images a second"] == pytest.approx(8 * 0.4 * 989e12 / flops)
    assert found["time"]["hours"] == pytest.approx(500 * 64 / found["time"]["images a second"] / 3600)
    assert found["batch"]["pictures a process at a time"] == 8
    assert memory["at"][memory["fullest at"].split(" of block")[0]] == sum(memory["parts"].values()) == memory["total"]
    assert memory["fits"] == (sum(memory["parts"].values()) + RESERVE <= 80 * GIB)


def test_a_picture_is_its_steps_twice_where_guided_and_a_decoding(in_json):
    arguments = ("--preset", "sd3.5-large", "--generate", 1, "sample.steps=40")
    guided, alone = in_json(*arguments, "sample.guidance=4.5"), in_json(*arguments, "sample.guidance=1")
    once = sum(guided["FLOP an image"]["forward"].values())
    assert guided["FLOP an image"]["picture"]["the network's steps"] == 80 * once
    assert alone["FLOP an image"]["picture"]["the network's steps"] == 40 * once
    assert in_json(*arguments, "sample.solver=rk4")["FLOP an image"]["picture"]["the network's steps"] == 320 * once
    parts, parameters = guided["memory"]["parts"], guided["parameters"]
    assert parts["weights"] == 2 * sum(parameters["network"].values())
    assert parts["text encoders and VAE"] == 2 * sum(parameters["frozen models"].values())


HARD = [
    ("--preset", "sd3-medium", "--gpu", "a100-40", "train.batch_size=32", "--gpus", 2),
    ("--preset", "sd3.5-medium", "--gpu", "l40s", "train.adapter.rank=16", "train.batch_size=16"),
    ("--preset", "sd3.5-large", "train.batch_size=64", "--gpus", 8, "sample.prompts=[a]"),
    ("--preset", "large", "--gpu", "4090", "train.batch_size=8"),
    ("--preset", "sd3.5-large", "--gpu", "4090", "--generate", 4),
    ("--preset", "sd3-medium", "--gpu", "4090", "--generate", 64),
    ("--preset", "sd3.5-large", "--gpu", "4090", "--generate", 1024),
]


@pytest.mark.parametrize("arguments", HARD)
def test_every_way_out_makes_it_fit(in_json, arguments):
    found = in_json(*arguments)["memory"]
    assert not found["fits"] and found["ways out"]
    for way in found["ways out"]:
        if "enable_model_cpu_offload" in way:
            continue
        changed = list(arguments)
        if "--generate" in way:
            place = changed.index("--generate")
            del changed[place : place + 2]
        assert in_json(*changed, *way.split())["memory"]["fits"], way


def test_the_fraction_of_checkpointing_is_the_smallest_of_tenths_that_fits(in_json):
    arguments = ("--preset", "depth15", "train.batch_size=16", "sample.prompts=[a]", "model.text_encoders=bfloat16")
    checkpointing = "train.gradient_checkpointing"
    least, most = (sum(in_json(*arguments, f"{checkpointing}={share}")["memory"]["parts"].values()) for share in (1, 0))
    arguments += ("--gpu-memory", ((least + most) / 2 + RESERVE) / GIB)
    (way,) = [way for way in in_json(*arguments)["memory"]["ways out"] if way.startswith(checkpointing)]
    fraction = float(way.split("=")[1])
    assert in_json(*arguments, f"{checkpointing}={fraction}")["memory"]["fits"]
    assert not in_json(*arguments, f"{checkpointing}={round(fraction - 0.1, 1)}")["memory"]["fits"]


def test_what_cannot_fit_says_so(run):
    answer = run("--preset", "sd3.5-large", "--gpu-memory", 2)
    assert answer.exit_code == 0 and "does not fit" in answer.stdout and "nothing here makes it fit" in answer.stdout


def test_another_gpu_is_given_by_its_peak_and_memory(in_json):
    found = in_json("--preset", "small", "--peak", 100, "--gpu-memory", 16)
    assert found["device"] == {"name": "another", "TFLOP/s": 100, "bytes": 16 * GIB}
    assert found["time"]["images a second"] == pytest.approx(in_json("--preset", "small")["time"]["images a second"] * 100 / 989)


def test_a_pipeline_folder_is_read(in_json, tiny_folder, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    found = in_json("--model", tiny_folder, "train.batch_size=2", "data.t5_lengths={8: 1}")
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    assert sum(found["parameters"]["network"].values()) == pipe.transformer.num_parameters()
    frozen = found["parameters"]["frozen models"]
    assert frozen["VAE"] == pipe.vae.num_parameters()
    for name in ("text_encoder", "text_encoder_2"):
        assert frozen[name] == sum(p.numel() for p in getattr(pipe, name).parameters())
    assert (found["run"]["size"], found["tokens"]["image"], found["tokens"]["text"]) == ([32, 32], [16], 24)
    assert in_json("--model", tiny_folder)["tokens"]["text"] == 16 + 256
    alone = shutil.copytree(tiny_folder / "transformer", tmp_path / "alone")
    assert in_json("--model", alone)["run"]["size"] == [64, 64]  # among SD3's frozen models


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "sd3-medum"), "--preset 'sd3-medum' does not exist (did you mean 'sd3-medium'?)"),
        (("--gpu", "h10"), "--gpu 'h10' does not exist (did you mean 'h100'?)"),
        (("train.adapter.kind=lore",), "train.adapter.kind: Input should be 'lora' or 'dora'"),
        (("--shard", "ful", "--gpus", 8), "did you mean 'full'?"),
        (("train.weights=float16",), "train.weights: Input should be 'float32' or 'bfloat16'"),
        (("--generate", 8, "--dtype", "float16"), "--dtype 'float16' does not exist"),
        (("data.size=1000",), "data.size 1000 is not a multiple of 16; the nearest are 992 and 1008"),
        (("data.size=4096",), "data.size 4096 is larger than this network's 3072"),
        (("data.size=wide",), "data.size"),
        (("train.batch_size=6", "--gpus", 4), "train.batch_size 6 does not divide by 4 processes"),
        (("train.batch_size=8", "train.gradient_accumulation=3"), "not divisible by train.gradient_accumulation 3"),
        (("--generate", 6, "--gpus", 4), "--generate 6 does not divide by 4 GPUs"),
        (("--generate", 0), "--generate 0 must be at least 1"),
        (("--generate", 10**9), "--generate 1000000000 is more than 1,024"),
        (("--gpus", 0), "--gpus 0 must be at least 1"),
        (("data.t5_lengths={0: 1}",), "lengths must be from 1"),
        (("train.gradient_checkpointing=1.5",), "train.gradient_checkpointing: Input should be less than or equal to 1"),
        (("--efficiency", 40), "--efficiency 40 must be above 0 and at most 1"),
        (("--peak", 0), "--peak 0 must be above 0"),
        (("--gpu-memory", "nan"), "--gpu-memory nan must be above 0"),
        (("--generate", 8, "sample.solver=dormand_prince"), "is not known beforehand; plan with euler"),
        (("--dtype", "float32"), "--dtype float32 goes with --generate"),
        (("--generate", 8, "--gpus", 2, "--shard", "full"), "--shard full is for training"),
        (("--generate", 8, "--dtype", "float32"), "give its float32 peak with --peak"),
        (("train.master_weights=true",), "train.master_weights=true goes with train.weights=bfloat16"),
        (("train.moments=bfloat16",), "train.moments=bfloat16 goes with train.weights=bfloat16"),
        (("--shard", "full"), "say how many with --gpus"),
        (("--model", "nowhere"), "--model nowhere does not exist"),
        (("--model", "nowhere", "--preset", "small"), "give --preset small or --model nowhere, not both"),
    ],
)
def test_bad_input_is_one_line_with_the_way_out(run, arguments, message):
    answer = run(*arguments)
    assert answer.exit_code == 2
    assert answer.stderr.startswith("error: ") and message in answer.stderr and len(answer.stderr.splitlines()) == 1
    assert not answer.stdout


def test_a_folder_that_is_no_sd3_model_is_refused(run, tmp_path, tiny_folder):
    assert "config.json is missing" in run("--model", tmp_path).stderr
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert "it is not an SD3 transformer's" in run("--model", tmp_path).stderr
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in run("--model", tmp_path).stderr
    broken = shutil.copytree(tiny_folder, tmp_path / "broken")
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    assert "its copy is not complete" in run("--model", broken).stderr
    single = tmp_path / "sd3.safetensors"
    single.write_bytes(b"")
    assert "convert it to a folder first" in run("--model", single).stderr


def test_it_needs_no_torch_and_is_quick():
    script = "import sys; from latentfm.cli.main import app; app(['plan', '--json'], standalone_mode=False)"
    script += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"]["pipeline"] == "sd3-medium"


def test_a_runs_configuration_is_planned_as_it_stands(in_json):
    from latentfm.config import load_config

    configs = Path(__file__).resolve().parents[2] / "configs"
    found = in_json("--config", configs / "sd35-large-lora.yaml", "--preset", "sd3.5-large", "--gpu", "4090")
    run = load_config(configs / "sd35-large-lora.yaml", ["data.folder=-"])
    assert "lora of rank" in found["run"]["trains"] and found["memory"]["fits"]
    assert found["time"]["hours"] == pytest.approx(run.train.steps * run.train.batch_size / found["time"]["images a second"] / 3600)
    assert in_json("--config", configs / "quickstart.yaml")["tokens"]["text"] == bundled_tokens()[1]  # as the run has it


def test_the_help_teaches(run):
    text = run("--help").stdout
    assert all(name in text for name in (*PRESETS, *GPUS)) and "latentfm plan --preset sd3-medium" in text
