"""`latentfm train`: a configuration and overrides to a finished pipeline folder."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Options on top of the configuration.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file of options; see configs/.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the output folder.")] = False,
    options: Annotated[bool, typer.Option("--options", help="List every option with its meaning and default, and leave.")] = False,
) -> None:
    """Train on a folder of captioned pictures: fine-tune a pipeline's network, or train a new one.

    The folder holds pictures with same-stem .txt captions, or a metadata.jsonl / metadata.csv with the columns file_name and text.
    The result is OUTPUT/model, a pipeline folder for `latentfm generate --model` and for diffusers; OUTPUT/samples shows
    the pictures along the way. Runs under `accelerate launch -m latentfm train ...` on many processes, same options, same result.
    """
    from latentfm.config import load_config

    if options:
        print(option_table())
        return
    run = load_config(config, overrides)

    from latentfm.cli.terminal import quiet_libraries
    from latentfm.errors import InputError

    quiet_libraries()
    from latentfm.training.trainer import train as run_training

    try:
        target = run_training(run, resume)
    except OSError as error:  # a full disk, a folder that may not be written: the message names it
        raise InputError(" ".join(str(error).split())) from error
    typer.echo(f"finished: {target}", err=True)
    print(target)


def option_table() -> str:
    """Every option as "section.key = default   meaning", one a line."""
    from latentfm.config import RunConfig

    lines = []
    for section, field in RunConfig.model_fields.items():
        for key, option in field.annotation.model_fields.items():
            default = "(required)" if option.is_required() else option.get_default(call_default_factory=True)
            lines.append(f"{section}.{key} = {default}" + (f"    {option.description}" if option.description else ""))
    return "\n".join(lines)
