"""Time MMDiT beside diffusers' SD3Transformer2DModel: same weights, same inputs, same process, taken in turn, median of several.

    python scripts/bench_mmdit.py                                     # all parts; three quarters of an hour on two CPU cores
    python scripts/bench_mmdit.py --parts sampling                    # the bundled model's 28 guided steps: a minute
    python scripts/bench_mmdit.py --parts forward --pixels 256 --batch 1 2 --dtype bfloat16
    python scripts/bench_mmdit.py --device cuda                       # the whole 24-layer SD3 medium in bf16, with TFLOP/s

Parts: forward (SD3 medium's width; "in sampling" is one step of a schedule whose modulations and projected text are computed once),
compiled (the same with torch.compile on each block of both), training (forward, backward, fused AdamW; eager, and compiled on a GPU),
sampling (the bundled model through both pipelines), profile (where the time goes). Memory is scripts/bench_memory.py's.
Cells that take longer than a minute a round are run three times, all others seven; each row says how often.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from ceilings import at_best, ceilings, in_words, moved_by_adamw, seconds
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from latentfm import LatentFMPipeline, MMDiT, bundled_model
from latentfm.models.presets import PRESETS
from latentfm.models.schedule import Precomputed
from latentfm.planning.cost import Network, forward_flops

PARTS = ("forward", "compiled", "training", "sampling", "profile")
TEXT_TOKENS = 77 + 256
STEPS = 28
KINDS = {
    "matrix products": ("addmm", "aten::mm", "aten::bmm", "linear_pointwise", "latentfm::product", "gemm", "cutlass", "nvjet", "conv"),
    "attention": ("attention", "flash", "fmha", "cudnn_generated"),
    "GELU": ("gelu",),
    "optimizer": ("adam",),
    "norms, modulation, sums, copies": (
        "norm", "mul", "add", "copy", "cat", "sum", "elementwise", "reduce", "sub", "div", "fill", "zero_", "triton", "vectorized",
    ),
}  # fmt: skip


def twins(config: dict, device: str, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """diffusers' network and ours with the same random weights, in evaluation mode."""
    torch.manual_seed(0)
    with torch.device(device):
        theirs, ours = SD3Transformer2DModel(**config).to(dtype).eval(), MMDiT(**config).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return {"diffusers": theirs, "latentfm": ours}


