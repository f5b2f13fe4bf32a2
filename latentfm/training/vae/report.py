"""How good a trained autoencoder is: report.html, complete in itself, and its figures as report.json."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from latentfm.data.check.page import STYLE
from latentfm.files import whole_or_nothing
from latentfm.training.records.json_lines import rows_of
from latentfm.training.vae.options import VAEConfig
from latentfm.words import count, shown

AMPLIFIED = 4  # times, of the differences shown
MEASURES = {  # what is in a validation's row: how it is called, what it says
    "psnr": ("PSNR, dB", "higher is better; of pictures in 255 levels"), "worst_psnr": ("PSNR of the worst picture, dB", ""),
    "ssim": ("SSIM", "1 is the same picture"), "edges": ("edge strength", "of the picture's own; below 1 is blurred, above 1 is noise"),
    "lpips": ("LPIPS", "lower is better"), "validation_loss": ("loss of the reconstruction", "as the options weight it"),
    "kl": ("KL, nats a picture", "how far the latents are from a standard normal"),
}  # fmt: skip


def triptych(target: Tensor, output: Tensor) -> Image.Image:
    """A picture [1, 3, H, W] in [-1, 1], its reconstruction and their difference, amplified, on white, side by side."""
    levels = [np.rint((value[0].clamp(-1, 1).cpu().numpy() + 1) * 127.5) for value in (target, output)]
    difference = 255 - np.minimum(255, AMPLIFIED * abs(levels[0] - levels[1]))
    return Image.fromarray(np.concatenate([*levels, difference], axis=2).transpose(1, 2, 0).astype(np.uint8))


def write_report(out: Path, config: VAEConfig, settings: Mapping[str, Any], images: Sequence[Image.Image], names: Sequence[str]) -> Path:
    """The path of out/report.html, written with report.json, of a run's first and last validation.

    settings: the saved configuration. images: each a `triptych` of the picture of that name. Raises InputError when the disk refuses them.
    """
    rows = [row for row in rows_of(out / "validation.jsonl") if "psnr" in row]
    found = {
        "autoencoder": str(out / "model"), "shift_factor": settings["shift_factor"], "scaling_factor": settings["scaling_factor"],
        "part": config.model.part, "steps": config.train.steps,
        "before": rows[0] if rows and rows[0]["step"] == 0 and config.model.vae else None,
        "after": rows[-1] if rows else None,
    }  # fmt: skip
    for path, text in ((out / "report.json", json.dumps(found, indent=2) + "\n"), (out / "report.html", page(found, images, names))):
        with whole_or_nothing(path) as partial:
            partial.write_text(text, "utf-8")
    return out / "report.html"


def page(found: Mapping[str, Any], images: Sequence[Image.Image], names: Sequence[str]) -> str:
    """The report as one HTML page: no script, no link."""
    title = escape(f"Autoencoder: {shown(found['autoencoder'])}")
    after, before = found["after"], found["before"]
    body = [f"<h1 style='max-width:none'>{title}</h1>"]
    factors = f"scaling_factor {found['scaling_factor']:.6g}, shift_factor {found['shift_factor'] or 0:.6g}"
    why = {
        "all": "what is trained on its latents has them at mean 0 and deviation 1",
        "decoder": "as they were: the decoder alone was trained, what was trained on the latents stays good",
    }  # fmt: skip
    body.append(f"<p>{count(found['steps'], 'step')}; {factors}: {why[found['part']]}.</p>")
    if after is None:
        body.append("<p>Nothing was held out: give validation.held_out or validation.folder for figures and pictures.</p>")
    else:
        body += [f"<h2>{count(after['pictures'], 'picture')} held out</h2>", figures(before, after), channels(after["kl_by_channel"])]
        body += [f"<h2>Original, reconstruction, difference {AMPLIFIED} times</h2>", sheet(images, names)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def figures(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> str:
    """The table of measures, before the training where that means something, and after it."""
    columns = [row for row in (before, after) if row is not None]
    heads = "".join(f'<th class="n">step {row["step"]:,}</th>' for row in columns)
    rows = [f"<tr><th></th>{heads}<th></th></tr>"]
    for name, (called, says) in MEASURES.items():
        if name in after:
            # what came with --resume, LPIPS, is not known of the beginning
            cells = "".join(f'<td class="n">{in_digits(row[name]) if name in row else ""}</td>' for row in columns)
            rows.append(f'<tr><td>{called}</td>{cells}<td class="quiet">{says}</td></tr>')
    return f"<table>{''.join(rows)}</table>"


def in_digits(value: float) -> str:
    """Four digits, or all that are before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def channels(nats: Sequence[float]) -> str:
    """KL by channel, as bars: a channel near 0 tells nothing of the picture."""
    largest = max(nats) or 1.0
    rows = "".join(
        f'<tr><td class="n">{number}</td><td class="n">{in_digits(value)}</td>'
        f'<td class="wide"><div class="bar" style="width:{100 * value / largest:.1f}%"></div></td></tr>'
        for number, value in enumerate(nats)
    )
    note = '<p class="quiet">Nats a picture. A channel near 0 tells nothing of the picture.</p>'
    return f'<h2>KL by channel</h2><table><tr><th class="n">channel</th><th class="n">KL</th><th></th></tr>{rows}</table>{note}'


def sheet(images: Sequence[Image.Image], names: Sequence[str]) -> str:
    """The pictures under one another, small ones enlarged to their pixels."""
    parts = []
    for image, name in zip(images, names, strict=True):
        encoded = io.BytesIO()
        image.save(encoded, format="PNG")
        width = image.width * max(1, round(576 / image.width))
        source = base64.b64encode(encoded.getvalue()).decode()
        parts.append(
            f'<figure style="width:{width}px"><img style="max-width:none;width:{width}px;image-rendering:pixelated" '
            f'src="data:image/png;base64,{source}" alt=""><figcaption style="max-width:none">{escape(shown(name))}</figcaption></figure>'
        )
    return f'<div class="sheet">{"".join(parts)}</div>'
