"""`latentfm convert`: every direction from the command line, nothing lost or half-written, and one clear line for bad input."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from latentfm.cli.convert import parse_bytes
from latentfm.cli.main import app
from latentfm.errors import InputError
from latentfm.interchange import conversion
from latentfm.interchange.weights import open_weights
from latentfm.words import in_units

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs `latentfm convert` with its arguments in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LATENTFM_DEBUG", raising=False)

    def convert(*args):
        return CliRunner().invoke(app, ["convert", *map(str, args)])

    return convert


@pytest.fixture
def done(run):
    """A function that runs a conversion that must succeed; (its OUT, what it said on stderr)."""

    def convert(*args):
        answer = run(*args)
        assert answer.exit_code == 0, answer.output
        (path,) = answer.stdout.splitlines()
        assert not list(Path(path).parent.glob("*.partial"))
        return Path(path), answer.stderr

    return convert


@pytest.fixture
def refused(run, tmp_path):
    """A function that returns the one line with which a conversion is refused; nothing may have been written."""

    def convert(*args):
        before = snapshot(tmp_path)
        answer = run(*args)
        assert answer.exit_code == 2, answer.output
        lines = [line for line in answer.stderr.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1 and lines[0].startswith("error: ") and not answer.stdout, answer.output
        assert snapshot(tmp_path) == before
        return lines[0]

    return convert


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def same_weights(one: Path, other: Path) -> None:
    """Every safetensors file of `one` is in `other`, bit for bit."""
    files = list(one.rglob("*/*.safetensors"))
    assert files
    for file in files:
        found, expected = load_file(other / file.relative_to(one)), load_file(file)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items()), file


def test_a_folder_to_a_single_file_and_back(done, tiny_folder):
    file, said = done(tiny_folder, "one.safetensors")
    assert file == Path("one.safetensors") and "MM-DiT of 2 layers x 32" in said
    for word in ("text_encoder_3", "80,592", "float32", "322.37 KB", "single file (original naming)", "pipeline/vae"):
        assert word in said
    assert "note: the first CLIP has a projection of its own" in said
    folder, said = done(file, "deep/back", "--pipeline", tiny_folder)
    assert "back/transformer" in said and "note" not in said
    same_weights(tiny_folder, folder)
    from diffusers import StableDiffusion3Pipeline

    assert type(StableDiffusion3Pipeline.from_pretrained(folder).transformer).__name__ == "SD3Transformer2DModel"
    names = {path.relative_to(folder) for path in folder.rglob("*")}
    assert names - {Path("latentfm_manifest.txt")} == {path.relative_to(tiny_folder) for path in tiny_folder.rglob("*")}


def test_the_result_draws(done, tiny_folder):
    file, _ = done(tiny_folder, "one.safetensors", "--with", "transformer")
    folder, said = done(file, "back", "--pipeline", tiny_folder, "--dtype", "bfloat16")
    assert "float32 -> bfloat16" in said
    drawn = CliRunner().invoke(app, ["generate", "a cat", "--model", str(folder), "--steps", "2", "--device", "cpu", "--out", "made"])
    assert drawn.exit_code == 0, drawn.output


def prefixes(file: Path) -> set[str]:
    return {name.split(".")[0] for name in load_file(file)}


def test_parts_of_a_single_file(done, refused, tiny_folder):
    assert prefixes(done(tiny_folder, "a.safetensors", "--with", "transformer,vae")[0]) == {"model", "first_stage_model"}
    assert prefixes(done("a.safetensors", "b.safetensors", "--with", "transformer")[0]) == {"model"}
    more, _ = done("a.safetensors", "c.safetensors", "--with", "transformer,text", "--pipeline", tiny_folder)
    assert prefixes(more) == {"model", "text_encoders"}
    assert "a.safetensors has none; --pipeline names a folder" in refused("a.safetensors", "d.safetensors", "--with", "text")


def test_diffusers_naming_and_a_transformer_folder(done, tiny_folder):
    file, _ = done(tiny_folder, "t.safetensors", "--naming", "diffusers")
    expected = load_file(tiny_folder / "transformer" / WEIGHTS)
    found = load_file(file)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())
    folder, _ = done(file, "t", "--transformer-only", "--max-shard-size", "100KB")
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "SD3Transformer2DModel"
    assert len(list(folder.glob("*-of-*.safetensors"))) > 2
    from diffusers import SD3Transformer2DModel

    state = SD3Transformer2DModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    back, _ = done(folder, "original.safetensors")
    original, _ = done(tiny_folder, "o.safetensors", "--with", "transformer")
    assert load_file(back).keys() == load_file(original).keys()
    with safe_open(back, "pt") as opened:
        assert json.loads(opened.metadata()["latentfm"])["transformer"]["num_attention_heads"] == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype(done, tiny_folder, dtype):
    file, _ = done(tiny_folder, "x.safetensors", "--dtype", dtype)
    expected = load_file(tiny_folder / "transformer" / WEIGHTS)["proj_out.weight"].to(getattr(torch, dtype))
    tensors = load_file(file)
    assert {value.dtype for value in tensors.values()} == {expected.dtype}
    assert torch.equal(tensors["model.diffusion_model.final_layer.linear.weight"], expected)


def test_sample_size(done, tiny_folder, tmp_path):
    save_file(load_file(tiny_folder / "transformer" / WEIGHTS), tmp_path / "bare.safetensors")
    for expected, more in ((128, ()), (8, ("--sample-size", 8))):
        folder, _ = done("bare.safetensors", f"side {expected}", "--transformer-only", *more)
        assert json.loads((folder / "config.json").read_text())["sample_size"] == expected


def test_a_lora_to_peft_and_back(done, refused, tiny_folder, tmp_path):
    module = "transformer_blocks.0.attn.to_q"
    matrices = {f"{module}.lora_A.weight": torch.randn(3, 32), f"{module}.lora_B.weight": torch.randn(32, 3)}
    linear = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    encoder = {f"{linear}.lora_A.weight": torch.randn(3, 16), f"{linear}.lora_B.weight": torch.randn(16, 3)}
    save_file({f"transformer.{name}": value for name, value in matrices.items()}, tmp_path / "lora.safetensors")
    folder, said = done("lora.safetensors", "adapter")
    assert "LoRA of rank 3, alpha 3" in said and "peft adapter folder" in said
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
    file, _ = done(folder, "back.safetensors")
    assert all(torch.equal(load_file(file)[f"transformer.{name}"], value) for name, value in matrices.items())
    assert "is a diffusers LoRA file already; give as OUT a folder" in refused("lora.safetensors", "other.safetensors")
    assert "is a peft adapter folder already; give as OUT a name" in refused("adapter", "other")
    assert "is a LoRA: of the options only" in refused("lora.safetensors", "other", "--pipeline", tiny_folder)
    save_file({f"transformer.{name}": value for name, value in matrices.items()} | encoder, tmp_path / "both.safetensors")
    assert "adapts the text encoders too (2 tensors" in refused("both.safetensors", "other")
    assert done("both.safetensors", "other", "--transformer-only")[0].is_dir()


def test_a_lora_into_another_programs_naming_and_back(done, refused, tmp_path):
    module = "transformer_blocks.0.attn.to_q"
    matrices = {f"transformer.{module}.lora_A.weight": torch.randn(3, 32), f"transformer.{module}.lora_B.weight": torch.randn(32, 3)}
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "lora.safetensors", tmp_path / "folder" / "pytorch_lora_weights.safetensors"):
        save_file(matrices, path, metadata={"trained by": "me", "sshs_model_hash": "1"})
    file, said = done("folder", "kohya.safetensors", "--naming", "kohya", "--dtype", "bfloat16")
    tensors = load_file(file)
    assert {name.partition(".")[0] for name in tensors} == {"lora_unet_joint_blocks_0_x_block_attn_qkv"} and "kohya LoRA file" in said
    assert tensors["lora_unet_joint_blocks_0_x_block_attn_qkv.alpha"].dtype == torch.float32  # a single number is not rounded
    back, _ = done(file, "back.safetensors")
    found = load_file(back)
    assert found.keys() == matrices.keys() and all(torch.equal(found[name], value.bfloat16()) for name, value in matrices.items())
    with safe_open(back, "pt") as opened:
        assert opened.metadata()["trained by"] == "me" and "sshs_model_hash" not in opened.metadata()
    assert "is a kohya LoRA file already; give as OUT a folder for peft, or another" in refused(file, "x.safetensors", "--naming", "kohya")
    assert "--naming 'kohia' does not exist (did you mean 'kohya'?)" in refused("lora.safetensors", "x.safetensors", "--naming", "kohia")
    lokr = {f"lycoris_{module.replace('.', '_')}.{name}": torch.randn(shape) for name, shape in (("lokr_w1", (4, 4)), ("lokr_w2", (8, 8)))}
    save_file(lokr, tmp_path / "lokr.safetensors")
    file, said = done("lokr.safetensors", "x.safetensors")
    assert "it is a LoKr, and is written as the LoRA that computes the same; there is no way back" in said
    up, down = (load_file(file)[f"transformer.{module}.lora_{end}.weight"] for end in "BA")
    assert torch.equal(up @ down, torch.kron(*lokr.values()))
    text = {name: torch.zeros(2, 2) for name in ("lora_te1_text_projection.lora_down.weight", "lora_te1_text_projection.lora_up.weight")}
    save_file(text, tmp_path / "text.safetensors")
    assert "adapts the text encoders alone" in refused("text.safetensors", "y")
    assert "leaves nothing" in refused("text.safetensors", "y", "--transformer-only")
    more = ("--naming", "lycoris")
    assert "adapts text_encoder, and a LyCORIS LoRA file has no place for it" in refused("text.safetensors", "y.safetensors", *more)


def test_a_naming_of_loras_is_none_of_models(refused, tiny_folder):
    assert "--naming 'kohya' does not exist" in refused(tiny_folder, "x.safetensors", "--naming", "kohya")


def test_options_that_cannot_be_meant(refused, tiny_folder):
    assert "--dtype 'float15' does not exist (did you mean 'float16'?)" in refused(tiny_folder, "x", "--dtype", "float15")
    assert "--naming 'diffuser' does not exist (did you mean 'diffusers'?)" in refused(tiny_folder, "x.safetensors", "--naming", "diffuser")
    assert "--with 'vea' does not exist (did you mean 'vae'?)" in refused(tiny_folder, "x.safetensors", "--with", "transformer,vea")
    assert "--with does nothing here: OUT is a folder" in refused(tiny_folder, "x", "--with", "vae")
    assert "--naming does nothing here" in refused(tiny_folder, "x", "--naming", "original")
    assert "--max-shard-size does nothing here" in refused(tiny_folder, "x.safetensors", "--max-shard-size", "1GB")
    assert "--max-shard-size '1 apple' is no size" in refused(tiny_folder, "x", "--max-shard-size", "1 apple")
    more = ("--naming", "diffusers", "--with", "vae")
    assert "--naming diffusers is for a transformer alone" in refused(tiny_folder, "x.safetensors", *more)
    assert "--transformer-only takes nothing" in refused(tiny_folder, "x", "--transformer-only", "--pipeline", tiny_folder)
    assert "--sample-size 0 must be at least 1" in refused(tiny_folder, "x", "--sample-size", "0")


def test_places_that_would_lose_something(refused, done, tiny_folder, tmp_path):
    assert "nowhere does not exist" in refused("nowhere", "x")
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    done("model", "one.safetensors")
    for out in ("model", ".", "model/../model"):
        assert "is, or holds, what is read" in refused("model", out, "--overwrite")
    assert "is, or holds, what is read" in refused("one.safetensors", "model", "--pipeline", "model", "--overwrite")
    assert "lies inside model" in refused("model", "model/inner.safetensors")
    assert "is a file, not a folder" in refused("model", "one.safetensors/x")
    assert "exists; give another name, or --overwrite" in refused("model", "one.safetensors")
    assert "nothing that this command writes" in refused("model", "notes", "--overwrite")
    (tmp_path / "folder.safetensors").mkdir()
    assert "nothing that this command writes" in refused("model", "folder.safetensors", "--overwrite")
    done("one.safetensors", "back", "--pipeline", "model")
    stale = tmp_path / "back" / "stale"
    stale.write_text("x")
    done("one.safetensors", "back", "--pipeline", "model", "--overwrite")
    assert not stale.exists() and (tmp_path / "back" / "model_index.json").exists()
    done("model", "one.safetensors", "--overwrite", "--dtype", "float16")
    assert {value.dtype for value in load_file("one.safetensors").values()} == {torch.float16}


def test_what_is_wrong_with_the_source_is_said(refused, done, tiny_folder, tmp_path):
    file, _ = done(tiny_folder, "one.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-5000])
    assert "one.safetensors is cut short: 5,000 bytes of" in refused(file, "x")
    file.write_bytes(whole)
    assert "has a text_encoder with a vocabulary of its own" in refused(file, "x")
    only, _ = done(tiny_folder, "only.safetensors", "--with", "transformer")
    assert "only.safetensors has no vae; give a pipeline folder" in refused(only, "x")
    assert "is a transformer folder; give a pipeline folder" in refused(only, "x", "--pipeline", tiny_folder / "transformer")
    flux = ("double_blocks.0.img_attn.norm.key_norm.scale", "single_blocks.0.linear1.weight")
    save_file({name: torch.zeros(1) for name in flux}, "flux.safetensors")
    assert "looks like a Flux transformer" in refused("flux.safetensors", "x")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert "is a pickle" in refused("model.ckpt", "x")
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html></html>")
    assert "no safetensors file" in refused("page.safetensors", "x")
    linked = shutil.copytree(tiny_folder, tmp_path / "linked")
    (linked / "tokenizer" / "notes.txt").symlink_to(tmp_path / "model.ckpt")  # which would be copied
    assert "notes.txt is a link out of the model's folder" in refused("linked", "x")
    sharded, _ = done(tiny_folder, "sharded", "--transformer-only", "--max-shard-size", "100KB")
    next(sharded.glob("*-00002-of-*")).unlink()
    assert "lacks diffusion_pytorch_model-00002-of-" in refused(sharded, "x.safetensors")


def test_too_little_space_is_said_before_anything_is_written(refused, tiny_folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 875_000, 875_000))
    assert "takes 875.34 KB, and" in refused(tiny_folder, "x.safetensors") and "875.00 KB free" in refused(tiny_folder, "x")


@pytest.mark.parametrize("out", ["x.safetensors", "x"])
def test_a_write_that_fails_leaves_nothing(run, tiny_folder, tmp_path, out):
    """The system itself refuses to let a file grow beyond 100 kB, as a full disk would."""
    resource = pytest.importorskip("resource")  # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        answer = run(tiny_folder, f"out/{out}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert answer.exit_code == 1 and not answer.stdout
    assert answer.stderr.splitlines()[-1].startswith(f"error: could not write out/{out}: File too large")
    assert not list((tmp_path / "out").iterdir())


def test_sizes_in_words():
    assert [parse_bytes(text) for text in ("10GB", "1.5 mb", "700")] == [10**10, 1_500_000, 700]
    for text in ("", "GB", "-1GB", "0MB", "1TB"):
        with pytest.raises(InputError):
            parse_bytes(text)
    assert [in_units(size) for size in (5, 1234, 4_340_000_000)] == ["5 bytes", "1.23 KB", "4.34 GB"]


def test_help_teaches(run):
    said = " ".join(run("--help").output.split())
    for words in ("OUT decides", "--pipeline", "--transformer-only", "convert sd3.5_medium.safetensors", "diffusers' LoRA to peft"):
        assert words in said


def test_the_source_may_be_read_only(done, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    before = snapshot(tmp_path / "model")
    done("model", "one.safetensors")
    done("one.safetensors", "back", "--pipeline", "model")
    assert snapshot(tmp_path / "model") == before
    assert open_weights("back").kind == "pipeline folder"
