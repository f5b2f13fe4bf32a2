"""Training an AutoencoderKL (notes, section 6.2, Algorithm 6; with Esser et al. 2021's adversarial term), through Accelerate.

    latentfm train-vae --config configs/vae.yaml data.folder=my_pictures
    torchrun --nproc_per_node 2 -m latentfm train-vae --config configs/vae.yaml data.folder=my_pictures

A run's folder holds run.html (curves, and reconstructions through time), metrics.jsonl, validation.jsonl, samples/, checkpoints/, and at
the end model/, an AutoencoderKL folder, and report.html.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from latentfm.data.cache.stat_cache import StatCache
from latentfm.data.inventory import Inventory
from latentfm.data.mixture import Mixture
from latentfm.data.pixels import PixelBatch, PixelReader, Variety, batches_of
from latentfm.data.readable import ReadablePictures
from latentfm.data.stream import Stream
from latentfm.errors import Failure, InputError
from latentfm.files import expanded
from latentfm.models.manifest import hash_of
from latentfm.planning.run import with_precision
from latentfm.training.checkpoint.resuming import finished
from latentfm.training.distributed.processes import raise_on_all_ranks
from latentfm.training.loop import TrainingLoop
from latentfm.training.precision import computing_device, has_bfloat16
from latentfm.training.records.sample_files import write_step
from latentfm.training.vae.checks import cautions, check, data_plan, listed
from latentfm.training.vae.losses import adaptive_weight, hinge, kl_by_channel, kl_weight, reconstruction_terms
from latentfm.training.vae.networks import LPIPS
from latentfm.training.vae.options import VAEConfig
from latentfm.training.vae.quality import LatentStatistics, measures, reconstructed
from latentfm.training.vae.report import triptych, write_report
from latentfm.training.vae.weights import VAEWeights, fingerprint, load_vae, vae_folder
from latentfm.training.validation import EPOCH, evaluating, split_held_out
from latentfm.words import count, shown

COUNTED = 10_000  # pictures that the latents' statistics are taken of at most
PICTURES = 8  # shown through time on the run page


@dataclass
class VAEFigures:
    """A step's figures over all processes: `terms` by name, each a mean over the global batch."""

    loss: float
    gradient_norm: float
    terms: dict[str, float]
    stop: bool


