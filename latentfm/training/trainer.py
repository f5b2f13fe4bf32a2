"""Training by conditional flow matching with label dropout (notes, Algorithm 5), through Accelerate.

    latentfm train --config configs/quickstart.yaml data.folder=my_pictures
    accelerate launch --config_file configs/accelerate/ddp-8.yaml -m latentfm train --config configs/quickstart.yaml
    torchrun --nproc_per_node 2 -m latentfm train --config configs/quickstart.yaml

A run's folder holds run.html (curves and pictures, opens in a browser), metrics.jsonl and TensorBoard logs, samples/ (pictures from the
averaged weights), checkpoints/, and at the end model/, a stock pipeline folder.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from latentfm.config import RunConfig
from latentfm.data.loader import Batch, Dropout
from latentfm.data.mixture import Mixture
from latentfm.data.prepared import PreparedData
from latentfm.data.sources import summary
from latentfm.data.stream import Stream
from latentfm.errors import InputError
from latentfm.models.backends import check_backend
from latentfm.planning.run import with_precision
from latentfm.training.adapters import seed_dropout
from latentfm.training.checkpoint.resuming import finished
from latentfm.training.checks import cautions, check
from latentfm.training.distributed.shards import is_split
from latentfm.training.figures import StepSums
from latentfm.training.loop import TrainingLoop
from latentfm.training.models import load_models
from latentfm.training.pairs import listed_data
from latentfm.training.precision import compute_dtype, computing_device, has_bfloat16
from latentfm.training.samples import SamplePictures
from latentfm.training.step import Objective, cfm_losses, weights_of
from latentfm.training.validation import Validation, split_held_out
from latentfm.training.weights import TrainedWeights
from latentfm.words import shown


class Trainer(TrainingLoop):
    """A run that trains MM-DiT by flow matching; made, its cache is filled too."""

    config: RunConfig
    data: PreparedData
    weights: TrainedWeights

    def __init__(self, config: RunConfig, resume: bool = False):
        super().__init__(config, resume, cautions(config))

    def check(self) -> None:
        self.plan = check(self.config, self.resuming)
        self.lengths = self.plan.data.t5_lengths

    def prepare(self, resources: ExitStack) -> None:
        config = self.config
        self.models = load_models(config.model, device=self.accelerator.device)
        self.choose_attention()
        self.objective = Objective.of(config.train, self.models.outline)
        self.dropout = Dropout(config.train.dropout, config.train.dropout_each)
        self.data = self.listed_data()
        self.hold_folder(resources)
        self.data.prepare(self.progress)
        self.accelerator.wait_for_everyone()  # what one found damaged and made again, the others have not seen
        self.divide_data()
        self.data.release()
        self.weights = TrainedWeights(self.models, config, self.accelerator, sorted(self.lengths))
        frozen = {"frozen weights": self.weights.trained.base} if self.weights.trained.base else {}
        self.inputs = self.data.identity() | frozen | {"T5 lengths": ", ".join(map(str, sorted(self.lengths)))}

    def listed_data(self) -> PreparedData:
        """The run's data, listed by all processes together; its cache is not filled yet."""
        dataset, data = listed_data(self.config, self.plan, self.models, self.processes)
        self.accelerator.print(summary(dataset))
        return data

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

    def what_trains(self) -> str:
        sizes = f"{self.weights.trained_size / 1e6:.1f}M of {self.weights.size / 1e6:.1f}M parameters in {self.config.train.weights}"
        return f"{self.weights.trained.summary}: {sizes}"

    def more_in_words(self) -> str:
        return f", P(no condition) = {self.facts()['no_condition']:.3f}"

    def facts(self) -> dict[str, Any]:
        """What the run page says of the run beside its options."""
        found = super().facts()
        found["devices"] += ", weights split by FSDP2" * is_split(self.models.network) + ", on the CPU" * self.plan.parallelism.offload
        return found | {"no_condition": round(self.dropout.p_unconditional(len(self.models.encoders)), 4)}

    # The training

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
                losses, t = self.losses(batch)
            weights = weights_of(t, batch.prior, self.objective, self.config.data.prior_weight)
            loss = (weights * losses).mean() / options.gradient_accumulation
            accelerator.backward(loss)
        sums.add(losses.detach(), t, loss.detach(), batch)
        return losses.detach(), batch.ids

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(what each sample adds to the mean that is minimised, before its weight; its time), [B] float32 each."""
        return cfm_losses(self.weights.shards.model, batch, self.models.null, self.objective)

    def reading_ahead(self) -> int:
        """None on a CPU that trains from the cache: reading a batch takes less there than handing it over to another process does."""
        return int(self.config.data.online or self.accelerator.device.type != "cpu")

    # Validations and pictures

    def validate_and_sample(self) -> None:
        """Both, when they are due: before the first step too, and again after a stop before the pictures of a step."""
        if self.validation and self.due(self.config.validation.every):
            self.validate()
        if self.due(self.config.sample.every):
            self.sample()

    def validation_figures(self) -> dict[str, Any]:
        """The loss on the held-out pictures, from the weights as they are now."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return self.validation.run(self.models.network, rank, world, lambda table: self.accelerator.reduce(table, "sum"))

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


def train(config: RunConfig, resume: bool = False, last: bool = True) -> Path:
    """Runs a training from its options; returns the folder of the finished pipeline. Raises Stopped when a signal ended it, saved.

    last: whether its processes part afterwards.
    """
    model = finished(with_precision(config, has_bfloat16(computing_device()))) if resume else None
    if model is not None:
        print(f"{shown(model.parent)} is finished already")
        return model
    return Trainer(config, resume).train(last)
