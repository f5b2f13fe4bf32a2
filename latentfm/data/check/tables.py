"""The findings of a dataset check as tables, for whatever shows them: a terminal or a page. Needs no heavy library."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latentfm.words import count


class Bar(float):
    """A share in [0, 1], drawn as a bar."""


class Names(tuple):
    """Texts of which a reader wants a few first, and the rest on request."""


@dataclass(frozen=True)
class Table:
    """A title, a head for each column, rows of int, str, Bar and Names, and a line below. A `folded` one is for those who ask."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    folded: bool = False

    def right(self, column: int) -> bool:
        """Whether a column holds numbers, or texts that look like some, and stands better on the right."""
        return bool(self.rows) and all(is_number(row[column]) for row in self.rows)


def headline(findings: dict[str, Any]) -> str:
    """One sentence on the whole."""
    held_out = f", {findings['held_out']:,} of them held out" if findings["held_out"] else ""
    steps = findings["steps_an_epoch"]
    return (
        f"{findings['used']:,} of {count(findings['pictures'], 'picture')} of {findings['place']}{held_out}, "
        f"{count(findings['captions'], 'caption')} ({findings['distinct_captions']:,} distinct), "
        f"{steps:,g} {'step' if steps == 1 else 'steps'} an epoch at a batch of {findings['batch_size']:,}"
    )


def tables(findings: dict[str, Any]) -> list[Table]:
    """Every table of the findings that has rows, but those of what is left out, cut and double also without any, in order."""
    made = [
        sources(findings), left_out(findings), odd(findings), sizes(findings), common_sizes(findings), aspects(findings),
        buckets(findings), tokens(findings), cut(findings), empty(findings), shared(findings), duplicates(findings),
    ]  # fmt: skip
    return [table for table in made if table.rows or table.note]


def sources(findings: dict[str, Any]) -> Table:
    rows = [
        [row["name"] or findings["place"], row["pictures"], row["captions"], row["masks"], f"{row['rate']:g}",
         f"{row['draws_an_epoch']:,g}", "regularisation" if row["regularisation"] else ""]
        for row in findings["sources"]
    ]  # fmt: skip
    return Table("Sources", ["source", "pictures", "captions", "masks", "rate", "draws an epoch", ""], rows)


def left_out(findings: dict[str, Any]) -> Table:
    rows = [[row["reason"], len(row["names"]), Names(row["names"])] for row in findings["problems"]]
    unusable = findings["unusable"]
    if unusable:
        rows.append(["cannot be used", len(unusable), Names(f"{row['name']}: {row['reason']}" for row in unusable)])
    crops = findings["left_out"]
    if crops:
        names = Names(f"{row['name']} ({percent(row['crop'])})" for row in crops)
        rows.append([f"more than {findings['max_crop']:g} cropped away", len(crops), names])
    return Table("Left out", ["why", "how many", "which"], rows, "" if rows else "nothing")


def odd(findings: dict[str, Any]) -> Table:
    rows = [[row["kind"], len(row["names"]), row["meaning"], Names(row["names"])] for row in findings["odd"]]
    rows += [["said of", len(row["names"]), row["reason"], Names(row["names"])] for row in findings["remarks"]]
    return Table("Odd, used as they are", ["kind", "how many", "what becomes of them", "which"], rows)


def sizes(findings: dict[str, Any]) -> Table:
    found = findings["sizes"]
    words = ("min", "median", "max")
    rows = [[name, *(f"{found[name][word]:,g}" for word in words)] for name in ("width", "height", "megapixels") if found]
    return Table("Sizes", ["", "smallest", "median", "largest"], rows)


def common_sizes(findings: dict[str, Any]) -> Table:
    found = findings["sizes"]
    rows = [[shape(width, height), number] for width, height, number in found["common"]] if found else []
    return Table(f"The most common of {found['distinct']:,} sizes" if found else "", ["size", "pictures"], rows, folded=True)