def inputs(config: dict, pixels: int, batch: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Latents of `pixels` x `pixels` pictures through a factor-8 VAE, with SD3's text."""
    side = pixels // 8
    return {
        "hidden_states": torch.randn(batch, 16, side, side, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, config["joint_attention_dim"], device=device, dtype=dtype),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"], device=device, dtype=dtype),
        "timestep": torch.full((batch,), 500.0, device=device),
    }


def compare(calls: dict[str, Callable[[], object]], device: str, repeats: int) -> tuple[dict[str, float], int]:
    """(median seconds of each call, how often each was run): one warm-up round, then rounds of each in turn."""
    warm = [seconds(call, device) for call in calls.values() for _ in range(2)]
    repeats = min(repeats, 3) if sum(warm) / 2 > 60 else repeats
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(seconds(call, device))
    return {name: statistics.median(values) for name, values in taken.items()}, repeats


def flops(config: dict, pixels: int, training: bool) -> float:
    """Floating-point operations of one picture's forward pass, or forward and backward, in SD3Transformer2DModel."""
    with torch.device("meta"):
        network, given = SD3Transformer2DModel(**config), inputs(config, pixels, 1, "meta", torch.float32)
    with FlopCounterMode(display=False) as counter:
        out = network(**given).sample
        if training:
            out.sum().backward()
    return counter.get_total_flops()


def row(label: str, found: dict[str, float], repeats: int, best: float) -> None:
    """One line: milliseconds, ratios to diffusers, and of ours the share of the roof, at which it would take `best` seconds."""
    base = found["diffusers"]
    times = "  ".join(f"{name} {value * 1e3:8.1f} ms ({base / value:.2f}x)" for name, value in found.items())
    fastest = min(value for name, value in found.items() if name != "diffusers")
    print(f"{label:<34} {times}   {best / fastest:.0%} of the roof   [{repeats}]", flush=True)


def compile_blocks(models: dict[str, torch.nn.Module]) -> None:
    """torch.compile on each block: ours by MMDiT's method, diffusers' as it comes, each size and length for itself."""
    torch._dynamo.config.recompile_limit = 64
    models["latentfm"].compile_repeated_blocks()
    for block in models["diffusers"].transformer_blocks:
        block.compile()


def forward(models: dict[str, torch.nn.Module], config: dict, options: argparse.Namespace, dtype: torch.dtype, compiled: bool) -> None:
    roof = ceilings(options.device, dtype)
    print(f"\nforward, {'compiled' if compiled else 'eager'}, {config['num_layers']} layers, {dtype}; {in_words(roof)}")
    if compiled:
        compile_blocks(models)
    for pixels in options.pixels:
        work = flops(config, pixels, training=False)
        for batch in options.batch:
            given = inputs(config, pixels, batch, options.device, dtype)
            times = torch.linspace(1000.0, 30.0, STEPS)
            scheduled = given | {"timestep": times[:1]}, Precomputed(times)
            calls = {
                "diffusers": lambda given=given: models["diffusers"](**given),
                "latentfm": lambda given=given: models["latentfm"](**given),
                "in sampling": lambda scheduled=scheduled: models["latentfm"](**scheduled[0], precomputed=scheduled[1]),
            }
            with torch.no_grad():
                found, repeats = compare(calls, options.device, options.repeats)
            row(f"  {pixels} px, batch {batch}", found, repeats, at_best(roof, work * batch))


def training(config: dict, options: argparse.Namespace, weights: torch.dtype, dtype: torch.dtype, compiled: bool) -> None:
    """One optimizer step of plain regression; float32 `weights` with bfloat16 `dtype` are autocast's."""
    roof = ceilings(options.device, dtype)
    kind = f"{'compiled' if compiled else 'eager'}, {config['num_layers']} layers, {dtype} products, {weights} weights"
    print(f"\nforward + backward + AdamW, {kind}; {in_words(roof)}")
    for pixels in options.pixels:
        work = flops(config, pixels, training=True)
        for batch in options.train_batch:
            models = twins(config, options.device, weights)
            if compiled:
                compile_blocks(models)
            given = inputs(config, pixels, batch, options.device, weights)
            calls = {}
            for name, model in models.items():
                optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5, fused=True)

                def step(model=model, optimizer=optimizer, given=given) -> None:
                    with torch.autocast(options.device, dtype, enabled=dtype != weights):
                        loss = model(**given).sample.float().square().mean()
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()

                calls[name] = step
            found, repeats = compare(calls, options.device, options.repeats)
            parameters = sum(parameter.numel() for parameter in models["latentfm"].parameters())
            row(f"  {pixels} px, batch {batch}", found, repeats, at_best(roof, work * batch, moved_by_adamw(parameters)))
            if options.device == "cuda":
                for name, call in calls.items():
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    call()
                    print(f"    {name}: {(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GiB above what lies there between steps")


