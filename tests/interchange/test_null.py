"""What a call is guided against is of the encoders as they are at that call, whatever was done to them: stock diffusers' picture."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
from diffusers import StableDiffusion3Pipeline
from diffusers.hooks import apply_layerwise_casting
from drawn import draw, gap
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from latentfm import LatentFMPipeline
from latentfm.errors import InputError

ROUNDING = 1e-5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded(saved):
    return [kind.from_pretrained(saved, torch_dtype=torch.float32) for kind in (StableDiffusion3Pipeline, LatentFMPipeline)]


@pytest.fixture
def both(loaded):
    """The folder in stock diffusers and here, each to be changed."""
    return [copy.deepcopy(pipe) for pipe in loaded]


@pytest.fixture(scope="module")
def lora(loaded, tmp_path_factory):
    """A LoRA of both CLIPs."""
    folder, pipe, layers = tmp_path_factory.mktemp("lora"), copy.deepcopy(loaded[0]), {}
    torch.manual_seed(1)
    for name in ("text_encoder", "text_encoder_2"):
        config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        getattr(pipe, name).add_adapter(config)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(getattr(pipe, name))
    pipe.save_lora_weights(folder, **layers)
    return folder


# What is done with a LoRA of the text encoders, step by step, with a picture drawn after each
LORA = {
    "loaded": [],
    "scaled": [lambda pipe: pipe.set_adapters("one", 0.3)],
    "scaled by encoder": [lambda pipe: pipe.set_adapters("one", {"text_encoder": 0.3, "text_encoder_2": 1.5})],
    "fused": [lambda pipe: pipe.fuse_lora(lora_scale=0.7)],
    "fused and unloaded": [lambda pipe: pipe.fuse_lora(lora_scale=0.7), lambda pipe: pipe.unload_lora_weights()],
    "fused and unfused": [lambda pipe: pipe.fuse_lora(), lambda pipe: pipe.unfuse_lora()],
    "fused of one encoder": [lambda pipe: pipe.fuse_lora(components=["text_encoder"]), lambda pipe: pipe.unload_lora_weights()],
    "disabled": [lambda pipe: pipe.disable_lora()],
    "unloaded": [lambda pipe: pipe.unload_lora_weights()],
    "deleted": [lambda pipe: pipe.delete_adapters("one")],
}


@pytest.mark.parametrize("between", [True, False], ids=["drawn between", "at once"])
@pytest.mark.parametrize("steps", LORA.values(), ids=LORA.keys())
def test_an_adapter_of_the_text_encoders_counts_in_each_of_its_states(both, lora, steps, between):
    for pipe in both:
        draw(pipe)
        pipe.load_lora_weights(lora, adapter_name="one")
        for step in steps:
            if between:
                draw(pipe)
            step(pipe)
    assert gap(*map(draw, both)) < ROUNDING


def test_a_merged_adapter_is_seen_where_no_version_counter_is_told(both, lora):
    before = draw(both[1])
    for pipe in both:
        pipe.load_lora_weights(lora, adapter_name="one")
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    assert gap(*map(draw, both)) < ROUNDING < 100 * ROUNDING < gap(draw(both[1]), before)


def sequential(pipe):
    """As enable_sequential_cpu_offload, which asks for a GPU: weights are nowhere but while their module runs."""
    for network in (part for part in pipe.components.values() if isinstance(part, torch.nn.Module)):
        weights = {name: value.clone() for name, value in network.state_dict().items()}
        add_hook_to_module(network, AlignDevicesHook(io_same_device=True), append=True)
        attach_align_device_hook(
            network, execution_device=CPU, offload=True, offload_buffers=len(network._parameters) > 0, weights_map=weights
        )
    assert pipe.text_encoder.device.type == "meta"


def by_groups(**how):
    return lambda pipe: pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, **how)


def fewer_layers(pipe):
    pipe.text_encoder.text_model.encoder.layers = pipe.text_encoder.text_model.encoder.layers[:-1]


def another_scale(pipe):
    for layer in pipe.text_encoder.text_model.encoder.layers:
        layer.self_attn.scale = 2.0


def another_value(pipe):
    weight = pipe.text_encoder.text_model.final_layer_norm.weight
    weight.data = weight.data * 30


def of_another_folder(pipe):
    pipe.text_encoder_2.load_state_dict({name: value * 1.5 for name, value in pipe.text_encoder_2.state_dict().items()})


CHANGES = {
    "offloaded by model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "offloaded by module": sequential,
    "offloaded by blocks": by_groups(offload_type="block_level", num_blocks_per_group=1),
    "offloaded by leaves": by_groups(offload_type="leaf_level"),
    "fewer layers": fewer_layers,
    "another scale": another_scale,
    "another value": another_value,
    "another state": of_another_folder,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_whatever_is_done_to_the_encoders_the_picture_is_stock_diffusers(both, change):
    draw(both[1])
    for pipe in both:
        change(pipe)
    assert gap(draw(both[0]), draw(both[1])) < ROUNDING
    assert gap(draw(both[0]), draw(both[1])) < ROUNDING  # a second time, for hooks that put things back


def test_encoders_cast_layer_by_layer_are_asked_anew(both):
    before = draw(both[1])
    apply_layerwise_casting(both[1].text_encoder_3, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=["wo"])
    expected = both[1].prompt_encoder.encode([""], 16)
    assert gap(both[1].null.parts(16).t5, expected.t5) == 0 < gap(draw(both[1]), before)


def test_without_encoders_the_saved_one_is_read_and_of_a_length_that_is_not_saved_refused(both, saved):
    absent = {name: None for name in both[0].components if name.startswith(("text_encoder", "tokenizer"))}
    bare = LatentFMPipeline.from_pretrained(saved, **absent)
    encoded = {length: both[0].encode_prompt("a red apple", None, None, max_sequence_length=length) for length in (16, 24)}
    given = {length: {"prompt": None, "prompt_embeds": found[0], "pooled_prompt_embeds": found[2]} for length, found in encoded.items()}
    assert gap(draw(bare, **given[16]), draw(both[0])) < ROUNDING
    with pytest.raises(InputError, match=r"lengths \[16\], not 24, and no text encoder"):
        draw(bare, **given[24], max_sequence_length=24)
