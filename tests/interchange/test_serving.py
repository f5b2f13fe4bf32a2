"""A folder saved here is what engines that serve diffusers' folders read: class names, files, keys; and stock diffusers takes it."""

import inspect
import json
import logging
import re
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors import safe_open

from latentfm import LatentFMPipeline

README = Path(__file__).parents[2] / "README.md"
# Of the transformer's config.json, what vLLM-Omni's SD3Transformer2DModel (vllm_omni/diffusion/models/sd3) makes itself by
READ = {
    "num_layers", "sample_size", "in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "caption_projection_dim",
    "pooled_projection_dim", "joint_attention_dim", "patch_size", "dual_attention_layers", "qk_norm", "pos_embed_max_size",
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "model"
    LatentFMPipeline.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


def test_an_engine_knows_the_pipeline_and_each_component_by_its_class(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline" and re.fullmatch(r"\d+\.\d+\.\d+.*", index["_diffusers_version"])
    parts = {name: entry for name, entry in index.items() if isinstance(entry, list) and any(entry)}
    assert parts.keys() | {"image_encoder", "feature_extractor"} == set(inspect.signature(StableDiffusion3Pipeline).parameters)
    for name, (library, kind) in parts.items():  # one after the other, from its subfolder, with nothing from elsewhere
        getattr({"diffusers": diffusers, "transformers": transformers}[library], kind).from_pretrained(
            saved, subfolder=name, local_files_only=True
        )
        for config in (saved / name).glob("*config.json"):
            said = json.loads(config.read_text())
            assert said.get("_class_name", kind) == kind and not {"_name_or_path", "auto_map", "local_files_only", "is_local"} & said.keys()


def test_an_engines_own_network_finds_its_sizes_and_its_weights(saved):
    config = json.loads((saved / "transformer" / "config.json").read_text())
    assert config.keys() >= READ and config["out_channels"] is not None
    with torch.device("meta"):
        expected = SD3Transformer2DModel.from_config(config).state_dict()
    with safe_open(saved / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in expected}
        assert set(file.keys()) == expected.keys()
    assert found == {name: tuple(value.shape) for name, value in expected.items()}  # the position table, a buffer, among them
    vae = json.loads((saved / "vae" / "config.json").read_text())
    assert len(vae["block_out_channels"]) == 3 and None not in (vae["scaling_factor"], vae["shift_factor"])


def test_a_vae_without_a_shift_is_saved_as_one_that_stock_diffusers_decodes_with(tiny_folder, tmp_path):
    pipe = LatentFMPipeline.from_pretrained(tiny_folder)
    pipe.vae.register_to_config(shift_factor=None)
    pipe.save_pretrained(tmp_path / "model")
    images = StableDiffusion3Pipeline.from_pretrained(tmp_path / "model")(
        "a red apple", num_inference_steps=1, output_type="pt", max_sequence_length=16
    ).images
    assert images.isfinite().all()


@pytest.mark.parametrize("by", [StableDiffusion3Pipeline, DiffusionPipeline], ids=lambda by: by.__name__)
def test_stock_diffusers_loads_it_without_a_warning(saved, by, caplog, monkeypatch):
    for library in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = by.from_pretrained(saved, dtype=torch.float32)
    assert type(pipe) is StableDiffusion3Pipeline and [record.getMessage() for record in caplog.records] == []


def test_the_readmes_example_asks_for_a_folder_that_a_run_writes():
    text = README.read_text("utf-8")
    section = text[text.index("### Serve") : text.index("## Bring SD3 weights")]
    assert "vllm serve runs/mine/model --omni" in section
    request = json.loads(re.search(r"-d '(\{.*\})'", section)[1])
    assert {"prompt", "size", "seed", "response_format"} == request.keys() and re.fullmatch(r"\d+x\d+", request["size"])
