"""Training on a GPU: `latentfm train`'s own Trainer beside a plain diffusers loop, on SD3 medium's network with random weights.

    bash scripts/gpu/kit.sh training

All weights in bfloat16, LoRA, and float32 weights under autocast; 1024 and 512 px; blocks recomputed or not; compiled or not. The loop
of diffusers (as bench_training.py's) has latents and embeddings in the GPU's memory; ours reads its cache from disk in a process beside
it and keeps averages of the weights. Then what the loader costs beside the same batch again and again, and how long a run takes to its
first step.
"""

import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cells import DEVICE, DTYPE, SHRUNK, Cells, clear, compile_blocks, forget_peak, network_settings, peak_memory, quiet, rate

from bench_mmdit import flops  # isort: skip
from ceilings import seconds  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
WORK = Path(os.environ.get("KIT_WORK", Path(tempfile.gettempdir()) / ("latentfm-kit-shrunk" if SHRUNK else "latentfm-kit")))
STEPS, WARM = (5, 2) if SHRUNK else (16, 6)
SIZES = {64: 2, 32: 2} if SHRUNK else {1024: 4, 512: 16}  # pixels: pictures a step
RANK = 2 if SHRUNK else 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
RATE = 1e-5


class Case(NamedTuple):
    """What is trained, and how."""

    mode: str  # bf16: every weight, in bfloat16; lora: on a bfloat16 base; mixed: every weight in float32, computing in bfloat16
    pixels: int
    fraction: float = 0.0  # of the blocks, recomputed in the backward pass
    compiled: bool = False

    @property
    def batch(self) -> int:
        return SIZES[self.pixels]

    def __str__(self) -> str:
        more = (f", {self.fraction:g} recomputed" if self.fraction else "") + (", compiled" if self.compiled else "")
        return f"{self.mode}, {self.pixels} px, {self.batch}{more}"


def cases() -> list[Case]:
    """In order of worth."""
    found = [Case("bf16", pixels) for pixels in SIZES] + [Case("lora", pixels) for pixels in SIZES]
    found += [Case(mode, pixels, compiled=True) for pixels in SIZES for mode in ("bf16", "lora")]
    found += [Case("bf16", pixels, fraction) for pixels in SIZES for fraction in (0.5, 1.0)]
    return found + [Case("mixed", min(SIZES)), Case("mixed", min(SIZES), compiled=True), Case("lora", max(SIZES), 1.0)]


def make_folder() -> Path:
    """A pipeline folder of SD3 medium's shapes, made once: random weights, text encoders of one layer; and pictures beside it."""
    import numpy as np
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from PIL import Image
    from transformers import T5Config, T5EncoderModel

    folder = WORK / "sd3"
    if (WORK / "done").exists():
        return folder
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import clip_text, clip_tokenizer, t5_tokenizer

    settings = network_settings("sd3-medium")
    wide = settings["joint_attention_dim"]
    widths = (24, settings["pooled_projection_dim"] - 24) if SHRUNK else (768, 1280)
    levels = (8, 8, 8, 8) if SHRUNK else (128, 256, 512, 512)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        transformer = SD3Transformer2DModel(**settings).to(DTYPE)
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.mul_(0.5)  # keeps a deep random network's output small
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=levels,
            layers_per_block=1 if SHRUNK else 2, latent_channels=16, norm_num_groups=4 if SHRUNK else 32, scaling_factor=1.5305,
            shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
    tokenizers = [clip_tokenizer(77, "<|endoftext|>"), clip_tokenizer(77, "!")]
    tokenizer_3 = t5_tokenizer(folder / "tokenizer_3")
    t5 = T5Config(
        vocab_size=len(tokenizer_3), d_model=wide, d_kv=16, d_ff=64, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=clip_text(tokenizers[0], widths[0], "quick_gelu"), tokenizer=tokenizers[0],
        text_encoder_2=clip_text(tokenizers[1], widths[1], "gelu"), tokenizer_2=tokenizers[1],
        text_encoder_3=T5EncoderModel(t5).eval(), tokenizer_3=tokenizer_3,
    ).save_pretrained(folder)  # fmt: skip
    (WORK / "pictures").mkdir(exist_ok=True)
    for number in range(8 if SHRUNK else 48):
        coarse = Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8))
        coarse.resize((max(SIZES), max(SIZES)), Image.Resampling.BICUBIC).save(WORK / "pictures" / f"{number:02d}.png")
        (WORK / "pictures" / f"{number:02d}.txt").write_text(f"a picture of colours, number {number}", "utf-8")
    (WORK / "done").touch()
    return folder


