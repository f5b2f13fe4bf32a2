"""SD3's original naming both ways, against diffusers' own conversion on the same tensors, and the configurations read from them."""

import inspect
import logging

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_sd3_t5_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file

from latentfm.interchange import original
from latentfm.interchange.tensors import Stored, read_folder, write_file
from latentfm.interchange.weights import architecture, open_weights
from latentfm.interchange.writers import write_single
from latentfm.models.mmdit import MMDiT
from latentfm.models.presets import PRESETS, size

MODELS = {
    "sd3": {},
    "qk-norm": {"qk_norm": "rms_norm"},
    "dual": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1), "num_layers": 3},
    "heads of 16": {"qk_norm": "rms_norm", "attention_head_dim": 16, "num_attention_heads": 8},
    "one layer": {"num_layers": 1, "patch_size": 4, "out_channels": 8},
}
BASE = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2,
    "joint_attention_dim": 24, "caption_projection_dim": 128, "pooled_projection_dim": 20, "pos_embed_max_size": 6,
}  # fmt: skip


def random_model(cls, config, seed=0):
    """A model of the class with every parameter random, none zero or one."""
    torch.manual_seed(seed)
    model = cls(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def loaded(tensors: dict[str, Stored]) -> dict[str, torch.Tensor]:
    return {name: stored.load() for name, stored in tensors.items()}


@pytest.fixture(params=MODELS)
def model(request):
    return random_model(SD3Transformer2DModel, BASE | MODELS[request.param])


@pytest.fixture
def original_file(model, tmp_path):
    """The model as a single file in the original naming, written here."""
    model.save_pretrained(tmp_path / "transformer")
    write_single(tmp_path / "one.safetensors", open_weights(tmp_path / "transformer"), "original", None)
    return tmp_path / "one.safetensors"


def test_diffusers_makes_the_model_of_the_original_file(model, original_file):
    tensors = load_file(original_file)
    layers = model.config.num_layers
    names = {name.removeprefix("model.diffusion_model.") for name in tensors}
    assert all(name.startswith("model.diffusion_model.") for name in tensors)
    width = 128
    assert tensors["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"].shape == (3 * width, width)
    last = {name.removeprefix(f"joint_blocks.{layers - 1}.context_block.") for name in names if f"s.{layers - 1}.context_block" in name}
    norms = {"attn.ln_q.weight", "attn.ln_k.weight"} if model.config.qk_norm else set()
    assert last == norms | {f"{part}.{kind}" for part in ("attn.qkv", "adaLN_modulation.1") for kind in ("weight", "bias")}
    same(convert_sd3_transformer_checkpoint_to_diffusers(tensors), model.state_dict())


def test_the_original_file_is_read_as_diffusers_reads_it(model, original_file):
    weights = open_weights(original_file)
    same(loaded(weights.parts["transformer"].tensors), model.state_dict())
    found = MMDiT.from_config(weights.parts["transformer"].config).config
    assert all(found[name] == value or list(found[name]) == list(value) for name, value in model.config.items() if name in signature())


def signature() -> set[str]:
    return set(inspect.signature(MMDiT.__init__).parameters) - {"self"}


def test_the_configuration_is_seen_in_names_and_shapes(model):
    stored = {name: Stored(value.dtype, tuple(value.shape), ()) for name, value in model.state_dict().items()}
    found = original.transformer_config(stored, sample_size=8)
    expected = {name: model.config[name] for name in signature()}
    expected["dual_attention_layers"] = list(expected["dual_attention_layers"])
    assert found == expected
    assert original.transformer_config(stored)["sample_size"] == 128


def published() -> dict[str, dict]:
    medium_35 = size(24, 24, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)))
    return {
        "SD3 medium": PRESETS["sd3-medium"], "SD3.5 medium": medium_35, "SD3.5 large": size(38, 38),
        "MM-DiT of 6 layers x 256": PRESETS["emoji"],
    }  # fmt: skip


@pytest.mark.parametrize("name", published())
def test_the_published_models_are_known(name):
    settings = published()[name]
    with torch.device("meta"):
        state = SD3Transformer2DModel(**settings).state_dict()
    tensors = {key: Stored(torch.float16, tuple(value.shape), ()) for key, value in state.items()}
    found = original.transformer_config(tensors, settings["sample_size"])
    assert found == {"dual_attention_layers": [], **settings} | {"dual_attention_layers": list(settings.get("dual_attention_layers", ()))}
    assert architecture(found) == name


