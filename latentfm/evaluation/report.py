"""An evaluation as one HTML page, complete in itself: no script, no link; made from the record that report.json holds."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from latentfm.data.images import open_rgb
from latentfm.evaluation.geneval import TASKS
from latentfm.evaluation.plots import plot
from latentfm.words import count, shown

SHOWN, PAIRS, SIDE = 24, 16, 160  # pictures of a task, pairs of a drawn and a known picture, pixels of each
CONFUSED = 60  # of a detector's confusions, the most frequent
SURE, LEAST = 0.05, 0.0001  # p below which a difference is called one, and below which it is not told

# each figure's label, whether more of it is better (None: neither), its format, and what it is
FIGURES = {
    "overall": ("overall", True, ".1%", "the mean of the tasks' shares, as GenEval's"),
    **{name: (label, True, ".1%", "pictures with all that was asked, by GenEval's rules") for name, label in TASKS.items()},
    "clip_score": ("CLIP score", True, ".2f", "100 times the cosine of picture and prompt"),
    "fid": ("FID", False, ".2f", "Frechet distance to the real pictures"),
    "cmmd": ("CMMD", False, ".3f", "1000 times the squared MMD to the real pictures, sigma 10, CLIP's features"),
    "mmd": ("MMD", False, ".3f", "the same in the space named below, not CLIP's"),
    "precision": ("precision", True, ".3f", "drawn pictures among the real ones (k = 5)"),
    "recall": ("recall", True, ".3f", "real pictures among the drawn ones"),
    "density": ("density", True, ".3f", "how many real pictures each drawn one is among, over k"),
    "coverage": ("coverage", True, ".3f", "real pictures with a drawn one among their nearest"),
    "diversity": ("diversity within a prompt", None, ".4f", "1 - mean cosine between the pictures of a prompt"),
    "nearest": ("distance to the nearest known picture", None, ".4f", "1 - cosine"),
    "copies": ("copies", None, ".1%", "pictures nearer to a known one than 95 % of the known ones are to each other"),
    "loss": ("held-out loss", False, ".4f", "mean squared error of the velocity over pictures and t"),
}  # fmt: skip

STYLE = """
:root { color-scheme: light dark; --line: #8884; --s0: #3b78c3; --s1: #d07a2a; --bad: #d04a3a; --good: #2e8b57 }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem } h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
.quiet { opacity: .7 } .bad { color: var(--bad) } .good { color: var(--good) }
table { border-collapse: collapse } th, td { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top }
th { border-bottom: 1px solid var(--line) } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.scroll { overflow-x: auto } .sheet { display: flex; flex-wrap: wrap; gap: .8rem } figure { margin: 0; width: 160px }
.pair { width: 330px } figure img { width: 160px; image-rendering: pixelated; border: 1px solid var(--line) }
figcaption { font-size: 12px; line-height: 1.3; overflow-wrap: anywhere } .plots { display: flex; flex-wrap: wrap; gap: 1.5rem }
svg text { font: 11px system-ui, sans-serif; fill: currentColor } svg .title { font-weight: 600; font-size: 13px }
svg .grid { stroke: var(--line) } svg .s0 { stroke: var(--s0); fill: var(--s0) } svg .s1 { stroke: var(--s1); fill: var(--s1) }
svg .line { fill: none } .s0 { color: var(--s0) } .s1 { color: var(--s1) } dt { font-weight: 600 } dd { margin: 0 0 .3rem 1rem }
"""


def page(report: dict[str, Any], folder: Path) -> str:
    """The page of an evaluation; its pictures are read from `folder`."""
    models = report["models"]
    title = escape("Evaluation of " + " and ".join(shown(model["name"], 200) for model in models))
    body = [f"<h1>{title}</h1>", told(report), table(report)]
    if tasks := [name for name in TASKS if name in models[0]["figures"]]:
        series = [[model["figures"][name] for name in tasks] for model in models]
        body.append(plots([plot("right, by task", [TASKS[name] for name in tasks], series, joined=False)]))
    body += [swept(each) for each in report["sweeps"]]
    if report["losses"]:
        body.append(losses(report["losses"]))
    if report["validation"]:
        body.append(validation(report["validation"]))
    for which, model in enumerate(models):
        heading = f'<h2><span class="s{which}">Pictures of {escape(shown(model["name"], 200))}</span></h2>'
        body += [heading, pictures(report, model, folder), memorised(model, folder)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def told(report: dict[str, Any]) -> str:
    """By what and on what the models were measured."""
    rows = {
        "prompts": f"{report['prompts_file']}, {count(len(report['prompts']), 'prompt')} of {count(report['number'], 'picture')} each",
        "seeds": f"{report['seeds'][0]} to {report['seeds'][1]}",
        "detector": report["detector"] or "none: whether pictures show what was asked is not told",
        "feature space": report["space"] or "none",
        "CLIP": report["clip"] or "none: no CLIP score, no CMMD",
        "real pictures": f"{report['real']['folder']}, {count(report['real']['pictures'], 'picture')}" if report["real"] else "none",
    }
    for model in report["models"]:
        rows[model["name"]] = ", ".join(f"{name} {value}" for name, value in model["told"].items() if value not in (None, ""))
    cells = "".join(f"<tr><td>{escape(shown(name, 200))}</td><td>{escape(shown(value, 2000))}</td></tr>" for name, value in rows.items())
    return f'<div class="scroll"><table>{cells}</table></div>'


def said(name: str, figure: dict[str, float]) -> tuple[str, str]:
    """A figure and its interval in words."""
    style = FIGURES[name][2] if name in FIGURES else ".4f"
    if not math.isfinite(figure["high"] - figure["low"]):
        return format(figure["value"], style), "too few prompts"
    return format(figure["value"], style), f"{figure['low']:{style}} to {figure['high']:{style}}"


def difference(name: str, figure: dict[str, float]) -> tuple[str, str, str]:
    """(the difference, its interval, what it comes to) in words."""
    value, interval = said(name, figure)
    if figure["p"] >= SURE or not math.isfinite(figure["p"]):
        return value, interval, "no difference found"
    better = FIGURES[name][1]
    more = figure["value"] > 0
    return value, interval, "differs" if better is None else "better" if more == better else "worse"


def chance(p: float) -> str:
    """A p in words."""
    return f"{p:.4f}" if not p < LEAST else f"< {LEAST}"


def table(report: dict[str, Any]) -> str:
    """Every figure of every model, and the differences of two."""
    models, compared = report["models"], report["comparison"]
    heads = ["", *(cell for model in models for cell in (shown(model["name"], 60), "95 % interval"))]
    heads += ["difference", "95 % interval", "p", ""] if compared else []
    rows = []
    for name, (label, _, _, meaning) in FIGURES.items():
        if not any(name in model["figures"] for model in models):
            continue
        cells = [f"<td>{escape(label)}</td>"]
        for model in models:
            for text in said(name, model["figures"][name]) if name in model["figures"] else ("", ""):
                cells.append(f'<td class="n">{text}</td>')
        if compared and name in compared:
            value, interval, word = difference(name, compared[name])
            colour = {"better": "good", "worse": "bad"}.get(word, "quiet")
            cells += [f'<td class="n">{escape(each)}</td>' for each in (value, interval, chance(compared[name]["p"]))]
            cells.append(f'<td class="{colour}">{word}</td>')
        elif compared:
            cells += ["<td></td>"] * 4
        rows.append(f"<tr>{''.join(cells)}<td class='quiet'>{escape(meaning)}</td></tr>")
    numbers = "".join(f"<th{' class=n' if place else ''}>{escape(head)}</th>" for place, head in enumerate(heads))
    note = (
        "Intervals and p are over prompts: shares by Wilson's interval with the prompts' design effect, means by Student's, distances "
        "between sets by leaving out a twentieth of the prompts at a time, around the value without the bias of few pictures (report.json "
        "has it), so that an interval of FID may lie below its value. The real pictures are taken as they are."
    )
    if compared:
        note += f" Differences are {shown(models[1]['name'], 60)} less {shown(models[0]['name'], 60)}, prompt by prompt; each p by itself."
    made = f'<div class="scroll"><table><tr>{numbers}<th></th></tr>{"".join(rows)}</table></div>'
    return f'<h2>Figures</h2>{made}<p class="quiet">{escape(note)}</p>'


def plots(figures: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(figures)}</div>'


def swept(sweep: dict[str, Any]) -> str:
    """A plot of each figure against the values of one option."""
    numeric = all(isinstance(value, int | float) for value in sweep["values"])
    labels = [str(value) for value in sweep["values"]]
    names = [name for name in FIGURES if all(name in each for each in sweep["figures"])]
    drawn = [plot(FIGURES[name][0], labels, [[each[name] for each in sweep["figures"]]], numeric) for name in names]
    return f"<h2>Against {escape(sweep['option'])}</h2>" + plots(drawn)


def losses(found: Sequence[dict[str, Any]]) -> str:
    """The held-out loss by t of each model."""
    times = [name for name in found[0]["figures"] if name != "loss"]
    drawn = plot("held-out loss by t (0 noise, 1 data)", times, [[each["figures"][t] for t in times] for each in found])
    return "<h2>Held-out loss</h2>" + plots([drawn])


def validation(found: dict[str, Any]) -> str:
    """How often the detector was right about pictures that were composed as prompts ask, or on purpose otherwise."""
    cells = [(name, f"{each['value']:.1%}", f"{each['low']:.1%} to {each['high']:.1%}", f"{each['of']:,}") for name, each
             in found["verdicts"].items()]  # fmt: skip
    rows = "".join(f"<tr><td>{escape(name)}</td>{''.join(f'<td class=n>{each}</td>' for each in rest)}</tr>" for name, *rest in cells)
    confused = "".join(f"<li>{escape(name)}: {number}</li>" for name, number in list(found["confusion"].items())[:CONFUSED])
    heads = "<tr><th>verdicts</th><th class=n>right</th><th class=n>95 % interval</th><th class=n>of</th></tr>"
    taken = f"Of {found['looked at']:,} drawings alone, what was taken for what:"
    inside = f"<summary>verdicts and confusions</summary><table>{heads}{rows}</table><p>{taken}</p><ul>{confused}</ul>"
    return f"<h2>The detector on composed pictures</h2><details>{inside}</details>"


def image(path: Path) -> str:
    """The picture as part of the page, at most 2 SIDE pixels a side; a note where it is no longer there."""
    if not path.is_file():
        return '<span class="quiet">(the picture is gone)</span>'
    picture, buffer = open_rgb(path), io.BytesIO()
    picture.thumbnail((2 * SIDE, 2 * SIDE))
    picture.save(buffer, "PNG")
    return f'<img alt="" loading="lazy" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def pictures(report: dict[str, Any], model: dict[str, Any], folder: Path) -> str:
    """Of each task some pictures, evenly spread over its prompts, with the verdict."""
    by_task: dict[str, list[dict]] = {}
    for row in model["pictures"]:
        by_task.setdefault(report["prompts"][row["prompt"]]["task"] or "", []).append(row)
    parts = []
    for task, rows in by_task.items():
        few = [rows[place * len(rows) // min(SHOWN, len(rows))] for place in range(min(SHOWN, len(rows)))]
        cells = []
        for row in few:
            mark = "" if "right" not in row else '<span class="good">right</span> ' if row["right"] else '<span class="bad">wrong</span> '
            text = f"{mark}{escape(shown(report['prompts'][row['prompt']]['prompt'], 120))}, seed {row['seed']}"
            wrong = f'<br><span class="quiet">{escape(row["wrong"])}</span>' if row.get("wrong") else ""
            cells.append(f"<figure>{image(folder / row['file'])}<figcaption>{text}{wrong}</figcaption></figure>")
        parts.append(f'<h3>{escape(TASKS.get(task, "other prompts"))}</h3><div class="sheet">{"".join(cells)}</div>')
    return "".join(parts)


def memorised(model: dict[str, Any], folder: Path) -> str:
    """The drawn pictures that are most alike to a known one, each beside it."""
    rows = sorted((row for row in model["pictures"] if "nearest" in row), key=lambda row: row["nearest"][1])
    if not rows:
        return ""
    seen, few = set(), []
    for row in rows:  # of one known picture the one that is most alike
        if row["nearest"][0] not in seen and len(few) < PAIRS:
            seen.add(row["nearest"][0])
            few.append(row)
    cells = []
    for row in few:
        path, distance = row["nearest"]
        text = f"distance {distance:.4f}<br>{escape(Path(row['file']).name)}<br>{escape(shown(Path(path).name, 80))}"
        cells.append(f'<figure class="pair">{image(folder / row["file"])} {image(Path(path))}<figcaption>{text}</figcaption></figure>')
    return f'<h3>Nearest to known pictures (left drawn, right known)</h3><div class="sheet">{"".join(cells)}</div>'
