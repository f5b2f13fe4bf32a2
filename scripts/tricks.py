"""What training tricks gain in the same CPU time, on the same data, through the real Trainer: a held-out loss at two sizes, several seeds.

    python scripts/tricks.py --data my_pictures --out runs/tricks                     # goes on where it was stopped
    python scripts/tricks.py --data my_pictures --out runs/tricks --encoder DINOV2    # with REPA, by a local vision model of transformers'
    python scripts/tricks.py --data my_pictures --out runs/tricks --table             # the table of what is there

A cell is one trick at one size from one seed (weights, order, noise): new weights train until the process has spent --seconds of CPU time
on steps, what the trick itself costs among them; then the averaged weights' loss is measured on the same held-out pictures, with the same
noise at the same times, for every cell. First the learning rates, AdamW's and Muon's: each is doubled for as long as that gains at the
small size, from a seed of its own. Each cell is a line of cells.jsonl. The table has the mean difference to plain AdamW, paired by seed,
with Student's 95 % interval.

plain        AdamW, the flow-matching loss
contrastive  less 0.05 |v - u'|^2, u' the target of the batch's next sample (Stoica et al. 2025). Its minimiser is not the flow's velocity v
             but (v - 0.05 m) / 0.95, m the mean target: guidance of a kind, which costs held-out loss; a row has it with that taken back
curriculum   t's shift falls from 4 to 1 over half of the steps that plain took
muon         train.optimizer=muon: Muon for the blocks' matrices (Jordan et al. 2024), AdamW for the rest
tread        half of the image tokens go round the middle blocks (Krause et al. 2025): train.token_routing
repa         an early block's tokens are aligned to a frozen encoder's features of the clean picture (Yu et al. 2024), by cosine, weight
             0.5; the features are made once, before the time counts
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from latentfm import flow
from latentfm.bundled import bundled_model
from latentfm.config import load_config
from latentfm.data.loader import Batch
from latentfm.data.mixture import Mixture
from latentfm.data.stream import Stream
from latentfm.models.presets import PRESETS, size
from latentfm.training.step import predict
from latentfm.training.trainer import Trainer

SMALL = "tricks-small"
SIZES = {SMALL: size(4, 2), "tricks-large": size(6, 3)}
for settings in SIZES.values():
    settings |= {"sample_size": 8, "patch_size": 2, "pos_embed_max_size": 8}
RATES = {"adamw": 1e-3, "muon": 2e-3}  # the first that is tried
RATES_SEED = 100
LAMBDA = 0.05  # contrastive flow matching's
SHIFTS = (4.0, 1.0)  # the curriculum's, first and last
ALIGNED = 0.5  # REPA's weight


class Plain(Trainer):
    """The Trainer, its held-out pictures and their noise the same whatever the run's seed."""

    def divide_data(self) -> None:
        own = self.config
        self.config = own.model_copy(update={"train": own.train.model_copy(update={"seed": 0})})
        super().divide_data()
        self.config = own
        bucket_of = self.data.bucket_of.copy()
        bucket_of[self.held_out] = -1
        self.stream = Stream(Mixture.of(self.data.samples, own.train.seed, bucket_of), own.train.batch_size, own.train.seed)
        self.reader = self.data.reader(own.train.seed, self.dropout, self.plan.routing)

    def predicted(self, batch: Batch) -> tuple[Tensor, flow.PathSample, Tensor]:
        """(the network's velocity, the path's sample, the times) of a batch."""
        t, absent = self.objective.times(batch.u), self.models.null.parts(batch.t5_length)
        return *predict(self.weights.shards.model, batch, t, batch.parts.drop(batch.dropped, absent), self.objective), t


class Contrastive(Plain):
    mean: Tensor | None = None  # of the targets, [C, h, w]

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        prediction, path, t = self.predicted(batch)
        seen = path.velocity.mean(0)
        self.mean = seen if self.mean is None else self.mean.lerp(seen, 0.01)
        other = path.velocity.roll(1, 0)
        return flow.cfm_loss(prediction, path.velocity) - LAMBDA * flow.cfm_loss(prediction, other), t

    def figures(self) -> dict[str, float]:
        def undo(network: nn.Module, inputs: Any, output: tuple[Tensor]) -> tuple[Tensor]:
            return ((1 - LAMBDA) * output[0] - LAMBDA * self.mean,)  # the network's output is minus the velocity

        handle = self.models.network.register_forward_hook(undo)
        found = self.validation_figures()["validation_loss"]
        handle.remove()
        return {"undone": found}


