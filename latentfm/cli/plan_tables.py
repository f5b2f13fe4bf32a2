"""A plan (`latentfm plan`) and a dry run (`latentfm train --dry-run`) on a terminal."""

from typing import TYPE_CHECKING, Any, TextIO

from latentfm.cli.terminal import harmless, table
from latentfm.planning.devices import GIB
from latentfm.words import count, shown

if TYPE_CHECKING:
    from rich.console import Console

NAMES_SHOWN, LONGEST, LONGEST_VALUE = 5, 160, 400


def show_plan(found: dict[str, Any]) -> None:
    """Prints the plan of a training or a drawing on stdout."""
    console = plain_console()
    show_model(found, console)
    show_network(found, console)
    show_memory(found["memory"], console)
    show_time(found, console)


def show_dry_run(found: dict[str, Any], console: "Console | None" = None) -> None:
    """Prints a dry run, on stdout where no console is given."""
    console = console or plain_console()
    for note in found["notes"]:
        console.print(shown(f"note: {note}"), markup=False)
    show_options(found["options"], console)
    show_data(found, console)
    show_model(found, console)
    console.print(f"P(no condition) = {found['P(no condition)']:.4f}")
    show_memory(found["memory"], console)
    show_time(found, console)
    rows = [
        (need["what"], size(need["bytes"]), size(need["there"]) if need["there"] else "", size(need["free"]), need["place"])
        for need in found["disk"]
    ]
    table(console, "Disk", ("", "needs at most", "in that place now", "free", "where"), rows, texts=("where",))
    for what, place in found["places"].items():
        console.print(shown(f"{what}: {place}"), markup=False)


def plain_console(file: TextIO | None = None, width: int | None = None) -> "Console":
    """Where tables are printed: stdout if not told, as wide as that is."""
    from rich.console import Console

    return Console(file=file, width=width, highlight=False, markup=True, emoji=False, soft_wrap=True)


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
    """Prints what trains or draws, on how many tokens, and how a batch is split."""
    run, tokens, counts, device = found["run"], found["tokens"], found["parameters"], found["device"]
    what = run.get("trains") or run["draws"]
    peak = f", {device['TFLOP/s']:g} TFLOP/s" if device["TFLOP/s"] else ""
    console.print(f"\n[bold]Model[/bold] {harmless(run['pipeline'])}, {harmless(what)}; {harmless(device['name'])}{peak}")
    own = {"the network": counts["frozen"]} if counts.get("frozen") else {}
    frozen = ", ".join(f"{name} {count_of(count)}" for name, count in (own | counts["frozen models"]).items())
    console.print((f"{count_of(counts['trained'])} parameters train; " if "trained" in counts else "") + f"frozen: {frozen}")
    images = sorted(set(tokens["image"]))
    span = f"{images[0]:,}" if len(images) == 1 else f"{images[0]:,} to {images[-1]:,}"
    mean = f" ({tokens['mean text']:.4g} in the mean)" if tokens.get("mean text", tokens["text"]) != tokens["text"] else ""
    routed = tokens.get("routed")
    through = f"; blocks {routed['first block']} to {routed['last block']} see {routed['kept']:,} of them" if routed else ""
    console.print(f"{span} image tokens a picture{through}, {tokens['text']:,} text tokens{mean}")
    if batch := found.get("batch"):
        console.print(
            f"{count(batch['pictures a step'], 'picture')} a step = {count(batch['processes'], 'process', 'processes')} x "
            f"{count(batch['gradient accumulation'], 'pass', 'passes')} x {count(batch['pictures a process at a time'], 'picture')}"
        )
        if batch["processes a copy of the weights"] > 1:
            console.print(f"FSDP2: {batch['processes a copy of the weights']} processes share one copy of the weights")
        if batch["on the CPU"]:
            console.print("FSDP2 keeps weights, gradients, optimizer and averages on the CPU")


def show_network(found: dict[str, Any], console: "Console") -> None:
    """Prints the network's parameters and operations by part."""
    counts = found["parameters"]["network"]
    table(console, "Parameters", ("", ""), [(part, count_of(n)) for part, n in (counts | {"in all": sum(counts.values())}).items()])
    columns = [flops | {"in all": sum(flops.values())} for flops in found["FLOP an image"].values()]
    unit, each = ("TFLOP", 1e12) if columns[0]["in all"] > 1e11 else ("GFLOP", 1e9)
    parts = [part for part in dict.fromkeys(part for flops in columns for part in flops) if part != "in all"]
    rows = [(part, *(f"{flops[part] / each:.3f}" if part in flops else "" for flops in columns)) for part in [*parts, "in all"]]
    table(console, f"{unit} an image", ("", *found["FLOP an image"]), rows)


def show_memory(memory: dict[str, Any], console: "Console") -> None:
    """Prints the fullest phase by part, whether it fits, and what would make it fit."""
    rows = [(part, size(amount)) for part, amount in (memory["parts"] | {"in all": memory["total"]}).items()]
    whose = "process" if memory["device"] == "CPU" else "GPU"
    table(console, f"Memory of a {whose} at its fullest: {memory['fullest at']}", ("", ""), rows)
    console.print("; ".join(f"{phase} {size(amount)}" for phase, amount in memory["at"].items()) + " (closed forms)")
    word = "[bold green]fits[/bold green]" if memory["fits"] else "[bold red]does not fit[/bold red]"
    room = f"{size(memory['reserve'])} to leave free, of {size(memory['bytes'])} ({harmless(memory['device'])})"
    console.print(f"{word}: {size(memory['total'])} + {room}")
    if memory["ways out"]:
        console.print(shown(f"fits with {'; or '.join(memory['ways out'])}"), markup=False)
    elif not memory["fits"]:
        console.print("nothing here makes it fit: take a GPU with more memory, or a smaller model or data.size")


def show_time(found: dict[str, Any], console: "Console") -> None:
    """Prints the operations of a picture, and the time they take where the GPU is known."""
    time = found["time"]
    each = time["FLOP a picture"]
    amount = f"{each / 1e12:.3g} TFLOP" if each > 1e11 else f"{each / 1e9:.3g} GFLOP"
    if time["images a second"] is None:
        console.print(f"\n{amount} a picture; how long that takes on this device is not known (a GPU's time: --gpu)")
        return
    speed = f"\n{amount} a picture: about {time['images a second']:.3g} images/s at {time['efficiency']:.0%} of the peak"
    if "hours" in time:
        console.print(f"{speed}, {time['seconds a step']:.3g} s a step, {duration(time['hours'])} in all, besides filling the cache")
    else:
        console.print(f"{speed}, {time['seconds a picture']:.3g} s a picture")


def count_of(number: int) -> str:
    """A number of parameters with its unit."""
    unit, each = ("B", 1e9) if number >= 1e9 else ("M", 1e6) if number >= 1e6 else ("k", 1e3)
    return f"{number / each:.3f} {unit}"


def duration(hours: float) -> str:
    """Hours in the unit that suits them."""
    if hours < 1:
        return f"{hours * 60:.3g} min" if hours * 60 >= 1 else f"{hours * 3600:.3g} s"
    return f"{hours:.3g} h" if hours < 48 else f"{hours / 24:.3g} days"


def size(amount: int) -> str:
    """Bytes in the unit that suits them."""
    unit, each = ("GiB", GIB) if amount >= GIB else ("MiB", 1 << 20) if amount >= 1 << 20 else ("KiB", 1 << 10)
    return f"{amount / each:.1f} {unit}"
