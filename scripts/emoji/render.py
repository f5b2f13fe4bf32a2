"""SVG to pixels, and pictures on backgrounds. Used by build.py."""

import io
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

from PIL import Image
from sets import Icon

SIZE = 128
LARGE = 256  # what scenes are put together from
VAE_SIZES = (128, 64)  # the VAE also sees things as small as they are in scenes


def render(svg: str, size: int) -> Image.Image:
    """The SVG as an RGBA image of size x size pixels, centred if it is not square."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if image.size != (size, size):
        canvas = Image.new("RGBA", (size, size))
        canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = canvas
    return image


def on_colour(image: Image.Image, colour: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """An RGBA image laid on a colour, as RGB."""
    return Image.alpha_composite(Image.new("RGBA", image.size, (*colour, 255)), image).convert("RGB")


def write_icon(icon: Icon, folder: Path) -> None:
    """One icon's files in the folders of `write_pictures`."""
    if not icon.held_out:
        for size in VAE_SIZES:
            render(icon.svg, size).save(folder / "vae" / f"{icon.stem}-{size}.png")
        render(icon.svg, LARGE).save(folder / "large" / f"{icon.stem}.png", compress_level=1)
    part = "held_out" if icon.held_out else "icons"
    on_colour(render(icon.svg, SIZE)).save(folder / part / f"{icon.stem}.png")


def write_pictures(icons: list[Icon], pictograms: dict[str, str], folder: Path) -> None:
    """Write vae/ (RGBA, all training renders at VAE_SIZES), large/ (the same at LARGE, for scenes), and icons/ and held_out/
    (RGB on white, SIZE); all folders or none.
    """
    if (folder / "done").exists():
        return
    for name in ("vae", "large", "icons", "held_out"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write_icon, icons, repeat(folder), chunksize=32))
    for name, svg in pictograms.items():
        render(svg, SIZE).save(folder / "vae" / f"pictogram-{name}-{SIZE}.png")
    (folder / "done").write_text(f"{len(icons)}\n")
