"""Images a second of one fine-tuning: `latentfm train`'s own Trainer beside plain diffusers loops on the same weights and pictures.

    python scripts/bench_training.py                              # about ten minutes on two quiet cores
    python scripts/bench_training.py --only bundled --rounds 1    # a first look

The loops are diffusers' examples/dreambooth/train_dreambooth_sd3.py without what it does around the training: its SD3Transformer2DModel,
logit-normal times from the scheduler's table, torch's AdamW, Accelerator. One encodes pictures and captions in every step, as the script
does; the other has latents and embeddings of all pictures in memory. Ours reads its cache from disk and keeps averages of the weights
besides. "bare" is our network and AdamW alone, on random numbers that are there: what the Trainer's step costs more is the last percentage.
The one before it is the share that ours reaches of the roof: the seconds in which the device's best rates, measured in this process, do the
step's products and move what AdamW reads and writes. Each part is a process of its own, taken in turns; of the seconds a step takes the
median after the first steps, and of the turns the median again. Start-up is what comes before the first step: imports, loading, filling a
cache. bfloat16 is left out on a CPU that only imitates it.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

BEGAN = time.perf_counter()
OURS, ENCODING, CACHED, BARE = "latentfm", "diffusers, encoding", "diffusers, cached", "bare"
PARTS = (OURS, ENCODING, CACHED, BARE)
PRECISIONS = {"float32": "no", "bfloat16": "bf16"}
CASES = {
    "bundled": {"size": 128, "batch": 16, "length": 24, "steps": 40, "pictures": 64},
    "large": {"size": 256, "batch": 4, "length": 64, "steps": 12, "pictures": 16},
}  # fmt: skip
NAMES = {"bundled": "bundled, 128 px, batch 16", "large": "8 x 512, 256 px, batch 4"}
WARM_UP = 4  # steps left out
LEARNING_RATE = 1e-5


def make_inputs(name: str, folder: Path) -> None:
    """Writes pictures with captions, and a pipeline folder: the bundled model, or its text encoders beside larger networks."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from PIL import Image

    from latentfm.bundled import bundled_model
    from latentfm.models.presets import size

    (folder / "pictures").mkdir(parents=True)
    side = 2 * CASES[name]["size"]
    for number in range(CASES[name]["pictures"]):
        coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(folder / "pictures" / f"{number:03d}.jpg", quality=92)
        (folder / "pictures" / f"{number:03d}.txt").write_text(f"a picture of colours, number {number}", "utf-8")
    if name == "bundled":
        (folder / "pipeline").symlink_to(bundled_model())
        return
    torch.manual_seed(0)
    pipe = StableDiffusion3Pipeline.from_pretrained(bundled_model(), torch_dtype=torch.float32)
    like = pipe.transformer.config
    pipe.transformer = SD3Transformer2DModel(**size(
        8, 8, sample_size=32, joint_attention_dim=like.joint_attention_dim, pooled_projection_dim=like.pooled_projection_dim,
        pos_embed_max_size=32,
    ))  # fmt: skip
    pipe.vae = AutoencoderKL(  # Stable Diffusion 3's
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512),
        layers_per_block=2, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    )  # fmt: skip
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.save_pretrained(folder / "pipeline")


def ours(case: dict, folder: Path, precision: str) -> list[float]:
    """When each step of a run of the Trainer was done, its start first."""
    from latentfm.cli.main import keep_freed_memory
    from latentfm.config import load_config
    from latentfm.training.trainer import Trainer

    class Timed(Trainer):
        def validate_and_sample(self) -> None:
            super().validate_and_sample()
            if not self.step:
                times.append(time.perf_counter())

        def log(self, row: dict) -> None:
            super().log(row)
            times.append(time.perf_counter())

    keep_freed_memory()  # as the command does
    times: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        Timed(load_config(None, [
            f"model.pipeline={folder / 'pipeline'}", f"data.folder={folder / 'pictures'}", f"data.cache={out}/cache",
            f"data.size={case['size']}", f"data.t5_lengths={{{case['length']}: 1}}", f"output.folder={out}/run", "output.trackers=[]",
            f"train.steps={case['steps']}", f"train.batch_size={case['batch']}", f"train.learning_rate={LEARNING_RATE}",
            "train.warmup_steps=0", "train.decay=constant", f"train.mixed_precision={precision}", "sample.every=1000000",
            "sample.prompts=[a]", "sample.steps=1", "output.checkpoint_every=1000000",
        ])).train()  # fmt: skip
    return times


