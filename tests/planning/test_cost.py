"""Closed-form parameters and FLOP against the networks themselves: meta devices and torch's own counter."""

import math

import pytest
import torch
from diffusers import AutoencoderKL
from models.twins import TINY
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from latentfm.errors import InputError
from latentfm.models.linears import LORA_TARGETS
from latentfm.models.mmdit import MMDiT
from latentfm.planning.cost import (
    Decoder,
    Network,
    block_linears,
    block_parameters,
    checkpointed,
    forward_flops,
    lora_parameters,
    parameters,
    position_table,
    training_flops,
)
from latentfm.planning.model import SD3_ENCODERS, SD3_VAE

ON_CPU = {  # the attention of CPUs, which torch's own list may lack: as a GPU's
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, out_shape, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
    # the products of float32 on some processors
    torch.ops.latentfm.linear: lambda x, weight, *_, out_shape, **__: 2 * math.prod(x) * weight[0],
}
VARIANTS = {
    "sd3": {},
    "qk-norm": {"qk_norm": "rms_norm"},
    "dual": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "dual in the last block": {"dual_attention_layers": (2,)},
    "one block": {"num_layers": 1},
    "patch 4, more channels out": {"patch_size": 4, "out_channels": 8},
    "out_channels None": {"out_channels": None},
}
BATCH, TEXT = 2, 7


def small(variant: str, device: str = "cpu") -> MMDiT:
    with torch.device(device):
        return MMDiT(**(TINY | VARIANTS[variant])).train()


def counted(network: MMDiT, backward: bool) -> tuple[int, int]:
    """(FLOP that torch counts for BATCH pictures, image tokens)."""
    config = network.config
    side = 6 * config.patch_size
    given = [torch.randn(BATCH, config.in_channels, side, side), torch.randn(BATCH, TEXT, 40), torch.randn(BATCH, 24), torch.rand(BATCH)]
    counting = FlopCounterMode(display=False, custom_mapping=ON_CPU)
    with counting as counter:
        out = network(*given, return_dict=False)[0]
        if backward:
            out.sum().backward()
    return counter.get_total_flops(), 36


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_by_part_are_the_modules(variant):
    network = small(variant, "meta")
    net, found = Network.of(network.config), parameters(Network.of(network.config))
    assert sum(found.values()) == sum(p.numel() for p in network.parameters())
    for index, block in enumerate(network.transformer_blocks):
        assert block_parameters(net, index) == sum(p.numel() for p in block.parameters())
        linears = {name: (m.in_features, m.out_features) for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        assert block_linears(net, index) == linears
    named = dict(network.named_parameters())
    assert found["modulation"] == sum(p.numel() for name, p in named.items() if "norm1" in name or "norm_out" in name)
    assert found["query-key norms"] == sum(p.numel() for name, p in named.items() if ".norm_" in name)
    assert found["second attention"] == sum(p.numel() for name, p in named.items() if ".attn2.to_" in name)
    assert position_table(net) == network.pos_embed.pos_embed.numel()


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_flops_are_torchs_count(variant):
    """The last block's text queries are skipped by the network and so in the formula."""
    network = small(variant)
    flops, image = counted(network.requires_grad_(False), backward=False)
    assert flops == BATCH * sum(forward_flops(Network.of(network.config), image, TEXT).values())


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("variant", ["sd3", "dual", "dual in the last block"])
def test_training_flops_are_torchs_count(variant, rank, share):
    network = small(variant)
    if rank:
        network.requires_grad_(False)
        network.add_adapter(LoraConfig(r=rank, target_modules=list(LORA_TARGETS)))
        adapters = sum(p.numel() for p in network.parameters() if p.requires_grad)
        assert adapters == sum(lora_parameters(Network.of(network.config), i, rank) for i in range(3))
    network.set_gradient_checkpointing(share)
    flops, image = counted(network, backward=True)
    assert flops == BATCH * sum(training_flops(Network.of(network.config), image, TEXT, rank, share).values())


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("variant", ["sd3", "dual"])
def test_blocks_before_the_first_that_trains_have_a_forward_pass_alone(variant, share):
    network = small(variant).requires_grad_(False)
    network.transformer_blocks[1:].requires_grad_(True)
    network.set_gradient_checkpointing(share)
    flops, image = counted(network, backward=True)
    assert flops == BATCH * sum(training_flops(Network.of(network.config), image, TEXT, checkpointing=share, first=1).values())


def test_training_is_about_three_times_the_forward_pass_and_lora_two():
    net = Network.of(TINY | {"num_layers": 20, "num_attention_heads": 12})
    once = sum(forward_flops(net, 64, 16).values())
    assert sum(training_flops(net, 64, 16).values()) / once == pytest.approx(3, rel=0.03)
    assert sum(training_flops(net, 64, 16, rank=1).values()) / once == pytest.approx(2, rel=0.1)
    assert sum(training_flops(net, 64, 16, checkpointing=1.0).values()) / once == pytest.approx(4, rel=0.03)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.34, 0.5, 0.8, 1.0])
def test_the_checkpointed_blocks_are_the_networks(share):
    network = MMDiT(**(TINY | {"num_layers": 11}))
    network.set_gradient_checkpointing(share)
    assert [network.checkpointed(i) for i in range(11)] == [checkpointed(i, share) for i in range(11)]


def test_the_frozen_models_are_sd3s():
    sizes = {"CLIP-L": (768, 12, 12), "CLIP-G": (1280, 32, 20)}
    found = {}
    with torch.device("meta"):
        for name, (width, layers, heads) in sizes.items():
            found[name] = CLIPTextModelWithProjection(CLIPTextConfig(
                vocab_size=49408, max_position_embeddings=77, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                num_attention_heads=heads, projection_dim=width,
            ))  # fmt: skip
        found["T5-XXL"] = T5EncoderModel(T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu",
        ))  # fmt: skip
    assert {name: sum(p.numel() for p in model.parameters()) for name, model in found.items()} == {
        name: encoder.parameters for name, encoder in SD3_ENCODERS.items()
    }
    assert sum(p.numel() for p in vae(Decoder()).parameters()) == SD3_VAE


def vae(decoder: Decoder) -> AutoencoderKL:
    levels = len(decoder.channels)
    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=decoder.channels, layers_per_block=decoder.layers, latent_channels=decoder.latent_channels,
            use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip


@pytest.mark.parametrize("decoder", [Decoder(), Decoder((32, 64, 128), 1, 12), Decoder((32, 64, 128, 128), 1, 16)])
def test_decoding_flops_are_torchs_count(decoder):
    latents = torch.empty(1, decoder.latent_channels, 8, 8, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae(decoder).decode(latents)
    assert counter.get_total_flops() == decoder.flops((8 * decoder.factor) ** 2)


def test_a_configuration_of_something_else_is_refused_by_name():
    with pytest.raises(InputError, match="no 'num_attention_heads'"):
        Network.of({"num_layers": 3})