VAES = {
    "sd3": {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
    "with quant convs": {"latent_channels": 16, "layers_per_block": 2},
    "two levels": {
        "latent_channels": 16, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (32, 64), "use_quant_conv": False, "use_post_quant_conv": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", VAES)
def test_the_vae_both_ways(name, tmp_path):
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = random_model(AutoencoderKL, kinds | {"block_out_channels": (32, 32, 64)} | VAES[name])
    vae.save_pretrained(tmp_path)
    stored = read_folder(tmp_path)[0]
    write_file(tmp_path / "ldm.safetensors", original.vae_to_original(stored), {}, None)
    ldm = load_file(tmp_path / "ldm.safetensors")
    assert ldm["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    finest = len(vae.config.block_out_channels) - 1  # diffusers counts the decoder's levels from the coarsest
    assert torch.equal(ldm["decoder.up.0.block.1.conv1.weight"], vae.decoder.up_blocks[finest].resnets[1].conv1.weight)
    same(convert_ldm_vae_checkpoint({f"first_stage_model.{key}": value for key, value in ldm.items()}, vae.config), vae.state_dict())
    back = original.vae_to_diffusers(original.vae_to_original(stored))
    same(loaded(back), vae.state_dict())
    config = original.vae_config(back)
    with torch.device("meta"):
        twin = AutoencoderKL.from_config(config)
    assert {key: value.shape for key, value in twin.state_dict().items()} == {key: value.shape for key, value in vae.state_dict().items()}
    assert (config["scaling_factor"], config["shift_factor"]) == (1.5305, 0.0609)
    assert config["layers_per_block"] == vae.config.layers_per_block


def test_the_text_encoders_as_diffusers_takes_them(tiny_folder, tmp_path):
    write_single(tmp_path / "all.safetensors", open_weights(tiny_folder), "original", None)
    tensors = load_file(tmp_path / "all.safetensors")
    for name, prefix in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        found = convert_ldm_clip_checkpoint(tensors, f"text_encoders.{prefix}.transformer.")
        same(found, load_file(tiny_folder / name / "model.safetensors"))
    same(convert_sd3_t5_checkpoint_to_diffusers(tensors), load_file(tiny_folder / "text_encoder_3" / "model.safetensors"))


@pytest.mark.parametrize(
    "clip, config",
    [
        ("text_encoder", {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "projection_dim": 16, "vocab_size": 646}),
        ("text_encoder_2", {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "projection_dim": 24, "vocab_size": 646}),
    ],
)
def test_a_clips_configuration_is_seen(tiny_folder, clip, config):
    found = original.clip_config(open_weights(tiny_folder).parts[clip].tensors, "gelu")
    assert found.items() >= config.items() and (found["bos_token_id"], found["eos_token_id"]) == (644, 645)


def test_a_t5s_configuration_is_seen(tiny_folder):
    part = open_weights(tiny_folder).parts["text_encoder_3"]
    found = original.t5_config(part.tensors)
    assert {key: part.config[key] for key in found if key != "decoder_start_token_id"} | {"decoder_start_token_id": 0} == found


def test_diffusers_loads_the_single_file_and_draws_the_same_picture(tiny_folder, tmp_path, caplog):
    from diffusers import StableDiffusion3Pipeline

    from latentfm import LatentFMPipeline

    file = tmp_path / "all.safetensors"
    write_single(file, open_weights(tiny_folder), "original", None)
    stock = StableDiffusion3Pipeline.from_pretrained(
        tiny_folder,
        transformer=SD3Transformer2DModel.from_single_file(str(file), config=str(tiny_folder), subfolder="transformer"),
        vae=AutoencoderKL.from_single_file(str(file), config=str(tiny_folder), subfolder="vae"),
    )
    with caplog.at_level(logging.WARNING):
        ours = LatentFMPipeline.from_single_file(file, pipeline=tiny_folder)
    pictures = []
    for pipe in (stock, ours):
        pipe.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np", "height": 32, "width": 32}
        pictures.append(torch.from_numpy(pipe("a red apple", generator=torch.Generator().manual_seed(0), **settings).images))
    assert (pictures[0] - pictures[1]).abs().max() < 1e-5 < pictures[0].std()
    assert "left out" not in caplog.text
