"""`latentfm generate` on a tiny stock pipeline: pictures that depend on nothing but their settings, and one clear line for bad input."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import latentfm
from latentfm import series as series_module
from latentfm.cli import generate as generate_module
from latentfm.cli.checks import check_size, parse_size
from latentfm.drawing import fingerprint, slug, versions
from latentfm.errors import InputError
from latentfm.models.compiled import FOLDER
from latentfm.models.mmdit import MMDiT
from latentfm.pictures import read_settings

ROOT = Path(latentfm.__file__).resolve().parent.parent


@pytest.fixture
def draw(run, tiny_folder):
    """A function that runs `latentfm generate` on the tiny model, three steps on the CPU, and returns the paths printed."""

    def paths(*args):
        result = run("generate", "--model", tiny_folder, "--steps", 3, "--device", "cpu", *args)
        assert result.exit_code == 0, result.output
        return [Path(line) for line in result.stdout.splitlines()]

    return paths


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def refused(result, *words, code=2):
    """Asserts one line on stderr, with `words` in it, the exit code, and nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0]


def test_the_batch_changes_no_picture(draw):
    prompts = ["a red apple", "a blue car, flat style"]
    ones = draw(*prompts, "-n", 3, "--seed", 11, "--no-grid", "--batch", 1, "--out", "ones")
    fours = draw(*prompts, "-n", 3, "--seed", 11, "--no-grid", "--batch", 4, "--out", "fours")
    assert [path.name for path in ones] == [f"{11 + i}-{'a-red-apple' if i < 3 else 'a-blue-car-flat-style'}.png" for i in range(6)]
    assert [path.name for path in fours] == [path.name for path in ones]
    for one, four in zip(ones, fours, strict=True):
        assert abs(pixels(one) - pixels(four)).max() <= 1
    assert min(abs(pixels(a) - pixels(b)).max() for a, b in itertools.pairwise(ones)) > 10


def test_compiled_blocks_draw_the_same_picture(draw, monkeypatch):
    monkeypatch.setenv(FOLDER, "")  # so that what the network sets is taken back
    monkeypatch.setattr(MMDiT, "compile_repeated_blocks", partialmethod(MMDiT.compile_repeated_blocks, backend="aot_eager"))
    plain = draw("a cat", "--seed", 3)[0]
    compiled = draw("a cat", "--seed", 3, "--compile", "--out", "compiled")[0]
    again, not_again = draw("--like", compiled, "--out", "again")[0], draw("--like", compiled, "--no-compile", "--out", "not")[0]
    torch.compiler.reset()
    assert abs(pixels(plain) - pixels(compiled)).max() <= 1
    assert read_settings(compiled) == read_settings(plain) | {"compile": True} == read_settings(again)
    assert read_settings(not_again) == read_settings(plain)


def test_a_missing_compiler_is_told(run, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    result = run("generate", "a cat", "--model", tiny_folder, "--seed", 1, "--device", "cpu", "--compile")
    refused(result, "torch.compile needs a C++ compiler here: g++")


def test_a_picture_can_be_made_again_from_its_own_settings(draw, tiny_folder):
    path = draw("a cat", "the moon", "-n", 2, "--seed", 5, "--guidance", 4.5, "--negative", "a dog", "--size", "24x40")[2]
    settings = read_settings(path)
    assert settings == {
        "prompt": "the moon", "negative_prompt": "a dog", "seed": 7, "steps": 3, "guidance": 4.5, "width": 24, "height": 40,
        "model": str(tiny_folder), "model_fingerprint": fingerprint(tiny_folder), "device": "cpu", "dtype": "float32",
        "attention": "auto",
        **versions(),
    }  # fmt: skip
    again = draw(
        settings["prompt"], "--seed", settings["seed"], "--guidance", settings["guidance"], "--negative", settings["negative_prompt"],
        "--size", f"{settings['width']}x{settings['height']}", "--out", "again",
    )  # fmt: skip
    assert len(again) == 1
    assert abs(pixels(again[0]) - pixels(path)).max() <= 1


def test_solver_schedule_and_rule_reach_the_pipeline_by_name(draw, tiny_folder):
    import torch

    options = ("--solver", "heun", "--schedule", "karras", "--shift", 2, "--guidance-rule", "apg", "--guidance-interval", 0.1, 0.9)
    path = draw("a cat", "--seed", 3, *options, "--guidance-rescale", 0.5, "--zero-init", 1)[0]
    pipe = latentfm.LatentFMPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a cat", num_inference_steps=3, guidance_scale=3.0, generator=torch.Generator().manual_seed(3), solver="heun", schedule="karras",
        shift=2.0, guidance="apg", guidance_interval=(0.1, 0.9), guidance_rescale=0.5, zero_init=1,
    ).images[0]  # fmt: skip
    assert abs(pixels(path) - np.asarray(expected).astype(int)).max() <= 1
    settings = {
        "guidance": 3.0, "solver": "heun", "schedule": "karras", "shift": 2.0, "guidance_rule": "apg", "guidance_interval": [0.1, 0.9],
        "guidance_rescale": 0.5, "zero_init": 1,
    }  # fmt: skip
    assert settings.items() <= read_settings(path).items()
    assert abs(pixels(path) - pixels(draw("a cat", "--seed", 3, "--out", "plain")[0])).max() > 5


