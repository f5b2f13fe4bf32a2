"""Training by conditional flow matching with label dropout (notes, Algorithm 5), through Accelerate.

    latentfm train --config configs/quickstart.yaml data.folder=my_pictures
    accelerate launch --config_file configs/accelerate/ddp-8.yaml -m latentfm train --config configs/quickstart.yaml
    torchrun --nproc_per_node 2 -m latentfm train --config configs/quickstart.yaml

A run's folder holds run.html (curves and pictures, opens in a browser), metrics.jsonl and TensorBoard logs, samples/ (pictures from the
averaged weights), checkpoints/, and at the end model/, a stock pipeline folder.
"""

import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from torch import Tensor

from latentfm import flow
from latentfm.config import RunConfig
from latentfm.data.loader import Batch, Dropout, Loader, Routing
from latentfm.data.mixture import Mixture
from latentfm.data.sources import summary
from latentfm.data.stream import Stream
from latentfm.errors import InputError
from latentfm.files import expanded
from latentfm.models.backends import check_backend
from latentfm.models.folder import t5_length
from latentfm.training.adapters import seed_dropout
from latentfm.training.checkpoint.resuming import check_options, finished
from latentfm.training.checks import cautions, check
from latentfm.training.distributed import zero
from latentfm.training.distributed.launcher import Peers, fewer_than_asked
from latentfm.training.distributed.processes import from_main, shared, together
from latentfm.training.distributed.shards import is_split
from latentfm.training.models import load_models, picture_size
from latentfm.training.online import dataset_of
from latentfm.training.precision import choose_workspace, compute_dtype, deterministic, has_bfloat16, settled
from latentfm.training.records.progress import Progress
from latentfm.training.records.run_log import RunLog, claimed
from latentfm.training.samples import SamplePictures
from latentfm.training.sources import open_dataset
from latentfm.training.step import Objective, cfm_losses, weights_of
from latentfm.training.stop import Stop, Stopped
from latentfm.training.validation import Validation, split_held_out
from latentfm.training.weights import Weights
from latentfm.words import count, shown

INTERVALS = 8  # of t, for the loss by t in the log
STEPS_OF_PACE = 50  # that pictures a second are counted over
WAYS = {"none": "", "full": ", weights split by FSDP2", "zero2": ", DeepSpeed's ZeRO 2", "zero3": ", DeepSpeed's ZeRO 3"}