def sampling(options: argparse.Namespace) -> None:
    """The bundled model's whole guided sampling, latents to latents, through both pipelines."""
    for dtype in options.dtypes:
        pipes = {"diffusers": StableDiffusion3Pipeline, "latentfm": LatentFMPipeline}
        pipes = {name: kind.from_pretrained(bundled_model()).to(options.device, dtype) for name, kind in pipes.items()}
        fused = LatentFMPipeline.from_pretrained(bundled_model()).to(options.device, dtype)
        fused.transformer.fuse_qkv_projections()
        pipes["with fused qkv"] = fused
        config = pipes["diffusers"].transformer.config
        roof, net = ceilings(options.device, dtype), Network.of(config)
        work = 2 * STEPS * sum(forward_flops(net, (config.sample_size // net.patch) ** 2, 77 + 32).values())
        print(f"\nsampling with the bundled model, {STEPS} steps, guidance 3, T5 length 32, {dtype}; {in_words(roof)}")
        for batch in (1, 8):
            calls, latents = {}, {}
            width, tokens = config.joint_attention_dim, 77 + 32
            text = {
                "prompt_embeds": torch.randn(batch, tokens, width), "negative_prompt_embeds": torch.randn(batch, tokens, width),
                "pooled_prompt_embeds": torch.randn(batch, 320), "negative_pooled_prompt_embeds": torch.randn(batch, 320),
            }  # fmt: skip
            text = {name: value.to(options.device, dtype) for name, value in text.items()}
            start = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size).to(options.device, dtype)
            for name, pipe in pipes.items():
                pipe.set_progress_bar_config(disable=True)

                def sample(name=name, pipe=pipe, text=text, start=start, latents=latents) -> None:
                    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
                    latents[name] = pipe(**text, **call, latents=start.clone()).images

                calls[name] = sample
            found, repeats = compare(calls, options.device, options.repeats)
            base = found["diffusers"]
            times = "  ".join(f"{name} {value * 1e3:.1f} ms ({base / value:.2f}x)" for name, value in found.items())
            off = (latents["latentfm"].float() - latents["diffusers"].float()).abs().max() / latents["diffusers"].float().std()
            share = at_best(roof, work * batch) / found["with fused qkv"]
            found_off = f"largest difference {off:.1e} of the latents' deviation"
            print(f"  batch {batch}: {times}, {share:.0%} of the roof   {found_off}   [{repeats}]", flush=True)


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in name.lower() for word in words)), "other")


def profiled(models: dict[str, torch.nn.Module], config: dict, options: argparse.Namespace, dtype: torch.dtype) -> None:
    """Where the time goes, in a forward pass of the first size and batch and in a training step: share of each kind of operation."""
    given = inputs(config, options.pixels[0], options.batch[-1], options.device, dtype)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if options.device == "cuda" else [])
    for what in ("forward", "forward + backward"):
        print(f"\nprofile, {what}, {options.pixels[0]} px, batch {options.batch[-1]}, {dtype}")
        for name, model in models.items():

            def once(model=model, what=what) -> None:
                with torch.set_grad_enabled(what != "forward"):
                    out = model(**given).sample
                    if what != "forward":
                        out.sum().backward()
                        model.zero_grad()

            once()
            with profile(activities=activities) as recorded:
                once()
            on_device = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
            totals: dict[str, float] = {}
            for event in recorded.key_averages():
                totals[kind_of(event.key)] = totals.get(kind_of(event.key), 0.0) + getattr(event, on_device) / 1e3
            whole, ranked = sum(totals.values()), sorted(totals.items(), key=lambda item: -item[1])
            shares = "  ".join(f"{kind} {value:.1f} ms ({value / whole:.0%})" for kind, value in ranked)
            print(f"  {name:<10} {whole:8.1f} ms: {shares}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), help="both on a CPU, bfloat16 on a GPU")
    parser.add_argument("--pixels", nargs="+", type=int, default=[256, 512, 1024])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 8])
    parser.add_argument("--train-batch", nargs="+", type=int, default=[2])
    parser.add_argument("--layers", type=int, help="of SD3 medium's 24; 4 on a CPU, all on a GPU")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.dtypes = [getattr(torch, name) for name in options.dtype or (["bfloat16"] if on_gpu else ["float32", "bfloat16"])]
    config = PRESETS["sd3-medium"] | {"num_layers": options.layers or (24 if on_gpu else 4)}
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if on_gpu else f'CPU with {torch.get_num_threads()} threads'}")
    if "sampling" in options.parts:
        sampling(options)
    for dtype in options.dtypes:
        models = twins(config, options.device, dtype) if {"forward", "compiled", "profile"} & set(options.parts) else {}
        if "profile" in options.parts:
            profiled(models, config, options, dtype)
        if "forward" in options.parts:
            forward(models, config, options, dtype, compiled=False)
        if "compiled" in options.parts:
            forward(models, config, options, dtype, compiled=True)
        models.clear()
        if "training" in options.parts:
            for weights in dict.fromkeys((torch.float32, dtype)):
                for compiled in (False, True) if on_gpu else (False,):
                    training(config, options, weights, dtype, compiled)


if __name__ == "__main__":
    main()
