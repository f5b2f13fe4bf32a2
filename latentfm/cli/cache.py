"""`latentfm cache`: the cache of a run filled before it, by as many processes as there are; or every entry of a cache checked."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentfm.cli.completion import Overrides
from latentfm.words import count, shown

if TYPE_CHECKING:
    from latentfm.config import RunConfig
    from latentfm.data.cache.store import Cache


def cache(
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file of options, the run's own.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every entry of data.cache, of all runs, and make nothing. Exit code 1 for damage.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove damaged shards and unfinished files from data.cache, while nothing is filling it.")
    ] = False,
) -> None:
    """Fill the cache that a training will read: the VAE's moments of its pictures, the embeddings of its captions and sample prompts.

    The options are those of `latentfm train`, which then finds everything there. Under torchrun or `accelerate launch -m latentfm
    cache ...` each process makes its share. It may be stopped and started again at any time; what was made stays. The network's weights
    are not loaded.
    """
    from latentfm.config import load_config

    run = load_config(config, overrides)
    from latentfm.cli.terminal import quiet_libraries
    from latentfm.data.cache.store import Cache
    from latentfm.files import expanded

    folder = expanded(run.data.cache)
    quiet_libraries()
    if prune:
        remove_leftovers(Cache(folder))
    if verify:
        check(Cache(folder))
    if not (verify or prune):
        fill(run)


def fill(run: "RunConfig") -> None:
    """Fills the cache of a run and prints what is in it. Raises InputError for what is wrong with the run's data."""
    import os

    from latentfm.data.sources import summary
    from latentfm.errors import InputError
    from latentfm.planning.run import plan_run
    from latentfm.training.distributed.processes import launched
    from latentfm.training.models import load_models
    from latentfm.training.pairs import listed_data
    from latentfm.training.precision import computing_device
    from latentfm.training.records.progress import Progress
    from latentfm.training.samples import prompts_of

    if run.data.online:
        raise InputError("data.online=true is a run without a cache; leave it out to fill one")
    with launched() as processes:
        models = load_models(run.model, weights=False, device=computing_device(int(os.environ.get("LOCAL_RANK", 0))))
        plan = plan_run(run)
        dataset, data = listed_data(run, plan, models, processes)
        if processes.rank == 0:
            print(summary(dataset), flush=True)
        before, began = data.existing_keys(), time.monotonic()
        with Progress(processes.rank == 0) as progress:
            made = data.prepare(progress)
            data.encode(prompts_of(run.sample, data.samples), plan.model.t5_tokens)
            data.null({*plan.data.t5_lengths, plan.model.t5_tokens}, models.device)
        seconds = time.monotonic() - began
        if processes.rank == 0:
            captions = len({caption for sample in data.samples for caption in sample.captions})
            show(data.cache.folder, data.contents(before, made), seconds)
            print(f"{count(len(data.samples), 'picture')}, {count(captions, 'caption')}", flush=True)


def show(folder: Path, found: dict[str, tuple[int, int, int]], seconds: float) -> None:
    """Prints what was made, here or by other processes too, and what was there, by kind, and how fast."""
    for kind, (there, new, size) in found.items():
        if there:
            were = "was" if there - new == 1 else "were"
            entries = count(there, "entry", "entries")
            print(f"{kind}: {entries}, {size / 2**20:,.1f} MiB; {new:,} made now, {there - new:,} {were} there")
    pictures = found["moments"][1] + found["pairs"][1]
    pace = f", {pictures / seconds:,.1f} images/s" if pictures else ""
    print(f"{sum(size for _, _, size in found.values()) / 2**20:,.1f} MiB in {shown(folder)}, {seconds:.1f} s{pace}")


def check(cache: "Cache") -> None:
    """Reads every entry of a cache and prints how many are damaged, which are noted as lost; exits with code 1 when one is."""
    from latentfm.training.records.progress import Progress

    cache.refresh()
    with Progress(True) as progress:
        task = progress.add_task("checking the cache", total=len(cache.index))
        damaged = cache.verify(lambda count: progress.advance(task, count))
        progress.remove_task(task)
    aside = sum(path.name.endswith(".damaged") for path in cache.leftovers())
    where = f"{count(len(cache.paths), 'shard')} of {shown(cache.folder)}"
    size = int(cache.index["length"].sum())
    print(f"{count(len(cache.index), 'entry', 'entries')} in {where}, {size / 2**30:,.2f} GiB: {damaged:,} damaged", flush=True)
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
    removed, size = cache.prune()
    print(f"removed {count(removed, 'file')}, {size / 2**20:,.1f} MiB, from {shown(cache.folder)}", flush=True)
