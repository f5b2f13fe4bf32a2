"""`latentfm data`: what there is to know of a dataset before it is trained on."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentfm.bundled import pipeline_folder
from latentfm.cli.checks import check_at_least_one, model_folder, parse_size
from latentfm.errors import InputError
from latentfm.words import listed, shown

if TYPE_CHECKING:
    from latentfm.config import RunConfig

app = typer.Typer(help="Look at a dataset as a run will see it.", invoke_without_command=True)
NAMES_SHOWN, ROWS_SHOWN, LONGEST = 5, 6, 120
WIDTH_OF_A_FILE = 160  # characters; a file or a pipe has no width of its own


@app.callback()
def data(ctx: typer.Context) -> None:
    """Look at a dataset as a run will see it."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), nl=False)


@app.command(
    epilog="Examples\n\n"
    "latentfm data check pictures\n\n"
    "latentfm data check pictures --model an/sd3/folder --size 1024 --buckets 7 --max-aspect 2\n\n"
    "latentfm data check --config run.yaml train.batch_size=64 --strict  (data.sources, exactly as the run will use them)\n\n"
    "latentfm data check shards/part-000.tar --json > findings.json"
)
def check(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH] [SECTION.KEY=VALUE]...", show_default=False,
            help="A folder of pictures, parquet files, WebDataset shards or a saved dataset, by path or URL; options of a run after it.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A run's YAML file: its data and options are checked.", show_default=False)
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Pipeline folder whose sizes and tokenizers count. Default: the bundled one.", show_default=False)
    ] = None,
    size: Annotated[str | None, typer.Option(help="Pixels: WIDTHxHEIGHT, or one number for a square.", show_default=False)] = None,
    buckets: Annotated[int | None, typer.Option(help="How many shapes.", show_default=False)] = None,
    max_aspect: Annotated[float | None, typer.Option(help="Of the widest and the tallest bucket.", show_default=False)] = None,
    max_crop: Annotated[
        float | None, typer.Option(help="Leave out pictures that lose more than this share.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page to write. Default: data-check.html, or none with --json.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page when it exists.")] = False,
    pictures: Annotated[int, typer.Option(help="Crops on the page, as they will be trained.")] = 64,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when a picture is left out or a caption cut.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON object instead of tables.")] = False,
) -> None:
    """Say what a run would make of a dataset: what is left out, cropped, cut or there twice, and how the buckets fill.

    Reads every picture once and changes nothing. Prints tables, and writes a page with the crops as they will be trained.
    """
    given = {
        "model.pipeline": None if model is None else str(model), "data.size": None if size is None else list(parse_size(size)),
        "data.buckets": buckets, "data.max_aspect": max_aspect, "data.max_crop": max_crop,
    }  # fmt: skip
    run = options(words or [], config, given)
    check_at_least_one({"--pictures": pictures})
    target = out if out is not None else None if as_json else Path("data-check.html")
    if target is not None:
        from latentfm.data.check.page import check_target

        check_target(target, overwrite)
    from latentfm.planning.run import plan_run

    folder = model_folder(pipeline_folder(run.model.pipeline))
    plan = plan_run(run).data

    from latentfm.cli.terminal import progress_bar, quiet_libraries

    quiet_libraries()
    from latentfm.data.check.captions import load_tokenizers
    from latentfm.data.check.findings import check as examine
    from latentfm.data.check.findings import contact_sheet
    from latentfm.data.check.page import page, write_page
    from latentfm.data.from_options import open_dataset
    from latentfm.training.validation import split_held_out

    encoder, dataset = load_tokenizers(folder), open_dataset(run.data)
    with progress_bar() as bar:

        def start(what: str, total: int) -> Callable[[int], None]:
            task = bar.add_task(what, total=total)
            return lambda count: bar.advance(task, count)

        number, seed = run.validation.held_out, run.train.seed
        findings, placed = examine(dataset, plan, encoder, start, lambda samples: split_held_out(samples, number, seed)[1])
        if target is not None:
            sheet = contact_sheet(placed, pictures, start("cropping", min(pictures, findings["used"])))
    if as_json:
        print(json.dumps(findings, indent=2))
    else:
        show(findings)
    if target is not None:
        write_page(target, page(findings, sheet), overwrite)
        typer.echo(f"the page: {shown(target)}", err=True)
    if strict and (findings["dropped"] or findings["truncated"]):
        raise typer.Exit(1)


def options(words: list[str], config: Path | None, given: dict[str, Any]) -> "RunConfig":
    """The run that the command line describes: the configuration, the overrides, the path and the flags. Raises InputError."""
    from latentfm.config import load_config

    overrides = [word for word in words if re.match(r"[a-z_]+(\.\w+)+=", word)]
    paths = [word for word in words if word not in overrides]
    if len(paths) > 1:
        raise InputError(f"one path at a time, not {listed(paths)}; list several as data.sources in a configuration")
    if paths:
        from latentfm.data.sources.several import kind_of

        if kind_of(paths[0]) == "folder":
            overrides += ["data.sources=null", f"data.folder={paths[0]}"]
        else:
            place = "url" if "://" in paths[0] else "path"
            overrides += ["data.folder=", f"data.sources={json.dumps([{place: paths[0]}])}"]
    elif config is None and not any(word.startswith("data.") for word in overrides):
        raise InputError("nothing to check: give a path, or a configuration with --config")
    overrides += [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given.items() if value is not None]
    return load_config(config, [*overrides, "output.folder=-"])  # nothing is written there


def show(findings: dict[str, Any]) -> None:
    """Prints the findings as tables on stdout; text is never read as markup."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from latentfm.data.check.tables import headline, tables

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    console.print(Text(shown(headline(findings))))
    for table in tables(findings):
        console.print(Text(f"\n{shown(table.title)}", style="bold"))
        if table.rows:
            made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
            for column, head in enumerate(table.heads):
                made.add_column(Text(head), justify="right" if table.right(column) else "left", overflow="fold")
            first = table.rows[:ROWS_SHOWN] if table.folded else table.rows
            for row in first:
                made.add_row(*(Text(plain(value)) for value in row))
            console.print(made)
            if len(first) < len(table.rows):
                console.print(Text(f"and {len(table.rows) - len(first):,} more on the page"))
        if table.note:
            console.print(Text(shown(table.note)))


def plain(value: Any) -> str:
    """A cell as text that a terminal shows and does not obey: a bar of blocks, a few of many names, a long text cut short."""
    from latentfm.data.check.tables import Bar, Names

    if isinstance(value, Bar):
        return "█" * math.ceil(24 * value)
    if isinstance(value, Names):
        return listed(value, NAMES_SHOWN)
    return f"{value:,}" if isinstance(value, int) else shown(value, LONGEST)
