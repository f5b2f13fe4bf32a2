"""quantization_config reaches the network, the VAE and the text encoders: stock diffusers' picture with each library that is installed."""

import pytest
import torch
import transformers
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, QuantoConfig, StableDiffusion3Pipeline

from latentfm import LatentFMPipeline
from latentfm.errors import InputError

CALL = {"prompt": "a red apple", "num_inference_steps": 2, "guidance_scale": 5.0, "max_sequence_length": 16, "output_type": "latent"}


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**CALL, generator=torch.Generator().manual_seed(0)).images


def quanto():
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights_dtype="int8"), transformers.QuantoConfig(weights="int8")


def torchao():
    quantization = pytest.importorskip("torchao.quantization")
    from diffusers import TorchAoConfig

    how = quantization.Int8WeightOnlyConfig()
    return TorchAoConfig(how), transformers.TorchAoConfig(how)


@pytest.mark.parametrize("library", [quanto, torchao])
@pytest.mark.parametrize("parts", [("transformer",), ("text_encoder_3",), ("transformer", "text_encoder_3")], ids=str)
@pytest.mark.parametrize("as_mapping", [True, False], ids=["mapping", "config"])
def test_components_are_quantised_with_stock_diffusers_picture(tiny_folder, library, parts, as_mapping):
    for_network, for_text = library()
    mapping = {name: for_network if name == "transformer" else for_text for name in parts}
    stock, ours = (
        kind.from_pretrained(tiny_folder, torch_dtype=torch.float32, quantization_config=how)
        for kind, how in (
            (StableDiffusion3Pipeline, PipelineQuantizationConfig(quant_mapping=mapping)),
            (LatentFMPipeline, mapping if as_mapping else PipelineQuantizationConfig(quant_mapping=mapping)),
        )
    )
    for name in parts:
        theirs, own = (dict(getattr(pipe, name).named_modules()) for pipe in (stock, ours))
        kinds = {key: type(module.weight) for key, module in theirs.items() if getattr(module, "weight", None) is not None}
        quantised = {key: kind for key, kind in kinds.items() if kind is not torch.nn.Parameter}
        assert len(quantised) > 10 and {key: type(own[key].weight) for key in quantised} == quantised
    assert (draw(stock) - draw(ours)).abs().max() < 1e-5
    assert ours.quantization_config.quant_mapping.keys() == set(parts)


def test_a_text_encoder_is_quantised_by_bitsandbytes(tiny_folder):
    pytest.importorskip("bitsandbytes")
    config = PipelineQuantizationConfig(quant_mapping={"text_encoder_3": transformers.BitsAndBytesConfig(load_in_4bit=True)})
    pipe = LatentFMPipeline.from_pretrained(tiny_folder, quantization_config=config)
    kinds = {type(module).__name__ for module in pipe.text_encoder_3.modules()}
    assert "Linear4bit" in kinds and "Linear4bit" not in {type(module).__name__ for module in pipe.text_encoder_2.modules()}


def installed(name):
    from importlib.util import find_spec

    return find_spec(name.split(".")[0]) is not None and find_spec(name) is not None


def test_what_cannot_be_quantised_here_is_refused_by_library_and_component(tiny_folder):
    if not torch.cuda.is_available() and installed("bitsandbytes"):
        for name in ("transformer", "vae"):
            config = PipelineQuantizationConfig("bitsandbytes_4bit", {"load_in_4bit": True}, components_to_quantize=[name])
            with pytest.raises(InputError, match=f"{name}, to be quantised by bitsandbytes, .*No GPU found"):
                LatentFMPipeline.from_pretrained(tiny_folder, quantization_config=config)
    if not installed("optimum.quanto"):
        mapping = {"transformer": QuantoConfig(weights_dtype="int8")}
        with pytest.raises(InputError, match=r"transformer, to be quantised by quanto, .*pip install optimum-quanto"):
            LatentFMPipeline.from_pretrained(tiny_folder, quantization_config=mapping)


def test_a_component_that_is_not_there_to_be_quantised_is_told(tiny_folder, caplog):
    mapping = {"controlnet": BitsAndBytesConfig(load_in_8bit=True), "text_encoder_3": BitsAndBytesConfig(load_in_8bit=True)}
    LatentFMPipeline.from_pretrained(tiny_folder, quantization_config=mapping, text_encoder_3=None, tokenizer_3=None)
    assert "quantization_config names what is not loaded from the folder, and stays as it is: controlnet, text_encoder_3" in caplog.text