def test_a_weaker_model_guides(draw, run, tiny_folder):
    path = draw("a cat", "--seed", 3, "--guidance-rule", "autoguidance", "--reference", tiny_folder)[0]
    assert abs(pixels(path) - pixels(draw("a cat", "--seed", 3, "--guidance", 1, "--out", "plain")[0])).max() <= 1  # by itself: not at all
    assert read_settings(path)["reference"] == str(tiny_folder)
    refused(run("generate", "a cat", "--guidance-rule", "autoguidance"), "--reference")
    refused(run("generate", "a cat", "--guidance-rule", "autoguidance", "--reference", "nowhere"), "--reference nowhere does not exist")
    rule = ("--guidance-rule", "autoguidance", "--reference")
    refused(run("generate", "a cat", *rule, tiny_folder), f"--reference {tiny_folder}: reference is of another model: its in_channels is 4")
    refused(run("generate", "a cat", "--shift", 2), "needs a schedule of its own")


@pytest.mark.parametrize(
    ("part", "says"), [("transformer", "transformer"), ("vae", "vae"), ("encoders", "text encoder, and prompts are read by one")]
)
def test_a_model_without_a_part_is_refused(run, tiny_folder, tmp_path, part, says):
    absent = [part] if part != "encoders" else [f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    latentfm.LatentFMPipeline.from_pretrained(tiny_folder, **dict.fromkeys(absent)).save_pretrained(tmp_path / "part")
    refused(run("generate", "a cat", "--model", tmp_path / "part"), f"has no {says}: pictures are drawn with a whole model")


def test_every_option_reaches_the_pipeline(draw, tiny_folder):
    import torch

    path = draw("a cat", "--seed", 3, "--guidance", 6, "--negative", "a dog", "--size", "24x40", "--dtype", "float32", "--device", "cpu")[0]
    pipe = latentfm.LatentFMPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a cat", negative_prompt="a dog", height=40, width=24, num_inference_steps=3, guidance_scale=6.0,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    assert Image.open(path).size == (24, 40)
    assert abs(pixels(path) - np.asarray(expected).astype(int)).max() <= 1


@pytest.mark.parametrize("change", [("--steps", 5), ("--guidance", 8), ("--negative", "a dog"), ("--seed", 4), ("--dtype", "bfloat16")])
def test_every_option_changes_the_picture(draw, change):
    before, after = (draw("a cat", "--seed", 3, *extra)[0] for extra in ((), change))
    assert (pixels(before) != pixels(after)).any()
    differing = {key for key, value in read_settings(before).items() if read_settings(after)[key] != value}
    assert differing == {change[0].removeprefix("--").replace("negative", "negative_prompt")}


def test_loras_are_merged_into_the_network(run, draw, tiny_folder, tmp_path):
    import torch
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    for number, name in enumerate(("first", "second")):
        stock = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
        torch.manual_seed(number)
        stock.transformer.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False))
        stock.save_lora_weights(tmp_path / name, transformer_lora_layers=get_peft_model_state_dict(stock.transformer))
    base = draw("a cat", "--seed", 3)[0]
    path = draw("a cat", "--seed", 3, "--lora", "first", "--lora", "second/pytorch_lora_weights.safetensors")[0]
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    for name in ("first", "second"):
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    pipe.set_adapters(["first", "second"])
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 32, "width": 32, "max_sequence_length": 256}
    expected = pipe("a cat", generator=torch.Generator().manual_seed(3), **settings).images[0]
    assert abs(pixels(path) - np.asarray(expected).astype(int)).max() <= 1 < abs(pixels(path) - pixels(base)).max()
    assert read_settings(path)["lora"] == ["first", "second/pytorch_lora_weights.safetensors"]
    (tmp_path / "third").mkdir()
    refused(run("generate", "a cat", "--model", tiny_folder, "--seed", 1, "--lora", "third"), "third")