def aspects(findings: dict[str, Any]) -> Table:
    """The histogram, without the empty bins at its ends."""
    bins = findings["aspects"]
    filled = [place for place, row in enumerate(bins) if row["pictures"]]
    bins = bins[filled[0] : filled[-1] + 1] if filled else []
    most = max((row["pictures"] for row in bins), default=0)
    return Table("Width to height", ["", "pictures", ""], [[interval(row), row["pictures"], Bar(row["pictures"] / most)] for row in bins])


def buckets(findings: dict[str, Any]) -> Table:
    most = max(row["share"] for row in findings["buckets"]) or 1
    rows = [
        [shape(row["width"], row["height"]), row["pictures"], Bar(row["share"] / most), percent(row["share"]), percent(row["mean_crop"]),
         percent(row["worst_crop"]), row["worst"] or "", row["enlarged"], f"{row['draws_an_epoch']:,g}",
         f"{row['steps_an_epoch']:,g}", row["left_out"]]
        for row in findings["buckets"]
    ]  # fmt: skip
    heads = ["shape", "pictures", "", "share", "mean crop", "worst crop", "worst", "enlarged", "draws an epoch", "steps an epoch"]
    note = "Each picture goes to exactly one bucket. What does not fill a batch at an epoch's end waits for the next epoch: 0 dropped."
    return Table("Buckets", [*heads, "left out"], rows, note)


def tokens(findings: dict[str, Any]) -> Table:
    rows = [
        [row["encoder"], row["limit"], *(f"{row['lengths'][word]:g}" for word in ("min", "median", "mean", "p95", "max")),
         row["truncated"], percent(row["truncated"] / row["captions"])]
        for row in findings["tokens"]
    ]  # fmt: skip
    heads = ["encoder", "reads", "shortest", "median", "mean", "95 %", "longest", "cut", ""]
    return Table("Caption lengths in tokens", heads, rows, "Of the distinct captions, start and end included.")


def cut(findings: dict[str, Any]) -> Table:
    """The worst truncations over all encoders, those that lose the most tokens first."""
    found = [(worst["tokens"] - row["limit"], row, worst) for row in findings["tokens"] for worst in row["worst"]]
    found.sort(key=lambda item: -item[0])
    rows = [[worst["name"], f"{row['encoder']}, {row['limit']}", lost, worst["lost"]] for lost, row, worst in found]
    return Table("Captions that lose the most", ["picture", "encoder", "tokens lost", "lost words"], rows, folded=True)


def empty(findings: dict[str, Any]) -> Table:
    names = Names(findings["empty_captions"])
    rows = [["empty: drawn without a condition", len(names), names]] if names else []
    return Table("Empty captions", ["caption", "pictures", "which"], rows)


def shared(findings: dict[str, Any]) -> Table:
    found = findings["shared_captions"]
    rows = [[row["caption"], row["pictures"], ", ".join(row["names"])] for row in found["most"]]
    title = f"Captions of several pictures, the most used of {found['captions']:,}"
    return Table(title, ["caption", "pictures", "as of"], rows, folded=True)


def duplicates(findings: dict[str, Any]) -> Table:
    rows = [
        [word, len(findings[key]), Names(" = ".join(group) for group in findings[key])]
        for key, word in (("exact_duplicates", "equal byte for byte"), ("near_duplicates", "look alike"))
        if findings[key]
    ]
    return Table("Duplicates", ["pictures that", "groups", "which"], rows, "" if rows else "none")


def is_number(value: Any) -> bool:
    if isinstance(value, (Bar, Names)):
        return False
    return str(value).removesuffix(" %").replace(",", "").replace(".", "", 1).isdigit()


def interval(row: dict[str, Any]) -> str:
    """The bounds of one bin of the aspect histogram."""
    if row["from"] is None or row["to"] is None:
        return f"below {row['to']:.2f}" if row["from"] is None else f"{row['from']:.2f} and more"
    return f"{row['from']:.2f} to {row['to']:.2f}"


def shape(width: int, height: int) -> str:
    return f"{width}x{height}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
