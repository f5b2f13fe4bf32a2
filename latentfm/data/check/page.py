"""The findings of a dataset check as one HTML page, complete in itself: no script, no link, no font from elsewhere."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from latentfm.data.check.findings import Crop
from latentfm.data.check.tables import Bar, Names, Table, headline, percent, tables
from latentfm.errors import InputError
from latentfm.files import open_file, reading, whole_or_nothing
from latentfm.words import count, shown

NAMES_SHOWN = 200  # of each list; the JSON has all
MUCH = 0.2  # a crop that loses more is marked

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #3b78c3; --bad: #d04a3a; --good: #2e8b57 }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem; overflow-wrap: anywhere; max-width: 192px;
  display: -webkit-box; -webkit-line-clamp: 6; -webkit-box-orient: vertical; overflow: hidden }
h2, .folded > summary { font-size: 1.1rem; font-weight: 600; margin: 2rem 0 .4rem } h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
.quiet { opacity: .7 } .bad { color: var(--bad) } .good { color: var(--good) }
table { border-collapse: collapse; margin: .4rem 0 } th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
td { overflow-wrap: break-word } th { border-bottom: 1px solid var(--line); font-weight: 600 }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
th { white-space: nowrap } td.wide { width: 14rem; min-width: 8rem }
.bar { background: var(--bar); height: .8rem; margin-top: .3rem; border-radius: 2px }
summary { cursor: pointer } ul { margin: .3rem 0 .3rem 1.2rem; padding: 0 }
.scroll { overflow-x: auto } .sheet { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0; width: 192px }
figure img { display: block; max-width: 192px } figcaption { font-size: 12px; line-height: 1.3; overflow-wrap: anywhere; max-width: 192px;
  display: -webkit-box; -webkit-line-clamp: 6; -webkit-box-orient: vertical; overflow: hidden }
.name { font-weight: 600 }
"""


def page(findings: dict[str, Any], sheet: Sequence[Sequence[Crop]]) -> str:
    """The page of `check`'s findings and the contact sheet, a list of crops for each bucket."""
    title = escape(f"Data check: {findings['place']}")
    ours = '<meta name="generator" content="latentfm data check">'  # such a page may be written again
    head = f'<meta charset="utf-8">{ours}<meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style>'
    dropped, truncated = findings["dropped"], findings["truncated"]
    verdict = (
        mark(f"{dropped:,} left out" if dropped else "nothing left out", dropped > 0),
        mark(f"{count(truncated, 'caption')} cut" if truncated else "no caption cut", truncated > 0),
    )
    body = [f"<h1>{title}</h1>", f"<p>{escape(headline(findings))}: {', '.join(verdict)}.</p>"]
    body += [*map(section, tables(findings)), contact(findings, sheet)]
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def section(table: Table) -> str:
    """One table under its title, to be opened with a click when it is folded."""
    note = f'<p class="quiet">{escape(table.note)}</p>' if table.note else ""
    rows = "".join(
        f"<tr>{''.join(cell(value, table.right(column)) for column, value in enumerate(row))}</tr>" for row in table.rows
    )
    heads = "".join(f"<th{css(table.right(column))}>{escape(head)}</th>" for column, head in enumerate(table.heads))
    body = f'<div class="scroll"><table><tr>{heads}</tr>{rows}</table></div>{note}' if table.rows else note
    if table.folded:
        return f'<details class="folded"><summary>{escape(table.title)}</summary>{body}</details>'
    return f"<h2>{escape(table.title)}</h2>{body}"


def cell(value: Any, right: bool) -> str:
    if isinstance(value, Bar):
        return f'<td class="wide"><div class="bar" style="width:{100 * value:.1f}%"></div></td>'
    if isinstance(value, Names):
        return f"<td>{names(value)}</td>"
    return f"<td{css(right)}>{f'{value:,}' if isinstance(value, int) else escape(str(value))}</td>"


def css(right: bool) -> str:
    return ' class="n"' if right else ""


def names(items: Names) -> str:
    """A few names as they are, more as a list that opens when it is clicked."""
    if len(items) <= 3:
        return "<br>".join(map(escape, items))
    listed = "".join(f"<li>{escape(item)}</li>" for item in items[:NAMES_SHOWN])
    rest = f"<li>and {len(items) - NAMES_SHOWN:,} more: latentfm data check --json lists all</li>" if len(items) > NAMES_SHOWN else ""
    return f"<details><summary>{escape(items[0])} and {len(items) - 1:,} more</summary><ul>{listed}{rest}</ul></details>"


def contact(findings: dict[str, Any], sheet: Sequence[Sequence[Crop]]) -> str:
    """The contact sheet, bucket by bucket."""
    parts = []
    for row, crops in zip(findings["buckets"], sheet, strict=True):
        if crops:
            parts.append(f'<h3>{row["width"]}x{row["height"]}</h3><div class="sheet">{"".join(map(figure, crops))}</div>')
    note = "As they will be trained, on this page at most 192 pixels a side; of each bucket those that lose most come first."
    return f'<h2>Crops</h2><p class="quiet">{note}</p>' + "".join(parts) if parts else ""


def figure(crop: Crop) -> str:
    """One crop with its name, what is lost of it, how it is scaled, and its first caption."""
    buffer = io.BytesIO()
    crop.image.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    lost = mark(f"{percent(crop.lost)} lost", crop.lost > MUCH) if round(crop.lost, 3) else "whole"
    scale = f", {mark(f'scaled up {crop.scale:.2f} times', True)}" if crop.scale > 1 else ""
    text = f'<span class="name">{escape(crop.name)}</span><br>{crop.size[0]}x{crop.size[1]}, {lost}{scale}<br>{escape(crop.caption)}'
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="" width="{crop.image.width}" height="{crop.image.height}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def mark(text: str, bad: bool) -> str:
    return f'<span class="{"bad" if bad else "good"}">{escape(text)}</span>'


def check_target(target: Path, overwrite: bool) -> None:
    """Raises InputError when the page cannot be written, or exists and may not be replaced."""
    if target.is_dir():
        raise InputError(f"--out {shown(target)} is a folder; give a file, as in {shown(target / 'data-check.html')}")
    if target.exists() and not overwrite:
        with reading(target, "give another --out"), open_file(target) as file:
            ours = b"latentfm data check" in file.read(2000)
        if not ours:
            raise InputError(
                f"{shown(target)} exists and is no page of latentfm data check; replace it with --overwrite, or give another --out"
            )


def write_page(target: Path, text: str, overwrite: bool) -> None:
    """Writes the page whole or not at all. Raises InputError when the disk refuses it."""
    check_target(target, overwrite)
    try:
        with whole_or_nothing(target) as partial:
            partial.write_bytes(text.encode("utf-8", "xmlcharrefreplace"))
    except InputError as error:
        raise type(error)(f"{error}, or give another place as --out") from error