def test_the_attention_asked_for_computes_the_picture(run, draw, tiny_folder):
    auto, math = (draw("a cat", "--seed", 3, "--attention", name)[0] for name in ("auto", "math"))
    assert abs(pixels(auto) - pixels(math)).max() <= 1 and read_settings(math)["attention"] == "math"
    refused(run("generate", "a cat", "--model", tiny_folder, "--attention", "cudnn", "--device", "cpu"), "cudnn", "cpu", "auto")


def test_the_names_of_attention_are_the_networks():
    from latentfm.models.backends import BACKENDS

    assert tuple(BACKENDS) == generate_module.ATTENTION


def test_a_random_seed_is_printed_and_used(run, tiny_folder):
    results = [run("generate", "a cat", "--model", tiny_folder, "--steps", 1) for _ in range(2)]
    seeds = [int(result.stderr.split()[1]) for result in results]
    assert seeds[0] != seeds[1]
    assert [result.stderr for result in results] == [f"seed {seed} (to repeat: --seed {seed})\n" for seed in seeds]
    assert [read_settings(result.stdout.strip())["seed"] for result in results] == seeds


def test_the_empty_prompt_is_a_prompt(draw):
    path, cat = draw("", "a cat", "--seed", 3, "--no-grid")
    assert path.name == "3-empty-prompt.png" and read_settings(path)["prompt"] == ""
    assert (pixels(path) != pixels(draw("a cat", "--seed", 3)[0])).any()
    assert read_settings(cat)["seed"] == 4


def test_prompts_from_a_file_come_after_those_on_the_line(draw):
    Path("prompts.txt").write_bytes("\ufeffa cat\r\n\r\n   \n  ein Bär  \n".encode())
    paths = draw("first", "--prompts-file", "prompts.txt", "--seed", 0, "--no-grid")
    assert [read_settings(path)["prompt"] for path in paths] == ["first", "a cat", "ein Bär"]
    assert paths[2].name == "2-ein-bär.png"


def test_the_contact_sheet_is_printed_last_and_lists_its_pictures(draw):
    paths = draw("a cat", "a dog", "-n", 2, "--seed", 1)
    assert [path.name for path in paths] == ["1-a-cat.png", "2-a-cat.png", "3-a-dog.png", "4-a-dog.png", "grid-1.png"]
    assert [picture["file"] for picture in read_settings(paths[-1])["pictures"]] == [path.name for path in paths[:-1]]
    sheet = pixels(paths[-1])
    for index, path in enumerate(paths[:-1]):  # two columns, a row for each prompt; pictures of 32 pixels six times as large
        left, top = 8 + index % 2 * 200, 8 + index // 2 * (sheet.shape[0] - 8) // 2
        assert (sheet[top : top + 192 : 6, left : left + 192 : 6] == pixels(path)).all()
    assert len(draw("a cat", "--seed", 1, "--grid", "--out", "single")) == 1
    assert len(draw("a cat", "-n", 2, "--no-grid", "--out", "none")) == 2


def test_nothing_is_overwritten(draw):
    first = draw("a cat", "--seed", 1)[0]
    content = first.read_bytes()
    assert draw("a cat", "--seed", 1, "--guidance", 9) == [Path("outputs/1-a-cat-2.png")]
    assert first.read_bytes() == content


def test_what_the_encoders_cut_off_is_said(run, tiny_folder):
    result = run("generate", "a cat " * 40, "--model", tiny_folder, "--steps", 1, "--seed", 1, "--guidance", 1, "--negative", "a dog")
    assert result.exit_code == 0 and result.stdout == f"outputs/1-{slug('a cat ' * 40)}.png\n"
    lines = result.stderr.splitlines()
    assert len(lines) >= 2 and all(line.startswith("note: ") for line in lines)
    assert "longer than" in lines[0] and "--negative does nothing at --guidance 1;" in lines[-1]


