"""What a run leaves: stock pipeline folders with an adapter merged, the adapter as diffusers' file, and components that are linked."""

import json
import os
import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from faults import files_no_larger_than
from safetensors import safe_open
from safetensors.torch import load_file

from latentfm import LatentFMPipeline
from latentfm.config import ModelOptions, RunConfig
from latentfm.errors import InputError
from latentfm.interchange.lora.files import open_adapter
from latentfm.interchange.tensors import Held
from latentfm.models.folder import INFO_FILE
from latentfm.models.linears import parse_blocks
from latentfm.models.manifest import MANIFEST
from latentfm.models.text import NULL_FILE
from latentfm.training.adapters import cast_weights, choose_trainable
from latentfm.training.checkpoint import export
from latentfm.training.checkpoint.export import own_weights, write_adapter
from latentfm.training.models import load_models

FILE = "pytorch_lora_weights.safetensors"
# rank and alpha apart, so that a lost alpha shows
ADAPTERS = {
    "lora": {"rank": 4, "alpha": 6},
    "dora": {"kind": "dora", "rank": 2, "alpha": 3.5},
    "lora everywhere on nf4": {"rank": 3, "targets": "all_linear", "base": "nf4"},
    "lora on int8": {"rank": 3, "targets": ["ff.net.2", "to_q"], "base": "int8"},
    "dora on bfloat16": {"kind": "dora", "rank": 2, "targets": "modulation"},
}


def trained(folder, out, adapter=None, blocks=None, weights="float32", dtype="float32"):
    """(models, config, averages) of a run: what trains is away from its start, and its averages are elsewhere again."""
    config = RunConfig.model_validate({
        "data": {"folder": "unused"}, "output": {"folder": str(out), "dtype": dtype},
        "train": {"adapter": adapter, "blocks": blocks, "weights": weights, "mixed_precision": "no"},
    })  # fmt: skip
    models = load_models(ModelOptions(pipeline=str(folder)))
    said = choose_trainable(models.network, config.train)
    generator = torch.Generator().manual_seed(0)
    averages = {}
    with torch.no_grad():
        for name in said.names:
            parameter = models.network.get_parameter(name)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            averages[name] = parameter + 0.05 * torch.randn(parameter.shape, generator=generator)
    cast_weights(models.network, config.train)
    return models, config, averages


def write_pipeline(target, models, network, averages, config, lengths, link=False):
    held = {name: Held.of(value) for name, value in averages.items()}
    export.write_pipeline(target, models, network, held, config, lengths, link)


def picture(pipe):
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np", "height": 32, "width": 32, "max_sequence_length": 16}
    pipe.set_progress_bar_config(disable=True)
    return torch.from_numpy(pipe("a red apple", generator=torch.Generator().manual_seed(0), **settings).images)


def gap(one, other):
    return float((one - other).abs().max())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_stock_draws_the_same_with_the_merged_folder_and_with_base_and_adapter(tmp_path, tiny_folder, kind):
    weights = "bfloat16" if kind.endswith("bfloat16") else "float32"
    models, config, averages = trained(tiny_folder, tmp_path, ADAPTERS[kind], weights=weights)
    write_pipeline(tmp_path / "model", models, models.network, averages, config, [8])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora", "model"] and sorted(os.listdir(tmp_path / "lora")) == [MANIFEST, FILE]
    merged = picture(StableDiffusion3Pipeline.from_pretrained(tmp_path / "model"))
    base = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    before = picture(base)
    base.load_lora_weights(tmp_path / "lora")
    assert gap(merged, picture(base)) < 1e-4 < 1e-2 < gap(merged, before)
    assert gap(picture(LatentFMPipeline.from_pretrained(tmp_path / "model")), merged) < 1e-4
    info = json.loads((tmp_path / "model" / INFO_FILE).read_text())
    assert info["trained"]["adapter"] == config.train.adapter.model_dump(mode="json") and info["trained"]["t5_lengths"] == [8]


def test_what_is_merged_is_the_averages_into_the_folders_own_weights(tmp_path, tiny_folder):
    """Written out: W + alpha / rank B A on the base's float32 W, though the training held it in 4 bits."""
    models, config, averages = trained(tiny_folder, tmp_path, {"rank": 4, "alpha": 6, "base": "nf4"})
    write_pipeline(tmp_path / "model", models, models.network, averages, config, [8])
    found = load_file(tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    base = load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == base.keys()
    merged = 0
    for name, value in base.items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.default.weight" in averages:
            down, up = (averages[f"{module}.lora_{part}.default.weight"] for part in "AB")
            value, merged = value + 6 / 4 * up @ down, merged + 1
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found[name], value), name
    assert merged == 15


