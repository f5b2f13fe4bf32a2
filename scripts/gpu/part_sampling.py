"""Sampling on a GPU beside diffusers, same random weights: SD3 medium whole, 3.5 medium and 3.5 large by forward steps.

    bash scripts/gpu/kit.sh sampling

28 guided steps at 1024 px of one picture and of four, eager and compiled, then ours by each attention backend; the text is given, no VAE
runs. FLOPs are those of SD3Transformer2DModel, also for ours, which leaves some of them out.
"""

import torch
from cells import DEVICE, DTYPE, SHRUNK, Cells, compile_blocks, network_settings, quiet, rate, timed
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from bench_mmdit import TEXT_TOKENS, flops, inputs, twins  # isort: skip

from latentfm import LatentFMPipeline
from latentfm.models.backends import available_backends
from latentfm.models.schedule import Precomputed

PIXELS, STEPS = (64, 2) if SHRUNK else (1024, 28)
GUIDANCE = 5.0


def pipelines(settings: dict) -> dict[str, LatentFMPipeline | StableDiffusion3Pipeline]:
    """Both pipelines around networks of the same weights, without text encoders; their VAE only says that it divides by eight."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(8, 8, 8, 8),
        layers_per_block=1, latent_channels=16, norm_num_groups=4, scaling_factor=1.5305, shift_factor=0.0609,
    ).to(DEVICE, DTYPE)  # fmt: skip
    found = {}
    for name, network in twins(settings, DEVICE, DTYPE).items():
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        if name == "diffusers":
            nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
            found[name] = StableDiffusion3Pipeline(transformer=network, scheduler=scheduler, vae=vae, **nothing)
        else:
            found[name] = LatentFMPipeline(network, scheduler, vae)
        found[name].set_progress_bar_config(disable=True)
    return found


def sampler(pipe, settings: dict, pictures: int, steps: int = STEPS):
    """A call that draws the latents of `pictures` pictures."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, DTYPE)

    wide, pooled = settings["joint_attention_dim"], settings["pooled_projection_dim"]
    given = {
        "prompt_embeds": normal(pictures, TEXT_TOKENS, wide), "negative_prompt_embeds": normal(pictures, TEXT_TOKENS, wide),
        "pooled_prompt_embeds": normal(pictures, pooled), "negative_pooled_prompt_embeds": normal(pictures, pooled),
    }  # fmt: skip
    start = normal(pictures, 16, PIXELS // 8, PIXELS // 8)
    call = {"height": PIXELS, "width": PIXELS, "num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "latent"}
    return lambda: pipe(**given, **call, latents=start.clone()).images


def compare(pipes: dict, settings: dict, pictures: int, peak: float) -> dict:
    """The row of the pipelines: seconds, rate and memory of each; of two the ratio of their speeds and the latents' difference."""
    calls = {name: sampler(pipe, settings, pictures) for name, pipe in pipes.items()}
    found = timed(calls, repeats=3 if pictures == 1 else 1, warm=1)
    work = flops(settings, PIXELS, training=False) * 2 * pictures * STEPS
    for values in found.values():
        values |= rate(work, values["seconds"], peak)
    row: dict = dict(found)
    if len(pipes) > 1:
        ours, theirs = (calls[name]().float() for name in ("latentfm", "diffusers"))
        row |= {"ratio": round(found["diffusers"]["seconds"] / found["latentfm"]["seconds"], 3)}
        row |= {"difference": ((ours - theirs).norm() / theirs.norm()).item()}
    return row


def forward_steps(preset: str, peak: float) -> dict:
    """One guided forward pass at PIXELS of networks of `preset`: diffusers', ours, and ours within a schedule."""
    settings = network_settings(preset)
    models, given = twins(settings, DEVICE, DTYPE), None
    given = inputs(settings, PIXELS, 2, DEVICE, DTYPE)
    times = torch.linspace(1000.0, 30.0, STEPS)
    ahead = Precomputed(times)
    calls = {
        "diffusers": lambda: models["diffusers"](**given), "latentfm": lambda: models["latentfm"](**given),
        "in a schedule": lambda: models["latentfm"](**given | {"timestep": times[:1]}, precomputed=ahead),
    }  # fmt: skip
    with torch.no_grad():
        found: dict = timed(calls, repeats=7)
    for values in found.values():
        values |= rate(2 * flops(settings, PIXELS, training=False), values["seconds"], peak)
    return found | {"ratio": round(found["diffusers"]["seconds"] / found["in a schedule"]["seconds"], 3)}


def main() -> None:
    quiet()
    cells = Cells("sampling")
    peak, settings = cells.ceilings()["tflops"], network_settings("sd3-medium")
    pipes: dict = {}

    def measured(way: str, pictures: int, about: float) -> None:
        """The cell of both pipelines, which the first that is missing makes."""
        name = f"{way}, {PIXELS} px, {pictures}"
        if not pipes and cells.rows.get(name, {}).get("state") != "done":
            pipes.update(pipelines(settings))
            if way == "compiled":
                compile_all()
        cells.run(name, lambda: compare(pipes, settings, pictures, peak), about)

    def compile_all() -> None:
        for pipe in pipes.values():
            compile_blocks(pipe.transformer)

    def by_backend(name: str) -> dict:
        own = pipes["latentfm"] if pipes else pipelines(settings)["latentfm"]
        own.transformer.set_attention(name)
        try:
            return compare({"latentfm": own}, settings, 1, peak)
        finally:
            own.transformer.set_attention("auto")

    measured("eager", 1, 40)
    slow = ("math", "flex")
    for name in sorted(available_backends(torch.device(DEVICE), DTYPE, 64), key=lambda name: name in slow):
        if name not in ("auto", "native"):  # measured above
            cells.run(f"attention {name}, {PIXELS} px, 1", lambda name=name: by_backend(name), 60 if name in slow else 20)
    for preset in ("sd3.5-medium", "sd3.5-large"):
        cells.run(f"forward {preset}, {PIXELS} px, 2", lambda preset=preset: forward_steps(preset, peak), 35)
    measured("eager", 4, 90)
    compile_all()
    for pictures in (1, 4):
        measured("compiled", pictures, 90)


if __name__ == "__main__":
    main()
