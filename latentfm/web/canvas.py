"""What a picture is painted on for inpainting: Gradio's editor, with bounds on what it keeps, and nothing decoded before it is measured."""

import io
from collections import OrderedDict
from typing import Any

import gradio as gr
from gradio.components.image_editor import AcceptBlobs, EditorData, EditorDataBlobs
from PIL import Image, ImageChops

from latentfm.data.images import open_rgb, upright_size
from latentfm.files import read_bytes, reading
from latentfm.web.gallery import Gallery
from latentfm.web.limits import Limits

BLOBS, LAYERS = 64, 4  # what of unfinished transfers is kept, and layers of each
STROKE = ("#6366f1", 0.6)  # the brush's colour, and how opaque it is
EASY = 512  # pixels of the longer side, below which a picture is enlarged to be painted on
PAINTED = 8  # of 255: alpha from which a stroke counts


class Blobs(OrderedDict):
    """The last BLOBS transfers; older ones, which nobody has come for, go."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > BLOBS:
            self.popitem(last=False)


def canvas(**options: Any) -> gr.ImageEditor:
    """An ImageEditor whose value is the files' bytes, {"background": bytes or None, "layers": [bytes]}, and whose transfers are bounded.

    Not a class of its own: Gradio writes a file beside every module that has one.
    """
    editor = gr.ImageEditor(**options)
    kept = editor.blob_storage = Blobs()

    def preprocess(payload: EditorData | None) -> dict[str, Any] | None:
        found = payload if payload is None or payload.id is None else kept.pop(payload.id, None)
        if found is None:
            return None
        return {"background": content(found.background), "layers": [content(each) for each in (found.layers or [])[:LAYERS]]}

    @gr.components.base.server
    def accept_blobs(data: AcceptBlobs) -> None:
        kind, index, key = data.data["type"], str(data.data["index"]), str(data.data["id"])[:100]
        current = kept.get(key) or EditorDataBlobs(background=None, layers=[], composite=None)
        if kind == "layer" and index.isdecimal() and int(index) < LAYERS:
            current.layers += [None] * (int(index) + 1 - len(current.layers))
            current.layers[int(index)] = data.files[0][1]
        elif kind == "background":
            current.background = data.files[0][1]
        kept[key] = current

    editor.preprocess, editor.accept_blobs = preprocess, accept_blobs
    return editor


def content(part: Any) -> bytes | None:
    """The bytes of a part of a picture, that came as a file or by itself."""
    return part if part is None or isinstance(part, bytes) else read_bytes(part.path)


def measured(data: bytes, limits: Limits, what: str) -> Image.Image:
    """The picture in `data`, upright, RGB. Raises InputError for what is none, or is too large, before it is decoded."""
    limits.check(what, len(data), limits.upload, " bytes")
    width, height = upright_size(what, data)
    limits.check(f"{what} of {width:,} x {height:,}", width * height, limits.pixels, " pixels")
    return open_rgb(what, data)


def sources(value: dict[str, Any] | None, limits: Limits, gallery: Gallery) -> dict[str, Any]:
    """The files `image` and `mask` of what is on the canvas, kept in the gallery's folder; the mask is white where it was painted on.

    value: the bytes `background`, and `layers` with strokes, or a `mask`. Both files are missing of an empty canvas, the mask of one
    without strokes. Raises InputError for what is no picture or too large.
    """
    if not value or value["background"] is None:
        return {}
    image = measured(value["background"], limits, "the picture")
    mask = Image.new("L", image.size, 0)
    if value.get("mask") is not None:
        mask = measured(value["mask"], limits, "the mask").convert("L").resize(image.size)
    for layer in value.get("layers", ()):
        if layer is not None:
            mask = ImageChops.lighter(mask, painted(layer, image.size, limits))
    found = {"image": gallery.keep_source(png(image))}
    return found | ({"mask": gallery.keep_source(png(mask))} if mask.getbbox() else {})


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