EARLY = [
    ((), ["no prompt", "--prompts-file"]),
    (("cat", "-n", "0"), ["--number 0", "at least 1"]),
    (("cat", "--steps", "0"), ["--steps 0"]),
    (("cat", "--steps", "-3"), ["--steps -3"]),
    (("cat", "--batch", "0"), ["--batch 0"]),
    (("cat", "--steps", "many"), ["--steps", "whole numbers"]),
    (("cat", "--stps", "3"), ["--stps", "--steps"]),
    (("cat", "--guidance", "nan"), ["--guidance nan"]),
    (("cat", "--guidance", "inf"), ["--guidance inf"]),
    (("cat", "--guidance=-1"), ["--guidance -1", "from 0 to 1000"]),
    (("cat", "--guidance", "1e39"), ["--guidance 1e+39"]),
    (("cat", "--seed=-1"), ["--seed -1 is out of range"]),
    (("cat", "--seed", str(2**63)), ["is out of range"]),
    (("cat", "-n", "2", "--seed", str(2**63 - 1)), ["is out of range", str(2**63 - 2)]),
    (("cat", "--size", "large"), ["--size 'large'", "WIDTHxHEIGHT"]),
    (("cat", "--size=-8x8"), ["--size '-8x8'"]),
    (("cat", "--prompts-file", "missing.txt"), ["missing.txt", "No such file"]),
    (("cat", "--prompts-file", "blank.txt"), ["blank.txt has no prompt"]),
    (("cat", "--prompts-file", "latin.txt"), ["latin.txt is not UTF-8"]),
    (("cat", "--out", "blank.txt"), ["blank.txt is a file"]),
    (("cat", "--out", "blank.txt/below"), ["blank.txt is a file"]),
    (("cat", "--device", "cuad"), ["'cuad'", "did you mean 'cuda'"]),
    (("cat", "--dtype", "bfloat"), ["'bfloat'", "did you mean 'bfloat16'"]),
    (("cat", "--attention", "flesh"), ["'flesh'", "did you mean 'flash'"]),
    (("cat", "--model", "missing"), ["missing does not exist"]),
    (("cat", "--lora", "missing"), ["--lora missing does not exist"]),
    (("cat", "--model", "blank.txt"), ["blank.txt is a file"]),
    (("cat", "--model", "run"), ["did you mean run/step-2?"]),
    (("b\udce4r",), ["not valid UTF-8"]),
]


@pytest.mark.parametrize(("args", "words"), EARLY, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_bad_input_is_refused_before_anything_is_loaded(run, tiny_folder, monkeypatch, args, words):
    monkeypatch.setattr(generate_module, "quiet_libraries", lambda: pytest.fail("the libraries were loaded"))
    Path("blank.txt").write_text("\n  \n")
    Path("latin.txt").write_bytes("ein Bär".encode("latin-1"))
    for step in (1, 2):
        Path(f"run/step-{step}").mkdir(parents=True)
        Path(f"run/step-{step}/model_index.json").write_text("{}")
    before = sorted(Path().rglob("*"))
    refused(run("generate", *(() if "--model" in args else ("--model", tiny_folder)), *args), *words)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--size", "36"), ["36x36", "multiples of 8", "32x32 and 40x40"]),
        (("--size", "32x37"), ["32x32 and 32x40"]),
        (("--size", "128x64"), ["up to 64", "the nearest is 64x64"]),
        (("--size", "0"), ["the nearest is 8x8"]),
        (("--device", "cuda:99"), ["--device cuda:99"]),
    ],
)
def test_what_the_model_cannot_do_is_refused(run, tiny_folder, args, words):
    refused(run("generate", "a cat", "--model", tiny_folder, "--steps", 3, "--seed", 1, *args), *words)
    assert not Path("outputs").exists()