class VAETrainer(TrainingLoop):
    """A run that trains an autoencoder."""

    config: VAEConfig
    weights: VAEWeights
    lengths = {0: 1.0}  # there are no prompts

    def __init__(self, config: VAEConfig, resume: bool = False):
        super().__init__(config, resume, cautions(config))

    def check(self) -> None:
        check(self.config, self.resuming)
        self.size, self.plan = data_plan(self.config)

    def prepare(self, resources: ExitStack) -> None:
        config, device = self.config, self.accelerator.device
        self.lpips = LPIPS.load(expanded(config.loss.lpips)).to(device) if config.loss.lpips else None
        self.data = self.pictures(config.data)
        elsewhere = {"folder": config.validation.folder, "sources": None}
        apart = self.pictures(config.data.model_copy(update=elsewhere)) if config.validation.folder else None
        self.hold_folder(resources)
        for data in filter(None, (self.data, apart)):
            data.leave_out_unreadable(self.progress)
        self.accelerator.wait_for_everyone()
        vae = load_vae(config.model, max(self.size))
        options, seed, samples = config.data, config.train.seed, self.data.samples
        _, self.held_out = split_held_out(samples, config.validation.held_out, seed)
        self.bucket_of = self.data.bucket_of.copy()
        self.bucket_of[self.held_out] = -1  # never drawn
        self.stream = Stream(Mixture.of(samples, seed, self.bucket_of), config.train.batch_size, seed)
        variety = Variety(options.flip, options.crop == "random", options.random_background, options.permute_colours)
        self.reader = PixelReader(self.data.inventory, seed, vae.config.latent_channels, variety)
        # what is validated: pictures by a reader of their own, as a training of the network sees them
        self.judged_data, self.judged = (apart, range(len(apart.samples))) if apart else (self.data, self.held_out)
        self.judged_reader = PixelReader(self.judged_data.inventory, seed, vae.config.latent_channels, Variety())
        self.weights = VAEWeights(vae, config, self.accelerator)
        self.inputs = {"pictures": self.data.inventory.identity()["pictures"]}
        self.inputs |= {"autoencoder": fingerprint(vae_folder(config.model.vae))} if config.model.vae else {}
        measured = config.loss.perceptual and config.loss.lpips
        self.inputs |= {"LPIPS": hash_of(expanded(measured)).sha256} if measured else {}

    def pictures(self, options: Any) -> ReadablePictures:
        """The pictures of a part of the data, listed by all processes together, in their shapes."""
        kept = StatCache(expanded(options.cache))
        dataset = self.processes.first(lambda: listed(options, kept), f"sources of {options.folder}")
        self.accelerator.print(f"{count(len(dataset.samples), 'picture')} in {shown(dataset.folder)}")
        for reason, names in dataset.problems_by_reason(used=False).items():
            self.accelerator.print(f"not used, {shown(reason)}: {len(names):,} ({shown(', '.join(names[:5]))})")
        # a mirrored picture is decoded like its original
        inventory = Inventory(dataset, self.plan, processes=self.processes, kept=kept)
        return ReadablePictures(inventory, expanded(options.cache), self.processes)

    def what_trains(self) -> str:
        part = {"all": "encoder and decoder", "decoder": "the decoder"}[self.config.model.part]
        return f"{part}: {self.weights.trained_size / 1e6:.1f}M of {self.weights.size / 1e6:.1f}M parameters"

    # The training

    @property
    def judging(self) -> bool:
        """Whether the discriminator takes part in the step that comes."""
        return self.weights.judge is not None and self.step >= self.config.adversarial.start

    def train_step(self, batches: Iterator[PixelBatch]) -> dict[str, Any]:
        """One optimizer step of the autoencoder, and one of the discriminator when it takes part; returns the log row."""
        passes = self.config.train.gradient_accumulation
        rate, sums = self.weights.set_learning_rate(self.step), {}
        seen = [self.forward_backward_step(next(batches), sums, last=number + 1 == passes) for number in range(passes)]
        figures = self.over_all_ranks(sums)
        self.refuse_non_finite(figures, seen)
        if self.judging:
            self.weights.update_judge()
        self.weights.update(self.step + 1)
        self.step += 1
        self.asked_to_stop = figures.stop
        return {"loss": figures.loss, "learning_rate": rate, "gradient_norm": figures.gradient_norm, **figures.terms}

    def forward_backward_step(self, batch: PixelBatch, sums: dict[str, Tensor], last: bool) -> tuple[Tensor, list[str]]:
        """One forward and backward pass, added to `sums`; returns (losses [B], the samples' names)."""
        config, accelerator, weights = self.config, self.accelerator, self.weights
        passes, batch = config.train.gradient_accumulation, batch.to(accelerator.device)
        target = (batch.pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        if weights.judge is not None:
            weights.judge.requires_grad_(False)  # what fools it does not teach it
        with weights.shards.accumulating(last):
            with accelerator.autocast():
                output, mean, logvar = (value.float() for value in weights.shards.model(target, batch.noise))
                terms = reconstruction_terms(output, target, config.loss)
                if config.loss.perceptual and (self.lpips or self.judging):
                    distance = self.lpips or weights.judge.distance
                    terms["perceptual"] = config.loss.perceptual * distance(output, target).float()
            kl = kl_by_channel(mean, logvar).sum(dim=1) / target[0].numel()
            losses = sum(terms.values())
            loss = losses.mean() + kl_weight(self.step, config.loss) * kl.mean()
            found = {name: value.mean() for name, value in terms.items()} | {"kl": kl.mean()}
            if self.judging and config.adversarial.weight:
                with accelerator.autocast():
                    fooled = -weights.judge(output).float().mean()
                found["adaptive_weight"] = adaptive_weight(losses.mean(), fooled, weights.last_layer, self.mean_over_ranks)
                found["adversarial"] = fooled
                loss = loss + config.adversarial.weight * found["adaptive_weight"] * fooled
            accelerator.backward(loss / passes)
        if self.judging:
            found["discriminator"] = self.judge_step(target, output.detach(), passes)
        for name, value in (found | {"loss": loss}).items():
            sums[name] = sums.get(name, 0.0) + value.detach() / passes
        return (losses + kl).detach(), batch.ids

    def judge_step(self, target: Tensor, output: Tensor, passes: int) -> Tensor:
        """One backward pass of the discriminator on pictures and their reconstructions, of `passes` of a step; returns its loss."""
        judge = self.weights.judge.requires_grad_(True)
        with self.accelerator.autocast():
            real, fake = judge(target), judge(output)
        loss = hinge(real.float(), fake.float())
        (loss / passes).backward()
        return loss.detach()

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "mean")

    def over_all_ranks(self, sums: dict[str, Tensor]) -> VAEFigures:
        """The step's figures, in one sum over the processes; gradients are clipped, the discriminator's averaged before."""
        most, norm = self.config.train.max_grad_norm, self.weights.shards.clip_gradient(self.config.train.max_grad_norm)
        norms = [norm]
        if self.judging:
            self.weights.average_judge()
            norms.append(self.weights.judge_shards.clip_gradient(most))
        stop = torch.full((), float(bool(self.stop.signal)), device=self.accelerator.device)
        names = sorted(sums)
        summed = self.mean_over_ranks(torch.stack([sums[name] for name in names] + [stop]))
        *means, stopped = summed.tolist()
        terms, largest = dict(zip(names, means, strict=True)), max(torch.stack(norms).tolist())
        loss = terms.pop("loss")
        wrong = [value for value in terms.values() if not math.isfinite(value)]
        stopped = bool(stopped) or (self.accelerator.num_processes == 1 and bool(self.stop.signal))
        return VAEFigures(wrong[0] if wrong else loss, largest if not math.isfinite(largest) else norm.item(), terms, stopped)

    # Validations, pictures, the result

    def validate_and_sample(self) -> None:
        """Both, when they are due and there is something to judge by: before the first step too."""
        if len(self.judged) and self.due(self.config.validation.every):
            self.validate()
            self.sample()

    def batches(self, reader: PixelReader, indices: Sequence[int], bucket_of: np.ndarray) -> Iterator[tuple[list[int], Tensor]]:
        """(places in `indices`, pictures in [-1, 1] on the device) of this process's share of some samples."""
        options, world = self.config.train, self.accelerator.num_processes
        place_of = {index: place for place, index in enumerate(indices)}
        size = options.batch_size // (world * options.gradient_accumulation)
        for own in batches_of(indices, bucket_of, size)[self.accelerator.process_index :: world]:
            pixels = reader[[(EPOCH, index, 0) for index in own], 0].pixels.to(self.accelerator.device)
            yield [place_of[index] for index in own], pixels.float() / 127.5 - 1

    def validation_figures(self) -> dict[str, Any]:
        """The means over the held-out pictures; "kl_by_channel" and "kl" in nats a picture. Raises Failure for what is not finite."""
        options, rows = self.config.loss, {}
        with evaluating(self.weights.network):
            for places, target in self.batches(self.judged_reader, self.judged, self.judged_data.bucket_of):
                output, mean, logvar = reconstructed(self.weights.network, target)
                found = measures(output, target, mean, logvar, self.lpips)
                loss = sum(reconstruction_terms(output, target, options).values())
                found["validation_loss"] = loss.double() + (options.perceptual * found["lpips"] if self.lpips else 0.0)
                for name, value in found.items():
                    table = rows.setdefault(name, torch.zeros(len(self.judged), *value.shape[1:], dtype=torch.float64))
                    table[places] = value.cpu()
        rows = self.gathered(rows)
        bad = [place for place in range(len(self.judged)) if not all(torch.isfinite(table[place]).all() for table in rows.values())]
        if bad:
            names = [self.judged_data.samples[self.judged[place]].id for place in bad[:5]]
            raise Failure(f"the reconstruction is not finite for {', '.join(names)}; the newest checkpoint is untouched")
        by_channel = rows.pop("kl").mean(dim=0).tolist()
        return {
            **{name: table.mean().item() for name, table in rows.items()}, "worst_psnr": rows["psnr"].min().item(),
            "kl": sum(by_channel), "kl_by_channel": by_channel, "pictures": len(self.judged),
        }  # fmt: skip

    def gathered(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tables of which each process has filled its rows, filled."""
        if self.accelerator.num_processes == 1:
            return rows
        told: dict[str, Tensor] = {}
        for own in gather_object([rows]):
            for name, table in own.items():
                told[name] = told.get(name, 0.0) + table
        return told

    def sheet(self, number: int) -> tuple[list[Image.Image], list[str]]:
        """(original, reconstruction and difference side by side, of held-out pictures evenly chosen; their names), by these weights."""
        indices, network = evenly(self.judged, number), self.weights.network
        images = []
        with evaluating(network):
            for index in indices:
                pixels = self.judged_reader[[(EPOCH, index, 0)], 0].pixels.to(self.accelerator.device)
                images.append(triptych(pixels.float() / 127.5 - 1, reconstructed(network, pixels.float() / 127.5 - 1)[0]))
        return images, [self.judged_data.samples[index].id for index in indices]

    def sample(self) -> None:
        """The reconstructions of this step, for the run page. What keeps them from being written is told: the training matters more."""
        if self.accelerator.is_main_process:
            try:
                with self.weights.averaged():
                    images, names = self.sheet(PICTURES)
                write_step(self.out / "samples", self.step, images, names, {"shows": "original, reconstruction, difference"})
            except InputError as error:
                self.run_log.event(self.step, f"no pictures: {error}")
                self.accelerator.print(f"warning: no pictures at step {self.step}: {shown(error)}. The training goes on")

    def finish(self) -> Path:
        """Writes model/, with what its latents are to be scaled by, and the report; returns model/."""
        with self.weights.averaged():
            if self.config.model.part == "all":
                shift, scale = self.latent_statistics().shift_and_scale()
                self.weights.network.register_to_config(shift_factor=shift, scaling_factor=scale)
            images, names = self.sheet(self.config.validation.pictures)
        target = super().finish()
        with raise_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                path = write_report(self.out, self.config, self.weights.network.config, images, names)
                self.accelerator.print(f"how good it is: {shown(path)}")
        return target

    def latent_statistics(self) -> LatentStatistics:
        """Those of COUNTED of the training's pictures at most, evenly chosen, as a training of the network will see them."""
        chosen = evenly(np.flatnonzero(self.bucket_of >= 0).tolist(), COUNTED)
        found, network = LatentStatistics(), self.weights.network
        with evaluating(network), torch.no_grad(), torch.autocast(self.accelerator.device.type, enabled=False):
            for _, pixels in self.batches(self.reader.plain(), chosen, self.bucket_of):
                posterior = network.encode(pixels).latent_dist
                found.add(posterior.mean, posterior.logvar)
        found.sums = sum(gather_object([found.sums])) if self.accelerator.num_processes > 1 else found.sums
        return found


def evenly(indices: Sequence[int], most: int) -> list[int]:
    """At most `most` of the indices, the first and the last among them, evenly spaced."""
    places = np.linspace(0, len(indices) - 1, min(len(indices), most)).round().astype(int)
    return [indices[place] for place in places.tolist()]


def train_vae(config: VAEConfig, resume: bool = False) -> Path:
    """Runs a training from its options; returns the folder of the finished autoencoder. Raises Stopped when a signal ended it, saved."""
    model = finished(with_precision(config, has_bfloat16(computing_device()))) if resume else None
    if model is not None:
        print(f"{shown(model.parent)} is finished already")
        return model
    return VAETrainer(config, resume).train()
