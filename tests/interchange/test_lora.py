"""LoRA adapters: the same picture in stock diffusers and here whichever saved the file, and diffusers' form to peft's and back."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentfm import LatentFMPipeline
from latentfm.errors import InputError
from latentfm.interchange.lora.files import is_adapter, open_adapter
from latentfm.interchange.lora.writing import write_lora, write_peft
from latentfm.models.mmdit import MMDiT

FILE = "pytorch_lora_weights.safetensors"
ROUNDING = 1e-5
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_v_proj", "proj", "linear"]
KINDS = {
    "lora": {"r": 4, "lora_alpha": 7},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "ranks": {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 3}},
    "rank-stabilised": {"r": 4, "lora_alpha": 2, "use_rslora": True},
}
PIPELINES = (LatentFMPipeline, StableDiffusion3Pipeline)


@pytest.fixture
def pipes(tiny_folder):
    """(ours, stock), both of the tiny folder."""
    loaded = [cls.from_pretrained(tiny_folder) for cls in PIPELINES]
    for pipe in loaded:
        pipe.set_progress_bar_config(disable=True)
    return loaded


def picture(pipe) -> torch.Tensor:
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np", "height": 32, "width": 32, "max_sequence_length": 16}
    return torch.from_numpy(pipe("a red apple", generator=torch.Generator().manual_seed(0), **settings).images)


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def adapt(model: torch.nn.Module, targets=TARGETS, seed=1, **config) -> dict:
    """Adds a random adapter to `model` and returns its configuration."""
    model.add_adapter(LoraConfig(target_modules=targets, init_lora_weights=False, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model.peft_config["default"].to_dict()


def save(pipe, folder: Path, text: bool = False, described: bool = True, **config) -> Path:
    """A random adapter on `pipe`, saved as its class does it, and the file's path."""
    said = adapt(pipe.transformer, **config)
    more = {"transformer_lora_adapter_metadata": said} if described else {}
    if text:
        more["text_encoder_lora_adapter_metadata"] = adapt(pipe.text_encoder, ["q_proj", "fc1"], r=2, lora_alpha=3)
        more["text_encoder_lora_layers"] = get_peft_model_state_dict(pipe.text_encoder, adapter_name="default")
    type(pipe).save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer), **more)
    return folder / FILE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saver", [0, 1], ids=["saved here", "saved by stock"])
def test_either_pipeline_loads_what_the_other_saved(pipes, tmp_path, saver, kind):
    before = picture(pipes[0])
    writer, reader = pipes[saver], pipes[1 - saver]
    file = save(writer, tmp_path, **KINDS[kind])
    adapted = picture(writer)
    reader.load_lora_weights(tmp_path, adapter_name="mine")
    assert gap(picture(reader), adapted) < ROUNDING < 1000 * ROUNDING < gap(adapted, before)
    reader.unload_lora_weights()
    assert gap(picture(reader), before) < ROUNDING
    reader.load_lora_weights(str(file))  # the file itself, a name as text
    assert gap(picture(reader), adapted) < ROUNDING


def test_the_text_encoders_are_adapted_too(pipes, tmp_path):
    ours, stock = pipes
    before = picture(ours)
    save(stock, tmp_path, text=True, **KINDS["lora"])
    stock_picture = picture(stock)
    ours.load_lora_weights(tmp_path)
    assert gap(picture(ours), stock_picture) < ROUNDING
    ours.transformer.disable_lora()
    assert ours.get_list_adapters() == {"transformer": ["default_0"], "text_encoder": ["default_0"]}
    assert gap(picture(ours), before) > 10 * ROUNDING  # the encoder alone does something


def test_mixing_fusing_and_unloading_are_stocks(pipes, tmp_path, tiny_folder):
    for name, seed in (("a", 1), ("b", 2)):
        save(StableDiffusion3Pipeline.from_pretrained(tiny_folder), tmp_path / name, seed=seed, **KINDS["lora"])
    before = picture(pipes[0])
    seen = []
    for pipe in pipes:
        for name in ("a", "b"):
            pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        found = []
        for names, weights in ((["a", "b"], [0.7, -0.4]), ("a", 1.0), ("b", 0.0)):
            pipe.set_adapters(names, weights)
            found.append(picture(pipe))
        pipe.set_adapters(["a", "b"], [0.7, -0.4])
        assert sorted(pipe.get_active_adapters()) == ["a", "b"]
        pipe.fuse_lora(lora_scale=1.0)
        found.append(picture(pipe))
        assert gap(found[-1], found[0]) < ROUNDING
        pipe.unfuse_lora()
        pipe.delete_adapters("b")
        pipe.set_adapters("a", 0.5)
        found.append(picture(pipe))
        pipe.disable_lora()
        found.append(picture(pipe))
        pipe.enable_lora()
        pipe.unload_lora_weights()
        seen.append([*found, picture(pipe)])
    for ours, stock in zip(*seen, strict=True):
        assert gap(ours, stock) < ROUNDING
    first, second, nothing, *_, half, off, unloaded = seen[0]
    assert all(gap(made, before) < ROUNDING for made in (nothing, off, unloaded))
    assert min(gap(first, before), gap(second, before), gap(first, second), gap(half, second)) > 100 * ROUNDING


