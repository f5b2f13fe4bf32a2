"""`latentfm plan`: what it counts, that its ways out are ways out, and one clear line for bad input."""

import json
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from latentfm.cli.main import app
from latentfm.cli.plan import GIB, GPUS, RESERVE
from latentfm.models.presets import PRESETS


@pytest.fixture
def run(monkeypatch):
    """A function that runs `latentfm plan` with its arguments."""
    monkeypatch.delenv("LATENTFM_DEBUG", raising=False)
    return lambda *args: CliRunner().invoke(app, ["plan", *map(str, args)])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mode", ["full", "lora", "generate"])
def test_every_preset_and_mode_has_a_plan(run, in_json, preset, mode):
    answer = run("--preset", preset, "--mode", mode)
    assert answer.exit_code == 0, answer.output
    for title in ("Parameters", "FLOP an image", "Memory of a GPU", "images/s at 40% of the peak"):
        assert title in answer.stdout
    found = in_json("--preset", preset, "--mode", mode)
    assert found["image tokens"] == (16 if preset == "emoji" else 4096)
    assert found["text tokens"] == (32 if preset == "emoji" else 333)


def test_the_sums_are_right_for_sd3_medium(in_json):
    found = in_json("--preset", "sd3-medium", "--resolution", 1024, "--batch", 64, "--gpus", 8, "--steps", 500, "--pictures", 0)
    assert sum(found["parameters"].values()) == found["trained parameters"] == 2_028_328_000
    assert found["memory"]["weights"] == 4 * 2_028_328_000 and found["memory"]["optimizer"] == 8 * 2_028_328_000
    flops = sum(found["FLOP an image"]["training"].values())
    assert found["time"]["images a second"] == pytest.approx(8 * 0.4 * 989e12 / flops)
    assert found["time"]["hours"] == pytest.approx(500 * 64 / found["time"]["images a second"] / 3600)
    assert found["pictures a GPU at a time"] == 8
    assert found["memory at"][found["fullest at"].split(" of block")[0]] == sum(found["memory"].values())
    assert found["fits"] == (sum(found["memory"].values()) + RESERVE <= 80 * GIB)


def test_a_picture_is_its_steps_twice_where_guided_and_a_decoding(in_json):
    arguments = ("--preset", "sd3.5-large", "--mode", "generate", "--steps", 40, "--batch", 1)
    guided, alone = in_json(*arguments, "--guidance", 4.5), in_json(*arguments, "--guidance", 1)
    once = sum(guided["FLOP an image"]["forward"].values())
    assert guided["FLOP an image"]["picture"]["the network's steps"] == 80 * once
    assert alone["FLOP an image"]["picture"]["the network's steps"] == 40 * once
    assert guided["memory"]["weights"] == 2 * sum(guided["parameters"].values())
    assert guided["memory"]["text encoders and VAE"] == 2 * sum(guided["frozen parameters"].values())


HARD = [
    ("--preset", "sd3-medium", "--gpu", "a100-40", "--batch", 32, "--gpus", 2),
    ("--preset", "sd3.5-medium", "--gpu", "l40s", "--mode", "lora", "--batch", 16),
    ("--preset", "sd3.5-large", "--batch", 64, "--gpus", 8, "--pictures", 0),
    ("--preset", "large", "--gpu", "4090", "--batch", 8),
    ("--preset", "sd3.5-large", "--gpu", "4090", "--mode", "generate", "--batch", 4),
    ("--preset", "sd3-medium", "--gpu", "4090", "--mode", "generate", "--batch", 64),
]


@pytest.mark.parametrize("arguments", HARD)
def test_every_way_out_makes_it_fit(in_json, arguments):
    found = in_json(*arguments)
    assert not found["fits"] and found["ways out"]
    for way in found["ways out"]:
        if "enable_model_cpu_offload" in way:
            continue
        changed = list(arguments)
        for name in way.split():
            if name.startswith("--") and name in changed:
                place = changed.index(name)
                del changed[place : place + 2]
        assert in_json(*changed, *way.split())["fits"], way


