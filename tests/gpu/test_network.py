"""The network on a GPU: every attention backend, autocast and its gradients, torch.compile, bases of 4 and 8 bits, rounding, offloading."""

import copy

import pytest
import torch
from models.twins import VARIANTS, inputs, twins

from latentfm.config import AdapterOptions, TrainOptions
from latentfm.models.backends import available_backends, check_backend
from latentfm.models.mmdit import MMDiT
from latentfm.models.schedule import Precomputed
from latentfm.training.adapters import cast_weights, choose_trainable
from latentfm.training.optimizers.adamw import AdamW, clip_gradient
from latentfm.training.optimizers.factory import make_optimizer
from latentfm.training.optimizers.state import optimizer_state, restore_optimizer_state

WIDE = VARIANTS["sd3.5-medium"] | {"attention_head_dim": 64, "num_attention_heads": 2, "caption_projection_dim": 128}
SHARED = {"flash", "efficient", "math", "cudnn"}  # what a GPU since Ampere computes


def given(model: MMDiT, device: torch.device, dtype: torch.dtype = torch.float32, shape: str = "square") -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in inputs(model, shape, dtype).items()}


def away(found: torch.Tensor, exact: torch.Tensor) -> float:
    """||found - exact|| / ||exact||."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def gradients(model, arguments: dict[str, torch.Tensor], autocast: bool = False) -> torch.Tensor:
    """The gradient of a regression by every parameter, as one vector in float64 on the CPU."""
    model.zero_grad()
    with torch.autocast(arguments["hidden_states"].device.type, torch.bfloat16, enabled=autocast):
        model(**arguments).sample.float().square().mean().backward()
    return torch.cat([parameter.grad.double().cpu().flatten() for _, parameter in sorted(model.named_parameters())])


# Attention


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_backend_agrees_with_math(device, dtype):
    model = twins(**WIDE)[0].to(device, dtype)
    names = available_backends(device, dtype, 64)
    assert names[0] == "auto" and (device.type == "cpu" or set(names) >= SHARED)
    with torch.no_grad():
        model.set_attention("math")
        expected = model(**given(model, device, dtype)).sample.float()
        for name in names:
            model.set_attention(name)
            found = model(**given(model, device, dtype)).sample.float()
            assert (found - expected).abs().max() < 2**-5 * expected.abs().max(), name


def test_every_backend_that_trains_has_the_gradient_of_math(device):
    model = twins(**WIDE)[0].to(device)
    model.set_attention("math")
    arguments = given(model, device)
    expected = gradients(model, arguments, autocast=True)
    tried = []
    for name in available_backends(device, torch.bfloat16, 64):
        try:
            check_backend(name, 2, 64, device, torch.bfloat16, training=True)
        except Exception:  # one that is for sampling says so there
            continue
        tried.append(name)
        model.set_attention(name)
        assert away(gradients(model, arguments, autocast=True), expected) < 0.02, name
    assert {"auto", "native", "math"} <= set(tried) and (device.type == "cpu" or {"flash", "efficient"} <= set(tried))


# Precision


@pytest.mark.parametrize("variant", ["sd3", "sd3.5-medium"])
@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast"])
def test_the_network_is_as_exact_as_diffusers(device, variant, how):
    """Against float64 on the CPU, output and gradient: in autocast too, where each operation has a precision of its own."""
    ours, theirs = twins(**VARIANTS[variant])
    exact = copy.deepcopy(theirs).double()
    wide = {name: value.double() for name, value in inputs(ours).items()}
    output, gradient = exact(**wide).sample.detach(), gradients(exact, wide)
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    errors = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.to(device, dtype)
        arguments = given(ours, device, dtype)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=how == "autocast"):
            found = model(**arguments).sample.cpu()
        errors[name] = away(found, output), away(gradients(model, arguments, autocast=how == "autocast"), gradient)
    bound = 1e-4 if how == "float32" else 0.05  # GPUs may multiply float32 numbers as tf32 where somebody allowed it
    for mine, other in zip(errors["ours"], errors["theirs"], strict=True):
        assert mine < bound and mine < 1.3 * other + 1e-6, errors


def test_a_training_step_takes_no_more_memory_than_diffusers(device, gpu_only):
    peaks = []
    for model in twins(**WIDE | {"num_layers": 8, "sample_size": 64, "pos_embed_max_size": 64}):
        model.to(device).train()
        arguments = given(model, device)
        arguments["hidden_states"] = torch.randn(4, 4, 64, 64, device=device)
        for name in ("encoder_hidden_states", "pooled_projections"):
            arguments[name] = arguments[name].repeat(2, *[1] * (arguments[name].ndim - 1))
        arguments["timestep"] = torch.full((4,), 500.0, device=device)
        gradients(model, arguments, autocast=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(model, arguments, autocast=True)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        model.cpu()
    assert peaks[0] < 1.02 * peaks[1]


# torch.compile


@torch._dynamo.config.patch(recompile_limit=16)  # three kinds of block, two sizes, with and without a gradient are twelve
def test_compiled_blocks_have_no_graph_break_and_are_not_compiled_again_for_a_size_seen_before(device):
    model = twins(num_layers=4, **WIDE)[0].to(device)
    plain = copy.deepcopy(model)
    model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    counts = []
    for shape in ("square", "wide", "square", "wide"):
        arguments = given(model, device, shape=shape)
        arguments["timestep"] = arguments["timestep"][:1].expand(arguments["hidden_states"].shape[0])
        with torch.no_grad():
            torch.testing.assert_close(model(**arguments).sample, plain(**arguments).sample, rtol=2e-3, atol=2e-3)
        assert away(gradients(model, arguments), gradients(plain, arguments)) < 2e-3
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[1] == counts[2] == counts[3], counts


def test_a_compiled_schedule_is_the_plain_one(device):
    model = twins(num_layers=4, **WIDE)[0].to(device)
    plain, times = copy.deepcopy(model), torch.tensor([1000.0, 700.0, 300.0])
    model.compile_repeated_blocks(fullgraph=True)
    ahead = [Precomputed(times), Precomputed(times)]
    with torch.no_grad():
        for time in times:
            arguments = given(model, device) | {"timestep": time.expand(2)}
            found, expected = (network(**arguments, precomputed=one).sample for network, one in zip((model, plain), ahead, strict=True))
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


# What is frozen in 4 and 8 bits, and bfloat16 weights


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_quantised_base_trains(device, base, kind):
    pytest.importorskip("bitsandbytes")
    if device.type == "cpu" and (base, kind) == ("int8", "dora"):
        pytest.skip("bitsandbytes has no such product on a CPU")
    network, _ = twins(qk_norm="rms_norm", dual_attention_layers=(0, 1), num_attention_heads=4, caption_projection_dim=64)
    adapter = AdapterOptions(rank=4, kind=kind, base=base, targets="all_linear")
    options = TrainOptions(adapter=adapter, weights="bfloat16", mixed_precision="no", seed=3)
    said = choose_trainable(network, options, device)
    network.to(device).train()
    cast_weights(network, options)
    network.set_gradient_checkpointing(0.5)
    arguments = given(network, device, torch.bfloat16)
    target = torch.randn_like(arguments["hidden_states"])
    optimizer = torch.optim.AdamW([network.get_parameter(name) for name in said.names], lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (network(**arguments).sample.float() - target.float()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw8bit", "adamw8bit"])
def test_the_state_of_8_bit_and_paged_optimizers_is_restored_to_the_bit(device, name):
    pytest.importorskip("bitsandbytes")
    options = TrainOptions(optimizer=name)
    big, again = (torch.nn.Linear(1000, 400, device=device) for _ in range(2))
    optimizer, other = (make_optimizer(dict(module.named_parameters()), options) for module in (big, again))
    big.weight.grad, big.bias.grad = torch.randn_like(big.weight), torch.randn_like(big.bias)
    optimizer.step()

    def names_of(module):
        return {id(parameter): name for name, parameter in module.named_parameters()}

    state = {key: value.detach().cpu().clone() for key, value in optimizer_state(optimizer, names_of(big)).items()}
    restore_optimizer_state(other, state, names_of(again))
    if "paged" in name and device.type == "cuda":
        assert optimizer.state[big.weight]["state1"].is_paged and other.state[again.weight]["state1"].is_paged
    again.load_state_dict(big.state_dict())
    for module, opt in ((big, optimizer), (again, other)):
        module.weight.grad, module.bias.grad = torch.ones_like(module.weight), torch.ones_like(module.bias)
        opt.step()
    assert torch.equal(big.weight, again.weight) and torch.equal(big.bias, again.bias)


def test_bfloat16_weights_move_as_float32_ones_in_the_mean_and_repeat_themselves(device):
    def moved(seed: int, weights: torch.dtype) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.full((1 << 16,), 1.0, dtype=weights, device=device))
        optimizer = AdamW([weight], lr=1e-4, weight_decay=0.0, moments=weights, seed=seed)
        for _ in range(20):
            weight.grad = torch.full_like(weight, 0.5)
            optimizer.step()
        return weight.detach().float()

    exact, rounded = moved(0, torch.float32), moved(0, torch.bfloat16)
    assert (1.0 - exact).mean() > 1e-3  # half of the distance to the next bfloat16 number: rounding to the nearest would not move
    assert abs((rounded - exact).mean().item()) < 2e-5
    assert torch.equal(rounded, moved(0, torch.bfloat16)) and not torch.equal(rounded, moved(1, torch.bfloat16))


def test_the_norm_of_bfloat16_gradients_is_float32s(device):
    parameters = [torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16, device=device)) for _ in range(3)]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.randn(1000, generator=torch.Generator().manual_seed(number)).to(device, torch.bfloat16)
    exact = torch.stack([parameter.grad.double().norm() for parameter in parameters]).norm()
    norm = clip_gradient(parameters, 1.0)
    assert norm.dtype == torch.float32 and abs(norm.double() / exact - 1) < 1e-5
    assert abs(torch.stack([parameter.grad.double().norm() for parameter in parameters]).norm() - 1) < 1e-2


def test_weights_in_8_bits_compute_in_bfloat16(device):
    model = twins(**WIDE)[0].to(device, torch.bfloat16)
    with torch.no_grad():
        expected = model(**given(model, device, torch.bfloat16)).sample
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
        found = model(**given(model, device, torch.bfloat16)).sample
    assert model.transformer_blocks[0].ff.net[2].weight.dtype == torch.float8_e4m3fn
    assert 0 < away(found.cpu(), expected.cpu()) < 0.2
