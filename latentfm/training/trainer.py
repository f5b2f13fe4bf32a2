"""Training by conditional flow matching with label dropout (notes, Algorithm 5), through Accelerate.

    latentfm train --config configs/quickstart.yaml data.folder=my_pictures
    accelerate launch --multi_gpu --num_processes 2 -m latentfm train --config configs/quickstart.yaml
    torchrun --nproc_per_node 2 -m latentfm train --config configs/quickstart.yaml

Both work without a GPU too; `accelerate launch --cpu --num_processes 2` starts a single process.

A run's folder holds metrics.jsonl and TensorBoard logs, samples/ (pictures from the averaged weights), checkpoints/,
and at the end model/, a stock pipeline folder.
"""

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from latentfm import flow
from latentfm.config import RunConfig, TokenRouting
from latentfm.data.loader import Batch, CachedSamples, Dropout, Routing, Stream, batches
from latentfm.data.mixture import Mixture
from latentfm.errors import InputError
from latentfm.files import whole_or_nothing
from latentfm.models import vae as vae_room
from latentfm.models.attention import check_backend
from latentfm.models.folder import t5_length
from latentfm.models.mmdit import TokenRoute
from latentfm.models.text import NullCondition, assemble
from latentfm.models.velocity import velocity
from latentfm.training import checkpoint, export
from latentfm.training.ema import EMA
from latentfm.training.optim import clip_gradient, learning_rate, make_optimizer, masters_of
from latentfm.training.prepare import CachedDataset, Models, load_models, open_dataset, picture_size
from latentfm.training.progress import Progress
from latentfm.training.samples import SamplePictures

DENSITIES = {name: density() for name, density in flow.DENSITIES.items()}
# options that may change when a run is resumed: they do not touch the course of the training
FREE_ON_RESUME = {
    "output", "sample", "data.workers", "data.cache", "train.compile", "train.gradient_checkpointing", "train.gradient_accumulation",
    "train.attention",
}  # fmt: skip


def cfm_losses(network: nn.Module, batch: Batch, null: NullCondition, config: RunConfig, shift: float, scale: float) -> Tensor:
    """The conditional flow-matching loss of each sample, [B] float32: the one place where latents are noised.

    z is a draw from the VAE's posterior, scaled; x_t and the target come from the CondOT path; dropped encoders read the null
    condition (notes, Algorithm 5, with the target alpha' z + beta' eps).
    """
    device = batch.moments.device
    z = vae_room.sample_latents(batch.moments, batch.vae_noise, shift, scale)
    t = flow.draw_t(batch.u, DENSITIES[config.train.t_density], config.train.t_shift)
    path = flow.sample_path(z, batch.eps, t)
    parts = batch.parts.drop(batch.dropped, null.parts(batch.t5_length).map(lambda value: value.to(device)))
    condition = assemble(parts.map(Tensor.float), *condition_widths(network))
    route = None
    if batch.kept is not None:
        route = TokenRoute(batch.kept, *routed_blocks(config.train.token_routing, network_config(network).num_layers))
    return flow.cfm_loss(velocity(network, path.x_t, t, condition, token_route=route), path.velocity, batch.mask)


def weighted(losses: Tensor, prior: Tensor | None, prior_weight: float) -> Tensor:
    """The losses [B] with those of a regularisation set, where `prior` is true, times prior_weight (DreamBooth, Ruiz et al. 2023)."""
    return losses if prior is None else torch.where(prior, prior_weight * losses, losses)


def condition_widths(network: nn.Module) -> tuple[int, int]:
    """(joint_attention_dim, pooled_projection_dim) of a network, wrapped for many processes or not."""
    config = network_config(network)
    return config.joint_attention_dim, config.pooled_projection_dim


def network_config(network: nn.Module) -> Any:
    """The configuration of a network, wrapped for many processes or not."""
    return getattr(network, "module", network).config


def routed_blocks(options: TokenRouting, layers: int) -> tuple[int, int]:
    """(first, last) routed block, both counted from 0, of a network of `layers` blocks. Raises InputError when they do not fit."""
    first, last = (block + layers if block < 0 else block for block in (options.first, options.last))
    if not 0 <= first <= last < layers:
        raise InputError(
            f"train.token_routing from block {options.first} to {options.last} does not fit this network of {layers} blocks; "
            f"choose 0 <= first <= last <= {layers - 1}, or negative numbers counted from the end"
        )
    return first, last


