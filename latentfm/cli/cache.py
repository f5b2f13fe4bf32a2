"""`latentfm cache`: the cache of a run filled before it, by as many processes as there are; or every entry of a cache checked."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentfm.words import count, shown

if TYPE_CHECKING:
    import torch

    from latentfm.config import RunConfig
    from latentfm.data.cache import Cache

SECONDS_BETWEEN_LINES = 15.0


def cache(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Options on top of the configuration.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file of options, the run's own.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every entry of data.cache, of all runs, and make nothing. Exit code 1 for damage.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove damaged shards and unfinished files from data.cache, while nothing is filling it.")
    ] = False,
) -> None:
    """Fill the cache that a training will read: the VAE's moments of its pictures and the embeddings of its captions.

    The options are those of `latentfm train`, which then finds everything there. Under torchrun or `accelerate launch -m latentfm
    cache ...` each process makes its share. It may be stopped and started again at any time; what was made stays. The network's weights
    are not loaded.
    """
    from latentfm.config import load_config

    run = load_config(config, overrides)
    from latentfm.cli.terminal import quiet_libraries
    from latentfm.data.cache import Cache
    from latentfm.errors import InputError
    from latentfm.files import expanded

    folder = expanded(run.data.cache)
    quiet_libraries()
    try:
        if prune:
            remove_leftovers(Cache(folder))
        if verify:
            check(Cache(folder))
        if not (verify or prune):
            fill(run)
    except OSError as error:  # a folder that may not be written: the message names it
        raise InputError(" ".join(str(error).split())) from error


def fill(run: "RunConfig") -> None:
    """Fills the cache of a run and prints what is in it. Raises InputError for what is wrong with the run's data."""
    import os

    from latentfm.data.sources import summary
    from latentfm.errors import InputError
    from latentfm.planning.run import plan_run
    from latentfm.training.models import load_models
    from latentfm.training.prepare import CachedDataset
    from latentfm.training.sources import open_dataset

    if run.data.online:
        raise InputError("data.online=true is a run without a cache; leave it out to fill one")
    # told by torchrun and accelerate launch; the processes meet in the folder alone, so none waits for another in a collective
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    dataset = open_dataset(run.data)
    if rank == 0:
        print(summary(dataset), flush=True)
    models, plan = load_models(run.model, weights=False), plan_run(run)
    data = CachedDataset(dataset, models, run.data, plan.data)
    models.frozen_to(device_of(int(os.environ.get("LOCAL_RANK", 0))))
    before = data.keys_there()
    began = time.monotonic()
    with Shown(rank == 0) as progress:
        data.fill(rank, world, progress)
    seconds = time.monotonic() - began
    if rank == 0:
        captions = len({caption for sample in data.samples for caption in sample.captions})
        show(data.cache.folder, data.contents(before), seconds)
        print(f"{count(len(data.samples), 'picture')}, {count(captions, 'caption')}", flush=True)


def show(folder: Path, found: dict[str, tuple[int, int, int]], seconds: float) -> None:
    """Prints what was made, here or by other processes too, and what was there, by kind, and how fast."""
    for kind, (there, new, size) in found.items():
        if there:
            were = "was" if there - new == 1 else "were"
            entries = count(there, "entry", "entries")
            print(f"{kind}: {entries}, {size / 2**20:,.1f} MiB; {new:,} made now, {there - new:,} {were} there")
    pictures = found["moments"][1]
    pace = f", {pictures / seconds:,.1f} images/s" if pictures else ""
    print(f"{sum(size for _, _, size in found.values()) / 2**20:,.1f} MiB in {shown(folder)}, {seconds:.1f} s{pace}")


def device_of(local_rank: int) -> "torch.device":
    """The accelerator of a machine's process `local_rank`, the CPU where there is none."""
    import torch

    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type, local_rank % torch.accelerator.device_count())


def check(cache: "Cache") -> None:
    """Reads every entry of a cache and prints how many are damaged, which are noted as lost; exits with code 1 when one is."""
    import numpy as np

    cache.refresh()
    places = np.lexsort((cache.index["offset"], cache.index["shard"]))  # as they lie on the disk
    size = int(cache.index["length"].sum())
    with Shown(True) as progress:
        task = progress.add_task("checking the cache", total=len(places))
        damaged = int(cache.damaged(places, lambda count: progress.advance(task, count)).sum())
    aside = sum(path.name.endswith(".damaged") for path in cache.leftovers())
    where = f"{count(len(cache.paths), 'shard')} of {shown(cache.folder)}"
    print(f"{count(len(places), 'entry', 'entries')} in {where}, {size / 2**30:,.2f} GiB: {damaged:,} damaged", flush=True)
    for said in cache.distrust():
        print(said, flush=True)
    if aside:
        shards = f"{count(aside, 'damaged shard')} {'is' if aside == 1 else 'are'} set aside"
        print(f"{shards}; the next run makes their entries again, --prune removes the files", flush=True)
    if damaged:
        print("the next run that needs a damaged entry makes it again", flush=True)
    if damaged or aside:
        raise typer.Exit(1)


def remove_leftovers(cache: "Cache") -> None:
    """Removes damaged shards and unfinished files, which are the cache's own, and prints how many."""
    cache.refresh()
    found = cache.leftovers()
    size = sum(path.stat().st_size for path in found)
    for path in found:
        path.unlink(missing_ok=True)
    print(f"removed {count(len(found), 'file')}, {size / 2**20:,.1f} MiB, from {shown(cache.folder)}", flush=True)


class Shown:
    """The progress of one task: a bar on a terminal, elsewhere a line now and then, both on stderr; nothing unless `active`."""

    def __init__(self, active: bool):
        from latentfm.cli.terminal import progress_bar

        self.active, self.bar = active, progress_bar()
        self.total, self.done, self.waiting = 0, 0, False
        self.began = self.printed = time.monotonic()

    def __enter__(self) -> "Shown":
        if self.active:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def add_task(self, description: str, total: int) -> Any:
        self.total = total
        return self.bar.add_task(description, total=total)

    def advance(self, task: Any, number: int) -> None:
        self.done += number
        self.bar.advance(task, number)
        if time.monotonic() - self.printed > SECONDS_BETWEEN_LINES:
            self.line(f"{self.done:,} of {self.total:,}")

    def update(self, task: Any, description: str) -> None:
        self.bar.update(task, description=description)
        if not self.waiting or time.monotonic() - self.printed > SECONDS_BETWEEN_LINES:
            self.waiting = True
            self.line(description)

    def remove_task(self, task: Any) -> None:
        """Ends the task; where lines were printed, the last says so."""
        if self.waiting or self.printed > self.began:
            self.line(f"{self.total:,} of {self.total:,}")
        self.bar.remove_task(task)

    def line(self, text: str) -> None:
        if self.active and self.bar.disable:
            self.printed = time.monotonic()
            typer.echo(text, err=True)
