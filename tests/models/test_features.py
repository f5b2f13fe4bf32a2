"""diffusers' own calls on an MMDiT, and on the pipeline: what each promises, against the plain model."""

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SD3Transformer2DModel,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_layer_skip
from models.twins import VARIANTS, difference, inputs, twins
from models.two_processes import together
from peft import LoraConfig
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from latentfm import LatentFMPipeline
from latentfm.models.block import Block
from latentfm.models.mmdit import MMDiT
from latentfm.models.routing import TokenRoute
from latentfm.models.schedule import Precomputed

DUAL = VARIANTS["sd3.5-medium"]
TIMES = [1000.0, 800.0, 600.0, 400.0, 200.0, 50.0]


class Schedule:
    """Runs a model at TIMES as a sampler does, and counts the attentions computed."""

    def __init__(self, model: MMDiT):
        self.model, self.now, self.calls = model, 1000.0, 0
        for block in model.transformer_blocks:
            block.attn.to_k.register_forward_hook(self.count)

    def count(self, *_) -> None:
        self.calls += 1

    @torch.no_grad()
    def __call__(self, **extra) -> tuple[Tensor, int]:
        self.calls, found = 0, []
        for self.now in TIMES:
            with self.model.cache_context("guided"):
                given = inputs(self.model) | {"timestep": torch.tensor([self.now, self.now])}
                found.append(self.model(**given, **extra).sample)
        self.model._reset_stateful_cache()  # as diffusers' pipelines do at the end
        return torch.stack(found), self.calls