class Curriculum(Plain):
    over = 0  # steps

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        first, last = SHIFTS
        self.objective = replace(self.objective, t_shift=first * (last / first) ** min(1.0, self.step / self.over))
        return super().losses(batch)


class Aligned(Plain):
    encoder: Path

    def prepare(self, resources: Any) -> None:
        super().prepare(resources)
        network = self.models.network
        self.features = features_of(self.encoder, self.data.samples, self.plan.size)
        dim, out = network.pos_embed.proj.out_channels, next(iter(self.features.values())).shape[0]
        self.projector = nn.Sequential(nn.Linear(dim, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, out))
        self.weights.optimizer.add_param_group({"params": list(self.projector.parameters()), "weight_decay": 0.0})
        block = network.transformer_blocks[len(network.transformer_blocks) // 3]
        block.register_forward_hook(lambda _, inputs, output: setattr(self, "hidden", output[0]))

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        found, t = super().losses(batch)
        seen = self.projector(self.hidden)  # [B, N, D]
        side = math.isqrt(seen.shape[1])
        wanted = F.interpolate(torch.stack([self.features[name] for name in batch.ids]), (side, side), mode="bilinear").flatten(2).mT
        return found - ALIGNED * F.cosine_similarity(seen.float(), wanted, dim=-1).mean(1), t


FEATURES: dict[str, Tensor] = {}


@torch.no_grad()
def features_of(folder: Path, samples: Any, pixels: Any) -> dict[str, Tensor]:
    """The patches' features of each picture by its id, [D, h, w] float32, standardised over all pictures."""
    from transformers import AutoImageProcessor, AutoModel

    if FEATURES:
        return FEATURES
    model, processor = AutoModel.from_pretrained(folder, local_files_only=True).eval(), AutoImageProcessor.from_pretrained(folder)
    model = getattr(model, "vision_model", model)
    found = []
    for sample in samples:
        with Image.open(sample.path) as image:
            inputs = processor(image.convert("RGB"), return_tensors="pt")
        hidden = model(**inputs).last_hidden_state[0]
        side = math.isqrt(len(hidden))
        found.append(hidden[-side * side :].mT.unflatten(1, (side, side)))  # before them are class and register tokens
    every = torch.stack(found)
    every = (every - every.mean((0, 2, 3), keepdim=True)) / every.std((0, 2, 3), keepdim=True)
    FEATURES.update(zip([sample.id for sample in samples], every, strict=True))
    return FEATURES


@dataclass(frozen=True)
class Trick:
    trainer: type[Plain] = Plain
    options: tuple[str, ...] = ()
    optimizer: str = "adamw"  # whose rate it takes


TRICKS = {
    "plain": Trick(),
    "muon": Trick(options=("train.optimizer=muon",), optimizer="muon"),
    "tread": Trick(options=("train.token_routing={keep: 0.5, first: 1, last: -2}",)),
    "contrastive": Trick(Contrastive),
    "curriculum": Trick(Curriculum),
    "repa": Trick(Aligned),
}


def cell(options: argparse.Namespace, name: str, preset: str, seed: int, rate: float, plain_steps: int = 0) -> dict[str, Any]:
    """What training with the trick `name` came to."""
    AcceleratorState._reset_state(True)  # Accelerate keeps one configuration a process
    GradientState._reset_state()
    trick = TRICKS[name]
    with tempfile.TemporaryDirectory() as out:
        trainer = trick.trainer(load_config(None, [
            f"model.pipeline={options.model}", f"model.preset={preset}", f"data.folder={options.data}",
            f"data.cache={options.out / 'cache'}", f"data.size={options.pixels}", "data.workers=0", "data.verify=false",
            f"output.folder={out}/run", "output.trackers=[]", f"train.steps={10**6}", f"train.batch_size={options.batch_size}",
            f"train.learning_rate={rate}", "train.warmup_steps=30", "train.decay=constant", "train.ema_decay=0.98",
            f"train.seed={seed}", f"validation.held_out={options.held_out}",
            "validation.times=6", "sample.prompts=[a]", *trick.options,
        ]))  # fmt: skip
        trainer.over = max(1, plain_steps // 2)
        with trainer.resources:
            batches, losses = iter(trainer.micro_batches()), []
            began, spent = time.process_time(), 0.0
            while spent < options.seconds:
                losses.append(trainer.train_step(batches)["loss"])
                spent = time.process_time() - began
            with trainer.weights.averaged():
                found = trainer.validation_figures()
                more = trainer.figures() if hasattr(trainer, "figures") else {}
    parameters = trainer.weights.trained_size
    return {
        "trick": name, "size": preset, "seed": seed, "rate": rate, "loss": found["validation_loss"], **more, "steps": trainer.step,
        "seconds": spent, "by_t": found["by_t"], "trained": statistics.mean(losses[-20:]), "parameters": parameters,
    }  # fmt: skip


class Cells:
    """The cells that are there, made when they are asked for."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.file = options, options.out / "cells.jsonl"
        options.out.mkdir(parents=True, exist_ok=True)
        self.rows = [json.loads(line) for line in self.file.read_text("utf-8").splitlines()] if self.file.exists() else []

    def find(self, name: str, preset: str, seed: int, rate: float) -> dict[str, Any] | None:
        return next((row for row in self.rows if (row["trick"], row["size"], row["seed"], row["rate"]) == (name, preset, seed, rate)), None)

    def make(self, name: str, preset: str, seed: int, rate: float, plain_steps: int = 0) -> dict[str, Any]:
        row = self.find(name, preset, seed, rate)
        if row is None:
            row = cell(self.options, name, preset, seed, rate, plain_steps)
            self.rows.append(row)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print({key: value for key, value in row.items() if key != "by_t"}, flush=True)
        return row

    def rate(self, optimizer: str) -> float:
        """An optimizer's rate at the small size: doubled for as long as that gains."""
        name, rate = "plain" if optimizer == "adamw" else optimizer, RATES[optimizer]
        while self.make(name, SMALL, RATES_SEED, 2 * rate)["loss"] < self.make(name, SMALL, RATES_SEED, rate)["loss"]:
            rate *= 2
        return rate


def table(cells: Cells) -> str:
    """The mean difference of each trick to plain AdamW, paired by seed, in Markdown."""
    from scipy import stats

    rows = [row for row in cells.rows if row["seed"] != RATES_SEED]
    of = {(row["trick"], row["size"], row["seed"]): row for row in rows}
    lines = ["| trick | size | held-out loss | difference to plain | seeds | steps | CPU s |", "|---|---|---|---|---|---|---|"]
    for name in TRICKS:
        for figure in ("loss", "undone"):
            for preset in SIZES:
                seeds = [seed for trick, at, seed in of if (trick, at) == (name, preset) and ("plain", preset, seed) in of]
                found = [of[name, preset, seed] for seed in seeds if figure in of[name, preset, seed]]
                if not found:
                    continue
                gains = [row[figure] - of["plain", preset, row["seed"]]["loss"] for row in found]
                half = stats.t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
                mean, steps, spent = (statistics.mean(row[key] for row in found) for key in (figure, "steps", "seconds"))
                parameters = f"{found[0]['parameters'] / 1e6:.1f}M"
                label = name if figure == "loss" else f"{name}, its shift undone"
                gain = f"{statistics.mean(gains):+.4f} +- {half:.4f}" if name != "plain" else "0"
                lines.append(f"| {label} | {parameters} | {mean:.4f} | {gain} | {len(gains)} | {steps:.0f} | {spent:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of pictures with captions, as `latentfm train` takes them")
    parser.add_argument("--model", type=Path, default=bundled_model(), help="whose VAE and text encoders are used; the bundled one")
    parser.add_argument("--encoder", type=Path, help="a local vision model for repa; it is left out if none is given")
    parser.add_argument("--out", type=Path, default=Path("runs/tricks"))
    parser.add_argument("--tricks", nargs="+", choices=TRICKS, default=list(TRICKS))
    parser.add_argument("--seconds", type=float, default=30, help="of CPU time for the steps of a cell")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--table", action="store_true", help="only print the table of the cells that are there")
    options = parser.parse_args()
    PRESETS.update(SIZES)
    cells, Aligned.encoder = Cells(options), options.encoder
    tricks = [name for name in options.tricks if name != "repa" or options.encoder]
    if not options.table:
        shared = ("data", "model", "seconds", "pixels", "batch_size", "held_out")
        settings, file = json.dumps({name: str(getattr(options, name)) for name in shared}), options.out / "settings.json"
        if file.exists() and file.read_text("utf-8") != settings:
            parser.error(f"{options.out} holds cells of other settings, {file.read_text('utf-8')}; choose another --out")
        file.write_text(settings, "utf-8")
        rates = {optimizer: cells.rate(optimizer) for optimizer in RATES}
        for seed in range(options.seeds):
            for preset in SIZES:
                plain = cells.make("plain", preset, seed, rates["adamw"])
                for name in tricks:
                    cells.make(name, preset, seed, rates[TRICKS[name].optimizer], plain["steps"])
    print(table(cells))


if __name__ == "__main__":
    main()
