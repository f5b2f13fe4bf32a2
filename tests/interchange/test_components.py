"""Components from a folder: what its files say decides sizes and numbers, and neither what code runs nor what is fetched or opened."""

import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchHeunDiscreteScheduler, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from latentfm import LatentFMPipeline
from latentfm.config import ModelOptions
from latentfm.errors import InputError
from latentfm.interchange.components import load_component, load_scheduler, load_text_encoders
from latentfm.interchange.networks import all_finite
from latentfm.interchange.weights import load_part, open_component, open_weights
from latentfm.training.models import load_models

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PARTS = ("transformer", "vae", *ENCODERS)
SETTINGS = {"prompt": "a red apple", "num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 16}
SETTINGS |= {"output_type": "latent"}


@pytest.fixture
def model(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny folder to spoil."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture(autouse=True)
def nothing_is_asked_of_the_network(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"asked of the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def change(path: Path, **settings) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def latents(folder: Path, **more) -> torch.Tensor:
    pipe = LatentFMPipeline.from_pretrained(folder, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe(**SETTINGS, generator=torch.Generator().manual_seed(0)).images


def refused(folder: Path, *words: str) -> None:
    """Asserts that the folder is refused in one line with `words`, for drawing and for training."""

    def trained(folder: Path) -> tuple:
        models = load_models(ModelOptions(pipeline=str(folder)))
        return models.vae_fingerprint(), models.text_fingerprints(), models.vae, models.encoder, models.null  # which a run asks for in turn

    for load in (LatentFMPipeline.from_pretrained, trained):
        with pytest.raises(InputError) as caught:
            load(folder)
        said = str(caught.value)
        assert "\n" not in said and len(said) < 1500 and all(word in said for word in words), said


@pytest.mark.parametrize("part", PARTS)
def test_a_component_is_its_librarys_own(tiny_folder, part):
    stock = getattr(StableDiffusion3Pipeline.from_pretrained(tiny_folder), part)
    ours = load_component(tiny_folder, part, type(stock).__name__, torch.float32)
    assert {key: value for key, value in ours.state_dict().items()}.keys() == stock.state_dict().keys()
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in ours.state_dict().items()) and not ours.training
    assert not any(tensor.is_meta for tensor in (*ours.parameters(), *ours.buffers()))
    if part in ENCODERS:
        assert ours.config._attn_implementation == stock.config._attn_implementation
        ids = torch.tensor([[3, 5, 7, 11]])
        with torch.no_grad():
            torch.testing.assert_close(ours(ids)[0], stock(ids)[0], rtol=1e-5, atol=1e-6)  # on some processors not to the last bit


def test_a_half_of_t5_that_overflows_in_float16_stays_in_float32_as_in_transformers(tiny_folder):
    stock = T5EncoderModel.from_pretrained(tiny_folder / "text_encoder_3", dtype=torch.float16)
    ours = load_component(tiny_folder, "text_encoder_3", "T5EncoderModel", torch.float16)
    kinds = {key: value.dtype for key, value in ours.state_dict().items()}
    assert kinds == {key: value.dtype for key, value in stock.state_dict().items()}
    assert set(kinds.values()) == {torch.float16, torch.float32}


CODE = {
    "attn_implementation": "someone/a-kernel", "_attn_implementation": "someone/a-kernel",
    "_attn_implementation_internal": "someone/a-kernel", "auto_map": {"AutoModel": "evil.Model"}, "transformers_weights": "evil.bin",
    "dtype": "fload32", "torch_dtype": "fload32",
    "output_attentions": True, "return_dict": False, "use_kernels": True, "architectures": ["Evil"], "model_type": "evil",
}  # fmt: skip


@pytest.mark.parametrize("part", ENCODERS)
def test_settings_that_fetch_code_or_files_or_change_the_output_are_not_read(model, tiny_folder, part):
    torch.save({}, model / part / "evil.bin")
    (model / part / "evil.py").write_text("raise SystemExit('ran')")
    (model / part / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/a-model", "peft_type": "LORA"}))
    (model / part / "generation_config.json").write_text("{")
    change(model / part / "config.json", **CODE)
    before = latents(tiny_folder)
    assert torch.equal(latents(model), before)
    found = load_text_encoders(model, 48, 40)
    assert all(encoder.config._attn_implementation == "sdpa" for encoder in found.encoders)
    LatentFMPipeline.from_pretrained(model).save_pretrained(model.parent / "saved")
    saved = json.loads((model.parent / "saved" / part / "config.json").read_text())
    assert not (CODE.keys() - {"dtype", "architectures", "model_type"}) & {key for key, value in saved.items() if value == CODE.get(key)}


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_keys_of_other_libraries_in_a_configuration_do_nothing(model, tiny_folder, part):
    change(model / part / "config.json", auto_map={"AutoModel": "evil.Model"}, _class_name=["evil", "Model"], custom_pipeline="evil")
    (model / part / "evil.py").write_text("raise SystemExit('ran')")
    assert torch.equal(latents(model), latents(tiny_folder))


def test_a_pipeline_class_of_the_folders_own_is_not_run(model, tiny_folder):
    for name in ("pipeline.py", "evil.py"):
        (model / name).write_text("raise SystemExit('ran')")
    change(model / "model_index.json", _class_name=["evil", "Pipeline"], custom_pipeline="evil")
    assert torch.equal(latents(model), latents(tiny_folder))


@pytest.mark.parametrize("name", ["vae", "scheduler", "tokenizer", "text_encoder_3", "image_encoder"])
def test_a_class_of_another_module_is_not_imported(model, name, monkeypatch, tmp_path):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (model / name).mkdir(exist_ok=True)
    (model / name / "evil_module.py").write_text("raise SystemExit('ran')")
    change(model / "model_index.json", **{name: ["evil_module", "Evil"]})
    refused(model, "model_index.json", name, "evil_module", "only classes of diffusers and transformers")
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize(
    ("name", "entry", "says"),
    [
        ("vae", ["diffusers", "UNet2DModel"], "must be a AutoencoderKL"), ("tokenizer", ["transformers", "BertTokenizer"], "CLIPTokenizer"),
        ("text_encoder", ["transformers", "AutoModel"], "must be a CLIPTextModelWithProjection"),
        ("scheduler", ["diffusers", "AutoencoderKL"], "none of diffusers"), ("scheduler", ["diffusers", "utils"], "none of diffusers"),
        ("image_encoder", ["transformers", "AutoModel"], "must be a CLIPVisionModelWithProjection or SiglipVisionModel"),
    ],
)  # fmt: skip
def test_a_component_of_another_class_is_refused_by_name(model, name, entry, says):
    (model / name).mkdir(exist_ok=True)
    change(model / "model_index.json", **{name: entry})
    with pytest.raises(InputError, match=says) as caught:
        LatentFMPipeline.from_pretrained(model)
    assert name in str(caught.value)


def test_older_names_of_tokenizers_and_another_scheduler_of_diffusers_load(model, tiny_folder):
    change(model / "model_index.json", tokenizer_3=["transformers", "T5TokenizerFast"])
    assert torch.equal(latents(model), latents(tiny_folder))
    assert isinstance(load_scheduler(model, "FlowMatchHeunDiscreteScheduler"), FlowMatchHeunDiscreteScheduler)


@pytest.mark.parametrize("part", PARTS)
def test_a_pickle_that_an_index_names_is_refused_in_every_component(model, part):
    (weights,) = (model / part).glob("*.safetensors")
    tensors = load_file(weights)
    torch.save(tensors, model / part / "e.bin")
    save_file({"z": torch.zeros(1)}, model / part / "z.safetensors")
    (model / part / f"{weights.name}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "e.bin")}))
    weights.unlink()
    refused(model, "e.bin is a pickle", part)
    with pytest.raises(InputError, match="e.bin is a pickle"):
        open_weights(model)
    (model / part / f"{weights.name}.index.json").unlink()
    weights.symlink_to("e.bin")
    refused(model, f"{weights.name} is a pickle under another name", part)


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_no_numbers_are_refused_by_name(model, part):
    (weights,) = (model / part).glob("*.safetensors")
    tensors = load_file(weights)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, weights)
    refused(model, f"the weights of the {part} are damaged", name, str(weights), "copy it again")


def test_a_number_beyond_float16_is_said_with_the_precision_that_holds_it(model):
    (weights,) = (model / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["decoder.conv_in.bias"][0] = 1e6
    save_file(tensors, weights)
    LatentFMPipeline.from_pretrained(model)
    with pytest.raises(InputError, match="vae are damaged: 1 of the .* infinite in float16; copy it again, or load it in float32"):
        LatentFMPipeline.from_pretrained(model, torch_dtype=torch.float16)
    tensors["decoder.conv_in.bias"][0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(InputError, match="infinite in float16; copy it again$"):  # no precision holds it
        LatentFMPipeline.from_pretrained(model, torch_dtype=torch.float16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_finite_is_what_torch_calls_so(dtype, bad):
    value = torch.full((100,), torch.finfo(dtype).max / 2, dtype=dtype)  # whose sum is not
    assert all_finite(value) and all_finite(torch.ones(3, dtype=torch.int64)) and all_finite(value[:0])
    value[7] = bad
    assert not all_finite(value)
    assert not all_finite(torch.tensor([float("inf"), -float("inf")]))


def test_a_vae_that_runs_over_makes_no_picture(tiny_folder):
    pipe = LatentFMPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    settings = {**SETTINGS, "output_type": "np"}
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.fill_(3e38)
    with pytest.raises(InputError, match="the VAE decodes to numbers that are not finite in float32: its weights are damaged"):
        pipe(**settings)
    pipe.transformer.to(torch.float32).proj_out.bias.data.fill_(float("inf"))
    with pytest.raises(InputError, match="the latents are not finite"):
        pipe(**settings)


@pytest.mark.parametrize("how", ["quanto", "torchao", "unknown", 5, None, ["bitsandbytes"]])
@pytest.mark.parametrize("part", PARTS)
def test_quantisation_by_another_library_is_refused_by_name(model, part, how):
    change(model / part / "config.json", quantization_config={"quant_method": how})
    with pytest.raises(InputError, match="config.json says it is quantised by .*; only bitsandbytes is read here"):
        LatentFMPipeline.from_pretrained(model)
    with pytest.raises(InputError, match="is quantised; it draws, but for this"):
        open_component(model / part, part)


def test_a_quantised_component_that_names_another_model_is_refused_before_its_library_sees_it(model):
    change(model / "text_encoder_3" / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    (model / "text_encoder_3" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="adapter_config.json, by which its library would load another model"):
        LatentFMPipeline.from_pretrained(model)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_3", "transformer"])
def test_weights_that_are_said_to_be_quantised_and_are_not_are_told(model, part):
    change(model / part / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(InputError, match=f"{part} says it is quantised, and its weights are not"):
        LatentFMPipeline.from_pretrained(model)


def test_a_text_encoder_saved_in_four_bits_loads(model, tiny_folder):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    shutil.rmtree(model / "text_encoder_3")
    T5EncoderModel.from_pretrained(tiny_folder / "text_encoder_3", quantization_config=config).save_pretrained(model / "text_encoder_3")
    change(model / "text_encoder_3" / "config.json", attn_implementation="someone/a-kernel")
    found = load_component(model, "text_encoder_3", "T5EncoderModel", torch.float32)
    assert any(type(module).__name__ == "Linear4bit" for module in found.modules()) and found.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("transformer", "in_channels", 8), ("transformer", "joint_attention_dim", 64), ("transformer", "pooled_projection_dim", 99),
    ],
)  # fmt: skip
def test_parts_that_were_not_made_for_each_other_are_told(model, part, key, value):
    settings = json.loads((model / "transformer" / "config.json").read_text()) | {key: value}
    from latentfm.models.mmdit import MMDiT

    other = MMDiT.from_config(settings)
    other.save_pretrained(model / "transformer")
    change(model / "transformer" / "config.json", _class_name="SD3Transformer2DModel")
    with pytest.raises(InputError, match=f"do not go together: .* {value}, .*copy the folder again"):
        LatentFMPipeline.from_pretrained(model)


def test_a_text_encoder_without_its_tokenizer_is_said(model):
    change(model / "model_index.json", tokenizer_2=[None, None])
    with pytest.raises(InputError, match="has a text_encoder_2 and no tokenizer_2"):
        LatentFMPipeline.from_pretrained(model)


def test_a_tokenizer_that_says_a_great_length_is_held_to_what_its_encoder_reads(model, tiny_folder):
    for name in ("tokenizer", "tokenizer_2"):
        change(model / name / "tokenizer_config.json", model_max_length=10**9)
    assert torch.equal(latents(model), latents(tiny_folder))


def test_a_tokenizer_with_more_tokens_than_its_encoder_is_no_pair(model):
    path = model / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {token: number + 10_000 for token, number in content["model"]["vocab"].items()}
    content["added_tokens"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="tokens beyond its vocabulary"):
        latents(model)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shift": 0}, "shift 0, which is no number to scale with"), ({"shift": "x"}, "no finite number"),
        ({"shift_terminal": [1]}, "shift_terminal"), ({"num_train_timesteps": 10**9}, "num_train_timesteps 1000000000"),
        ({"use_dynamic_shifting": True, "base_image_seq_len": 64, "max_image_seq_len": 64}, "the same"),
        ({"time_shift_type": "evil"}, "cannot be read"),
    ],
)  # fmt: skip
def test_a_scheduler_whose_settings_give_no_times_is_refused(model, settings, says):
    change(model / "scheduler" / "scheduler_config.json", **settings)
    with pytest.raises(InputError, match=says) as caught:
        LatentFMPipeline.from_pretrained(model)
    assert "scheduler_config.json" in str(caught.value)


def test_layers_without_end_are_refused_at_once(model):
    for part, key in (("transformer", "num_layers"), ("text_encoder", "num_hidden_layers"), ("text_encoder_3", "num_layers")):
        folder = shutil.copytree(model, model.parent / f"many {part}")
        change(folder / part / "config.json", **{key: 10**9})
        refused(folder, f"says {key} 1000000000, more than the 512 that are read")


def test_a_single_file_of_blocks_without_end_is_refused_at_once(tmp_path):
    names = ("pos_embed", "x_embedder.proj.weight", "joint_blocks.0.context_block.attn.qkv.weight", "joint_blocks.999999999.x_block.y")
    for number in ("999999999", "²"):
        path = tmp_path / "x.safetensors"
        save_file({f"model.diffusion_model.{name.replace('999999999', number)}": torch.zeros(3, 3) for name in names}, path)
        with pytest.raises(InputError, match=re.escape(str(path))):
            open_weights(path)


def test_a_single_files_words_of_itself_are_bounded(tmp_path, tiny_folder):
    from latentfm.interchange.writers import write_single

    path = tmp_path / "x.safetensors"
    write_single(path, open_weights(tiny_folder), "original", None)
    tensors = load_file(path)
    said = {"info": {"max_sequence_length": 10**9}}, {"transformer": {"num_layers": 10**9}}, {"vae": 5}, [1], {"scheduler": {"shift": "x"}}
    for value in said:
        save_file(tensors, path, metadata={"latentfm": json.dumps(value)})
        if value == [1]:
            continue
        with pytest.raises(InputError, match="its metadata's 'latentfm' cannot be read"):
            open_weights(path)
    save_file(tensors, path, metadata={"latentfm": '{"a":' * 10**5})
    with pytest.raises(InputError, match="nested too deeply"):
        open_weights(path)


def test_the_files_of_a_variant_are_taken_where_they_are_as_stock_does(model, tiny_folder):
    for name in ENCODERS:
        (weights,) = (model / name).glob("*.safetensors")
        shutil.copy(weights, weights.with_name("model.fp16.safetensors"))
        save_file({key: value + 1 for key, value in load_file(weights).items()}, weights)
    assert torch.equal(latents(model, variant="fp16"), latents(tiny_folder))
    StableDiffusion3Pipeline.from_pretrained(tiny_folder).save_pretrained(model.parent / "fp16", variant="fp16")
    assert torch.equal(latents(model.parent / "fp16"), latents(tiny_folder))  # the lone variant


def test_a_device_map_of_one_device_is_that_device(tiny_folder):
    assert LatentFMPipeline.from_pretrained(tiny_folder, device_map="cpu").device.type == "cpu"
    with pytest.raises(InputError, match="device_map 'nowhere' is no device here .*enable_model_cpu_offload"):
        LatentFMPipeline.from_pretrained(tiny_folder, device_map="nowhere")


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["vae/config.json", "text_encoder/model.safetensors", "latentfm.json", "null_condition.safetensors"])
def test_special_files_are_refused(model, name, kind):
    path = model / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    refused(model, name, f"a {'named pipe' if kind == 'pipe' else kind}", "not a regular file")


def test_loading_reads_no_other_copy_of_a_component(tiny_folder):
    part, _ = open_component(tiny_folder / "vae", "vae")
    found, stock = load_part("vae", part, torch.float32), AutoencoderKL.from_pretrained(tiny_folder / "vae")
    assert all(torch.equal(found.state_dict()[key], value) for key, value in stock.state_dict().items())