class Trainer:
    """One run, from its options to its model/ folder. `resume` goes on from the newest checkpoint."""

    def __init__(self, config: RunConfig, resume: bool = False):
        device = computing_device()
        config = settled(config, has_bfloat16(device))
        if config.train.deterministic:
            choose_workspace()
        setup = check(config, resume)
        self.lengths, self.way = setup.lengths, WAYS[setup.launch.way]
        self.config, self.out, self.resuming = config, expanded(config.output.folder), resume
        torch.manual_seed(config.train.seed)
        narrow = config.train.weights == "bfloat16" and config.train.adapter is None  # an adapter's own weights are float32
        # bfloat16 weights, and the copies that DeepSpeed makes, need no autocast: everything the network does is in their precision
        autocast = "no" if narrow or zero.is_zero() else config.train.mixed_precision
        with zero.not_by_accelerate():
            self.accelerator = Accelerator(
                mixed_precision=autocast, log_with=[*config.output.trackers], project_dir=self.out,
                kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # or every gradient is there twice
                cpu=device.type == "cpu",  # left to itself, Accelerate takes two processes without a GPU for two runs
            )  # fmt: skip
        for note in filter(None, [*cautions(config), fewer_than_asked(self.accelerator.num_processes)]):
            self.accelerator.print(f"warning: {note}")
        dataset = open_dataset(config.data)
        self.accelerator.print(summary(dataset))
        self.models = load_models(config.model)
        self.choose_attention()
        self.objective = Objective.of(config.train, self.models.vae)
        self.dropout = Dropout(config.train.dropout, config.train.dropout_each)
        self.progress = Progress(self.accelerator.is_main_process)
        self.records = RunLog(self.out, self.accelerator.is_main_process)
        self.stop, self.step, self.asked_to_stop = Stop(), 0, False
        self.validation_loss: tuple[int, float] = (-1, 0.0)  # the step of the last validation, and what it found
        share = partial(shared, self.accelerator)  # every picture is read once, whatever the number of processes
        self.data = dataset_of(dataset, self.models, config.data, sorted(self.lengths), share)
        routing = config.train.token_routing
        self.routing = Routing(routing.keep, self.models.network.config.patch_size) if routing else None

    def choose_attention(self) -> None:
        """Has train.attention compute the network's attention, tried on eight tokens. Raises InputError when it cannot, or not train."""
        options, network = self.config.train, self.models.network
        heads, head_dim = network.config.num_attention_heads, network.config.attention_head_dim
        check_backend(options.attention, heads, head_dim, self.accelerator.device, compute_dtype(options), training=True)
        network.set_attention(options.attention)

    # The run

    def run(self) -> Path:
        """Trains to the last step and returns the folder of the finished pipeline. Raises Stopped when asked to stop by a signal."""
        deterministically = deterministic(self.config.train.deterministic)
        with Peers(self.accelerator).watched(), self.progress, self.claimed(), deterministically:
            self.set_up()
            try:
                with self.stop.listening():
                    self.loop()
                    target = self.weights.write(self.out)
                    self.records.event(self.step, "finished")
            except Exception as error:
                if self.accelerator.is_main_process and not isinstance(error, Stopped):
                    self.records.event(self.step, f"ended: {error}")
                raise
            finally:
                self.records.page(now=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return target

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """A context in which no other run writes to the output folder; raises InputError on every process when one does."""
        with ExitStack() as stack:
            with together(self.accelerator):
                if self.accelerator.is_main_process:
                    self.records.claim = stack.enter_context(claimed(self.out))
            yield

    def set_up(self) -> None:
        """Fills the cache, places the models, restores the newest checkpoint and opens the logs."""
        config, accelerator = self.config, self.accelerator
        self.data.prepare(accelerator, self.progress)
        seed = config.train.seed
        _, self.held_out = split_held_out(self.data.samples, config.validation.held_out, seed)
        bucket_of = self.data.bucket_of.copy()
        bucket_of[self.held_out] = -1  # never drawn
        self.stream = Stream(Mixture.of(self.data.samples, seed, bucket_of), config.train.batch_size, seed)
        self.reader = self.data.reader(seed, self.dropout, self.routing)
        # on the device: from a CPU's memory every step would wait for its copy
        self.models.null = self.models.null.kept({*self.lengths, t5_length(self.models.info)}, accelerator.device)
        size, samples = picture_size(config.data, self.models), self.out / "samples"
        self.samples = SamplePictures(config.sample, self.models, self.data.samples, size, samples, accelerator.device)
        self.validation = Validation(
            config.validation.times, self.objective, self.reader, self.data.samples, self.data.bucket_of, self.held_out,
            max(self.lengths, key=self.lengths.get), self.micro_batch, lambda batch: self.data.complete(batch, accelerator.device),
        ) if self.held_out else None  # fmt: skip
        self.data.release()
        self.weights = Weights(self.models, config, accelerator, self.micro_batch, sorted(self.lengths))
        frozen = self.weights.trained.base
        base = {"frozen weights": frozen} if frozen else {}
        inputs = self.data.identity() | base | {"T5 lengths": ", ".join(map(str, sorted(self.lengths)))}
        self.identity = {"config": config.model_dump(mode="json"), "inputs": inputs}
        if self.resuming:
            self.restore()
        self.has_prior = any(sample.share.regularisation for sample in self.data.samples)
        facts = self.facts()
        self.records.open(self.step, self.identity["config"], facts, [self.data.samples[index].id for index in self.held_out])
        init = {"tensorboard": {"purge_step": self.step + 1}, "wandb": {"name": self.out.name, "dir": str(self.out)}}
        accelerator.init_trackers("logs", init_kwargs={name: init[name] for name in config.output.trackers})
        self.records.event(self.step, f"resumed after step {self.step}" if self.resuming else "started")
        self.describe(facts)

    @property
    def micro_batch(self) -> int:
        """Pictures in one forward pass of one process."""
        return self.config.train.batch_size // (self.accelerator.num_processes * self.config.train.gradient_accumulation)

    def facts(self) -> dict[str, Any]:
        """What the run page says of the run beside its options."""
        device = self.accelerator.device
        versions = {module.__name__: module.__version__ for module in map(__import__, ("torch", "diffusers", "transformers", "accelerate"))}
        encoders = sum(e is not None for e in self.models.encoder.encoders)
        way = WAYS["full"] if is_split(self.models.network) and not self.way else self.way  # in one process there is nothing to split
        return {
            "devices": (torch.cuda.get_device_name(device) if device.type == "cuda" else device.type) + way,
            "processes": self.accelerator.num_processes,
            "parameters": self.weights.size,
            "trained": self.weights.trained_size,
            "pictures": len(self.data.samples) - len(self.held_out),
            "held_out": len(self.held_out),
            "epochs": round(self.config.train.steps * self.config.train.batch_size / self.stream.mixture.per_epoch, 3),
            "no_condition": round(self.dropout.p_unconditional(encoders), 4),
            "versions": versions,
        }

    def describe(self, facts: dict[str, Any]) -> None:
        """Prints what is about to happen."""
        train, out = self.config.train, f" and {len(self.held_out)} held out" if self.held_out else ""
        trained, whole = facts["trained"] / 1e6, facts["parameters"] / 1e6
        self.accelerator.print(
            f"{self.weights.trained.summary}: {trained:.1f}M of {whole:.1f}M parameters in {train.weights}, "
            f"{count(facts['pictures'], 'picture')} in {len(self.data.buckets.shapes)} bucket(s){out}, "
            f"{count(train.steps, 'step')} of {train.batch_size} = {facts['epochs']:.1f} epochs, "
            f"{facts['processes']} process(es) on {facts['devices']}, P(no condition) = {facts['no_condition']:.3f}\n"
            f"its curves and pictures: {shown(self.out / 'run.html')}"
        )
        if compute_dtype(train) == torch.bfloat16 and not has_bfloat16(self.accelerator.device):
            self.accelerator.print(
                "warning: this device has no bfloat16 of its own and imitates it, slowly; train.mixed_precision=no, with "
                "train.weights=float32, is several times as fast"
            )

    def loop(self) -> None:
        """The training loop: every optimizer step, its log row, and what is due after it."""
        config = self.config.train
        batches = iter(self.micro_batches())
        self.look(first=True)
        paused = 0.0  # seconds of validations, pictures and checkpoints, which are no training time
        times = deque([time.monotonic()], STEPS_OF_PACE + 1)
        self.progress.start(self.step, config.steps)
        while self.step < config.steps:
            row = self.gradient(batches)
            self.weights.update(self.step + 1)
            self.step += 1
            if self.accelerator.num_processes == 1:  # nobody to agree with
                self.asked_to_stop = bool(self.stop.signal)
            times.append(time.monotonic() - paused)
            row["images_per_second"] = (len(times) - 1) * config.batch_size / (times[-1] - times[0])
            self.progress.step(self.step, row)
            self.log(row)
            last = self.step == config.steps
            saving = self.due(self.config.output.checkpoint_every)
            pause = time.monotonic()
            self.look()
            if saving or self.asked_to_stop:
                self.save(must=last or self.asked_to_stop)
            if self.asked_to_stop and not last:
                self.leave()
            paused += time.monotonic() - pause
            self.records.page()

    def due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.train.steps

    def look(self, first: bool = False) -> None:
        """Validates and draws when it is time: before the first step too, and again after a stop before the pictures of a step."""
        if self.validation and self.due(self.config.validation.every):
            self.validate()
        if self.due(self.config.sample.every):
            self.draw()
            if first:
                self.records.page(now=True)

    def draw(self) -> None:
        """The sample pictures of this step. What keeps them from being drawn or written is told and noted: the training matters more."""
        problem = "no memory for them"
        try:
            with self.weights.averaged():
                drawn = self.samples.draw(self.models.network, self.step, self.accelerator)
        except InputError as error:
            drawn, problem = None, str(error)
            self.accelerator.print(f"warning: no pictures at step {self.step}: {shown(problem)}. The training goes on")
        if drawn is None:
            self.records.event(self.step, f"no pictures: {problem}")

    def micro_batches(self) -> Loader:
        """This process's batches from the current step on."""
        config, accelerator = self.config, self.accelerator
        loader = Loader(
            self.reader, self.stream, self.lengths, config.train.steps, config.train.gradient_accumulation,
            accelerator.process_index, accelerator.num_processes, config.data.workers, pin=accelerator.device.type == "cuda",
        )  # fmt: skip
        loader.load_state_dict(self.stream.state(self.step))
        return loader

    def gradient(self, batches: Any) -> dict[str, Any]:
        """The log row of one optimizer step (global mean loss, rate, gradient norm, loss by t), its clipped gradient left in the parts."""
        options, accelerator, parts = self.config.train, self.accelerator, self.weights.parts
        rate = self.weights.begin(self.step)
        sums = torch.zeros(4 + 2 * INTERVALS, device=accelerator.device)  # loss, stop, prior loss and count, loss and count by t
        seen: list[tuple[Tensor, list[str]]] = []
        for micro in range(options.gradient_accumulation):
            batch = self.data.complete(next(batches), accelerator.device)
            seed_dropout(options, self.step, micro * accelerator.num_processes + accelerator.process_index)
            with parts.summing(last=micro + 1 == options.gradient_accumulation):
                with accelerator.autocast():
                    losses, t = cfm_losses(parts.model, batch, self.models.null, self.objective)
                weights = weights_of(t, batch.prior, self.objective, self.config.data.prior_weight)
                loss = (weights * losses).mean() / options.gradient_accumulation
                parts.backward(loss)
            self.add(sums, losses.detach(), t, loss.detach(), batch)
            seen.append((losses.detach(), batch.ids))
        norm = parts.gradient_norm(options.max_grad_norm)
        sums[1] = self.stop.signal
        *found, length = torch.cat([accelerator.reduce(sums, "sum"), norm.view(1)]).tolist()  # the one wait of a step
        self.asked_to_stop = found[1] > 0
        total = found[0] / accelerator.num_processes
        self.refuse_non_finite(total, length, seen)
        by_t, counts = found[4 : 4 + INTERVALS], found[4 + INTERVALS :]
        return {
            "loss": total, "learning_rate": rate, "gradient_norm": length,
            "loss_by_t": [value / count if count else None for value, count in zip(by_t, counts, strict=True)],
            "count_by_t": [int(count) for count in counts],
            # unweighted; none where no such sample was drawn
            **({"prior_loss": found[2] / found[3]} if self.has_prior and found[3] else {}),
        }  # fmt: skip

    def add(self, sums: Tensor, losses: Tensor, t: Tensor, loss: Tensor, batch: Batch) -> None:
        """Adds what the row of a step needs of a forward pass to `sums`, without waiting for the device."""
        sums[0] += loss
        if batch.prior is not None:
            sums[2] += torch.where(batch.prior, losses, 0.0).sum()
            sums[3] += batch.prior.sum()
        means, counts = flow.by_time(losses, t, INTERVALS)
        sums[4 : 4 + INTERVALS] += torch.where(counts > 0, means * counts, 0.0)
        sums[4 + INTERVALS :] += counts

    def refuse_non_finite(self, loss: float, norm: float, seen: list[tuple[Tensor, list[str]]]) -> None:
        """Raises InputError on every process when the loss or the gradient is not finite, before a weight is touched; names the samples."""
        if abs(loss) < float("inf") and norm < float("inf"):
            return
        bad = [name for losses, names in seen for name, good in zip(names, torch.isfinite(losses).tolist(), strict=True) if not good]
        bad = gather_object(bad)
        where = f"at step {self.step + 1}" + (f" for {', '.join(bad[:5])}" if bad else "")
        if bad:
            raise InputError(f"the loss is not finite {where}; the newest checkpoint is untouched")
        raise InputError(f"the gradient is not finite {where}; the newest checkpoint is untouched, lower train.learning_rate")

    def log(self, row: dict[str, Any]) -> None:
        self.records.metrics({"step": self.step, **row})
        self.track({name: value for name, value in row.items() if isinstance(value, float)})

    def track(self, values: dict[str, float]) -> None:
        """Gives the trackers the step's values. When one fails, that is told and they get no more: the training goes on."""
        try:
            self.accelerator.log(values, step=self.step)
        except Exception as error:  # TensorBoard's writer is broken for good after a write that the disk refused
            self.accelerator.trackers = []
            self.records.event(self.step, f"no more for {', '.join(self.config.output.trackers)}: {error}")
            names = ", ".join(self.config.output.trackers)
            self.accelerator.print(f"warning: {names}: {shown(error, 300)}. It gets no more until --resume")

    def validate(self) -> None:
        """The loss on the held-out pictures, from the averaged weights, unless this step's is known from before a stop."""
        row = from_main(self.accelerator, self.records.validated(self.step))
        if row is None:
            with self.weights.averaged():
                rank, world = self.accelerator.process_index, self.accelerator.num_processes
                found = self.validation.run(self.models.network, rank, world, lambda table: self.accelerator.reduce(table, "sum"))
            row = {"step": self.step, **found}
            self.records.validation(row)
            self.track({"validation_loss": row["validation_loss"]})
        self.validation_loss = (self.step, row["validation_loss"])

    # Stopping, saving, going on

    def leave(self) -> None:
        """Raises what ends a run that was asked to stop and has saved: KeyboardInterrupt for Ctrl-C, Stopped for the others."""
        self.records.event(self.step, "stopped by a signal, saved")
        text = f"stopped after step {self.step} of {self.config.train.steps}, saved; go on with --resume"
        if self.stop.signal == signal.SIGINT:
            self.accelerator.print(text)
            raise KeyboardInterrupt
        raise Stopped(text)

    def save(self, must: bool) -> None:
        """Writes the checkpoint of the current step, all processes together.

        When the disk refuses it the training goes on, says so, and tries again when the next is due; not if it `must`.
        """
        self.records.flush()
        info = self.identity | {"data": self.stream.state(self.step)}
        if self.validation_loss[0] == self.step:
            info["validation_loss"] = self.validation_loss[1]
        try:
            self.weights.save(self.out / "checkpoints", self.step, info)
        except InputError as error:
            self.records.event(self.step, f"not saved: {error}")
            if must:
                raise
            self.accelerator.print(f"warning: {shown(error)}. The training goes on, the next attempt is at the next checkpoint")

    def restore(self) -> None:
        """Goes on from the newest whole checkpoint; raises InputError if it is another run's."""
        info = self.weights.restore(self.out / "checkpoints", self.refuse_other_run)
        self.step = self.stream.step_of(info["data"])
        self.accelerator.print(f"resuming after step {self.step}")

    def refuse_other_run(self, path: Path, info: dict[str, Any]) -> None:
        """Raises InputError when a checkpoint was made with other options, or of other pictures, captions or models."""
        check_options(path, info, self.config)
        now = self.identity["inputs"]
        before = {"T5 lengths": now["T5 lengths"], **info["inputs"]}  # earlier versions did not tell them
        changed = ", ".join(what for what, value in now.items() if before.get(what) != value)
        if changed:
            named = " (pictures go by their source's name: give it where its folder has another)" if self.config.data.sources else ""
            raise InputError(
                f"{changed} of this run are not those {shown(path)} was trained on; restore them{named}, or choose another output.folder"
            )


def train(config: RunConfig, resume: bool = False) -> Path:
    """Runs a training from its options; returns the folder of the finished pipeline. Raises Stopped when a signal ended it, saved."""
    model = finished(settled(config, has_bfloat16(computing_device()))) if resume else None
    if model is not None:
        print(f"{shown(model.parent)} is finished already")
        return model
    return Trainer(config, resume).run()


def computing_device() -> torch.device:
    """The kind of device that a training computes on here."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