class Trainer:
    """One run, from its options to its model/ folder. `resume` goes on from the newest checkpoint."""

    def __init__(self, config: RunConfig, resume: bool = False):
        self.config, self.out = config, Path(config.output.folder).expanduser()
        self.refuse_overwriting(resume)
        torch.manual_seed(config.train.seed)
        self.accelerator = Accelerator(
            # bfloat16 weights need no autocast: everything the network does is in their precision
            mixed_precision="no" if config.train.weights == "bfloat16" else config.train.mixed_precision,
            log_with="tensorboard", project_dir=self.out,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # or every gradient is there twice
            cpu=not torch.accelerator.is_available(),  # left to itself, Accelerate takes two processes without a GPU for two runs
        )  # fmt: skip
        self.check_batch()
        dataset = open_dataset(config.data, self.accelerator)
        self.models: Models = load_models(config.model)
        self.choose_attention()
        self.routing = self.checked_routing()
        self.lengths = config.data.t5_lengths or {t5_length(self.models.info): 1.0}
        self.progress = Progress(self.accelerator.is_main_process)
        self.data = CachedDataset(dataset, self.models, config.data, sorted(self.lengths))

    def refuse_overwriting(self, resume: bool) -> None:
        """Raises InputError when the output folder already holds a run and `resume` is off, or the other way round."""
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"output.folder {self.out} is a file; choose another")
        self.saved = checkpoint.checkpoints(self.out / "checkpoints")
        if resume and not self.saved:
            raise InputError(f"nothing to resume: {self.out} holds no checkpoint; leave --resume out to start from the first step")
        if (self.saved or (self.out / "model").exists()) and not resume:
            raise InputError(f"{self.out} already holds a run; go on with --resume, or choose another output.folder")

    def check_batch(self) -> None:
        world, options = self.accelerator.num_processes, self.config.train
        if options.batch_size % (world * options.gradient_accumulation):
            raise InputError(
                f"train.batch_size {options.batch_size} does not divide by {world} processes times "
                f"gradient_accumulation {options.gradient_accumulation}"
            )

    def choose_attention(self) -> None:
        """Has train.attention compute the network's attention, tried on eight tokens. Raises InputError when it cannot, or not train."""
        options, network = self.config.train, self.models.network
        dtype = torch.bfloat16 if options.weights == "bfloat16" or options.mixed_precision == "bf16" else torch.float32
        heads, head_dim = network.config.num_attention_heads, network.config.attention_head_dim
        check_backend(options.attention, heads, head_dim, self.accelerator.device, dtype, training=True)
        network.set_attention(options.attention)

    def checked_routing(self) -> Routing | None:
        """How image tokens are routed, None if they are not. Raises InputError when the blocks or the tokens do not allow it."""
        options, network = self.config.train.token_routing, self.models.network
        if options is None:
            return None
        routed_blocks(options, network.config.num_layers)
        routing = Routing(options.keep, network.config.patch_size)
        factor = vae_room.downsampling(self.models.vae)
        width, height = (side // factor for side in picture_size(self.config.data, self.models))
        kept, tokens = routing.counts(height, width)
        if kept == 0 or (kept == tokens and options.keep < 1):
            raise InputError(
                f"train.token_routing.keep {options.keep} of a picture's {tokens} image tokens is {kept} of them; "
                f"choose a keep from 1/{tokens} to {tokens - 1}/{tokens}, a larger data.size, or leave token_routing out"
            )
        return routing

    def run(self) -> Path:
        """Trains to the last step and returns the folder of the finished pipeline."""
        with self.progress:
            self.set_up()
            try:
                self.loop()
            except KeyboardInterrupt:
                if self.step > self.started_at:
                    self.save()
                    self.accelerator.print(f"stopped at step {self.step}, saved; go on with --resume")
                raise
            self.accelerator.wait_for_everyone()
            target = self.out / "model"
            if self.accelerator.is_main_process:
                averages = self.ema.state_dict()
                export.write_pipeline(target, self.models, self.network, averages, self.config, sorted(self.lengths))
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()
        return target

    def set_up(self) -> None:
        """Fills the cache, places the models, restores the newest checkpoint and opens the logs."""
        config, accelerator = self.config, self.accelerator
        device = accelerator.device
        self.models.vae.to(device)
        self.models.encoder.to(device)
        self.data.fill(accelerator, self.progress)
        self.mixture = Mixture.of(self.data.samples, config.train.seed)
        for length in self.lengths:
            self.models.null.parts(length)
        self.samples = SamplePictures(config.sample, self.models, self.data, self.out / "samples", device)
        self.models.encoder.to(torch.device("cpu"))

        self.network = self.models.network.to(device).train()
        self.network.set_gradient_checkpointing(config.train.gradient_checkpointing)
        self.names = {id(p): name for name, p in self.network.named_parameters()}
        self.ema = EMA(self.network, config.train.ema_decay)
        optimizer = make_optimizer(self.network, config.train)
        for parameter in self.network.parameters():  # averages and masters began in float32; the position table stays in it
            parameter.data = parameter.data.to(getattr(torch, config.train.weights))
        self.step = 0
        self.identity = {"config": config.model_dump(mode="json"), "inputs": self.data.identity()}
        if self.saved:
            self.restore(optimizer)
        self.started_at = self.step
        if config.train.compile:
            torch._dynamo.config.recompile_limit = 64
            self.network.compile_repeated_blocks(dynamic=False)
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        self.shift, self.scale = vae_room.shift_and_scale(self.models.vae)
        self.has_prior = any(sample.share.regularisation for sample in self.data.samples)
        if accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "config.json").write_text(json.dumps(self.identity["config"], indent=2) + "\n", "utf-8")
            keep_rows(self.out / "metrics.jsonl", self.step)
        accelerator.init_trackers("logs", init_kwargs={"tensorboard": {"purge_step": self.step + 1}})
        self.describe()

    def describe(self) -> None:
        """Prints what is about to happen."""
        config, samples = self.config, len(self.data.samples)
        encoders = sum(e is not None for e in self.models.encoder.encoders)
        dropout = Dropout(config.train.dropout, config.train.dropout_each)
        parameters = sum(p.numel() for p in self.network.parameters() if p.requires_grad) / 1e6
        epochs = config.train.steps * config.train.batch_size / self.mixture.count
        self.accelerator.print(
            f"{parameters:.1f}M parameters in {config.train.weights}, {samples} pictures, "
            f"{config.train.steps} steps of {config.train.batch_size} = {epochs:.1f} epochs, "
            f"{self.accelerator.num_processes} process(es) on {self.accelerator.device.type}, "
            f"P(no condition) = {dropout.p_unconditional(encoders):.3f}"
        )

    def loop(self) -> None:
        """The training loop: every optimizer step, its log row, and what is due after it."""
        config = self.config.train
        stream = self.micro_batches()
        if self.due(self.config.sample.every):  # at the start, and again after a stop between a checkpoint and its pictures
            self.draw_samples()
        began, first = time.monotonic(), self.step
        self.progress.start(self.step, config.steps)
        while self.step < config.steps:
            row = self.gradient(stream)
            with unbroken():  # a Ctrl-C in here would save weights, averages, step and log that do not belong together
                self.update()
                row["images_per_second"] = (self.step - first) * config.batch_size / (time.monotonic() - began)
                self.progress.step(self.step, row)
                self.log(row)
            if self.due(self.config.output.checkpoint_every):
                self.save()
            if self.due(self.config.sample.every):
                self.draw_samples()

    def due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.train.steps

    def micro_batches(self) -> Iterator[Batch]:
        config = self.config
        data = CachedSamples(
            self.data.samples, self.data.cache, self.data.image_key, self.data.caption_key, config.train.seed,
            Dropout(config.train.dropout, config.train.dropout_each), config.data.flip, self.routing, self.mixture, self.data.mask_key,
        )  # fmt: skip
        return batches(
            data, Stream(self.mixture.count, config.train.batch_size, config.train.seed), self.lengths, self.step, config.train.steps,
            config.train.gradient_accumulation, self.accelerator.process_index, self.accelerator.num_processes, config.data.workers,
        )  # fmt: skip

    def gradient(self, stream: Iterator[Batch]) -> dict[str, float]:
        """The log row of one optimizer step (global mean loss, rate, gradient norm), its clipped gradient left in the weights."""
        options, accelerator = self.config.train, self.accelerator
        rate = learning_rate(self.step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total, prior = torch.zeros((), device=accelerator.device), torch.zeros(2, device=accelerator.device)
        for micro in range(options.gradient_accumulation):
            batch = to_device(next(stream), accelerator.device)
            with accelerator.no_sync(self.model) if micro + 1 < options.gradient_accumulation else nullcontext():
                losses = cfm_losses(self.model, batch, self.models.null, self.config, self.shift, self.scale)
                loss = weighted(losses, batch.prior, self.config.data.prior_weight).mean() / options.gradient_accumulation
                self.refuse_non_finite(losses, batch)
                accelerator.backward(loss)
            total += loss.detach()
            if batch.prior is not None:
                prior += torch.stack([losses.detach()[batch.prior].sum(), batch.prior.sum()])
        norm = clip_gradient(self.network.parameters(), options.max_grad_norm)
        if not torch.isfinite(norm):
            raise InputError(
                f"the gradient is not finite at step {self.step + 1}; the newest checkpoint is untouched, lower train.learning_rate"
            )
        row = {"loss": accelerator.reduce(total, "mean").item(), "learning_rate": rate, "gradient_norm": norm.item()}
        if self.has_prior:
            prior_sum, prior_count = accelerator.reduce(prior, "sum").tolist()
            row |= {"prior_loss": prior_sum / prior_count} if prior_count else {}  # unweighted; no row where no such sample was drawn
        return row

    def update(self) -> None:
        """Moves the weights by the gradient and the averages after them, and counts the step."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.network, self.step + 1, masters_of(self.optimizer, self.names))
        self.step += 1

    def refuse_non_finite(self, losses: Tensor, batch: Batch) -> None:
        """Raises InputError naming the samples whose loss is not finite, before they touch a weight."""
        bad = [name for name, good in zip(batch.ids, torch.isfinite(losses).tolist(), strict=True) if not good]
        if bad:
            raise InputError(f"the loss is not finite at step {self.step + 1} for {', '.join(bad[:5])}; the newest checkpoint is untouched")

    def log(self, row: dict[str, float]) -> None:
        self.accelerator.log(row, step=self.step)
        if self.accelerator.is_main_process:
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.step, **row}) + "\n")

    def draw_samples(self) -> None:
        if self.accelerator.is_main_process:
            with self.ema.applied_to(self.network):
                self.samples.draw(self.network, self.step)
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """Writes the checkpoint of the current step (main process)."""
        if self.accelerator.is_main_process:
            tensors = checkpoint.pack(self.network, self.ema, getattr(self.optimizer, "optimizer", self.optimizer), self.names)
            checkpoint.save(self.out / "checkpoints", self.step, tensors, self.identity, self.config.output.keep)

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Puts the newest checkpoint into the network, the averages and the optimizer; raises InputError if it is another run's."""
        tensors, info = checkpoint.load(self.saved[-1])
        changed = differences(info["config"], self.identity["config"])
        if changed:
            raise InputError(
                f"{self.saved[-1]} was made with other options: {'; '.join(changed)}. Restore them, or choose another output.folder"
            )
        changed = [what for what, value in self.identity["inputs"].items() if info.get("inputs", {}).get(what) != value]
        if changed:
            raise InputError(
                f"{', '.join(changed)} of this run are not those {self.saved[-1]} was trained on; "
                "restore them, or choose another output.folder"
            )
        checkpoint.unpack(tensors, self.network, self.ema, optimizer, self.names)
        self.step = info["step"]
        self.accelerator.print(f"resuming after step {self.step}")


def train(config: RunConfig, resume: bool = False) -> Path:
    """Runs a training from its options; returns the folder of the finished pipeline."""
    return Trainer(config, resume).run()


@contextmanager
def unbroken() -> Iterator[None]:
    """A context that Ctrl-C does not interrupt: it takes effect at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[tuple] = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: pressed.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed and callable(handler):
        handler(*pressed[0])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; u, the draws of dropout and the ids stay as they are in value."""
    return Batch(
        moments=batch.moments.to(device), parts=batch.parts.map(lambda value: value.to(device)),
        dropped={name: mask.to(device) for name, mask in batch.dropped.items()}, u=batch.u.to(device),
        vae_noise=batch.vae_noise.to(device), eps=batch.eps.to(device), t5_length=batch.t5_length, ids=batch.ids,
        kept=None if batch.kept is None else batch.kept.to(device), mask=None if batch.mask is None else batch.mask.to(device),
        prior=None if batch.prior is None else batch.prior.to(device),
    )  # fmt: skip


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of the options that matter differs, as "section.key was X, is Y"; an option that did not exist had its default."""
    found = []
    for section, options in now.items():
        defaults = RunConfig.model_fields[section].annotation.model_fields
        for key, value in options.items():
            was = before.get(section, {}).get(key, defaults[key].default)
            if section not in FREE_ON_RESUME and f"{section}.{key}" not in FREE_ON_RESUME and was != value:
                found.append(f"{section}.{key} was {was!r}, is {value!r}")
    return found


def keep_rows(path: Path, step: int) -> None:
    """Drops the rows of metrics.jsonl after `step`: a resumed run writes them again."""
    if path.exists():
        kept = [line for line in path.read_text("utf-8").splitlines() if line and line[-1] == "}" and json.loads(line)["step"] <= step]
        with whole_or_nothing(path) as partial:
            partial.write_text("".join(line + "\n" for line in kept), "utf-8")
