"""Closed-form memory against what autograd keeps, byte for byte, and against the peak of real training steps."""

import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentfm import flow
from latentfm.config import TrainOptions
from latentfm.models import onednn, schedule
from latentfm.models.linears import LORA_TARGETS
from latentfm.models.mmdit import MMDiT
from latentfm.planning import memory, sampling
from latentfm.planning.cost import Decoder, Network, lora_parameters, parameters
from latentfm.planning.memory import (
    Training,
    block_activations,
    block_copies,
    drawing_phases,
    end_activations,
    end_copies,
    forward_memory,
    fullest,
    optimizer_bytes,
    training_phases,
)
from latentfm.training.optimizers.factory import make_optimizer
from latentfm.training.precision import has_bfloat16

SMALL = {
    "sample_size": 16, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 3, "attention_head_dim": 32,
    "num_attention_heads": 3, "joint_attention_dim": 72, "caption_projection_dim": 96, "pooled_projection_dim": 40,
    "pos_embed_max_size": 16,
}  # fmt: skip
VARIANTS = {"plain": {}, "qk-norm": {"qk_norm": "rms_norm"}, "dual": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}}
TOKENS = {"more image": (64, 7), "more text": (16, 50), "long": (16, 250)}
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@contextmanager
def gpu_autocast():
    """Autocast for traced CUDA tensors, which torch.autocast refuses where there is no CUDA device."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def network_of(config, run: Training) -> MMDiT:
    network = MMDiT(**config).train()
    if run.precision == "bfloat16":
        network.to(torch.bfloat16)
    if run.rank:
        network.requires_grad_(False)
        network.add_adapter(LoraConfig(r=run.rank, target_modules=list(LORA_TARGETS)))
    if run.wide_adapters:
        for parameter in network.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return network


def to_traced_gpu(network: MMDiT) -> None:
    """Gives the network tensors without memory that say they are a GPU's; within a FakeTensorMode."""
    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                module._parameters[name] = torch.nn.Parameter(empty, value.requires_grad)
        for name, value in module._buffers.items():
            module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")


@pytest.fixture(autouse=True)
def pytorchs_products(monkeypatch):
    """Those of most processors. By oneDNN's, which are taken on some, no copy of the attention's output is kept: a little less."""
    monkeypatch.setattr(onednn, "ALWAYS", False)


def kept_for_backward(network: MMDiT, run: Training, device: str) -> int:
    """Bytes of all storages that autograd keeps of one forward pass, the parameters aside."""
    config, dtype = network.config, torch.bfloat16 if run.precision == "bfloat16" else torch.float32
    own = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        state_of_dropout = tensor.dtype == torch.uint64  # 24 bytes a flash attention
        copy_of_a_norm = tensor.shape == (config.attention_head_dim,)
        if storage._cdata not in own and not state_of_dropout and not copy_of_a_norm:
            found[storage._cdata] = (tensor, storage.nbytes())  # the tensor too, so that its storage's place is not used again
        return tensor

    side = config.patch_size * int(run.image**0.5)
    given = {
        "hidden_states": torch.randn(run.batch, config.in_channels, side, side, dtype=dtype, device=device),
        "encoder_hidden_states": torch.randn(run.batch, run.text, config.joint_attention_dim, dtype=dtype, device=device),
        "pooled_projections": torch.randn(run.batch, config.pooled_projection_dim, dtype=dtype, device=device),
        "timestep": torch.rand(run.batch, device=device),
    }
    autocast = gpu_autocast() if device == "cuda" else torch.autocast("cpu", dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast if run.precision == "autocast" else nullcontext():
        network(**given)
    return sum(size for _, size in found.values())


def predicted(net: Network, run: Training) -> int:
    blocks = sum(block_activations(net, i, run) + block_copies(net, i, run) for i in range(net.layers))
    return blocks + end_activations(net, run) + end_copies(net, run)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16", "bfloat16 under float32 adapters"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_activations_are_what_autograd_keeps_to_the_byte(device, precision, variant, rank, monkeypatch):
    """"cuda" traces CUDA's kernels without running them; flash attention by name, since no device is there to be asked for its choice."""

    def flash(query, key, value, **_):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    config, (precision, _, adapters) = SMALL | VARIANTS[variant], precision.partition(" ")
    if adapters and rank is None:
        pytest.skip("there is no adapter")
    for batch, (image, text) in zip((1, 3, 2), TOKENS.values(), strict=True):
        run = Training(image, text, batch, precision, rank, cpu=device == "cpu", wide_adapters=bool(adapters))
        network = network_of(config, run)
        with FakeTensorMode() if device == "cuda" else nullcontext():
            if device == "cuda":
                monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
                to_traced_gpu(network)
            assert kept_for_backward(network, run, device) == predicted(Network.of(config), run)


bfloat16 = pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="takes minutes where bfloat16 is imitated")