def test_an_adapter_trains_on_our_network(tiny_folder):
    network = MMDiT.from_pretrained(tiny_folder, subfolder="transformer")
    network.requires_grad_(False)
    network.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
    network(torch.randn(1, 4, 8, 8), torch.randn(1, 5, 48), torch.randn(1, 40), torch.tensor([500.0])).sample.square().mean().backward()
    trained = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert trained == {name for name in dict(network.named_parameters()) if "lora_" in name} and len(trained) > 20


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    return load_file(file)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_to_peft_and_back(pipes, tmp_path, tiny_folder, kind):
    ours, stock = pipes
    file = save(stock, tmp_path, **KINDS[kind])
    adapted = picture(stock)
    assert is_adapter(file) and not is_adapter(tiny_folder)
    write_peft(tmp_path / "peft", open_adapter(file), None)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config.items() >= KINDS[kind].items()
    assert is_adapter(tmp_path / "peft")
    base = SD3Transformer2DModel.from_pretrained(tiny_folder, subfolder="transformer")
    stock.transformer = PeftModel.from_pretrained(base, tmp_path / "peft").merge_and_unload()  # peft itself reads it
    assert gap(picture(stock), adapted) < ROUNDING
    ours.load_lora_weights(tmp_path / "peft")  # and so does our pipeline
    assert gap(picture(ours), adapted) < ROUNDING
    write_lora(tmp_path / "back.safetensors", open_adapter(tmp_path / "peft"), "diffusers")
    assert_equal(tensors_of(tmp_path / "back.safetensors"), tensors_of(file))
    stock.transformer = SD3Transformer2DModel.from_pretrained(tiny_folder, subfolder="transformer")
    stock.load_lora_weights(tmp_path / "back.safetensors")
    assert gap(picture(stock), adapted) < ROUNDING


def test_what_peft_saves_comes_to_diffusers(pipes, tmp_path, tiny_folder):
    base = SD3Transformer2DModel.from_pretrained(tiny_folder, subfolder="transformer")
    model = PeftModel(base, LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_v"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "peft")
    write_lora(tmp_path / "lora.safetensors", open_adapter(tmp_path / "peft"), "diffusers", torch.float32)
    pipes[1].load_lora_weights(tmp_path / "lora.safetensors")
    config = pipes[1].transformer.peft_config["default_0"]
    assert (config.r, config.lora_alpha) == (3, 5)
    expected = picture(pipes[1])
    pipes[1].unload_lora_weights()
    pipes[1].transformer = model.merge_and_unload()
    assert gap(picture(pipes[1]), expected) < ROUNDING


def test_a_file_that_says_nothing_of_alpha_has_alpha_equal_to_the_rank(pipes, tmp_path):
    file = save(pipes[1], tmp_path, described=False, r=4, lora_alpha=4, rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 2})
    with safe_open(file, "pt") as opened:
        assert set(opened.metadata()) == {"format"}
    write_peft(tmp_path / "peft", open_adapter(file), None)
    pipes[0].load_lora_weights(tmp_path / "peft")
    assert gap(picture(pipes[0]), picture(pipes[1])) < ROUNDING