def options(case: Case, out: Path) -> list[str]:
    """The overrides of `latentfm train` for a case."""
    own = {
        "bf16": ["train.weights=bfloat16", "train.moments=bfloat16"],
        "lora": ["train.weights=bfloat16", f"train.adapter={{rank: {RANK}, targets: attention}}"],
        "mixed": ["train.mixed_precision=bf16"],
    }[case.mode]  # fmt: skip
    return [
        f"model.pipeline={WORK / 'sd3'}", f"data.folder={WORK / 'pictures'}", f"data.cache={WORK / 'cache'}", f"data.size={case.pixels}",
        "data.t5_lengths={256: 1}", f"output.folder={out}", "output.trackers=[]", "output.checkpoint_every=1000000", "train.steps=1000000",
        f"train.batch_size={case.batch}", f"train.learning_rate={RATE}", "train.warmup_steps=0", "train.decay=constant",
        f"train.gradient_checkpointing={case.fraction}", f"train.compile={str(case.compiled).lower()}", "sample.every=1000000",
        "sample.prompts=[a]", "sample.steps=1", *own,
    ]  # fmt: skip


class Enough(Exception):
    """The run has been timed: it ends, unsaved."""


def ours(case: Case, same_batch: bool = False, steps: int = STEPS) -> dict[str, float]:
    """{"seconds" a step, "start_up", "memory_gib", "planned_gib"} of the Trainer; `same_batch`: with the first one at every step."""
    from accelerate.state import AcceleratorState, GradientState

    from latentfm.config import load_config
    from latentfm.planning.devices import Device
    from latentfm.planning.run import Parallelism
    from latentfm.training.dry_run import dry_run
    from latentfm.training.trainer import Trainer

    times: list[float] = []

    class Timed(Trainer):
        def validate_and_sample(self) -> None:
            """No picture before the first step: it is no part of a step."""

        def micro_batches(self) -> Any:
            batches = super().micro_batches()
            return again(next(iter(batches))) if same_batch else batches

        def log(self, row: dict) -> None:
            super().log(row)
            times.append(time.perf_counter())
            if len(times) > steps:
                raise Enough

    AcceleratorState._reset_state(True)  # Accelerate keeps one configuration a process
    GradientState._reset_state()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=WORK) as out:
        config = load_config(None, options(case, Path(out) / "run"))
        planned = dry_run(config, parallelism=Parallelism(), device=Device.here())["memory"]["total"] / 2**30
        trainer = Timed(config)
        forget_peak()
        with contextlib.suppress(Enough):
            trainer.train()
    taken = [after - before for before, after in zip(times, times[1:])][WARM:]
    return {
        "seconds": statistics.median(taken), "start_up": round(times[0] - began, 2), "memory_gib": peak_memory(),
        "planned_gib": round(planned, 3),
    }  # fmt: skip


def again(batch: Any) -> Iterator[Any]:
    """The same batch for ever, in pinned memory as it came."""
    while True:
        yield batch


