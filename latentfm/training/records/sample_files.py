"""The files of the pictures drawn while training. Pillow only, no torch.

samples/step-<step>.png           all prompts at one step, with its settings inside (latentfm.pictures.read_settings)
samples/cells/step-<step>.webp    the same small and side by side, for the growing grid and the run page
samples/progress.png              the growing grid: a row a step, a column a prompt
"""

import io
import re
from pathlib import Path

from PIL import Image

from latentfm.errors import InputError
from latentfm.files import TooLarge, open_file, read_bytes, reading, whole_or_nothing
from latentfm.pictures import PICTURE_ERRORS, SMALLEST, grid, png_bytes, read_settings, table
from latentfm.words import shown

ROWS, COLUMNS = 12, 16  # of the growing grid at most; the small pictures of a step are of as many prompts
MOST_PIXELS = 2**26  # of a grid that is read again
EXACT = 128  # pixels: smaller pictures are kept to the last bit


def write_step(folder: Path, step: int, images: list[Image.Image], prompts: list[str], settings: dict) -> Path:
    """The path of step-<step, 8 digits>.png in the samples' `folder`, written with the small pictures and the growing grid.

    Each file is written whole or not at all. `settings` are how the pictures were drawn, any JSON object; the grid shows the steps that
    have the same ones, prompts and size. Raises InputError when the disk does not take them.
    """
    settings = {"training_step": step, "prompts": prompts, **settings, "width": images[0].width, "height": images[0].height}
    path = folder / f"step-{step:08d}.png"
    with whole_or_nothing(cells_of(path)) as partial:
        partial.write_bytes(strip([small(image) for image in images[:COLUMNS]]))
    with whole_or_nothing(path) as partial:
        partial.write_bytes(png_bytes(grid(images, labels=prompts), settings))
    with whole_or_nothing(folder / "progress.png") as partial:
        progress(folder, settings).save(partial, format="PNG")
    return path


def progress(folder: Path, settings: dict) -> Image.Image:
    """The growing grid of the steps drawn with `settings`: at most ROWS of them, the first and the latest always there."""
    same = [path for path in steps(folder) if settings_of(path) == settings | {"training_step": step_of(path)} and cells_of(path).is_file()]
    prompts = settings["prompts"][:COLUMNS]
    rows = [path for path in thinned(same, ROWS) if has_cells(path)]
    return table([unstrip(read_bytes(cells_of(p)), len(prompts)) for p in rows], [f"step {step_of(p):,}" for p in rows], prompts)


def steps(folder: Path) -> list[Path]:
    """The pictures step-<step>.png in the samples' `folder`, by step."""
    return sorted((path for path in folder.glob("step-*.png") if step_of(path) >= 0), key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of samples/step-<step>.png; -1 where there is none."""
    digits = path.stem.removeprefix("step-")
    return int(digits) if re.fullmatch(r"[0-9]{1,12}", digits) else -1


def cells_of(path: Path) -> Path:
    """Where the small pictures of samples/step-<step>.png are."""
    return path.parent / "cells" / f"{path.stem}.webp"


def settings_of(path: Path) -> dict | None:
    """The settings inside a picture; None where there are none, or they are not those of pictures of prompts."""
    try:
        settings = read_settings(path)
    except InputError:
        return None
    prompts = settings.get("prompts")
    return settings if isinstance(prompts, list) and prompts and all(isinstance(prompt, str) for prompt in prompts) else None


def has_cells(path: Path) -> bool:
    """Whether the small pictures of samples/step-<step>.png are there and can be read."""
    try:
        opened(cells_of(path), SMALLEST * COLUMNS * SMALLEST)
    except InputError:
        return False
    return True


def opened(path: Path, most: int = MOST_PIXELS) -> Image.Image:
    """The picture in a file, decoded, in RGB. Raises InputError for what is none, is damaged, or has more than `most` pixels."""
    with reading(path, also=PICTURE_ERRORS), open_file(path) as file, Image.open(file) as image:
        if image.width * image.height > most:
            raise TooLarge(f"{shown(path)} has {image.width} x {image.height} pixels, more than are read here")
        return image.convert("RGB")


def thinned(items: list, most: int) -> list:
    """At most `most` of the items, two at least: every one, every second, every fourth, ... from the first on, and the last."""
    stride = 1
    while True:
        kept = items[::stride]
        if items and (len(items) - 1) % stride:
            kept.append(items[-1])
        if len(kept) <= most:
            return kept
        stride *= 2


def small(image: Image.Image) -> Image.Image:
    """`image` reduced to SMALLEST pixels a side at most."""
    image = image.convert("RGB")
    image.thumbnail((SMALLEST, SMALLEST), Image.Resampling.LANCZOS)
    return image


def strip(images: list[Image.Image]) -> bytes:
    """The WebP of pictures of one size, side by side."""
    width, height = images[0].size
    sheet = Image.new("RGB", (width * len(images), height))
    for number, image in enumerate(images):
        sheet.paste(image, (number * width, 0))
    encoded = io.BytesIO()  # lossy WebP halves the resolution of colours, which shows where pixels are enlarged
    sheet.save(encoded, format="WEBP", quality=85, lossless=max(width, height) < EXACT)
    return encoded.getvalue()


def unstrip(data: bytes, count: int) -> list[Image.Image]:
    """The `count` pictures that `strip` put side by side."""
    with Image.open(io.BytesIO(data)) as sheet:
        sheet = sheet.convert("RGB")
    width = sheet.width // count
    return [sheet.crop((number * width, 0, (number + 1) * width, sheet.height)) for number in range(count)]
