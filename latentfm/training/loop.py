"""A run's course, whatever it trains: its processes and folder, its steps and what is due after each, its records and checkpoints.

`train` -> `train_step` -> `forward_backward_step`: the first is here, the others are a trainer's own.
"""

import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from torch import Tensor

from latentfm.config import Section
from latentfm.data.cache.processes import Processes
from latentfm.data.loader import Loader, Reader
from latentfm.data.readable import ReadablePictures
from latentfm.data.stream import Stream
from latentfm.errors import Failure, InputError
from latentfm.files import expanded
from latentfm.planning.run import with_precision
from latentfm.training.checkpoint import storage
from latentfm.training.checkpoint.claim import claimed
from latentfm.training.checkpoint.resuming import check_same_run
from latentfm.training.distributed.launcher import Peers, fewer_than_asked
from latentfm.training.distributed.processes import broadcast_from_main, find_by_all, raise_on_all_ranks
from latentfm.training.figures import Pace
from latentfm.training.precision import choose_workspace, compute_dtype, computing_device, deterministic, has_bfloat16
from latentfm.training.records.progress import Progress
from latentfm.training.records.run_log import RunLog
from latentfm.training.stop import Stop, Stopped
from latentfm.training.weights import Weights
from latentfm.words import count, shown


class Figures(Protocol):
    """What every trainer knows of a step, over all processes."""

    loss: float
    gradient_norm: float