def test_folders_that_are_no_model_are_refused(run, tiny_folder):
    Path("empty").mkdir()
    refused(run("generate", "a cat", "--model", "empty"), "empty", "model_index.json")
    shutil.copytree(tiny_folder, "damaged")
    weights = next(Path("damaged/vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(run("generate", "a cat", "--model", "damaged"), "damaged/vae/diffusion_pytorch_model.safetensors is cut short")
    assert not Path("outputs").exists()


def test_latents_that_are_no_numbers_make_no_picture(run, tiny_folder):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_folder, "broken")
    file = next(Path("broken/transformer").glob("*.safetensors"))
    weights = load_file(file)
    weights["proj_out.bias"].fill_(3e38)  # finite, and no longer so once guidance has multiplied it
    save_file(weights, file)
    broken = ("generate", "a cat", "--model", "broken", "--steps", 2, "--seed", 1, "--device", "cpu")
    refused(run(*broken), "not finite numbers in float32", "--guidance", code=1)
    refused(run(*broken, "--dtype", "bfloat16"), "use --dtype float32", code=1)
    weights["proj_out.bias"][3] = float("nan")
    save_file(weights, file)
    refused(run(*broken), "weights of the transformer are damaged: 1 of the 16 numbers of proj_out.bias", str(file))
    assert not Path("outputs").exists()


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2", "text_encoder_3"])
def test_a_part_with_weights_that_are_no_numbers_is_named(run, tiny_folder, part):
    shutil.copytree(tiny_folder, "broken")
    (file,) = Path("broken", part).glob("*.safetensors")
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = b"\xff" * (len(content) - start)
    file.write_bytes(content)
    refused(run("generate", "a cat", "--model", "broken", "--steps", 1), f"weights of the {part} are damaged", str(file), "NaN")
    assert not Path("outputs").exists()


def test_sizes():
    assert parse_size("512x768") == (512, 768) == parse_size(" 512 X 768 ")
    assert parse_size("64") == (64, 64)
    for text in ("", "x", "64x", "64x64x64", "6.4", "1e3"):
        with pytest.raises(InputError):
            parse_size(text)
    check_size(8, 64, 8, 64)
    with pytest.raises(InputError, match=r"the nearest are 48x48 and 48x64$"):
        check_size(48, 50, 16, 64)


def test_ctrl_c_keeps_what_is_finished(run, tiny_folder, monkeypatch):
    real, calls = series_module.draw, []

    def draw_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(series_module, "draw", draw_once)
    result = run("generate", "a cat", "-n", 3, "--batch", 1, "--model", tiny_folder, "--steps", 1, "--seed", 1)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "outputs/1-a-cat.png\n", "interrupted\n")
    assert [path.name for path in Path("outputs").iterdir()] == ["1-a-cat.png"]


def test_a_full_disk_is_one_line_and_keeps_what_is_finished(run, tiny_folder, monkeypatch):
    real, calls = os.fsync, []

    def full_after_one(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_one)
    result = run("generate", "a cat", "-n", 3, "--model", tiny_folder, "--steps", 1, "--seed", 1)
    assert (result.exit_code, result.stdout) == (1, "outputs/1-a-cat.png\n")
    assert result.stderr == "error: cannot write a picture into outputs: No space left on device; the finished ones are kept\n"
    assert [path.name for path in Path("outputs").iterdir()] == ["1-a-cat.png"]


def test_debugging_shows_the_exception(run, monkeypatch):
    monkeypatch.setenv("LATENTFM_DEBUG", "1")
    assert isinstance(run("generate").exception, InputError)


def test_names_of_files():
    assert slug("A red Apple,  on/a\\plate!") == "a-red-apple-on-a-plate"
    assert slug("../..") == slug("🐻") == "picture"
    assert slug(" ") == "empty-prompt"
    assert len(slug("熊 " * 200).encode()) <= 80 and set(slug("熊 " * 200)) == {"熊", "-"}


def test_the_fingerprint_is_of_the_weights_not_of_the_folder(tmp_path):
    weights = np.random.default_rng(0).integers(0, 256, 2**20, dtype=np.uint8)

    def model(name, scale=1):
        (tmp_path / name / "transformer").mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": "X", "transformer": ["a", "B"]}))
        (tmp_path / name / "transformer" / "model.safetensors").write_bytes((weights * scale).tobytes())
        return tmp_path / name

    first = fingerprint(model("first"))
    assert len(first) == 12 and int(first, 16) >= 0
    assert fingerprint(model("copy")) == first
    assert fingerprint(model("retrained", scale=3)) != first
    (tmp_path / "first" / "outputs").mkdir()
    (tmp_path / "first" / "outputs" / "picture.png").write_bytes(b"beside the model")
    assert fingerprint(tmp_path / "first") == first
    (tmp_path / "first" / "transformer" / "config.json").write_text("{}")
    assert fingerprint(tmp_path / "first") != first


