"""Training by conditional flow matching with label dropout (notes, Algorithm 5), through Accelerate.

    latentfm train --config configs/quickstart.yaml data.folder=my_pictures
    accelerate launch --config_file configs/accelerate/ddp-8.yaml -m latentfm train --config configs/quickstart.yaml
    torchrun --nproc_per_node 2 -m latentfm train --config configs/quickstart.yaml

A run's folder holds run.html (curves and pictures, opens in a browser), metrics.jsonl and TensorBoard logs, samples/ (pictures from the
averaged weights), checkpoints/, and at the end model/, a stock pipeline folder.
"""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from torch import Tensor

from latentfm.config import RunConfig
from latentfm.data.cache.processes import Processes
from latentfm.data.cache.stat_cache import StatCache
from latentfm.data.from_options import open_dataset, prepared_data
from latentfm.data.loader import Batch, Dropout, Loader
from latentfm.data.mixture import Mixture
from latentfm.data.prepared import PreparedData
from latentfm.data.sources import summary
from latentfm.data.stream import Stream
from latentfm.errors import Failure, InputError
from latentfm.files import expanded
from latentfm.models.backends import check_backend
from latentfm.planning.run import with_precision
from latentfm.training.adapters import seed_dropout
from latentfm.training.checkpoint import storage
from latentfm.training.checkpoint.claim import claimed
from latentfm.training.checkpoint.resuming import check_same_run, finished
from latentfm.training.checks import cautions, check
from latentfm.training.distributed.launcher import Peers, fewer_than_asked
from latentfm.training.distributed.processes import broadcast_from_main, find_by_all, raise_on_all_ranks
from latentfm.training.distributed.shards import is_split
from latentfm.training.figures import Pace, StepFigures, StepSums
from latentfm.training.models import load_models
from latentfm.training.precision import choose_workspace, compute_dtype, computing_device, deterministic, has_bfloat16
from latentfm.training.records.progress import Progress
from latentfm.training.records.run_log import RunLog
from latentfm.training.samples import SamplePictures
from latentfm.training.step import Objective, cfm_losses, weights_of
from latentfm.training.stop import Stop, Stopped
from latentfm.training.validation import Validation, split_held_out
from latentfm.training.weights import TrainedWeights
from latentfm.words import count, shown