GUIDED = ["hidden_states", "encoder_hidden_states", "timestep", "pooled_projections"]  # what FasterCache halves
CACHES: dict[str, tuple[Callable, Callable]] = {  # by name: a configuration that changes nothing, and one that saves work
    "first block": (lambda now: FirstBlockCacheConfig(threshold=0.0), lambda now: FirstBlockCacheConfig(threshold=1.0)),
    "pyramid": tuple(
        lambda now, n=n: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=n, spatial_attention_timestep_skip_range=(100, 900), current_timestep_callback=now
        )
        for n in (1, 2)
    ),
    "TaylorSeer": tuple(
        lambda now, n=n: TaylorSeerCacheConfig(cache_interval=n, disable_cache_before_step=2, taylor_factors_dtype=torch.float32)
        for n in (1, 3)
    ),
    "TaylorSeer lite": tuple(
        lambda now, n=n: TaylorSeerCacheConfig(
            cache_interval=n, disable_cache_before_step=2, taylor_factors_dtype=torch.float32, use_lite_mode=True
        )
        for n in (1, 3)
    ),
    "MagCache": tuple(lambda now, t=t: MagCacheConfig(threshold=t, num_inference_steps=6, mag_ratios=[1.01] * 6) for t in (0.0, 1.0)),
    "FasterCache": tuple(
        lambda now, last=last: FasterCacheConfig(
            tensor_format="BCHW", spatial_attention_timestep_skip_range=(-1, last), unconditional_batch_timestep_skip_range=(-1, last),
            current_timestep_callback=now, attention_weight_callback=lambda _: 0.3,
            _unconditional_conditional_input_kwargs_identifiers=GUIDED,
        )
        for last in (-1, 900)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("variant", ["sd3", "sd3.5-medium"])
def test_caches_of_enable_cache(variant, name):
    model = twins(num_layers=4, **VARIANTS[variant])[0]
    run = Schedule(model)
    plain, every = run()
    assert every == 6 * 4 and not model.is_cache_enabled
    exact, saving = (make(lambda: run.now) for make in CACHES[name])
    model.enable_cache(exact)
    found, calls = run()
    assert torch.equal(found, plain) and calls == every
    model.disable_cache()
    model.enable_cache(saving)
    found, calls = run()
    assert calls < every or name == "FasterCache"  # this one saves half of the guided batch instead
    assert 0 < (found - plain).abs().mean() < 0.5 * plain.abs().mean()
    again, _ = run()
    assert torch.equal(found, again)  # nothing is left over from the run before
    model.disable_cache()
    found, calls = run()
    assert torch.equal(found, plain) and calls == every


def test_faster_cache_halves_the_guided_batch_of_a_schedule_computed_ahead_too():
    model = twins(num_layers=4, **DUAL)[0]
    run, rows = Schedule(model), []
    plain, _ = run()
    model.enable_cache(CACHES["FasterCache"][1](lambda: run.now))
    model.proj_out.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
    expected, _ = run()
    assert rows == [2, 1, 1, 1, 1, 2]
    precomputed, found = Precomputed(torch.tensor(TIMES)), []
    with torch.no_grad():
        for run.now in TIMES:
            with model.cache_context("guided"):
                given = inputs(model) | {"timestep": torch.tensor([run.now, run.now])}
                found.append(model(**given, precomputed=precomputed).sample)
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("skipped", [[1], [0, 2]])
def test_layer_skip_is_skip_layers(skipped):
    model = twins(num_layers=4, **DUAL)[0]
    with torch.no_grad():
        expected = model(**inputs(model), skip_layers=skipped).sample
        apply_layer_skip(model, LayerSkipConfig(indices=skipped, fqn="transformer_blocks"))
        assert torch.equal(model(**inputs(model)).sample, expected)


def counted(model: MMDiT, **options) -> CompileCounterWithBackend:
    """Compiles the model's blocks and returns what counts how often a block was compiled."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter, **options)
    return counter


def test_compiled_blocks_are_compiled_once_for_all_steps():
    model = twins(num_layers=5, **DUAL)[0]  # two dual blocks, two plain ones, the last
    plain, counter = copy.deepcopy(model), counted(model)
    precomputed = Precomputed(torch.tensor(TIMES))
    with torch.no_grad():
        for time in TIMES:
            given = inputs(model) | {"timestep": torch.tensor([time, time])}
            found, expected = model(**given, precomputed=precomputed).sample, plain(**given).sample
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert counter.frame_count == 3  # one for each kind of block, none for a step
        for time in TIMES:
            model(**inputs(model) | {"timestep": torch.tensor([time, time])})
        assert counter.frame_count == 6  # and once more without a schedule
    torch.compiler.reset()


def test_compiled_blocks_take_other_sizes_without_end():
    model = twins(num_layers=3, **DUAL)[0]
    plain, counter, counts = copy.deepcopy(model), counted(model, dynamic=True), []
    with torch.no_grad():
        for rows, columns, tokens in ((4, 4, 9), (8, 4, 9), (8, 8, 12), (6, 10, 7), (16, 6, 20)):
            given = inputs(model)
            given["hidden_states"] = torch.randn(2, 4, rows, columns)
            given["encoder_hidden_states"] = torch.randn(2, tokens, 40)
            torch.testing.assert_close(model(**given).sample, plain(**given).sample, rtol=1e-4, atol=1e-5)
            counts.append(counter.frame_count)
    assert counts[-1] == counts[-2] == counts[-3] <= 4
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("fraction", "extra"),
    [
        (0, {"token_route": TokenRoute(torch.arange(6).expand(2, -1), 0, 0)}),
        pytest.param(0, {}, marks=pytest.mark.slow),
        pytest.param(0, {"encoder_attention_mask": torch.arange(9) < torch.tensor([[3], [9]])}, marks=pytest.mark.slow),
        pytest.param(1, {"token_route": TokenRoute(torch.arange(6).expand(2, -1), 0, 0)}, marks=pytest.mark.slow),
    ],
    ids=["route", "plain", "mask", "route and recomputed"],
)
def test_compiled_blocks_train(fraction, extra):
    model = twins(num_layers=2, **VARIANTS["sd3.5-large"])[0]
    plain, counter = copy.deepcopy(model), counted(model)
    model.set_gradient_checkpointing(fraction)
    for network in (model, plain):
        network(**inputs(network), **extra).sample.square().mean().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert counter.frame_count >= 2
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_compiled_by_inductor(dtype):
    model = twins(num_layers=3, **DUAL)[0].to(dtype)
    plain = copy.deepcopy(model)
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True)
    given = inputs(model, dtype=dtype)
    with torch.no_grad():
        found, expected = model(**given).sample.float(), plain(**given).sample.float()
    assert (found - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-5) * expected.abs().max()
    for network in (model, plain):
        network(**given).sample.float().square().mean().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        off = (one.grad - other.grad).float().norm()
        assert off <= (1e-4 if dtype == torch.float32 else 0.1) * max(other.grad.float().norm(), 1e-3)
    torch.compiler.reset()


def test_layerwise_casting_stores_eight_bits_and_computes_in_sixteen():
    model, theirs = (network.bfloat16() for network in twins(**DUAL))
    given = inputs(model, dtype=torch.bfloat16)
    with torch.no_grad():
        plain = model(**given).sample
        for network in (model, theirs):
            network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        found, expected = model(**given).sample, theirs(**given).sample
    stored = {name: value.dtype for name, value in model.named_parameters()}
    assert stored == {name: value.dtype for name, value in theirs.named_parameters()}
    assert {stored["transformer_blocks.0.attn.to_q.weight"], stored["context_embedder.weight"]} == {torch.float8_e4m3fn}
    assert {stored["transformer_blocks.0.norm1.linear.weight"], stored["pos_embed.proj.weight"]} == {torch.bfloat16}
    assert found.dtype == torch.bfloat16 and (found - plain).abs().max() > 0.01
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-6, atol=2**-6 * expected.abs().max().item())
    with torch.no_grad():
        ahead = model(**given | {"timestep": torch.tensor([500.0])}, precomputed=Precomputed(torch.tensor([500.0]))).sample
        torch.testing.assert_close(ahead, model(**given | {"timestep": torch.tensor([500.0])}).sample, rtol=2**-6, atol=2**-6)


def test_a_lora_trains_on_weights_in_eight_bits():
    model = twins(**DUAL)[0].requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    left = (*model._skip_layerwise_casting_patterns, "lora_")
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32, skip_modules_pattern=left)
    model(**inputs(model)).sample.square().mean().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(grad is not None and grad.abs().max() > 0 for grad in trained.values())


@pytest.mark.parametrize("how", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}], ids=str)
def test_group_offload(how):
    """Both devices are the CPU here: that the hooks find everything the forward pass uses; the gpu tests move it."""
    model = twins(**DUAL)[0]
    with torch.no_grad():
        plain = model(**inputs(model)).sample
        model.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **how)
        for precomputed in (None, Precomputed(inputs(model)["timestep"][:1])):
            times = inputs(model)["timestep"] if precomputed is None else inputs(model)["timestep"][:1]
            found = model(**inputs(model) | {"timestep": times}, precomputed=precomputed).sample
            assert (found[0] - plain[0]).abs().max() <= 1e-6 * plain.abs().max()


@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"low_cpu_mem_usage": False}, {"device_map": {"": "cpu"}}], ids=str)
def test_from_pretrained(options, tmp_path):
    model = twins(**DUAL)[0]
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert difference(MMDiT.from_pretrained(tmp_path, **options), model, **inputs(model)) == 0
    half = MMDiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, **options)
    stock = SD3Transformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, **options)
    dtypes = [{name: value.dtype for name, value in network.state_dict().items()} for network in (half, stock)]
    assert dtypes[0] == dtypes[1]
    if options == {"low_cpu_mem_usage": False}:
        return  # which leaves the first of several files in float32, in diffusers 0.42
    assert set(dtypes[0].values()) == {torch.bfloat16}
    given = inputs(model, dtype=torch.bfloat16)
    with torch.no_grad():
        found, expected = half(**given).sample.float(), model(**inputs(model)).sample
    assert 0 < (found - expected).square().mean().sqrt() < 0.03 * expected.std()


def test_gradient_checkpointing_by_diffusers_names():
    model = twins(**DUAL)[0]
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing and all(model.checkpointed(i) for i in range(3))
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing and not any(model.checkpointed(i) for i in range(3))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | str]:
    """What two processes found, once for all the tests of this module."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    return together(tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize(
    "name", ["ulysses", "skip_layers", "precomputed", "ulysses_anything, nine text tokens", "ulysses_anything, three heads"]
)
def test_tokens_over_two_processes(found, name):
    assert found[name] <= 1e-5 < found["scale"]


