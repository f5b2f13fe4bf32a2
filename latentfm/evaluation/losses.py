"""The held-out loss by t: a model's conditional flow-matching loss on pictures with captions that it was not trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from latentfm.config import load_config
from latentfm.data.cache.processes import Processes
from latentfm.data.from_options import open_dataset, prepared_data
from latentfm.data.loader import Dropout
from latentfm.evaluation import intervals
from latentfm.planning.run import plan_run
from latentfm.training.models import load_models
from latentfm.training.step import Objective
from latentfm.training.validation import Validation, names

TIMES = 10


def losses_by_t(
    folder: Path, pictures: Path, seed: int, device: torch.device, processes: Processes, progress: Any, batch_size: int = 16
) -> dict[str, dict[str, float]]:
    """{"loss": the mean, "0.05": at this t, ...} with intervals over the pictures, of the model in `folder`.

    The times are the middles of TIMES equal shares of the density that training draws t from by default, noise and crops a function of
    the seed. All of `processes` take part, each with its pictures. Raises InputError for pictures without captions.
    """
    options = [f"data.folder={pictures}", f"model.pipeline={folder}", "data.online=true", "output.folder=-"]
    run = load_config(None, options)
    plan = plan_run(run).data
    models = load_models(run.model, device=device)
    data = prepared_data(open_dataset(run.data, processes=processes), plan, models, run.data, processes)
    data.prepare(progress)
    models.null = data.null(sorted(plan.t5_lengths), device)
    network = models.network.to(device).eval()
    indices, length = list(range(len(data.samples))), max(plan.t5_lengths, key=plan.t5_lengths.get)
    validation = Validation(
        TIMES, Objective.of(run.train, models.outline), data.reader(seed, Dropout(0.0, 0.0)), data.samples, data.bucket_of, indices,
        length, batch_size, lambda batch: data.complete(batch, device),
    )  # fmt: skip
    find: Callable = lambda ranks: [validation.table(network, rank, processes.world).cpu().tolist() for rank in ranks]  # noqa: E731
    table = torch.tensor(processes.share(find, list(range(processes.world)), "held-out loss"), dtype=torch.float64).sum(dim=0)
    validation.refuse_non_finite(table)
    columns = {"loss": table.mean(dim=1), **dict(zip(names(validation.grid()), table.T, strict=True))}
    return {name: intervals.mean(values.tolist(), indices) for name, values in columns.items()}