class Trainer:
    """One run, from its options to its model/ folder. `resume` goes on from the newest checkpoint.

    Made, it holds the output folder for itself, its cache is filled, its network in place and its newest checkpoint restored;
    `train`, to be called once, does the rest and lets go of the folder.
    """

    def __init__(self, config: RunConfig, resume: bool = False):
        device = computing_device()
        self.chosen = {"train.mixed_precision": "auto"} if config.train.mixed_precision == "auto" else {}  # here, and what was given
        self.config = config = with_precision(config, has_bfloat16(device))
        if config.train.deterministic:
            choose_workspace()
        self.plan, self.out, self.resuming = check(config, resume), expanded(config.output.folder), resume
        self.lengths = self.plan.data.t5_lengths
        torch.manual_seed(config.train.seed)
        self.accelerator = accelerator = make_accelerator(config, device)
        for note in filter(None, [*cautions(config), fewer_than_asked(accelerator.num_processes)]):
            accelerator.print(f"warning: {note}")
        self.progress, self.run_log = Progress(accelerator.is_main_process), RunLog(self.out, accelerator.is_main_process)
        with ExitStack() as resources:
            resources.enter_context(Peers(accelerator).watched())
            self.models = load_models(config.model, device=accelerator.device)
            self.choose_attention()
            self.objective = Objective.of(config.train, self.models.outline)
            self.dropout = Dropout(config.train.dropout, config.train.dropout_each)
            self.data = self.listed_data()
            for context in (self.progress, self.claimed(), deterministic(config.train.deterministic)):
                resources.enter_context(context)
            self.data.prepare(self.progress)
            accelerator.wait_for_everyone()  # what one found damaged and made again, the others have not seen
            self.divide_data()
            self.data.release()
            self.weights = TrainedWeights(self.models, config, accelerator, sorted(self.lengths))
            frozen = {"frozen weights": self.weights.trained.base} if self.weights.trained.base else {}
            inputs = self.data.identity() | frozen | {"T5 lengths": ", ".join(map(str, sorted(self.lengths)))}
            self.identity = {"config": config.model_dump(mode="json"), "inputs": inputs}
            self.stop, self.asked_to_stop = Stop(), False
            self.validation_loss: tuple[int, float] = (-1, 0.0)  # the step of the last validation, and what it found
            self.step = self.restored_step() if resume else 0
            self.begin_records()
            self.resources = resources.pop_all()

    def listed_data(self) -> PreparedData:
        """The run's data, listed by all processes together; its cache is not filled yet."""
        place, options = (self.accelerator.process_index, self.accelerator.num_processes), self.config.data
        processes = Processes(*place, partial(find_by_all, *place))
        dataset = open_dataset(options, StatCache(expanded(options.cache)), processes)
        self.accelerator.print(summary(dataset))
        return prepared_data(dataset, self.plan.data, self.models, options, processes)

    def divide_data(self) -> None:
        """What of the data is drawn, in which order, what is held out, and what is drawn with it: stream, reader, validation, pictures."""
        config, data, device, seed = self.config, self.data, self.accelerator.device, self.config.train.seed
        _, self.held_out = split_held_out(data.samples, config.validation.held_out, seed)
        bucket_of = data.bucket_of.copy()
        bucket_of[self.held_out] = -1  # never drawn
        self.stream = Stream(Mixture.of(data.samples, seed, bucket_of), config.train.batch_size, seed)
        self.reader = data.reader(seed, self.dropout, self.plan.routing)
        # on the device: from a CPU's memory every step would wait for its copy
        self.models.null = data.null({*self.lengths, self.plan.model.t5_tokens}, device)
        self.samples = SamplePictures(config.sample, self.models, data.samples, self.plan.size, self.out / "samples", device, data.encode)
        self.validation = Validation(
            config.validation.times, self.objective, self.reader, data.samples, data.bucket_of, self.held_out,
            max(self.lengths, key=self.lengths.get), self.plan.micro_batch, lambda batch: data.complete(batch, device),
        ) if self.held_out else None  # fmt: skip

    def choose_attention(self) -> None:
        """Has train.attention compute the network's attention, tried on eight tokens. Raises InputError when it cannot, or not train."""
        options, network = self.config.train, self.models.network
        heads, head_dim = network.config.num_attention_heads, network.config.attention_head_dim
        check_backend(options.attention, heads, head_dim, self.accelerator.device, compute_dtype(options), training=True)
        network.set_attention(options.attention)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """A context in which no other run writes to the output folder; raises InputError on every process when one does."""
        with ExitStack() as stack:
            with raise_on_all_ranks(self.accelerator):
                if self.accelerator.is_main_process:
                    self.run_log.claim = stack.enter_context(claimed(self.out))
            yield

    def begin_records(self) -> None:
        """Opens the logs and prints what is about to happen."""
        config, accelerator, facts = self.config, self.accelerator, self.facts()
        self.run_log.open(self.step, self.identity["config"], facts, [self.data.samples[index].id for index in self.held_out])
        init = {"tensorboard": {"purge_step": self.step + 1}, "wandb": {"name": self.out.name, "dir": str(self.out)}}
        accelerator.init_trackers("logs", init_kwargs={name: init[name] for name in config.output.trackers})
        self.run_log.event(self.step, f"resumed after step {self.step}" if self.resuming else "started")
        train, out = config.train, f" and {len(self.held_out)} held out" if self.held_out else ""
        accelerator.print(
            f"{self.weights.trained.summary}: {facts['trained'] / 1e6:.1f}M of {facts['parameters'] / 1e6:.1f}M parameters in "
            f"{train.weights}, {count(facts['pictures'], 'picture')} in {count(len(self.data.inventory.buckets.shapes), 'bucket')}{out}, "
            f"{count(train.steps, 'step')} of {train.batch_size} = {facts['epochs']:.1f} epochs, "
            f"{count(facts['processes'], 'process', 'processes')} on {facts['devices']}, P(no condition) = {facts['no_condition']:.3f}\n"
            f"its curves and pictures: {shown(self.out / 'run.html')}"
        )
        if compute_dtype(train) == torch.bfloat16 and not has_bfloat16(accelerator.device):
            accelerator.print(
                "warning: this device has no bfloat16 of its own and imitates it, slowly; train.mixed_precision=no, with "
                "train.weights=float32, is several times as fast"
            )

    def facts(self) -> dict[str, Any]:
        """What the run page says of the run beside its options."""
        device = self.accelerator.device
        sharding = ", weights split by FSDP2" * is_split(self.models.network) + ", on the CPU" * self.plan.parallelism.offload
        versions = {module.__name__: module.__version__ for module in map(__import__, ("torch", "diffusers", "transformers", "accelerate"))}
        encoders = len(self.models.encoders)
        return {
            "devices": (torch.cuda.get_device_name(device) if device.type == "cuda" else device.type) + sharding,
            "processes": self.accelerator.num_processes,
            "parameters": self.weights.size,
            "trained": self.weights.trained_size,
            "pictures": len(self.data.samples) - len(self.held_out),
            "held_out": len(self.held_out),
            "epochs": round(self.config.train.steps * self.config.train.batch_size / self.stream.mixture.per_epoch(), 3),
            "no_condition": round(self.dropout.p_unconditional(encoders), 4),
            "versions": versions,
            "chosen": self.chosen,
        }

    # The training

    def train(self) -> Path:
        """Trains to the last step and returns the folder of the finished pipeline. Raises Stopped when asked to stop by a signal."""
        with self.resources, self.its_end_recorded(), self.stop.listening():
            batches, steps = iter(self.micro_batches()), self.config.train.steps
            self.validate_and_sample()
            self.run_log.page(now=True)
            self.progress.start(self.step, steps)
            pace = Pace(self.config.train.batch_size)
            while self.step < steps:
                row = self.train_step(batches)
                row["images_per_second"] = pace.step()
                self.log(row)
                with pace.pause():
                    self.after_step()
                self.run_log.page()
            target = self.weights.write(self.out, storage.path_of(self.out / "checkpoints", self.step))
            self.run_log.event(self.step, "finished")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return target

    def train_step(self, batches: Iterator[Batch]) -> dict[str, Any]:
        """One optimizer step; returns its log row (global mean loss, rate, gradient norm, loss by t). Raises as refuse_non_finite."""
        passes = self.config.train.gradient_accumulation
        rate, sums = self.weights.set_learning_rate(self.step), StepSums.zero(self.accelerator.device)
        seen = [self.forward_backward_step(next(batches), number, sums, last=number + 1 == passes) for number in range(passes)]
        norm = self.weights.shards.clip_gradient(self.config.train.max_grad_norm)
        figures = sums.over_all_ranks(self.accelerator, bool(self.stop.signal), norm)
        self.refuse_non_finite(figures, seen)
        self.weights.update(self.step + 1)
        self.step += 1
        self.asked_to_stop = figures.stop or (self.accelerator.num_processes == 1 and bool(self.stop.signal))
        return {
            "loss": figures.loss, "learning_rate": rate, "gradient_norm": figures.gradient_norm, "loss_by_t": figures.loss_by_t,
            "count_by_t": figures.count_by_t, **({} if figures.prior_loss is None else {"prior_loss": figures.prior_loss}),
        }  # fmt: skip

    def forward_backward_step(self, batch: Batch, number: int, sums: StepSums, last: bool) -> tuple[Tensor, list[str]]:
        """One forward and backward pass, the `number`-th of its step, added to `sums`; returns (losses [B], the samples' names)."""
        options, accelerator, shards = self.config.train, self.accelerator, self.weights.shards
        batch = self.data.complete(batch, accelerator.device)
        seed_dropout(options, self.step, number * accelerator.num_processes + accelerator.process_index)
        with shards.accumulating(last):
            with accelerator.autocast():
                losses, t = cfm_losses(shards.model, batch, self.models.null, self.objective)
            weights = weights_of(t, batch.prior, self.objective, self.config.data.prior_weight)
            loss = (weights * losses).mean() / options.gradient_accumulation
            accelerator.backward(loss)
        sums.add(losses.detach(), t, loss.detach(), batch)
        return losses.detach(), batch.ids

    def refuse_non_finite(self, figures: StepFigures, seen: list[tuple[Tensor, list[str]]]) -> None:
        """Raises Failure on every process when the loss or the gradient is not finite, before a weight is touched; names the samples."""
        if abs(figures.loss) < float("inf") and figures.gradient_norm < float("inf"):
            return
        bad = [name for losses, names in seen for name, good in zip(names, torch.isfinite(losses).tolist(), strict=True) if not good]
        bad = gather_object(bad)
        where = f"at step {self.step + 1}" + (f" for {', '.join(bad[:5])}" if bad else "")
        if bad:
            raise Failure(f"the loss is not finite {where}; the newest checkpoint is untouched")
        raise Failure(f"the gradient is not finite {where}; the newest checkpoint is untouched, lower train.learning_rate")

    def after_step(self) -> None:
        """What is due after a step: validation, pictures, a checkpoint, the end of a run that was asked to stop."""
        last = self.step == self.config.train.steps
        self.validate_and_sample()
        if self.due(self.config.output.checkpoint_every) or self.asked_to_stop:
            self.save(must=last or self.asked_to_stop)
        if self.asked_to_stop and not last:
            self.run_log.event(self.step, "stopped by a signal, saved")
            text = f"stopped after step {self.step} of {self.config.train.steps}, saved; go on with --resume"
            if self.stop.signal == signal.SIGINT:
                self.accelerator.print(text)
                raise KeyboardInterrupt
            raise Stopped(text)

    def due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.train.steps

    def micro_batches(self) -> Loader:
        """This process's batches from the current step on."""
        config, accelerator = self.config, self.accelerator
        loader = Loader(
            self.reader, self.stream, self.lengths, config.train.steps, config.train.gradient_accumulation,
            accelerator.process_index, accelerator.num_processes, config.data.workers, pin=accelerator.device.type == "cuda",
        )  # fmt: skip
        loader.load_state_dict(self.stream.state(self.step))
        return loader

    # Validations and pictures

    def validate_and_sample(self) -> None:
        """Both, when they are due: before the first step too, and again after a stop before the pictures of a step."""
        if self.validation and self.due(self.config.validation.every):
            self.validate()
        if self.due(self.config.sample.every):
            self.sample()

    def validate(self) -> None:
        """The loss on the held-out pictures, from the averaged weights, unless this step's is known from before a stop."""
        row = broadcast_from_main(self.accelerator, self.run_log.validated(self.step))
        if row is None:
            with self.weights.averaged():
                rank, world = self.accelerator.process_index, self.accelerator.num_processes
                found = self.validation.run(self.models.network, rank, world, lambda table: self.accelerator.reduce(table, "sum"))
            row = {"step": self.step, **found}
            self.run_log.validation(row)
            self.track({"validation_loss": row["validation_loss"]})
        self.validation_loss = (self.step, row["validation_loss"])

    def sample(self) -> None:
        """The sample pictures of this step. What keeps them from being drawn or written is told and noted: the training matters more."""
        problem = "no memory for them"
        try:
            with self.weights.averaged():
                drawn = self.samples.draw(self.models.network, self.step, self.accelerator)
        except InputError as error:
            drawn, problem = None, str(error)
            self.accelerator.print(f"warning: no pictures at step {self.step}: {shown(problem)}. The training goes on")
        if drawn is None:
            self.run_log.event(self.step, f"no pictures: {problem}")

    # What is written down

    @contextmanager
    def its_end_recorded(self) -> Iterator[None]:
        """A context whose error, if one ends it, is among the run's events, and after which the run page is up to date."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, Stopped):
                self.run_log.event(self.step, f"ended: {error}")
            raise
        finally:
            self.run_log.page(now=True)

    def log(self, row: dict[str, Any]) -> None:
        """Shows and writes down the row of a step."""
        self.progress.step(self.step, row)
        self.run_log.metrics({"step": self.step, **row})
        self.track({name: value for name, value in row.items() if isinstance(value, float)})

    def track(self, values: dict[str, float]) -> None:
        """Gives the trackers the step's values. When one fails, that is told and they get no more: the training goes on."""
        try:
            self.accelerator.log(values, step=self.step)
        except Exception as error:  # TensorBoard's writer is broken for good after a write that the disk refused
            self.accelerator.trackers = []
            names = ", ".join(self.config.output.trackers)
            self.run_log.event(self.step, f"no more for {names}: {error}")
            self.accelerator.print(f"warning: {names}: {shown(error, 300)}. It gets no more until --resume")

    # Checkpoints

    def save(self, must: bool) -> None:
        """Writes the checkpoint of the current step, all processes together.

        When the disk refuses it the training goes on, says so, and tries again when the next is due; not if it `must`.
        """
        self.run_log.flush()
        info = self.identity | {"data": self.stream.state(self.step)}
        if self.validation_loss[0] == self.step:
            info["validation_loss"] = self.validation_loss[1]
        try:
            self.weights.save(self.out / "checkpoints", self.step, info)
        except InputError as error:
            self.run_log.event(self.step, f"not saved: {error}")
            if must:
                raise
            self.accelerator.print(f"warning: {shown(error)}. The training goes on, the next attempt is at the next checkpoint")

    def restored_step(self) -> int:
        """The step of the newest whole checkpoint, whose state is taken on; raises InputError if it is another run's."""
        info = self.weights.restore(self.out / "checkpoints", partial(check_same_run, config=self.config, inputs=self.identity["inputs"]))
        step = self.stream.step_of(info["data"])
        self.accelerator.print(f"resuming after step {step}")
        return step


def train(config: RunConfig, resume: bool = False) -> Path:
    """Runs a training from its options; returns the folder of the finished pipeline. Raises Stopped when a signal ended it, saved."""
    model = finished(with_precision(config, has_bfloat16(computing_device()))) if resume else None
    if model is not None:
        print(f"{shown(model.parent)} is finished already")
        return model
    return Trainer(config, resume).train()


def make_accelerator(config: RunConfig, device: torch.device) -> Accelerator:
    """Accelerate for a run that computes on this kind of device."""
    narrow = config.train.weights == "bfloat16" and config.train.adapter is None  # an adapter's own weights are float32
    return Accelerator(
        mixed_precision="no" if narrow else config.train.mixed_precision,  # bfloat16 weights need no autocast
        log_with=[*config.output.trackers],
        project_dir=expanded(config.output.folder),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # or every gradient is there twice
        cpu=device.type == "cpu",  # left to itself, Accelerate takes two processes without a GPU for two runs
    )