def test_the_fraction_of_checkpointing_is_the_smallest_of_tenths_that_fits(in_json):
    arguments = ("--preset", "depth15", "--batch", 16, "--pictures", 0)
    least, most = (sum(in_json(*arguments, "--checkpointing", share)["memory"].values()) for share in (1, 0))
    arguments += ("--gpu-memory", ((least + most) / 2 + RESERVE) / GIB)
    (way,) = [way for way in in_json(*arguments)["ways out"] if way.startswith("--checkpointing")]
    fraction = float(way.split()[1])
    assert in_json(*arguments, "--checkpointing", fraction)["fits"]
    assert not in_json(*arguments, "--checkpointing", round(fraction - 0.1, 1))["fits"]


def test_what_cannot_fit_says_so(run):
    answer = run("--preset", "sd3.5-large", "--gpu-memory", 2)
    assert answer.exit_code == 0 and "does not fit" in answer.stdout and "nothing here makes it fit" in answer.stdout


def test_another_gpu_is_given_by_its_peak_and_memory(in_json):
    found = in_json("--preset", "small", "--peak", 100, "--gpu-memory", 16)
    assert found["GPU"] == {"name": "another", "TFLOP/s": 100, "GiB": 16}
    assert found["time"]["images a second"] == pytest.approx(in_json("--preset", "small")["time"]["images a second"] * 100 / 989)


def test_a_pipeline_folder_is_read(in_json, tiny_folder, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    found = in_json("--model", tiny_folder, "--batch", 2, "--tokens", 24)
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    assert sum(found["parameters"].values()) == pipe.transformer.num_parameters()
    assert found["frozen parameters"]["VAE"] == pipe.vae.num_parameters()
    for name in ("text_encoder", "text_encoder_2"):
        assert found["frozen parameters"][name] == sum(p.numel() for p in getattr(pipe, name).parameters())
    assert (found["width"], found["image tokens"], found["text tokens"]) == (32, 16, 24)
    assert in_json("--model", tiny_folder)["text tokens"] == 16 + 256
    alone = shutil.copytree(tiny_folder / "transformer", tmp_path / "alone")
    assert in_json("--model", alone)["width"] == 64  # among SD3's frozen models


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "sd3-medum"), "--preset 'sd3-medum' does not exist (did you mean 'sd3-medium'?)"),
        (("--gpu", "h10"), "--gpu 'h10' does not exist (did you mean 'h100'?)"),
        (("--mode", "lore"), "--mode 'lore' does not exist (did you mean 'lora'?)"),
        (("--shard", "ful", "--gpus", 8), "did you mean 'full'?"),
        (("--weights", "float16"), "--weights 'float16' does not exist"),
        (("--resolution", "1000"), "--resolution 1000x1000 does not fit this model: multiples of 16 up to 3072"),
        (("--resolution", "4096"), "up to 3072"),
        (("--resolution", "wide"), "--resolution 'wide' is no size"),
        (("--batch", 6, "--gpus", 4), "--batch 6 does not divide by 4 GPUs"),
        (("--batch", 8, "--accumulation", 3), "times --accumulation 3"),
        (("--gpus", 0), "--gpus 0 must be at least 1"),
        (("--tokens", 0), "--tokens 0 must be at least 1"),
        (("--checkpointing", 1.5), "--checkpointing 1.5 must be from 0"),
        (("--efficiency", 40), "--efficiency 40 must be above 0 and at most 1"),
        (("--peak", 0), "--peak 0 must be above 0"),
        (("--gpu-memory", "nan"), "--gpu-memory nan must be above 0"),
        (("--rank", 4), "--rank goes with --mode lora"),
        (("--guidance", 2), "--guidance goes with --mode generate"),
        (("--mode", "generate", "--checkpointing", 0.5), "--checkpointing goes with --mode full or lora"),
        (("--mode", "generate", "--no-ema"), "--no-ema goes with"),
        (("--mode", "generate", "--weights", "float32"), "give the float32 peak with --peak"),
        (("--master-weights",), "--master-weights goes with --weights bfloat16"),
        (("--moments", "bfloat16"), "--moments bfloat16 goes with --weights bfloat16"),
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
    assert json.loads(done.stdout)["model"] == "sd3-medium"


def test_the_help_teaches(run):
    text = run("--help").stdout
    assert all(name in text for name in (*PRESETS, *GPUS)) and "latentfm plan --preset sd3-medium" in text