@pytest.mark.parametrize(
    "case",
    [
        {"precision": "float32", "qk_norm": True, "dual": 2},
        pytest.param({"precision": "autocast", "qk_norm": True, "dual": 2}, marks=bfloat16),
        pytest.param({"precision": "bfloat16", "rank": 8, "checkpointing": 0.5, "layers": 6, "batch": 12}, marks=bfloat16),
    ],
    ids=["training", "training in mixed precision", "LoRA, half checkpointed"],
)
def test_the_peak_of_a_real_step_is_within_a_tenth(case, monkeypatch):
    """At a few hundred MB, in a process of its own; scripts/bench_memory.py has the large ones."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_memory

    case = {"layers": 4, "heads": 4, "image": 576, "text": 77, "batch": 8} | case
    _, expected = bench_memory.predicted(case)
    assert expected > 1e8
    assert bench_memory.measured(case) == pytest.approx(expected, rel=0.1)


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, those of a network aside, and their most."""

    def __init__(self, network):
        super().__init__()
        self.own = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes and storage._cdata not in self.own:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, storage._cdata)
        return out

    def gone(self, key):
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize("decoder", [Decoder(), Decoder((32, 64, 128), 1, 12)])
def test_decoding_takes_what_its_widest_layers_do(decoder):
    levels = len(decoder.channels)
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=decoder.channels, layers_per_block=decoder.layers, latent_channels=decoder.latent_channels,
        )  # fmt: skip
    with torch.no_grad(), Live(vae) as live:
        vae.decode(torch.empty(1, decoder.latent_channels, 24, 24, device="meta"))  # small: here attention makes its scores
    assert live.most == pytest.approx(4 * decoder.numbers((24 * decoder.factor) ** 2), rel=0.07)


@pytest.mark.parametrize(("image", "text"), [(256, 20), (64, 150)])
def test_a_forward_pass_takes_what_its_attention_or_feed_forward_does(image, text):
    run = Training(image, text, 2, "float32")
    network, net = network_of(SMALL, run).eval(), Network.of(SMALL)
    side = 2 * int(image**0.5)
    given = (torch.randn(2, 16, side, side), torch.randn(2, text, 72), torch.randn(2, 40), torch.rand(2))
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), Live(network) as live:  # as on a GPU
        network(*given)
    assert live.most == pytest.approx(forward_memory(net, image, text, 2, 4), rel=0.1)


RUN = Training(1024, 333, 4)
NET = Network.of(SMALL | {"num_layers": 8, "num_attention_heads": 12, "qk_norm": "rms_norm"})


def at(name: str, run: Training) -> dict[str, int]:
    """The parts of the fullest of the phases whose name begins so."""
    return fullest([phase for phase in training_phases(NET, run) if phase.name.startswith(name)]).parts


@pytest.mark.parametrize("rank", [None, 4])
def test_muon_keeps_half_for_the_blocks_matrices(rank):
    run = Training(64, 20, 1, "float32", rank, matrices=True)
    network, net = network_of(SMALL, run), Network.of(SMALL)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(trained, TrainOptions(optimizer="muon"))
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = sum(tensor.nbytes for state in optimizer.state.values() for name, tensor in state.items() if name != "step")
    assert kept == optimizer_bytes(net, run, sum(p.numel() for p in trained.values()))
    assert kept < 0.6 * optimizer_bytes(net, replace(run, matrices=False), sum(p.numel() for p in trained.values()))


def test_weights_gradients_and_optimizer_are_bytes_a_parameter():
    count = sum(parameters(NET).values())
    adapters = sum(lora_parameters(NET, i, 4) for i in range(8))
    wanted = {  # weights, gradients, optimizer, averages
        RUN: (4, 4, 8, 4),
        replace(RUN, precision="bfloat16"): (2, 2, 8, 4),
        replace(RUN, precision="bfloat16", master=True): (2, 2, 12, 4),
        replace(RUN, precision="bfloat16", narrow_moments=True): (2, 2, 4, 4),
    }
    names = ("weights", "gradients", "optimizer", "averages (EMA)")
    for run, each in wanted.items():
        parts = at("optimizer step", run)
        assert tuple(parts.get(name, 0) for name in names) == tuple(count * size for size in each)
    parts = at("optimizer step", replace(RUN, rank=4))
    assert tuple(parts[name] for name in names) == (4 * (count + adapters), *(adapters * size for size in (4, 8, 4)))


