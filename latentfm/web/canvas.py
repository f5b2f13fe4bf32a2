"""What a picture is painted on for inpainting: Gradio's editor, and its files made sources; none is decoded before it is measured."""

import io
import os
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.image_editor import AcceptBlobs
from gradio.utils import get_upload_folder, is_in_or_equal
from PIL import Image, ImageChops

from latentfm.data.images import open_rgb, upright_size
from latentfm.errors import InputError
from latentfm.files import read_bytes, reading
from latentfm.web.gallery import Gallery
from latentfm.web.limits import Limits

LAYERS = 4  # of strokes that are read
STROKE = ("#6366f1", 0.6)  # the brush's colour, and how opaque it is
EASY = 512  # pixels of the longer side, below which a picture is enlarged to be painted on
PAINTED = 8  # of 255: alpha from which a stroke counts


def canvas(**options: Any) -> gr.ImageEditor:
    """An ImageEditor, whose pictures come as files that are sent in; its other way, which keeps them in memory, is closed."""
    editor = gr.ImageEditor(**options)

    @gr.components.base.server
    def accept_blobs(data: AcceptBlobs) -> None:
        raise gr.Error("pictures are sent in as files", print_exception=False)

    editor.accept_blobs = accept_blobs
    return editor


def sent(what: str, value: Any) -> bytes | None:
    """The bytes of a file that was sent in, as Gradio names it; None of None. Raises InputError for anything else."""
    if value is None:
        return None
    path = value.get("path") if isinstance(value, dict) else None
    if not isinstance(path, str):
        raise InputError(f"{what} is no file; send it by gradio_client's handle_file")
    if not is_in_or_equal(os.path.realpath(path), os.path.realpath(get_upload_folder())) or not Path(path).is_file():
        raise InputError(f"{what} is no file that was sent here")
    return read_bytes(path)


def measured(data: bytes, limits: Limits, what: str) -> Image.Image:
    """The picture in `data`, upright, RGB. Raises InputError for what is none, or is too large, before it is decoded."""
    limits.check(what, len(data), limits.upload, " bytes")
    width, height = upright_size(what, data)
    limits.check(f"{what} of {width:,} x {height:,}", width * height, limits.pixels, " pixels")
    return open_rgb(what, data)


def sources(value: Any, limits: Limits, gallery: Gallery) -> dict[str, Path]:
    """The files `image` and `mask` of what is on the canvas, kept in the gallery's folder; the mask is white where it was painted on.

    value: the files `background`, and `layers` with strokes, or a `mask`. Both files are missing of an empty canvas, the mask of one
    with neither strokes nor a mask. Raises InputError for what is no picture or too large.
    """
    if value is not None and not isinstance(value, dict):
        raise InputError("the canvas is not laid out as it should be")
    background, masked = (sent(what, (value or {}).get(key)) for what, key in (("image", "background"), ("mask", "mask")))
    if background is None and masked is not None:
        raise InputError("mask needs an image that it is laid on")
    if background is None:
        return {}
    image = measured(background, limits, "the picture")
    mask = Image.new("L", image.size, 0)
    if masked is not None:
        mask = measured(masked, limits, "the mask").convert("L").resize(image.size)
    layers = value.get("layers") or []
    for layer in layers[:LAYERS] if isinstance(layers, list) else []:
        if (strokes := sent("a layer", layer)) is not None:
            mask = ImageChops.lighter(mask, painted(strokes, image.size, limits))
    found = {"image": gallery.keep_source(png(image))}
    return found | ({"mask": gallery.keep_source(png(mask))} if masked is not None or mask.getbbox() else {})


def painted(layer: bytes, size: tuple[int, int], limits: Limits) -> Image.Image:
    """A layer as a mask of `size`: white where something opaque enough was painted."""
    limits.check("the brush's layer", len(layer), limits.upload, " bytes")
    width, height = upright_size("the brush's layer", layer)
    limits.check("the brush's layer", width * height, limits.pixels, " pixels")
    with reading("the brush's layer", "paint again"), Image.open(io.BytesIO(layer), formats=("PNG", "WEBP")) as opened:
        alpha = opened.convert("RGBA").getchannel("A")
    mask = alpha.point(lambda value: 255 if value >= PAINTED else 0)
    return mask if mask.size == size else mask.resize(size, Image.Resampling.NEAREST)


def to_paint_on(image: Image.Image, mask: Image.Image | None = None) -> dict[str, Any]:
    """What the editor shows: a picture, small ones enlarged by a whole factor, and a mask of its size as strokes."""
    factor = max(1, EASY // max(image.size))
    size, layers = (image.width * factor, image.height * factor), []
    background = image.resize(size, Image.Resampling.NEAREST)
    if mask is not None:
        colour, opacity = STROKE
        strokes = Image.new("RGBA", size, colour)
        strokes.putalpha(mask.convert("L").resize(size, Image.Resampling.NEAREST).point(lambda value: round(value * opacity)))
        layers.append(strokes)
    return {"background": background, "layers": layers, "composite": background}


def png(image: Image.Image) -> bytes:
    """An image as a PNG, the same bytes for the same pixels."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