def theirs(case: dict, folder: Path, precision: str, cached: bool) -> list[float]:
    """The same of a plain loop on diffusers' classes; `cached`: with all latents and embeddings in memory."""
    import torch
    from accelerate import Accelerator
    from diffusers import StableDiffusion3Pipeline
    from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())
    device, narrow = accelerator.device, torch.bfloat16 if precision == "bf16" else torch.float32
    pipe = StableDiffusion3Pipeline.from_pretrained(folder / "pipeline", torch_dtype=torch.float32)
    network, vae, scheduler = pipe.transformer.train(), pipe.vae.to(device), copy.deepcopy(pipe.scheduler)
    for frozen in (vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        frozen.requires_grad_(False)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        encoder.to(device, narrow)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)

    @torch.no_grad()
    def embed(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        prompt, _, pooled, _ = pipe.encode_prompt(
            captions, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=case["length"]
        )
        return prompt, pooled

    loader = accelerator.prepare(torch.utils.data.DataLoader(
        Pictures(folder / "pictures", case["size"]), batch_size=case["batch"], shuffle=True, num_workers=1, drop_last=True,
        persistent_workers=True,
    ))  # fmt: skip
    network, optimizer = accelerator.prepare(network, optimizer)
    batches = encoded(case, loader, vae, embed) if not cached else remembered(case, loader, vae, embed)
    times = []
    for step in range(case["steps"]):
        if not step:
            first = next(batches)  # before it the cache is filled
            times.append(time.perf_counter())
        distribution, prompt, pooled = first if not step else next(batches)
        latents = (distribution.sample() - vae.config.shift_factor) * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        u = compute_density_for_timestep_sampling("logit_normal", len(latents), 0.0, 1.0, 1.29)
        indices = (u * scheduler.config.num_train_timesteps).long()
        timesteps = scheduler.timesteps[indices].to(device)
        sigmas = scheduler.sigmas[indices].to(device).view(-1, 1, 1, 1)
        noisy = (1 - sigmas) * latents + sigmas * noise
        predicted = network(
            hidden_states=noisy, timestep=timesteps, encoder_hidden_states=prompt, pooled_projections=pooled, return_dict=False
        )[0]
        weighting = compute_loss_weighting_for_sd3("logit_normal", sigmas)
        loss = (weighting.float() * (predicted.float() - (noise - latents).float()) ** 2).reshape(len(latents), -1).mean(1).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.detach().item()
        times.append(time.perf_counter())
    return times


def bare(case: dict, folder: Path, precision: str) -> list[float]:
    """The same of our network and torch's AdamW alone."""
    import torch
    from accelerate import Accelerator

    from latentfm import MMDiT

    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())
    network = MMDiT.from_pretrained(folder / "pipeline", subfolder="transformer").train()
    config, (image, text) = network.config, tokens(case, folder)
    side = round(image**0.5) * config.patch_size
    given = {
        "hidden_states": torch.randn(case["batch"], config.in_channels, side, side, device=accelerator.device),
        "encoder_hidden_states": torch.randn(case["batch"], text, config.joint_attention_dim, device=accelerator.device),
        "pooled_projections": torch.randn(case["batch"], config.pooled_projection_dim, device=accelerator.device),
        "timestep": 1000 * torch.rand(case["batch"], device=accelerator.device),
    }
    network, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, fused=True))
    times = [time.perf_counter()]
    for _ in range(case["steps"]):
        loss = network(**given, return_dict=False)[0].float().square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(time.perf_counter())
    return times


def network_of(folder: Path) -> dict:
    return json.loads((folder / "pipeline" / "transformer" / "config.json").read_text())


def tokens(case: dict, folder: Path) -> tuple[int, int]:
    """How many of the image and of the text the network sees in one sample."""
    vae, tokenizer = (
        json.loads((folder / "pipeline" / name).read_text()) for name in ("vae/config.json", "tokenizer/tokenizer_config.json")
    )
    side = case["size"] // 2 ** (len(vae["block_out_channels"]) - 1) // network_of(folder)["patch_size"]
    return side**2, tokenizer["model_max_length"] + case["length"]


