"""`latentfm train`: a configuration and overrides to a finished pipeline folder, or to what the run would take."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentfm.cli.completion import Overrides

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo

    from latentfm.config import RunConfig


def train(
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file of options; see configs/.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the output folder; decay=constant: to more steps too.")
    ] = False,
    options: Annotated[bool, typer.Option("--options", help="List every option with its meaning and default, and leave.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would do and take, and what is wrong with it; load and write nothing.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(help="--dry-run: as if on this GPU, a name of `latentfm plan`; default: what is here.", show_default=False)
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="--dry-run: as if on so many; default: what the launcher says.", show_default=False)
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="--dry-run: as of `latentfm plan`; default: the launcher's.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="--dry-run: print one JSON object instead of tables.")] = False,
) -> None:
    """Train on a folder of captioned pictures: fine-tune a pipeline's network, or train a new one.

    The folder holds pictures with same-stem .txt captions, or a metadata.jsonl / metadata.csv with the columns file_name and text.
    The result is OUTPUT/model, a pipeline folder for `latentfm generate --model` and for diffusers; OUTPUT/samples shows
    the pictures along the way. Runs under `accelerate launch -m latentfm train ...` on many processes, same options, same result.

    Options that touch the course of a training may not change on --resume; where the same pictures and models lie may. An option's text
    is taken as it stands: data.folder="pics #2". Other values are YAML, and names reach to any depth: train.adapter.rank=8.

    SIGTERM and SIGUSR1 end it after the step under way, saved, with exit code 0 and no path printed; --resume goes on.
    """
    from latentfm.config import OPTIONS, load_config
    from latentfm.errors import InputError

    if options:
        print(option_table(OPTIONS))
        return
    for option, given in (("--gpu", gpu), ("--gpus", gpus), ("--shard", shard), ("--json", as_json)):
        if given and not dry_run:
            raise InputError(f"{option} goes with --dry-run; give that too, or leave {option} out")
    run = load_config(config, overrides)

    from latentfm.cli.terminal import quiet_libraries, tell_result

    quiet_libraries()
    if dry_run:
        say_what_it_takes(run, resume, gpu, gpus, shard, as_json)
        return
    from latentfm.training.trainer import train as run_training

    tell_result(lambda: run_training(run, resume))


def say_what_it_takes(run: "RunConfig", resume: bool, gpu: str | None, gpus: int | None, shard: str | None, as_json: bool) -> None:
    """Prints the dry run of `run`, once over all processes. Raises InputError for what is wrong with it."""
    import json

    from latentfm.cli.plan import chosen_gpu, chosen_parallelism
    from latentfm.cli.plan_tables import show_dry_run
    from latentfm.cli.terminal import progress_bar, rank
    from latentfm.planning.devices import Device
    from latentfm.planning.run import Parallelism
    from latentfm.training.dry_run import dry_run

    parallelism = Parallelism.here()
    if gpus is not None or shard is not None:
        processes, machines = (parallelism.processes, parallelism.machines) if gpus is None else (gpus, 1)
        parallelism = chosen_parallelism(processes, shard or "none", machines)
    with progress_bar() as bar:
        task = bar.add_task("reading the headers of pictures", total=None)
        found = dry_run(
            run, resume, parallelism, None if gpu is None else Device.of(chosen_gpu(gpu)),
            lambda done, of: bar.update(task, completed=done, total=of),
        )  # fmt: skip
    if rank():
        return
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show_dry_run(found)


def option_table(options: "Mapping[str, FieldInfo]") -> str:
    """Every option as "section.key = default   meaning", one a line."""
    from latentfm.config import default_of

    lines = []
    for name, option in options.items():
        default = "(required)" if option.is_required() else default_of(name, options)
        lines.append(f"{name} = {default}" + (f"    {option.description}" if option.description else ""))
    return "\n".join(lines)