def test_what_cannot_be_computed_over_two_processes_says_so(found):
    assert found["nine text tokens"] == (
        "16 image tokens, 9 text tokens and 4 heads do not divide over 2 processes; "
        "ContextParallelConfig(ulysses_anything=True), or ring_anything=True, takes any number"
    )
    for name in ("encoder_attention_mask", "token_route", "block_controlnet_hidden_states"):
        assert found[name].startswith(f"{name} cannot be used with context parallelism")


@pytest.mark.parametrize("name", ["DDP", "FSDP2"])
def test_a_step_of_two_processes_is_one_processs(found, name):
    assert found[name] <= 1e-5 and found["step"] > 0.1
    assert found[f"{name} sample"] <= 1e-4


def draw(pipe: LatentFMPipeline, **options) -> Tensor:
    """The latents of two pictures by six guided steps."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipe(
        ["a red apple", "a blue car"], num_inference_steps=6, guidance_scale=3, generator=generators, output_type="latent", **options
    ).images


@pytest.mark.parametrize("name", [name for name in CACHES if name != "FasterCache"])
def test_caches_in_the_pipeline(tiny_folder, name):
    pipe, now = LatentFMPipeline.from_pretrained(tiny_folder), [1000.0]
    plain = draw(pipe)

    def after(pipe: LatentFMPipeline, index: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        now[0] = time.item()
        return {}

    exact, saving = (make(lambda: now[0]) for make in CACHES[name])
    pipe.transformer.enable_cache(exact)
    assert torch.equal(draw(pipe, callback_on_step_end=after), plain)
    pipe.transformer.disable_cache()
    calls = []
    pipe.transformer.transformer_blocks[-1].attn.to_k.register_forward_hook(lambda *_: calls.append(1))
    pipe.transformer.enable_cache(saving)
    cached = draw(pipe, callback_on_step_end=after)
    assert len(calls) < 6 and 0 < (cached - plain).abs().mean() < 0.5 * plain.std()
    assert torch.equal(draw(pipe, callback_on_step_end=after), cached)
    pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe), plain)


def test_the_pipeline_with_compiled_fused_and_offloaded_networks(tiny_folder):
    pipe = LatentFMPipeline.from_pretrained(tiny_folder)
    plain = draw(pipe)
    pipe.transformer.fuse_qkv_projections()
    torch.testing.assert_close(draw(pipe), plain, rtol=1e-4, atol=1e-4)
    pipe.transformer.unfuse_qkv_projections()
    counter = counted(pipe.transformer)
    torch.testing.assert_close(draw(pipe), plain, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2
    torch.compiler.reset()
    pipe = LatentFMPipeline.from_pretrained(tiny_folder)
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(draw(pipe), plain, rtol=1e-4, atol=1e-4)


def test_what_diffusers_asks_of_the_class():
    assert MMDiT._no_split_modules == MMDiT._repeated_blocks == [Block.__name__]
    model = twins()[0]
    assert model._keep_in_fp32_modules is None and MMDiT._supports_group_offloading