MATRIX = torch.zeros(2, 2)
OTHER_MODELS = {
    "unet.down_blocks.1.attentions.0.to_q": "a LoRA of a UNet (SD 1, SD 2 or SDXL)",
    "lora_unet_down_blocks_1_attentions_0_proj_in": "a LoRA of a UNet (SD 1, SD 2 or SDXL)",
    "lora_unet_input_blocks_4_1_proj_in": "an SDXL LoRA",
    "unet.down_blocks.2.attentions.0.transformer_blocks.7.attn1.to_q": "an SDXL LoRA",
    "lora_prior_unet_down_blocks_0_0_mapper": "a Stable Cascade LoRA",
    "transformer.single_transformer_blocks.0.attn.to_q": "a Flux LoRA",
    "lora_unet_double_blocks_0_img_attn_qkv": "a Flux LoRA",
    "diffusion_model.double_blocks.3.img_attn_qkv": "a HunyuanVideo LoRA",
    "transformer.joint_transformer_blocks.0.attn.to_q": "an AuraFlow LoRA",
    "transformer.transformer_blocks.0.img_mod.1": "a Qwen-Image LoRA",
    "diffusion_model.blocks.0.cross_attn.q": "a Wan video LoRA",
    "transformer.blocks.0.attn2.to_q": "a Wan video LoRA",
    "diffusion_model.layers.3.attention.qkv": "a Lumina 2 or Z-Image LoRA",
    "transformer.transformer_blocks.5.attn1.to_q": "a PixArt, Sana, LTX-Video or CogVideoX LoRA",
    "diffusion_model.double_stream_blocks.0.block.attn1.to_q": "a HiDream LoRA",
    "base_model.model.model.layers.0.self_attn.q_proj": "a language model's LoRA",
}


@pytest.mark.parametrize("module", OTHER_MODELS)
def test_a_lora_of_another_model_is_called_by_its_name(module, tmp_path, pipes):
    flat = module.startswith("lora_")
    known = "lora_unet_transformer_blocks_0_attn_to_q" if flat else "transformer.transformer_blocks.0.attn.to_q"  # as Flux has it too
    endings = ("lora_down.weight", "lora_up.weight") if flat else ("lora_A.weight", "lora_B.weight")
    save_file({f"{name}.{ending}": MATRIX.clone() for name in (known, module) for ending in endings}, tmp_path / "lora.safetensors")
    for read in (open_adapter, pipes[0].load_lora_weights):
        with pytest.raises(InputError, match=re.escape(f"is {OTHER_MODELS[module]}, and adapts no SD3 model: it has {module}")) as caught:
            read(tmp_path / "lora.safetensors")
        assert "\n" not in str(caught.value)


REFUSED = {
    "half a pair": (
        {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": MATRIX, "transformer.transformer_blocks.0.attn.to_q.alpha": MATRIX},
        "no lora_B.weight for transformer_blocks.0.attn.to_q",
    ),
    "half of a fused pair": ({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": MATRIX}, "no lora_B.weight for joint_blocks.0"),
    "no module of SD3's": ({"diffusion_model.joint_blocks.0.x_block.attn.q.lora_A.weight": MATRIX}, "modules that SD3's transf"),
    "nothing that is known": ({"decoder.up.1.lora_A.weight": MATRIX}, "is a LoRA of a model, or in a naming, that is not known here"),
    "no LoRA": ({"transformer.proj_out.weight": MATRIX}, "is no LoRA"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_lora_is_made_of_is_refused(kind, tmp_path, pipes):
    tensors, says = REFUSED[kind]
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "lora.safetensors")
    for read in (open_adapter, pipes[0].load_lora_weights):
        with pytest.raises(InputError, match=says):
            read(tmp_path / "lora.safetensors")


def test_a_pickle_and_a_damaged_file_are_refused(tmp_path, pipes):
    torch.save({"transformer.x.lora_A.weight": MATRIX}, tmp_path / "lora.bin")
    for path, more in ((tmp_path / "lora.bin", {}), (tmp_path, {"weight_name": "lora.bin"})):
        with pytest.raises(InputError, match="is a pickle"):
            pipes[0].load_lora_weights(path, **more)
    file = save(pipes[1], tmp_path, **KINDS["lora"])
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut short: 100 bytes"):
        pipes[0].load_lora_weights(file)
    with pytest.raises(InputError, match="100 bytes"):
        open_adapter(file)
    with pytest.raises(InputError, match="cannot be read"):
        pipes[0].load_lora_weights(tmp_path / "nowhere.safetensors")


def test_peft_folders_that_cannot_be_converted(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "OFT"}')
    with pytest.raises(InputError, match="adapter of type OFT"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    with pytest.raises(InputError, match="no adapter_model.safetensors"):
        open_adapter(tmp_path)
    tensors = {f"base_model.model.proj_out.{name}": MATRIX.clone() for name in ("lora_A.weight", "weight")}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="whole weights besides"):
        open_adapter(tmp_path)