def test_sharding_divides_what_a_copy_repeats():
    alone, sharded = (at("optimizer step", run) for run in (RUN, replace(RUN, shards=4)))
    for part in ("weights", "gradients", "optimizer", "averages (EMA)"):
        assert sharded[part] == alone[part] // 4
    assert sharded["position table"] == alone["position table"] and "gathered weights" in sharded
    assert "bfloat16 copies" not in at("backward pass", replace(RUN, shards=4))


def test_offloading_leaves_nothing_of_what_is_split_on_the_gpu_between_its_uses():
    sharded, offloaded = (at("optimizer step", replace(RUN, shards=4, offloaded=off)) for off in (False, True))
    assert {part for part in sharded if part not in offloaded} == {"weights", "gradients", "optimizer", "averages (EMA)"}
    assert {part: sharded[part] for part in offloaded} == offloaded and "gathered weights" in offloaded


def test_what_the_code_works_on_at_one_time_is_what_is_counted():
    assert memory.MODULATIONS == schedule.ROWS
    solvers = {**flow.SOLVERS, "euler_maruyama": flow.EulerMaruyama, "stochastic_heun": flow.StochasticHeun}
    assert {name: solver.evaluations_per_step for name, solver in solvers.items()} | {"dormand_prince": None} == sampling.SOLVERS


def test_checkpointing_saves_more_the_more_blocks_it_takes():
    """But for the first, which is the last block: its activations are there at once again."""
    peaks = [fullest(training_phases(NET, replace(RUN, checkpointing=share / 8))).total for share in range(9)]
    assert peaks[0] == peaks[1] and peaks[1:] == sorted(peaks[1:], reverse=True)
    kept = [at("end of the forward", replace(RUN, checkpointing=share))["activations"] for share in (0.0, 1.0)]
    assert kept[1] < 0.1 * kept[0]


def test_accumulated_gradients_are_there_in_the_forward_pass():
    before, during = (at("end of the forward", replace(RUN, accumulated=kept)) for kept in (False, True))
    assert during == before | {"gradients": 4 * sum(parameters(NET).values())}


def test_sample_pictures_and_the_cache_have_moments_of_their_own():
    run = replace(RUN, pictures=8, decoding=10**9, encoders=10**10, frozen=10**8)
    phases = {phase.name: phase for phase in training_phases(NET, run)}
    assert phases["filling the cache"].total == 10**10 + 10**8
    aside = phases["drawing sample pictures"].parts
    assert aside["weights put aside"] == 4 * sum(parameters(NET).values()) and aside["working memory"] == 10**9
    assert "drawing sample pictures" not in {phase.name for phase in training_phases(NET, RUN)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weights_that_drawing_on_a_cpu_lays_out_are_counted(variant, monkeypatch):
    network, net = MMDiT(**SMALL | VARIANTS[variant]), Network.of(SMALL | VARIANTS[variant])
    size = sum(weight.nbytes for weight in onednn.laid_out_weights(network))
    assert size == memory.laid_out(net, 4) > 0 and memory.LAID_OUT == onednn.MOST
    run = replace(RUN, pictures=8, precision="float32")
    parts = [at("drawing", replace(run, cpu=cpu, precision=precision)).get("weights laid out", 0)
             for cpu, precision in ((True, "float32"), (True, "bfloat16"), (True, "autocast"), (False, "float32"))]  # fmt: skip
    assert parts == [memory.laid_out(NET, 4), memory.laid_out(NET, 2), 0, 0]
    monkeypatch.setattr(memory, "LAID_OUT", size - 1)
    monkeypatch.setattr(onednn, "MOST", size - 1)
    assert not onednn.laid_out_weights(network) and memory.laid_out(net, 4) == 0


def test_drawing_guided_takes_twice_the_working_memory():
    once, twice = (drawing_phases(NET, 1024, 333, 2, guided, 28, 2, 10**9, 0)[0].parts for guided in (False, True))
    for part in ("working memory", "modulations of steps ahead"):
        assert twice[part] == 2 * once[part]
    assert once["text encoders and VAE"] == 10**9