def best(case: dict, folder: Path, precision: str) -> float:
    """Images a second of a step at the roof."""
    import torch
    from ceilings import at_best, ceilings, moved_by_adamw

    from latentfm.planning.cost import Network, parameters, training_flops

    net = Network.of(network_of(folder))
    roof = ceilings("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, precision))
    work = case["batch"] * sum(training_flops(net, *tokens(case, folder)).values())
    return case["batch"] / at_best(roof, work, moved_by_adamw(sum(parameters(net).values())))


class Pictures:
    """Pictures in [-1, 1] with their captions, cropped to a square, as torch's DataLoader takes them."""

    def __init__(self, folder: Path, size: int):
        self.files, self.size = sorted(folder.glob("*.jpg")), size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        from PIL import Image
        from torchvision.transforms import v2

        steps = v2.Compose([v2.PILToTensor(), v2.Resize(self.size), v2.CenterCrop(self.size)])
        with Image.open(self.files[index]) as image:
            pixels = steps(image.convert("RGB")).float() / 127.5 - 1
        return pixels, self.files[index].with_suffix(".txt").read_text("utf-8")


def encoded(case: dict, loader, vae, embed: Callable) -> Iterator[tuple]:
    """Batches of (the latents' distribution, embeddings, pooled embeddings), made when they are asked for."""
    import torch

    while True:
        for pixels, captions in loader:
            with torch.no_grad():
                distribution = vae.encode(pixels.to(vae.dtype)).latent_dist
            yield distribution, *embed(list(captions))


def remembered(case: dict, loader, vae, embed: Callable) -> Iterator[tuple]:
    """The same from memory, where all are put first; shuffled anew each time."""
    import torch
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    kept = []
    for pixels, captions in loader:
        with torch.no_grad():
            parameters = vae.encode(pixels.to(vae.dtype)).latent_dist.parameters
        kept += list(zip(parameters, *embed(list(captions)), strict=True))
    while True:
        order = torch.randperm(len(kept)).tolist()
        for start in range(0, len(order) - case["batch"] + 1, case["batch"]):
            parameters, prompt, pooled = (torch.stack(rows) for rows in zip(*(kept[i] for i in order[start : start + case["batch"]])))
            yield DiagonalGaussianDistribution(parameters), prompt, pooled


def measure(name: str, part: str, folder: Path) -> dict[str, tuple[float, float]]:
    """(images a second, start-up in seconds) of a part in this process, for each precision."""
    from accelerate.state import AcceleratorState, GradientState

    from latentfm.cli.terminal import quiet_libraries

    quiet_libraries()
    found, began = {}, BEGAN
    for precision, mixed in PRECISIONS.items():
        AcceleratorState._reset_state(True)  # Accelerate keeps one configuration a process
        GradientState._reset_state()
        case = CASES[name]
        times = {
            OURS: ours, BARE: bare, ENCODING: partial(theirs, cached=False), CACHED: partial(theirs, cached=True)
        }[part](case, folder, mixed)  # fmt: skip
        seconds = [after - before for before, after in zip(times, times[1:])][WARM_UP:]
        found[precision] = (case["batch"] / statistics.median(seconds), times[0] - began)
        began = time.perf_counter()
    return found


def in_its_own_process(name: str, part: str, folder: Path) -> dict[str, tuple[float, float]]:
    command = [sys.executable, __file__, "--case", name, "--part", part, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    import torch

    from latentfm.training.precision import has_bfloat16

    if not torch.accelerator.is_available() and not has_bfloat16(torch.device("cpu")):
        del PRECISIONS["bfloat16"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=tuple(CASES), help="one of the cases")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each, default 3")
    parser.add_argument("--case", choices=tuple(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(measure(options.case, options.part, options.folder)))
        return
    print(
        f"{'images/s':26s}{'precision':>10s}{'latentfm':>10s}{'encoding':>10s}{'cached':>10s}{'bare':>10s}"
        f"{'x encoding':>12s}{'x cached':>10s}{'of roof':>9s}{'over bare':>11s}"
        f"   start-up, s (in that order; the first precision's with imports)"
    )
    for name in [options.only] if options.only else CASES:
        with tempfile.TemporaryDirectory() as made:
            make_inputs(name, Path(made))
            roofs = {precision: best(CASES[name], Path(made), precision) for precision in PRECISIONS}
            turns = [{part: in_its_own_process(name, part, Path(made)) for part in PARTS} for _ in range(options.rounds)]
        for precision in PRECISIONS:
            speed, start = ({part: statistics.median(turn[part][precision][i] for turn in turns) for part in PARTS} for i in (0, 1))
            print(
                f"{NAMES[name]:26s}{precision:>10s}" + "".join(f"{speed[part]:10.2f}" for part in PARTS)
                + f"{speed[OURS] / speed[ENCODING]:12.2f}{speed[OURS] / speed[CACHED]:10.2f}{speed[OURS] / roofs[precision]:9.0%}"
                + f"{speed[BARE] / speed[OURS] - 1:11.1%}   "
                + " ".join(f"{start[part]:.1f}" for part in PARTS), flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
