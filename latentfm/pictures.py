"""Pictures on disk: PNGs that remember how they were made, and contact sheets. Pillow only, no torch."""

import io
import itertools
import json
import math
import os
import unicodedata
import uuid
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from latentfm.errors import InputError
from latentfm.files import CONTENT_ERRORS, open_file, reason
from latentfm.words import shown

PICTURE_ERRORS = (SyntaxError, Image.DecompressionBombError)  # what Pillow raises of damaged pictures beside plain errors
CHUNK = "latentfm"  # the PNG text chunk with the settings as JSON
SMALLEST, LARGEST = 192, 512  # pixels of a contact sheet cell's longer side: below it is enlarged, above it is reduced
PAPER, INK = (255, 255, 255), (60, 60, 60)
LABEL_LINES, LABEL_LETTERS = 2, 500  # of a label; more letters than two lines could hold


def save_png(image: Image.Image, folder: Path, stem: str, settings: dict) -> Path:
    """The path of a new file folder/stem.png (stem-2.png, -3, ... when taken) that holds `image` and its `settings`.

    `settings` is any JSON object; `read_settings` gives it back. It is written twice: as JSON in the iTXt chunk "latentfm",
    and in words in the chunk "parameters", where other programs look. An existing file is never overwritten, and the name
    appears only once the file is whole: an interrupt or a full disk leaves nothing behind. Creates `folder`. Raises OSError.
    """
    encoded = png_bytes(image, settings)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{uuid.uuid4().hex}.part"
    try:
        with unfinished.open("xb") as file:
            file.write(encoded)
            file.flush()
            os.fsync(file.fileno())
        return move_to_free_name(unfinished, folder, stem)
    finally:
        unfinished.unlink(missing_ok=True)


