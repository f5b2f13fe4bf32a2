"""What is trained: blocks and modules by name, adapters and their gradients, quantised bases, and the fingerprint of what is frozen."""

import sys

import pytest
import torch
from models.twins import inputs, twins
from peft.tuners.tuners_utils import BaseTunerLayer

from latentfm.config import AdapterOptions, TrainOptions
from latentfm.errors import InputError
from latentfm.models.linears import parse_blocks
from latentfm.models.mmdit import MMDiT
from latentfm.models.schedule import Precomputed
from latentfm.models.text import Condition
from latentfm.models.velocity import velocity
from latentfm.planning.cost import Network, lora_parameters
from latentfm.training import adapters
from latentfm.training.adapters import (
    base_fingerprint,
    cast_weights,
    check_base,
    choose_trainable,
    seed_dropout,
)

# three blocks, two with SD3.5's second attention, 64 numbers wide
DUAL = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1), "num_attention_heads": 4, "caption_projection_dim": 64}
KINDS = ["lora", "dora"]
BASES = ["nf4", "int8"]


def options_of(blocks=None, weights="float32", **adapter):
    return TrainOptions(
        adapter={"rank": 4, **adapter} if adapter else None, blocks=blocks, weights=weights, mixed_precision="no", seed=3
    )


def chosen(blocks=None, weights="float32", **adapter):
    """(network, what choose_trainable said), an adapter's values away from its start of nothing."""
    network, _ = twins(**DUAL)
    options = options_of(blocks, weights, **adapter)
    said = choose_trainable(network, options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    cast_weights(network, options)
    return network, said


def loss_of(network, dtype=torch.float32):
    return network(**inputs(network, dtype=dtype)).sample.float().square().mean()


def test_the_weights_of_some_blocks_train_and_every_one_has_a_gradient():
    network, said = chosen("0,-1")
    assert {name.split(".")[1] for name in said.names} == {"0", "2"} and all(n.startswith("transformer_blocks.") for n in said.names)
    assert set(said.names) == {n for n, _ in network.named_parameters() if n.startswith(("transformer_blocks.0.", "transformer_blocks.2."))}
    assert said.summary == "the weights of 2 of 3 blocks, the rest frozen"
    loss_of(network).backward()
    with_gradient = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(said.names)  # or data-parallel training would wait for the others


def test_without_an_adapter_or_blocks_everything_trains():
    network, said = chosen()
    assert said.names == tuple(name for name, _ in network.named_parameters())
    assert said.base is None and said.summary == "every weight"


# Adapters


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_has_the_parameters_the_plan_counts_and_starts_as_nothing(kind):
    network, _ = twins(qk_norm="rms_norm")
    with torch.no_grad():
        before = network(**inputs(network)).sample
        said = choose_trainable(network, options_of(kind=kind))
        torch.testing.assert_close(network(**inputs(network)).sample, before, rtol=1e-5, atol=1e-5)
    matrices = sum(p.numel() for p in network.parameters() if p.requires_grad and p.ndim == 2)
    assert matrices == sum(lora_parameters(Network.of(network.config), block, 4) for block in range(3))
    assert said.summary.startswith(f"a {'LoRA' if kind == 'lora' else 'DoRA'} of rank 4 on 23 linears, the base frozen in float32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "targets, blocks", [("attention", None), ("all_linear", None), ("modulation", "1-"), (["ff.net.2", "to_q"], "0,-1")]
)
def test_an_adapter_is_its_merged_weights_and_alone_has_gradients(kind, targets, blocks):
    plain, _ = twins(**DUAL)
    network, said = chosen(blocks, kind=kind, targets=targets)
    given = inputs(network)
    with torch.no_grad():
        adapted = network(**given).sample
        schedule = Precomputed(torch.tensor([987.654, 0.3217]))  # sampling's modulations computed ahead
        one_time = given | {"timestep": torch.tensor([987.654] * 2)}
        ahead = network(**one_time, precomputed=schedule).sample
        torch.testing.assert_close(ahead, network(**one_time).sample, rtol=1e-4, atol=1e-4)
        assert (adapted - plain(**given).sample).abs().max() > 0.01
    loss_of(network).backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert gradients.keys() == set(said.names) and all("lora_" in name for name in gradients)
    touched = {int(name.split(".")[1]) for name in gradients}
    assert touched == set(range(3) if blocks is None else parse_blocks(blocks, 3))
    zero = {name for name, value in gradients.items() if not value.any()}
    assert zero == {name for name in zero if "2.attn.add_q_proj" in name}  # nothing reads the last block's text queries
    network.fuse_lora()
    network.unload_lora()
    assert network.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(network(**given).sample, adapted, rtol=1e-4, atol=1e-4)


def test_the_seed_alone_fixes_an_adapters_start():
    def start(seed, before):
        network, _ = twins(**DUAL)
        torch.manual_seed(before)
        state = torch.get_rng_state()
        choose_trainable(network, options_of(targets="attention").model_copy(update={"seed": seed}))
        assert torch.equal(torch.get_rng_state(), state)
        return {name: p for name, p in network.named_parameters() if p.requires_grad}

    one, same, other = start(5, 1), start(5, 2), start(6, 1)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not all(torch.equal(value, other[name]) for name, value in one.items())
    values = [value for name, value in one.items() if "lora_A" in name]
    assert not torch.equal(values[0], values[1])


def test_alpha_is_the_rank_unless_given_and_scales_the_addition():
    for alpha, scale in ((None, 1.0), (2.0, 0.5), (1.5, 0.375)):
        network, _ = chosen(targets="attention", alpha=alpha)
        layer = network.transformer_blocks[0].attn.to_q
        assert layer.scaling["default"] == scale
        assert network.peft_config["default"].lora_alpha == (4 if alpha is None else alpha)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_float32_on_a_network_that_is_not(kind):
    network, _ = twins(**DUAL)
    network.to(torch.bfloat16)
    choose_trainable(network, options_of(kind=kind))
    assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_bfloat16_base_the_adapter_stays_float32(kind):
    network, said = chosen(weights="bfloat16", kind=kind)
    kinds = {name: parameter.dtype for name, parameter in network.named_parameters()}
    assert {kinds.pop(name) for name in said.names} == {torch.float32} and set(kinds.values()) == {torch.bfloat16}
    assert network.pos_embed.pos_embed.dtype == torch.float32
    loss = loss_of(network, torch.bfloat16)
    loss.backward()
    exact = loss_of(chosen(kind=kind)[0])
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(p.grad.dtype == torch.float32 for p in network.parameters() if p.requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_of(network).item() == pytest.approx(exact.item(), rel=0.05)


def test_blocks_are_cast_whole():
    network, _ = chosen("0", weights="bfloat16")
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


def test_checkpointing_the_blocks_changes_no_gradient():
    found = []
    for share in (0.0, 1.0):
        network, said = chosen(targets="all_linear")
        network.set_gradient_checkpointing(share)
        network.train()
        loss_of(network).backward()
        found.append({name: parameter.grad for name, parameter in network.named_parameters() if name in said.names})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_dropout_is_drawn_from_seed_step_and_place():
    network, _ = chosen(targets="all_linear", dropout=0.5)
    options = options_of(targets="all_linear", dropout=0.5)
    network.train()

    def loss(step, micro_batch, before):
        torch.manual_seed(before)
        seed_dropout(options, step, micro_batch)
        return loss_of(network).item()

    assert loss(1, 0, before=1) == loss(1, 0, before=2)
    assert len({loss(1, 0, 1), loss(2, 0, 1), loss(1, 1, 1), loss_of(network.eval()).item()}) == 4
    state = torch.get_rng_state()
    seed_dropout(options_of(targets="all_linear"), 1, 0)  # nothing drops: torch's generator stays as it is
    assert torch.equal(torch.get_rng_state(), state)


# Quantised bases


def unpacked(layer):
    """The weight of one of bitsandbytes' linears as it multiplies."""
    import bitsandbytes

    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    state = layer.state
    values, scales = (layer.weight.CB, layer.weight.SCB) if state.CB is None else (state.CB, state.SCB)
    return values.float() * scales[:, None] / 127


@pytest.mark.parametrize("base, kind", [("nf4", "lora"), ("nf4", "dora"), ("int8", "lora")])
def test_a_quantised_base_trains_as_its_own_values_in_float32_do(base, kind):
    network, said = chosen(kind=kind, base=base, targets="all_linear")
    network.train()
    exact, _ = chosen(kind=kind, targets="all_linear")
    adapted = {name: m for name, m in network.named_modules() if isinstance(m, BaseTunerLayer)}
    assert len(adapted) == 33 + 14 and said.summary.endswith(f"the base frozen in {base}")
    bits = {"nf4": torch.uint8, "int8": torch.int8}[base]
    with torch.no_grad():
        for name, layer in adapted.items():
            own = layer.get_base_layer()
            assert own.weight.dtype == bits
            beside = exact.get_submodule(name)
            close = beside.weight - unpacked(own)
            assert 0 < close.norm() / beside.weight.norm() < {"nf4": 0.12, "int8": 0.012}[base]  # what the rounding takes
            beside.weight.copy_(unpacked(own))
            if kind == "dora":  # its magnitudes began as those of the rounded weights
                exact.get_submodule(f"{name}.lora_magnitude_vector.default").weight.copy_(
                    network.get_submodule(f"{name}.lora_magnitude_vector.default").weight
                )
    loss_of(network)  # what the first pass sets up must hold for the second
    network.set_gradient_checkpointing(0.5)
    loss, reference = loss_of(network), loss_of(exact)
    loss.backward(), reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-4, atol=0)
    wanted = dict(exact.named_parameters())
    for name in said.names:
        torch.testing.assert_close(network.get_parameter(name).grad, wanted[name].grad, rtol=2e-3, atol=1e-5)
    assert {name for name, p in network.named_parameters() if p.grad is not None} == set(said.names)


@pytest.mark.parametrize("base", BASES)
def test_pictures_between_the_steps_change_nothing(base):
    network, said = chosen(base=base, targets="all_linear")
    network.train()
    loss_of(network).backward()
    first = {name: network.get_parameter(name).grad for name in said.names}
    network.zero_grad()
    with torch.no_grad():
        network.eval()
        loss_of(network)
        network.train()
        loss_of(network)
    loss_of(network).backward()
    assert all(torch.equal(network.get_parameter(name).grad, value) for name, value in first.items())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_the_velocity_of_a_quantised_network_is_float32_and_close(base, weights):
    plain, _ = twins(**DUAL)
    network, _ = chosen(weights=weights, base=base, targets="all_linear")
    network.train()
    with torch.no_grad():
        for parameter in (p for p in network.parameters() if p.requires_grad):
            parameter.zero_()
    given = inputs(plain)
    condition = Condition(given["encoder_hidden_states"], given["pooled_projections"])
    with torch.no_grad():
        found, expected = (velocity(n, given["hidden_states"], torch.tensor(0.3), condition) for n in (network, plain))
    assert found.dtype == torch.float32
    assert (found - expected).norm() / expected.norm() < {"nf4": 0.25, "int8": 0.02}[base]  # 64 numbers wide: little evens out


def test_nf4_of_other_widths_is_packed_in_smaller_blocks_or_refused():
    """bitsandbytes 0.50 unpacks such rows wrongly on a CPU, in silence."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32}
    network, _ = twins(**sizes)
    plain = network.transformer_blocks[0].attn.to_q.weight.detach().clone()
    choose_trainable(network, options_of(base="nf4", targets="feed_forward"))
    layer = network.transformer_blocks[0].attn.to_q
    assert layer.weight.quant_state.blocksize == 32 and (unpacked(layer) - plain).norm() / plain.norm() < 0.12
    network, _ = twins()
    says = "width divides by 32, this network has one of 48; use int8 or as_weights"
    with pytest.raises(InputError, match=says):
        choose_trainable(network, options_of(base="nf4"))
    assert len(adapters.trainable(network)) == len(list(network.parameters()))  # nothing of it was changed
    with torch.device("meta"), pytest.raises(InputError, match=says):
        check_base(MMDiT.from_config(dict(network.config)), AdapterOptions(base="nf4"), "cuda")
    check_base(network, AdapterOptions(base="int8"), "cpu")


def test_dora_on_8_bits_is_refused_on_a_cpu():
    network, _ = twins(**DUAL)
    with pytest.raises(InputError, match="kind=dora on base=int8 does not run on a CPU; use nf4"):
        choose_trainable(network, options_of(kind="dora", base="int8"))
    check_base(network, AdapterOptions(kind="dora", base="int8"), "cuda")


def test_a_missing_bitsandbytes_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what an import of a package that is not there finds
    network, _ = twins(**DUAL)
    with pytest.raises(InputError, match=r"train.adapter.base=nf4 needs bitsandbytes.*pip install 'latentfm\[optimizers\]'"):
        choose_trainable(network, options_of(base="nf4"))


# The base's fingerprint


def test_the_fingerprint_is_of_what_is_frozen():
    network, _ = twins(**DUAL)
    names = [name for name, _ in network.named_parameters() if name.startswith("transformer_blocks.1.")]
    before = base_fingerprint(network, names)
    assert before == base_fingerprint(twins(**DUAL)[0], names) != base_fingerprint(network)
    with torch.no_grad():
        network.transformer_blocks[1].ff.net[2].weight[0, 0] += 1
        assert base_fingerprint(network, names) == before
        network.proj_out.bias[3] += 1e-6
    assert base_fingerprint(network, names) != before
    assert base_fingerprint(twins(**DUAL | {"sample_size": 10})[0], names) != before


def test_a_fingerprint_does_not_depend_on_how_the_base_is_held():
    prints = {chosen(weights=weights, base=base, targets="attention")[1].base for weights in ("float32", "bfloat16")
              for base in ("as_weights", *BASES)}  # fmt: skip
    assert prints == {base_fingerprint(twins(**DUAL)[0])}
    assert chosen("1")[1].base not in prints
    other, _ = twins(seed=1, **DUAL)
    assert choose_trainable(other, options_of(rank=4)).base not in prints


def test_the_network_of_a_folder_is_adapted_on_its_class(tiny_folder):
    network = MMDiT.from_pretrained(tiny_folder, subfolder="transformer")
    said = choose_trainable(network, options_of(targets="feed_forward"))
    assert len(said.names) == 2 * 6 and adapters.trainable(network) == said.names