def shell(*args):
    """Runs python with `args` as a user would, outside this process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=environment, check=False)


def test_the_output_holds_nothing_but_ours(tiny_folder, tmp_path):
    done = shell("-m", "latentfm.cli.main", "generate", "a cat", "--model", tiny_folder, "--steps", 2, "--seed", 1, "--out", tmp_path / "o")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}/o/1-a-cat.png\n", "")


def test_the_command_line_starts_without_the_heavy_libraries():
    done = shell("-c", "import sys, latentfm.cli.main; print(*sys.modules)")
    loaded = set(done.stdout.split())
    assert "latentfm.cli.generate" in loaded, done.stderr
    assert not loaded & {"torch", "diffusers", "transformers", "numpy", "PIL", "pydantic", "yaml", "accelerate"}


def test_help_and_version(run):
    assert run("--version").stdout == f"latentfm {latentfm.__version__}\n"
    for args in ((), ("--help",), ("-h",)):
        result = run(*args)
        assert result.exit_code == 0 and "generate" in result.stdout and "train" in result.stdout
    assert 'latentfm generate "a red apple"' in run("generate", "--help").stdout
    refused(run("generat"), "generat", "Did you mean 'generate'")
    refused(run("--verbse"), "--verbse")


# What was drawn is kept, whatever becomes of the rest


def failing(monkeypatch, prompt, error):
    """Has the pipeline fail in any batch that holds `prompt`, with `error`, or with latents that are no numbers where that is None."""
    import torch

    from latentfm.pipelines.text_to_image import LatentFMPipeline

    real = LatentFMPipeline.__call__

    def call(self, **given):
        if prompt not in given["prompt"]:
            return real(self, **given)
        if error is not None:
            raise error
        row, after = given["prompt"].index(prompt), given["callback_on_step_end"]

        def spoil(pipe, step, timestep, tensors):
            tensors["latents"][row] = float("nan")
            return after(pipe, step, timestep, tensors) | {"latents": tensors["latents"]}

        return real(self, **given | {"callback_on_step_end": spoil})

    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    monkeypatch.setattr(LatentFMPipeline, "__call__", call)


def errors():
    import torch

    return [
        None, torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(), InputError("the VAE's picture is no numbers"),
    ]  # fmt: skip


@pytest.mark.parametrize("error", errors(), ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("batch", [1, 16])
def test_one_of_many_that_fails_costs_itself_alone(run, tiny_folder, monkeypatch, error, batch):
    more = ("--model", tiny_folder, "--steps", 2, "--device", "cpu")
    alone = run("generate", "the moon", "--seed", 3, "--out", "alone", *more).stdout.strip()
    failing(monkeypatch, "a dog", error)
    result = run("generate", "a cat", "a dog", "the moon", "--seed", 1, "--batch", batch, *more)
    assert result.exit_code == 1
    assert result.stdout.split() == ["outputs/1-a-cat.png", "outputs/3-the-moon.png", "outputs/grid-1.png"]
    told = result.stderr.splitlines()
    assert len(told) == 2 and told[0].startswith("not drawn: seed 2, 'a dog': ")
    assert told[1].startswith("error: 1 of 3 pictures could not be drawn, 2 are saved; ")
    assert [picture["seed"] for picture in read_settings("outputs/grid-1.png")["pictures"]] == [1, 3]
    assert abs(pixels("outputs/3-the-moon.png") - pixels(alone)).max() <= 1


def test_where_nothing_can_be_drawn_it_is_given_up(run, tiny_folder, monkeypatch):
    failing(monkeypatch, "a dog", MemoryError())
    result = run("generate", "a dog", "-n", 100, "--model", tiny_folder, "--steps", 1, "--seed", 1, "--batch", 4, "--device", "cpu")
    assert result.exit_code == 1 and result.stdout == "" and not Path("outputs").exists()
    assert result.stderr.splitlines()[-1].startswith("error: 16 of 100 pictures could not be drawn, 0 are saved; out of memory")


def test_another_error_is_no_lack_of_memory(run, tiny_folder, monkeypatch):
    failing(monkeypatch, "a dog", RuntimeError("a kernel died"))
    assert "a kernel died" in str(run("generate", "a dog", "--model", tiny_folder, "--steps", 1, "--device", "cpu").exception)


def test_ctrl_c_while_pictures_are_saved_waits_for_them(run, tiny_folder, monkeypatch):
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)
    real, saved = series_module.save, []

    def save(*args):
        saved.append(args)
        if len(saved) == 1:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(series_module, "save", save)
    result = run("generate", "a cat", "-n", 4, "--batch", 2, "--model", tiny_folder, "--steps", 1, "--seed", 1, "--device", "cpu")
    assert (result.exit_code, result.stdout) == (130, "outputs/1-a-cat.png\noutputs/2-a-cat.png\n") and "interrupted" in result.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def started(*args, **settings):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | settings
    command = [sys.executable, "-m", "latentfm", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def test_names_that_stdout_cannot_say_and_readers_that_leave_cost_no_picture(tiny_folder, tmp_path):
    words = ("generate", "a cat", "苹果", "a dog", "--model", tiny_folder, "--steps", 1, "--seed", 7, "--no-grid", "--batch", 1)
    narrow = started(*words, "--out", tmp_path / "narrow", PYTHONIOENCODING="cp1252")
    gone = started(*words, "--out", tmp_path / "gone")
    gone.stdout.close()  # as head does
    said, told = narrow.communicate()
    assert narrow.returncode == 0 and told == b"" and said.splitlines()[1].endswith(rb"8-\u82f9\u679c.png")
    told = gone.stderr.read()
    assert gone.wait() == 0 and told.decode() == f"note: standard output was closed; 3 pictures saved in {tmp_path / 'gone'}\n"
    for folder in ("narrow", "gone"):
        assert {path.name for path in (tmp_path / folder).iterdir()} == {"7-a-cat.png", "8-苹果.png", "9-a-dog.png"}


# What is asked for, and how


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_a_line_of_prompts_ends_where_a_line_ends(tmp_path, mark):
    from latentfm.cli.checks import wanted_prompts

    file = tmp_path / "prompts.txt"
    file.write_bytes(f"a cat{mark}on a mat\r\na dog\rthe moon\n\nthe sun".encode())
    assert wanted_prompts(None, file) == [f"a cat{mark}on a mat", "a dog", "the moon", "the sun"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("cat", "--steps", 10**9), ["--steps 1000000000 is more than 10,000"]),
        (("cat", "-n", 10**9), ["the number of pictures, 1000000000 is more than 1,000,000"]),
        (("cat", "--batch", 10**9), ["--batch 1000000000 is more than"]),
        (("cat", "-n", 5000, "--grid"), ["--grid of pictures, 5000 is more than 1,024"]),
        (("x" * 2_000_000,), ["'xxxxx", "has 2,000,000 characters"]),
        (("cat", "--negative", "x" * 2_000_000), ["--negative 'xxx", "has 2,000,000 characters"]),
        (("--prompts-file", "pipe"), ["--prompts-file pipe is a named pipe"]),
        (("--prompts-file", "."), ["--prompts-file . is a folder"]),
        (("--prompts-file", "~unheard/x.txt"), ["~unheard/x.txt cannot be read: No such file"]),
        (("cat", "--lora", "~unheard"), ["--lora ~unheard does not exist"]),
        (("cat", "--model", "~unheard"), ["--model ~unheard does not exist"]),
        (("cat", "--st\x1b[31m", 3), ["No such option: --st\\x1b[31m"]),
        (("cat", "--out", "esc\x1b[31m/x"), ["--out esc\\x1b[31m/x"]),
        (("cat", "--device", "c\x1b]0;title\x07"), ["'c\\x1b]0;title\\x07'"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_nobody_means_is_refused_early_in_one_harmless_line(run, monkeypatch, args, words):
    monkeypatch.setattr(generate_module, "quiet_libraries", lambda: pytest.fail("the libraries were loaded"))
    os.mkfifo("pipe")
    Path("esc\x1b[31m").write_text("")
    result = run("generate", *args)
    refused(result, *words)
    assert "\x1b" not in result.stderr and len(result.stderr) < 500


def test_a_home_is_a_home_in_every_path(run, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "model").symlink_to(tiny_folder)
    (tmp_path / "home" / "prompts.txt").write_text("a cat")
    result = run("generate", "--prompts-file=~/prompts.txt", "--model=~/model", "--out=~/out", "--steps", 1, "--seed", 1)
    assert result.exit_code == 0 and (tmp_path / "home" / "out" / "1-a-cat.png").is_file()


def test_long_prompts_are_not_echoed(run, tiny_folder):
    Path("prompts.txt").write_text("word " * 20_000)
    result = run("generate", "--prompts-file", "prompts.txt", "--model", tiny_folder, "--steps", 1, "--seed", 1, "--grid", "-n", 2)
    assert result.exit_code == 0 and len(result.stderr) < 2000