def test_the_adapters_file_says_its_rank_and_any_tool_finds_its_names(tmp_path, tiny_folder):
    models, _, averages = trained(tiny_folder, tmp_path, {"rank": 4, "alpha": 6, "targets": ["attn.to_q", "ff.net.2"]}, blocks="1")
    write_adapter(tmp_path / "one", models.network, averages, torch.float32)
    write_adapter(tmp_path / "half", models.network, {}, torch.float16)
    with safe_open(tmp_path / "one" / FILE, "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        said = json.loads(metadata["lora_adapter_metadata"])
    assert metadata["format"] == "pt"
    assert said["transformer.r"] == 4 and said["transformer.lora_alpha"] == 6
    modules = ["transformer.transformer_blocks.1.attn.to_q", "transformer.transformer_blocks.1.ff.net.2"]
    assert names == {f"{module}.lora_{part}.weight" for module in modules for part in "AB"}
    assert open_adapter(tmp_path / "one" / FILE).configs["transformer"]["r"] == 4  # what latentfm convert reads
    half = load_file(tmp_path / "half" / FILE)  # without averages the network's own
    own = models.network.transformer_blocks[1].attn.to_q.lora_A.default.weight
    assert torch.equal(half[f"{modules[0]}.lora_A.weight"], own.detach().half())


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_frozen_blocks_are_the_base_to_the_bit_and_the_others_the_averages(tmp_path, tiny_folder, weights):
    models, config, averages = trained(tiny_folder, tmp_path, blocks="-1", weights=weights)
    write_pipeline(tmp_path / "model", models, models.network, averages, config, [8])
    found = load_file(tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    base = load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == base.keys() and parse_blocks("-1", 2) == [1]
    for name, value in found.items():
        assert torch.equal(value, averages[name] if name.startswith("transformer_blocks.1.") else base[name]), name
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_result_is_rounded_once_from_float32(tmp_path, tiny_folder, dtype):
    kept = {}
    for name in ("float32", dtype):
        models, config, averages = trained(tiny_folder, tmp_path / name, {"rank": 4}, dtype=name)
        write_pipeline(tmp_path / name / "model", models, models.network, averages, config, [8])
        kept[name] = load_file(tmp_path / name / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, value in kept["float32"].items():
        assert torch.equal(kept[dtype][name], value.to(getattr(torch, dtype)))
    assert SD3Transformer2DModel.from_pretrained(tmp_path / dtype / "model", subfolder="transformer", torch_dtype="auto") is not None


def test_an_adapter_of_another_network_is_refused(tmp_path, tiny_folder):
    models, config, averages = trained(tiny_folder, tmp_path, {"rank": 4})
    models.folder = tmp_path / "base"
    shutil.copytree(tiny_folder, models.folder)
    smaller = {**json.loads((models.folder / "transformer" / "config.json").read_text()), "num_layers": 1}
    SD3Transformer2DModel.from_config(smaller).save_pretrained(models.folder / "transformer")
    with pytest.raises(ValueError, match="does not fit the network in"):
        write_pipeline(tmp_path / "model", models, models.network, averages, config, [8])
    assert not (tmp_path / "model").exists()


def test_linked_components_take_no_space_and_json_is_a_copy(tmp_path, tiny_folder):
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    before = {str(p.relative_to(base)): p.read_bytes() for p in base.rglob("*") if p.is_file()}
    models, config, averages = trained(base, tmp_path, blocks="0")
    write_pipeline(tmp_path / "linked", models, models.network, averages, config, [8], link=True)
    write_pipeline(tmp_path / "copied", models, models.network, averages, config, [8])
    assert {str(p.relative_to(base)): p.read_bytes() for p in base.rglob("*") if p.is_file()} == before
    shared = {str(p.relative_to(tmp_path / "linked")) for p in (tmp_path / "linked").rglob("*") if p.stat().st_nlink > 1 and p.is_file()}
    assert {f"{part}/model.safetensors" for part in ("text_encoder", "text_encoder_2", "text_encoder_3")} <= shared
    assert "vae/diffusion_pytorch_model.safetensors" in shared and not any(n.endswith(".json") or "transformer" in n for n in shared)
    files = [{str(p.relative_to(tmp_path / out)): p.read_bytes() for p in (tmp_path / out).rglob("*") if p.is_file()}
             for out in ("linked", "copied")]  # fmt: skip
    assert files[0] == files[1]
    shutil.rmtree(tmp_path / "linked")  # a rotated checkpoint takes nothing with it
    assert {str(p.relative_to(base)): p.read_bytes() for p in base.rglob("*") if p.is_file()} == before
    assert gap(picture(StableDiffusion3Pipeline.from_pretrained(base)), picture(StableDiffusion3Pipeline.from_pretrained(tiny_folder))) == 0


def test_links_of_a_hubs_cache_are_followed_and_a_refusal_is_a_copy(tmp_path, tiny_folder, monkeypatch):
    blobs, base = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0a1b"
    shutil.copytree(tiny_folder, base)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in base.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    (tmp_path / "base").symlink_to(base)
    models, config, averages = trained(tmp_path / "base", tmp_path, blocks="0")
    write_pipeline(tmp_path / "linked", models, models.network, averages, config, [8], link=True)
    weights = tmp_path / "linked" / "text_encoder_3" / "model.safetensors"
    assert not weights.is_symlink() and weights.stat().st_nlink == 2

    def refused(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    write_pipeline(tmp_path / "copied", models, models.network, averages, config, [8], link=True)
    copied = tmp_path / "copied" / "text_encoder_3" / "model.safetensors"
    assert copied.stat().st_nlink == 1 and copied.read_bytes() == weights.read_bytes()


def names_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_what_a_model_consists_of_is_taken_over(tmp_path, tiny_folder):
    """Not the single files beside it, which hold the untrained network, nor what else lies there; a link within the folder is a file."""
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    for name in ("a.safetensors", "model.ckpt", "a.gguf", "notes.txt", "README.md", ".hidden", "vae/x.bin", "vae/.hidden", "other/a.txt"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"x")
    (base / "vae" / "docs").mkdir()
    (base / "vae" / "docs" / "a.txt").write_text("x")
    (base / "LICENSE.md").write_text("yours")
    (base / "text_encoder" / "NOTICE").symlink_to("../LICENSE.md")
    for loop in ("a", "b"):  # two of them are paths without end
        (base / "vae" / loop).symlink_to(".")
    models, config, averages = trained(base, tmp_path, blocks="0")
    for link in (True, False):
        target = tmp_path / f"model {link}"
        write_pipeline(target, models, models.network, averages, config, [8], link=link)
        own = {"LICENSE.md", "text_encoder/NOTICE", INFO_FILE, MANIFEST, NULL_FILE}
        assert names_below(target) == names_below(tiny_folder) | own and (target / "text_encoder" / "NOTICE").read_text() == "yours"
        assert not any(path.is_symlink() for path in target.rglob("*"))


@pytest.mark.parametrize("name", ["LICENSE.md", "vae/notes.txt", "tokenizer", INFO_FILE])
def test_a_link_out_of_the_models_folder_is_refused_and_nothing_of_it_is_copied(tmp_path, tiny_folder, name):
    base, secret = tmp_path / "base", tmp_path / "secret"
    shutil.copytree(tiny_folder, base)
    models, config, averages = trained(base, tmp_path, blocks="0")
    shutil.copytree(base / "tokenizer", secret)
    if name == "tokenizer":
        shutil.rmtree(base / name)
    else:
        (secret / "key").write_text("{}")
    (base / name).symlink_to(secret if name == "tokenizer" else secret / "key")
    with pytest.raises(InputError, match=f"{base / name}.* is a link out of the model's folder, to {secret}/.*put the file itself"):
        load_models(ModelOptions(pipeline=str(base)))
    with pytest.raises(InputError, match="is a link out of"):
        write_pipeline(tmp_path / "model", models, models.network, averages, config, [8], link=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "secret"]


def test_a_text_encoder_may_lie_elsewhere_as_a_whole(tmp_path, tiny_folder):
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    (base / "text_encoder_3").rename(tmp_path / "t5")
    (base / "text_encoder_3").symlink_to(tmp_path / "t5")
    models, config, averages = trained(base, tmp_path, blocks="0")
    write_pipeline(tmp_path / "model", models, models.network, averages, config, [8])
    assert names_below(tmp_path / "model" / "text_encoder_3") == names_below(tmp_path / "t5")
    (tmp_path / "key").write_text("{}")
    (tmp_path / "t5" / "notes.txt").symlink_to(tmp_path / "key")
    with pytest.raises(InputError, match=r"notes\.txt is a link out of the model's folder"):
        load_models(ModelOptions(pipeline=str(base)))


def test_a_full_disk_leaves_the_adapter_that_was_there(tmp_path, tiny_folder):
    models, _, averages = trained(tiny_folder, tmp_path, {"rank": 64, "targets": "all_linear"})
    write_adapter(tmp_path / "lora", models.network, averages, torch.float16)
    before = (tmp_path / "lora" / FILE).read_bytes()
    with files_no_larger_than(100_000), pytest.raises(InputError, match="could not write .*lora"):
        write_adapter(tmp_path / "lora", models.network, averages, torch.float32)
    assert (tmp_path / "lora" / FILE).read_bytes() == before and os.listdir(tmp_path) == ["lora"]


def test_averages_stand_for_the_parameters_they_name(tmp_path, tiny_folder):
    models, _, averages = trained(tiny_folder, tmp_path, {"rank": 2})
    one = next(iter(averages))
    found = own_weights(models.network, {one: averages[one]})
    assert found.keys() == averages.keys() and found[one] is averages[one]
    assert all(torch.equal(value, models.network.get_parameter(name)) for name, value in found.items() if name != one)