class TrainingLoop(ABC):
    """One run, from its options to its model/ folder. `resume` goes on from the newest checkpoint.

    Made, it holds the output folder for itself, its data and its network are in place and its newest checkpoint is restored; `train`, to be
    called once, does the rest and lets go of the folder. `cautions` are said at the start.
    """

    data: ReadablePictures
    stream: Stream
    reader: Reader
    lengths: dict[int, float]  # of prompts, and the share of the steps that each has
    held_out: Sequence[int]
    weights: Weights
    inputs: dict[str, str]  # what the training sees, as a hash of each kind; another hash is another run

    def __init__(self, config: Section, resume: bool = False, cautions: Sequence[str] = ()):
        device = computing_device()
        self.chosen = {"train.mixed_precision": "auto"} if config.train.mixed_precision == "auto" else {}  # here, and what was given
        self.config = config = with_precision(config, has_bfloat16(device))
        if config.train.deterministic:
            choose_workspace()
        self.out, self.resuming = expanded(config.output.folder), resume
        self.check()
        torch.manual_seed(config.train.seed)
        self.accelerator = accelerator = make_accelerator(config, device)
        for note in filter(None, [*cautions, fewer_than_asked(accelerator.num_processes)]):
            accelerator.print(f"warning: {note}")
        self.progress, self.run_log = Progress(accelerator.is_main_process), RunLog(self.out, accelerator.is_main_process)
        self.stop, self.asked_to_stop = Stop(), False
        self.validation_loss: tuple[int, float] = (-1, 0.0)  # the step of the last validation, and what it found
        with ExitStack() as resources:
            resources.enter_context(Peers(accelerator).watched())
            self.prepare(resources)
            self.step = self.restored_step() if resume else 0
            self.begin_records()
            self.resources = resources.pop_all()

    @abstractmethod
    def check(self) -> None:
        """Raises InputError for everything about the options that can be seen to be wrong before a weight or a picture is read."""

    @abstractmethod
    def prepare(self, resources: ExitStack) -> None:
        """Makes all that the annotations above name; enters `hold_folder` into `resources` before anything is written."""

    def hold_folder(self, resources: ExitStack) -> None:
        """Has the progress shown, the output folder claimed and the kernels chosen for as long as the run lasts."""
        for context in (self.progress, self.claimed(), deterministic(self.config.train.deterministic)):
            resources.enter_context(context)

    @property
    def processes(self) -> Processes:
        """The run's processes as those that list and fill its data together."""
        place = self.accelerator.process_index, self.accelerator.num_processes
        return Processes(*place, partial(find_by_all, *place))

    @abstractmethod
    def what_trains(self) -> str:
        """In words, with the numbers of parameters: how the line begins that tells the start."""

    def more_in_words(self) -> str:
        """What else that line tells."""
        return ""

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
        held_out = [self.data.samples[index].id for index in self.held_out]
        self.run_log.open(self.step, config.model_dump(mode="json"), facts, held_out)
        init = {"tensorboard": {"purge_step": self.step + 1}, "wandb": {"name": self.out.name, "dir": str(self.out)}}
        accelerator.init_trackers("logs", init_kwargs={name: init[name] for name in config.output.trackers})
        self.run_log.event(self.step, f"resumed after step {self.step}" if self.resuming else "started")
        out = f" and {len(self.held_out)} held out" if self.held_out else ""
        buckets = count(len(self.data.inventory.buckets.shapes), "bucket")
        accelerator.print(
            f"{self.what_trains()}, {count(facts['pictures'], 'picture')} in {buckets}{out}, "
            f"{count(config.train.steps, 'step')} of {config.train.batch_size} = {facts['epochs']:.1f} epochs, "
            f"{count(facts['processes'], 'process', 'processes')} on {facts['devices']}{self.more_in_words()}\n"
            f"its curves and pictures: {shown(self.out / 'run.html')}"
        )
        if compute_dtype(config.train) == torch.bfloat16 and not has_bfloat16(accelerator.device):
            accelerator.print(
                "warning: this device has no bfloat16 of its own and imitates it, slowly; train.mixed_precision=no, with "
                "train.weights=float32, is several times as fast"
            )

    def facts(self) -> dict[str, Any]:
        """What the run page says of the run beside its options."""
        device = self.accelerator.device
        versions = {module.__name__: module.__version__ for module in map(__import__, ("torch", "diffusers", "transformers", "accelerate"))}
        return {
            "devices": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": self.accelerator.num_processes,
            "parameters": self.weights.size,
            "trained": self.weights.trained_size,
            "pictures": len(self.data.samples) - len(self.held_out),
            "held_out": len(self.held_out),
            "epochs": round(self.config.train.steps * self.config.train.batch_size / self.stream.mixture.per_epoch(), 3),
            "versions": versions,
            "chosen": self.chosen,
        }

    # The training

    def train(self, last: bool = True) -> Path:
        """Trains to the last step and returns the folder of the finished model. Raises Stopped when asked to stop by a signal.

        last: whether the processes part afterwards.
        """
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
            target = self.finish()
            self.run_log.event(self.step, "finished")
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if last:
            self.accelerator.state.destroy_process_group()
        return target

    def finish(self) -> Path:
        """Writes the result, model/, after the last step, and returns its folder."""
        return self.weights.write(self.out, storage.path_of(self.out / "checkpoints", self.step))

    @abstractmethod
    def train_step(self, batches: Iterator[Any]) -> dict[str, Any]:
        """One optimizer step; returns its log row, with the "loss" that is minimised. Raises as `refuse_non_finite`, and counts `step`."""

    @abstractmethod
    def validate_and_sample(self) -> None:
        """Validations and pictures, when they are due: before the first step too."""

    def refuse_non_finite(self, figures: Figures, seen: list[tuple[Tensor, list[str]]]) -> None:
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
        workers = self.reading_ahead() if config.data.workers is None else config.data.workers
        loader = Loader(
            self.reader, self.stream, self.lengths, config.train.steps, config.train.gradient_accumulation,
            accelerator.process_index, accelerator.num_processes, workers, pin=accelerator.device.type == "cuda",
        )  # fmt: skip
        loader.load_state_dict(self.stream.state(self.step))
        return loader

    def reading_ahead(self) -> int:
        """How many processes read batches ahead where data.workers is not given."""
        return 1

    def validate(self) -> None:
        """The loss on the held-out pictures, from the averaged weights, unless this step's is known from before a stop."""
        row = broadcast_from_main(self.accelerator, self.run_log.validated(self.step))
        if row is None:
            with self.weights.averaged():
                row = {"step": self.step, **self.validation_figures()}
            self.run_log.validation(row)
            self.track({name: value for name, value in row.items() if isinstance(value, float)})
        self.validation_loss = (self.step, row["validation_loss"])

    def validation_figures(self) -> dict[str, Any]:
        """The "validation_loss" of the held-out pictures and what else is found with it, the same on every process."""
        raise NotImplementedError

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
        info = {"config": self.config.model_dump(mode="json"), "inputs": self.inputs, "data": self.stream.state(self.step)}
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
        info = self.weights.restore(self.out / "checkpoints", partial(check_same_run, config=self.config, inputs=self.inputs))
        step = self.stream.step_of(info["data"])
        self.accelerator.print(f"resuming after step {step}")
        return step


def make_accelerator(config: Section, device: torch.device) -> Accelerator:
    """Accelerate for a run that computes on this kind of device."""
    narrow = config.train.weights == "bfloat16" and config.train.adapter is None  # an adapter's own weights are float32
    return Accelerator(
        mixed_precision="no" if narrow else config.train.mixed_precision,  # bfloat16 weights need no autocast
        log_with=[*config.output.trackers],
        project_dir=expanded(config.output.folder),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # or every gradient is there twice
        cpu=device.type == "cpu",  # left to itself, Accelerate takes two processes without a GPU for two runs
    )
