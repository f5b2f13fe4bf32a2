"""The page's own pieces of HTML. Whatever is not ours goes through `safe`: a prompt or a file's name is shown, never obeyed."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from latentfm.web.line import Job
from latentfm.words import count, shown

if TYPE_CHECKING:
    from PIL import Image

LONGEST = 512  # pixels of a preview's longer side, as it is sent
LABELS = {"prompt": "Prompt", "negative_prompt": "Negative", "seed": "Seed", "steps": "Steps", "guidance": "Guidance",
          "guidance_rule": "Rule", "solver": "Solver", "schedule": "Schedule", "size": "Size", "strength": "Strength", "model": "Model",
          "lora": "LoRA", "lora_strength": "LoRA strength"}  # fmt: skip


def safe(text: object, most: int | None = None) -> str:
    """A text as HTML that shows it letter by letter."""
    return html.escape(shown(text, most), quote=True)


def address(name: str, route: str = "pictures") -> str:
    """The address of a picture of the gallery, below the page's own."""
    return f"{route}/{quote(name, safe='')}"


def welcome() -> str:
    """The stage before anything was drawn."""
    return '<div class="stage empty"><p class="hint">Say what to draw, and press Enter.</p></div>'


def problem(message: str) -> str:
    """The stage with what is wrong."""
    return f'<div class="stage"><p class="problem" role="alert">{safe(message, 2000)}</p></div>'


def stage(job: Job, before: int) -> str:
    """The stage of a job as it is: where it stands, the pictures that are made, and those that form."""
    finished = [picture(path.name, settings.get("prompt", "")) for path, settings in job.made]
    if job.table is not None:
        finished = [picture(job.table.name, "The pictures in one table")]
    forming = [f'<img class="forming" alt="a picture that forms" src="{data_url(image)}">' for image in job.previews]
    left = (job.wish.count if not job.over and not finished and not forming else 0)
    waiting = ['<span class="blank"></span>'] * min(left, 4)
    shown_at_once = finished + forming + waiting
    kind = "one" if len(shown_at_once) == 1 else "many"
    notes = "".join(f'<p class="note">{safe(note, 500)}</p>' for note in job.notes)
    wrong = f'<p class="problem" role="alert">{safe(job.error, 2000)}</p>' if job.error else ""
    progress = "" if job.over else f'<progress max="{max(job.steps, 1)}" {f"value={job.step}" if job.steps else ""}></progress>'
    status = f'<p class="status" role="status" aria-live="polite">{safe(where(job, before))}</p>'
    return f'<div class="stage {job.state}"><div class="shown {kind}">{"".join(shown_at_once)}</div>{progress}{status}{wrong}{notes}</div>'


def alone(name: str) -> str:
    """The stage with one picture of the gallery."""
    return f'<div class="stage"><div class="shown one">{picture(name, name)}</div></div>'


def where(job: Job, before: int) -> str:
    """Where a job stands, in words."""
    made = count(len(job.made), "picture")
    if job.state == "waiting":
        return f"Waiting: {count(before, 'request')} before yours" if before else "Waiting"
    if job.state == "drawing":
        done = f", {made} done" if job.made else ""
        return f"Drawing: step {job.step:,} of {job.steps:,}{done}" if job.steps else "Loading the model"
    if job.state == "cancelled":
        return f"Cancelled; {made} kept" if job.made else "Cancelled"
    return f"{made}, seed {job.wish.seed}" if job.made else ""


def picture(name: str, text: str) -> str:
    """A picture that can be chosen."""
    image = f'<img src="{safe(address(name))}" alt="{safe(text, 200) or "no prompt"}">'
    return f'<button class="choose" data-name="{safe(name)}">{image}</button>'


def tiles(names: Sequence[str], more: bool) -> str:
    """The gallery's pictures, small."""
    if not names:
        return '<p class="hint">Pictures that are drawn stay here.</p>'
    each = "".join(
        f'<button class="choose" data-name="{safe(name)}" title="{safe(name)}"><img loading="lazy" src="{safe(address(name, "small"))}" '
        f'alt="{safe(name.removesuffix(".png"))}"></button>'
        for name in names
    )
    return f'<div class="tiles">{each}</div>' + ('<button class="more">Show more</button>' if more else "")


def details(name: str, settings: Mapping[str, Any], model: str | None, lora: str | None, note: str = "") -> str:
    """What a picture says of itself, and the way to have it."""
    told = {**settings}
    if "width" in told and "height" in told:
        told["size"] = f"{told['width']} x {told['height']}"
    for key, offered in (("model", model), ("lora", lora)):
        if key in told:
            told[key] = offered or last_part(told[key])
    known = {label: value_of(told[key]) for key, label in LABELS.items() if told.get(key) not in (None, "", [])}
    rows = "".join(f"<dt>{label}</dt><dd>{safe(value, 2000)}</dd>" for label, value in known.items())
    noted = f'<p class="note">{safe(note, 500)}</p>' if note else ""
    link = f'<a class="download" href="{safe(address(name))}" download="{safe(name)}">Download</a>'
    return f'<div class="details"><div class="file"><b>{safe(name)}</b>{link}</div>{noted}<dl>{rows}</dl></div>'


def last_part(path: object) -> str:
    """The last name of a path, or of the first of several: a server's folders are nobody's business."""
    first = path[0] if isinstance(path, list) and path else path
    parts = [part for part in str(first).replace("\\", "/").split("/") if part not in ("", "model")]
    return parts[-1] if parts else ""


def value_of(value: object) -> str:
    """A setting in words."""
    several = value if isinstance(value, list | tuple) else [value]
    return ", ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in several)


def data_url(image: "Image.Image") -> str:
    """A preview as a URL that holds it."""
    small, data = image.convert("RGB"), io.BytesIO()
    small.thumbnail((LONGEST, LONGEST))
    small.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"


def remarks(lines: Iterable[str]) -> str:
    """The stage with remarks, one under the other."""
    return f'<div class="stage">{"".join(f"<p class=note>{safe(line, 500)}</p>" for line in lines)}</div>'