def theirs(case: Case) -> dict[str, float]:
    """The same of diffusers' network in a plain loop on latents and embeddings that lie in the GPU's memory."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from diffusers.training_utils import cast_training_params, compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
    from peft import LoraConfig

    settings = network_settings("sd3-medium")
    forget_peak()
    weights = torch.float32 if case.mode == "mixed" else DTYPE
    network = SD3Transformer2DModel.from_pretrained(WORK / "sd3", subfolder="transformer", torch_dtype=weights).to(DEVICE).train()
    if case.mode == "lora":
        network.requires_grad_(False)
        network.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
        cast_training_params(network, torch.float32)
    if case.fraction:
        network.enable_gradient_checkpointing()
    if case.compiled:
        compile_blocks(network)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    scheduler = copy.deepcopy(FlowMatchEulerDiscreteScheduler(shift=3.0))
    side, batch, kept = case.pixels // 8, case.batch, weights if case.mode == "bf16" else torch.float32
    latents = torch.randn(4, batch, 16, side, side, device=DEVICE)
    prompts = torch.randn(4, batch, 77 + 256, settings["joint_attention_dim"], device=DEVICE, dtype=DTYPE)
    pooled = torch.randn(4, batch, settings["pooled_projection_dim"], device=DEVICE, dtype=DTYPE)

    def step(number: int) -> None:
        given = latents[number % 4]
        noise = torch.randn_like(given)
        u = compute_density_for_timestep_sampling("logit_normal", batch, 0.0, 1.0, 1.29)
        indices = (u * scheduler.config.num_train_timesteps).long()
        timesteps = scheduler.timesteps[indices].to(DEVICE)
        sigmas = scheduler.sigmas[indices].to(DEVICE).view(-1, 1, 1, 1)
        noisy = (1 - sigmas) * given + sigmas * noise
        with torch.autocast(DEVICE, DTYPE, enabled=case.mode != "bf16"):
            predicted = network(
                hidden_states=noisy.to(kept), timestep=timesteps, encoder_hidden_states=prompts[number % 4].to(kept),
                pooled_projections=pooled[number % 4].to(kept), return_dict=False,
            )[0]  # fmt: skip
        weighting = compute_loss_weighting_for_sd3("logit_normal", sigmas)
        loss = (weighting.float() * (predicted.float() - (noise - given)) ** 2).reshape(batch, -1).mean(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    taken = [seconds(lambda number=number: step(number), DEVICE) for number in range(STEPS)][WARM:]
    return {"seconds": statistics.median(taken), "memory_gib": peak_memory()}


def compare(case: Case, peak: float) -> dict[str, Any]:
    """The row of a case: both, with images a second and the share of the matrix product's peak; diffusers recomputes all blocks or none."""
    work = flops(network_settings("sd3-medium"), case.pixels, training=True) * case.batch
    if case.mode == "lora":
        work *= 2 / 3  # the frozen weights need no gradient
    found: dict[str, Any] = {"latentfm": ours(case)}
    clear()
    if case.fraction in (0, 1):
        found["diffusers"] = theirs(case)
    for values in found.values():
        values |= {"images_per_second": round(case.batch / values["seconds"], 3), **rate(work, values["seconds"], peak)}
    if "diffusers" in found:
        found["ratio"] = round(found["diffusers"]["seconds"] / found["latentfm"]["seconds"], 3)
    return found


def loader() -> dict[str, float]:
    """Seconds a step with the loader, and with the first batch given at every step; "cost" is what the loader adds."""
    case = Case("lora", min(SIZES))
    steps = STEPS if SHRUNK else 40
    fed, same = ours(case, steps=steps)["seconds"], ours(case, same_batch=True, steps=steps)["seconds"]
    return {"with_loader": fed, "same_batch": same, "cost": round(fed / same - 1, 4)}


def start_up() -> dict[str, float]:
    """Seconds from the command to its first step, on a cache that is full."""
    case = Case("lora", max(SIZES))
    with tempfile.TemporaryDirectory(dir=WORK) as out:
        rows = Path(out) / "run" / "metrics.jsonl"
        command = [sys.executable, "-m", "latentfm", "train", *options(case, Path(out) / "run")]
        began = time.perf_counter()
        with (Path(out) / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT) as process:
            while not rows.exists() or not rows.stat().st_size:
                if process.poll() is not None or time.perf_counter() - began > 300:
                    process.kill()
                    raise RuntimeError((Path(out) / "log").read_text()[-2000:])
                time.sleep(0.05)
            taken = time.perf_counter() - began
            process.kill()
    return {"seconds": round(taken, 2)}


def main() -> None:
    quiet()
    cells = Cells("training")
    peak = cells.ceilings()["tflops"]
    made = cells.run("a pipeline of SD3 medium's shapes", lambda: {"bytes": size_of(make_folder())}, 120)
    if not made:
        raise SystemExit("without it nothing can be trained; see above")
    make_folder()  # on a fresh machine once more
    first: list[tuple[str, Callable[[], dict], float]] = [(str(case), lambda case=case: compare(case, peak), 75) for case in cases()]
    first.insert(4, ("the loader's cost", loader, 75))
    first.insert(5, ("start-up", start_up, 60))
    for name, measure, about in first:
        cells.run(name, measure, about + (60 if "compiled" in name else 0))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    print(json.dumps({"work": str(WORK)}))
    WORK.mkdir(parents=True, exist_ok=True)
    main()
