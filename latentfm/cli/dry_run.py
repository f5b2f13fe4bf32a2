"""`latentfm train --dry-run`: what `latentfm.training.dry_run` found, on a terminal."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from latentfm.cli.plan import count_of, duration
from latentfm.models.gpus import GIB
from latentfm.words import count, shown

if TYPE_CHECKING:
    from rich.console import Console

NAMES_SHOWN, LONGEST, LONGEST_VALUE = 5, 160, 400


def show(found: dict[str, Any]) -> None:
    """Prints a dry run as tables on stdout."""
    from rich.console import Console

    console = Console(highlight=False, markup=True, emoji=False, soft_wrap=True)
    for note in found["notes"]:
        console.print(shown(f"note: {note}"), markup=False)
    show_options(found["options"], console)
    show_data(found, console)
    show_model(found, console)
    show_memory(found["memory"], console)
    show_time(found, console)
    rows = [
        (need["what"], size(need["bytes"]), size(need["there"]) if need["there"] else "", size(need["free"]), need["place"])
        for need in found["disk"]
    ]
    table(console, "Disk", ("", "needs at most", "in that place now", "free", "where"), rows)
    for what, place in found["places"].items():
        console.print(shown(f"{what}: {place}"), markup=False)


def show_options(options: dict[str, dict[str, Any]], console: "Console") -> None:
    """Prints every option; those that are given and differ from their defaults first, marked, then what was left as it is or to us."""
    console.print("[bold]Options[/bold], a star before those that are not as by default")
    own = {name for name, option in options.items() if "default" in option and option.get("given", option["value"]) != option["default"]}
    for name, option in options.items():
        if name in own:
            default = "" if option["default"] is None else f"   (default {option['default']})"
            console.print(f"* {name} = {shown(option['value'], LONGEST_VALUE)}{default}", markup=False)
    sections: dict[str, list[str]] = {}
    for name, option in options.items():
        if name not in own:
            section, key = name.split(".")
            given = f" ({option['given']})" if "given" in option else ""
            sections.setdefault(section, []).append(f"{key}={shown(option['value'], LONGEST_VALUE)}{given}")
    for section, entries in sections.items():
        console.print(shown(f"  {section}: {', '.join(entries)}"), markup=False, style="dim")


def show_data(found: dict[str, Any], console: "Console") -> None:
    """Prints the pictures, what is not used of them, the buckets and the epochs."""
    data, steps = found["data"], found["steps"]
    more = (f", {data['held out']:,} held out" if data["held out"] else "") + (f", {count(data['masks'], 'mask')}" if data["masks"] else "")
    pictures, captions = count(data["pictures"], "picture"), count(data["captions"], "caption")
    console.print(f"\n[bold]Data[/bold] {harmless(data['where'])}: {pictures}, {captions}{more}")
    for source in data["sources"]:
        if source["name"]:
            kind = ", a regularisation set" if source["regularisation"] else ""
            line = f"  {source['name']}: {count(source['pictures'], 'picture')}, {source['rate']:g} x an epoch{kind}"
            console.print(shown(line), markup=False)
    for problem in data["not used"]:
        rest = f" and {problem['count'] - NAMES_SHOWN:,} more" if problem["count"] > NAMES_SHOWN else ""
        names = "; ".join(shown(name, LONGEST) for name in problem["first"][:NAMES_SHOWN]) + rest
        console.print(shown(f"  not used, {problem['reason']}: {problem['count']:,} ({names})"), markup=False)
    rows = [
        (f"{row['width']} x {row['height']}", f"{row['pictures']:,}", f"{row['share']:.1%}", f"{row['mean crop']:.1%}",
         f"{row['worst crop']:.1%}", f"{row['steps an epoch']:.4g}", f"{tokens:,}")
        for row, tokens in zip(found["buckets"], found["tokens"]["image"])
    ]  # fmt: skip
    table(console, "Buckets", ("pixels", "pictures", "share", "mean crop", "worst crop", "steps an epoch", "image tokens"), rows)
    console.print(
        f"{count(steps['steps'], 'step')} of {count(found['batch']['pictures a step'], 'picture')}; {steps['an epoch']:.4g} steps an epoch "
        f"({steps['in the first epoch']:,} in the first): {steps['epochs']:.4g} epochs; {count(steps['checkpoints'], 'checkpoint')}"
        + (f", {count(steps['validations'], 'validation')}" if steps["validations"] else "")
    )


def show_model(found: dict[str, Any], console: "Console") -> None:
    """Prints what trains, on how many tokens, and how a batch is split."""
    run, tokens, counts, batch = found["run"], found["tokens"], found["parameters"], found["batch"]
    console.print(f"\n[bold]Model[/bold] {harmless(run['pipeline'])}, {harmless(run['network'])}; trains {harmless(run['trains'])}")
    own = {"the network": counts["frozen"]} if counts["frozen"] else {}
    frozen = ", ".join(f"{name} {count_of(count)}" for name, count in (own | counts["frozen models"]).items())
    console.print(f"{count_of(counts['trained'])} parameters train; frozen: {frozen}")
    images = sorted(set(tokens["image"]))
    span = f"{images[0]:,}" if len(images) == 1 else f"{images[0]:,} to {images[-1]:,}"
    mean = f" ({tokens['mean text']:.4g} in the mean)" if tokens["mean text"] != tokens["text"] else ""
    routed = tokens["routed"]
    through = f"; blocks {routed['first block']} to {routed['last block']} see {routed['kept']:,} of them" if routed else ""
    console.print(f"{span} image tokens a picture{through}, {tokens['text']:,} text tokens{mean}")
    console.print(f"P(no condition) = {found['P(no condition)']:.4f}")
    console.print(
        f"{count(batch['pictures a step'], 'picture')} a step = {count(batch['processes'], 'process', 'processes')} x "
        f"{count(batch['gradient accumulation'], 'pass', 'passes')} x {count(batch['pictures a process at a time'], 'picture')}"
    )
    if batch["processes a copy of the weights"] > 1:
        console.print(f"FSDP2: {batch['processes a copy of the weights']} processes share one copy of the weights")
    if batch["on the CPU"]:
        console.print("FSDP2 keeps weights, gradients, optimizer and averages on the CPU")


def show_memory(memory: dict[str, Any], console: "Console") -> None:
    """Prints the fullest moment by part and whether it fits."""
    rows = [(part, size(amount)) for part, amount in (memory["parts"] | {"in all": memory["total"]}).items()]
    table(console, f"Memory of a process at its fullest: {memory['fullest at']}", ("", ""), rows)
    console.print("; ".join(f"{moment} {size(amount)}" for moment, amount in memory["at"].items()) + " (closed forms)")
    word = "[bold green]fits[/bold green]" if memory["fits"] else "[bold red]does not fit[/bold red]"
    room = f"{size(memory['reserve'])} to leave free, of {size(memory['bytes'])} ({harmless(memory['device'])})"
    console.print(f"{word}: {size(memory['total'])} + {room}")
    if not memory["fits"]:
        console.print(
            "less memory: train.gradient_checkpointing, train.gradient_accumulation, train.weights=bfloat16, train.optimizer=adamw8bit, "
            "train.ema_device=cpu, a train.adapter with base nf4, fewer sample.prompts, FSDP (configs/accelerate); see `latentfm plan`"
        )


def show_time(found: dict[str, Any], console: "Console") -> None:
    """Prints the operations of a picture, and the time they take where the GPU is known."""
    time = found["time"]
    each = time["FLOP a picture"]
    amount = f"{each / 1e12:.3g} TFLOP" if each > 1e11 else f"{each / 1e9:.3g} GFLOP"
    if time["hours"] is None:
        console.print(f"\n{amount} a picture; how long that takes on this device is not known (a GPU's time: --gpu)")
        return
    console.print(
        f"\n{amount} a picture: about {time['images a second']:.3g} images/s at {time['efficiency']:.0%} of the peak, "
        f"{time['seconds a step']:.3g} s a step, {duration(time['hours'])} in all, besides filling the cache"
    )


def table(console: "Console", title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Prints a table whose columns but the first are numbers."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index and column != "where" else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(harmless, row))
    console.print(made)


def harmless(text: object) -> str:
    """A text as rich shows it, letter by letter: no mark-up of its own, nothing that a terminal obeys."""
    from rich.markup import escape

    return escape(shown(text))


def size(amount: int) -> str:
    """Bytes in the unit that suits them."""
    unit, each = ("GiB", GIB) if amount >= GIB else ("MiB", 1 << 20) if amount >= 1 << 20 else ("KiB", 1 << 10)
    return f"{amount / each:.1f} {unit}"