def png_bytes(image: Image.Image, settings: dict) -> bytes:
    """The PNG of `image` that holds `settings` as `save_png` writes them; the same bytes for the same arguments."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt(CHUNK, json.dumps(settings, ensure_ascii=False))
    text.add_itxt("parameters", in_words(settings))
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", pnginfo=text)
    return encoded.getvalue()


def move_to_free_name(file: Path, folder: Path, stem: str) -> Path:
    """The first free path of folder/stem.png, stem-2.png, ..., to which `file` has been moved in one step."""
    for path in names_of(folder, stem):
        try:
            os.link(file, path)  # unlike os.replace, refuses a name that another process has taken meanwhile
            return path
        except FileExistsError:
            continue
        except OSError:  # a file system without hard links
            if not path.exists():
                os.replace(file, path)
                return path


def names_of(folder: Path, stem: str) -> Iterator[Path]:
    """folder/stem.png, stem-2.png, -3, ...: where pictures of one name lie, in the order in which they take it."""
    yield folder / f"{stem}.png"
    yield from (folder / f"{stem}-{number}.png" for number in itertools.count(2))


def in_words(settings: dict) -> str:
    """The settings as the text that image viewers and galleries read: prompt, negative prompt, then "Name: value, ..."."""
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    values = dict(settings)
    if "width" in values and "height" in values:
        values["size"] = f"{values['width']}x{values['height']}"
    if "latentfm" in values:
        values["version"] = f"latentfm {values['latentfm']}"
    named = {
        "Steps": "steps", "CFG scale": "guidance", "Seed": "seed", "Size": "size", "Model": "model",
        "Model hash": "model_fingerprint", "Version": "version",
    }  # fmt: skip
    lines.append(", ".join(f"{name}: {values[key]}" for name, key in named.items() if key in values))
    return "\n".join(lines)


def read_settings(path: str | Path) -> dict:
    """The settings that `save_png` wrote into the picture at `path`.

    Raises InputError when there is no such file, it is no picture, or it carries no settings of ours.
    """
    try:
        with open_file(path) as file, Image.open(file) as image:
            written = image.info.get(CHUNK)
    except FileNotFoundError:
        raise InputError(f"there is no picture {shown(path)}") from None
    except InputError:
        raise
    except (*CONTENT_ERRORS, *PICTURE_ERRORS) as error:
        raise InputError(f"{shown(path)} cannot be read as a picture: {reason(error)}") from None
    if written is None:
        raise InputError(f"{shown(path)} carries no settings: it was not made by latentfm, or another program saved it again without them")
    try:
        settings = json.loads(written)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"the settings in {shown(path)} are damaged: {reason(error)}") from None
    if not isinstance(settings, dict):
        raise InputError(f"the settings in {shown(path)} are damaged: they should be a JSON object, not {shown(repr(settings), 60)}")
    return settings


def cell(image: Image.Image) -> Image.Image:
    """`image` in RGB at a size to be looked at: enlarged by a whole factor, pixels kept square, or reduced to LARGEST a side."""
    image, side = image.convert("RGB"), max(image.size)
    if side > LARGEST:
        size = tuple(max(1, round(edge * LARGEST / side)) for edge in image.size)
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = math.ceil(SMALLEST / side)
    return image if factor == 1 else image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def grid(images: list[Image.Image], columns: int | None = None, labels: list[str] | None = None, padding: int = 8) -> Image.Image:
    """The contact sheet of `images`, row by row, `columns` wide (default: near square), each with its label underneath.

    Every picture passes through `cell`; pictures of different sizes are centred in cells of the largest. `padding` is in
    pixels, around and between. Raises ValueError for no image, columns < 1, or labels that are not one per image.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one picture")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} pictures")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    cells = [cell(image) for image in images]
    width, height = max(c.width for c in cells), max(c.height for c in cells)
    font = ImageFont.load_default(13)
    texts = [wrapped(unaccented(label), font, width) for label in labels or []]
    line = sum(font.getmetrics())
    below = line * max((len(text) for text in texts), default=0)  # pixels of label under each picture

    sheet = Image.new("RGB", (padding + columns * (width + padding), padding + rows * (height + below + padding)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(cells):
        left = padding + index % columns * (width + padding)
        top = padding + index // columns * (height + below + padding)
        sheet.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
        for number, text in enumerate(texts[index] if texts else []):
            draw.text((left, top + height + number * line), text, fill=INK, font=font)
    return sheet


def table(rows: list[list[Image.Image]], row_labels: list[str], column_labels: list[str], padding: int = 8) -> Image.Image:
    """The pictures of `rows` one under the other, each row's label at its left and each column's above it.

    Every picture passes through `cell`; pictures of different sizes are centred in cells of the largest. Raises ValueError for no
    picture, or for labels that are not one a row and one a column.
    """
    if not rows or not rows[0]:
        raise ValueError("a table needs at least one picture")
    if len(row_labels) != len(rows) or any(len(row) != len(column_labels) for row in rows):
        raise ValueError(f"{len(row_labels)} and {len(column_labels)} labels for rows of {[len(row) for row in rows]} pictures")
    cells = [[cell(image) for image in row] for row in rows]
    width, height = (max(getattr(c, side) for row in cells for c in row) for side in ("width", "height"))
    font = ImageFont.load_default(13)
    texts = [wrapped(unaccented(label), font, width) for label in column_labels]
    line = sum(font.getmetrics())
    left = padding + round(max(font.getlength(label) for label in row_labels)) + padding
    top = padding + line * max(len(text) for text in texts) + padding

    sheet = Image.new("RGB", (left + len(texts) * (width + padding), top + len(rows) * (height + padding)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(texts):
        for number, part in enumerate(text):
            draw.text((left + column * (width + padding), padding + number * line), part, fill=INK, font=font)
    for number, (label, row) in enumerate(zip(row_labels, cells, strict=True)):
        above = top + number * (height + padding)
        draw.text((padding, above + (height - line) // 2), label, fill=INK, font=font)
        for column, picture in enumerate(row):
            across = left + column * (width + padding)
            sheet.paste(picture, (across + (width - picture.width) // 2, above + (height - picture.height) // 2))
    return sheet


def unaccented(text: str) -> str:
    """`text` without the accents that Pillow's own font lacks: "Bär" becomes "Bar"."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """At most LABEL_LINES lines of `text`, each within `width` pixels; what is left out is marked by "..."."""
    lines = [""]
    for word in text[:LABEL_LETTERS].split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    kept = lines[:LABEL_LINES]
    if len(lines) > LABEL_LINES:
        kept[-1] += "..."
    return [shortened(line, font, width) for line in kept]


def shortened(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`line`, or as much of its beginning as fits in `width` pixels together with "..."."""
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix("...")
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."
