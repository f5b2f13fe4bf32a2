"""A picture file -> RGB -> exactly height x width pixels -> a tensor in [-1, 1]. One path for training and checking.

What a picture takes is known from its header and bounded: PICTURE_BYTES of its file, twice Pillow's Image.MAX_IMAGE_PIXELS (179 million
pixels) decoded, 8 bytes a pixel at its fullest, and MEMORY over all threads together.
"""

import hashlib
import io
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError, features

from latentfm.data.memory import Budget, lacks
from latentfm.data.sources.base import PICTURE_BYTES, Place, sha256
from latentfm.data.sources.texts import FETCH, POINTER
from latentfm.errors import InputError
from latentfm.files import open_file, read_bytes, reason
from latentfm.words import shown

# Only these decoders are tried, whatever the extension says: Pillow's EPS decoder, for one, would run Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
TRANSFORM_VERSION = 1  # raise it when open_rgb or apply changes a pixel: caches keyed by Transform.key then miss
MEMORY = 2 * 2**30  # bytes that pictures being decoded may take over all threads of a process; a larger one is decoded alone
PIXEL_BYTES = 8  # a pixel at its fullest: as decoded and as RGB, Pillow's four bytes each
STRIP = 2**22  # pixels that are converted at a time

Colour = tuple[int, int, int]  # RGB, 0 to 255
WHITE: Colour = (255, 255, 255)

decoding = Budget(MEMORY)

# EXIF orientation -> what turns the stored picture upright (EXIF 2.3, tag 0x0112).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # those that exchange width and height


class UnreadableImage(InputError):
    """A file that cannot be read as a picture; the message names the file and the reason."""


@dataclass(frozen=True)
class Transform:
    """The size in pixels that a picture is brought to, and whether it is mirrored. Raises InputError below 1 pixel."""

    height: int
    width: int
    flip: bool = False

    def __post_init__(self):
        for name, side in (("height", self.height), ("width", self.width)):
            if not isinstance(side, int) or side < 1:
                raise InputError(f"{name} must be a whole number of pixels, not {side!r}: give 1 or more")

    def key(self) -> str:
        """Every setting and the version of the code as one canonical string, for content-addressed caches."""
        settings = " ".join(f"{field.name}={int(getattr(self, field.name))}" for field in fields(self))
        return f"cover-lanczos-centre v{TRANSFORM_VERSION} {settings}"


def load(path: str | Path | Place, transform: Transform, data: bytes | None = None) -> np.ndarray:
    """The picture at `path` as uint8 [height, width, 3]; `data` as for `open_rgb`. Raises UnreadableImage, MemoryError."""
    with opened_rgb(path, data) as image:
        return apply(image, transform)


def open_rgb(path: str | Path | Place, data: bytes | None = None) -> Image.Image:
    """The picture as 8-bit RGB, upright (EXIF orientation applied), transparency laid on white.

    `data` are the bytes of `path` when they are in hand already; then `path` is only a name for messages.

    16-bit grey is scaled to 8 bits, not clipped; an animation or a multi-page file gives its first frame. Embedded ICC
    profiles are ignored: RGB values are taken as sRGB, CMYK is converted by the plain formula. Damaged EXIF is ignored.

    Raises UnreadableImage when the file is missing, empty, truncated, corrupt, not a picture in FORMATS, or larger than
    Pillow's limit against decompression bombs (twice Image.MAX_IMAGE_PIXELS); MemoryError when the memory does not suffice, which
    says nothing about the picture.
    """
    with opened_rgb(path, data) as image:
        return image


@contextmanager
def opened_rgb(path: str | Path | Place, data: bytes | None = None, background: Colour = WHITE) -> Iterator[Image.Image]:
    """A context with `open_rgb`'s picture, transparency laid on `background`, in which its memory counts as taken.

    Threads wait for their turn with large ones.
    """
    if data is None:
        if not isinstance(path, Place) and not os.path.lexists(path):
            raise UnreadableImage(f"there is no picture {shown(path)}: restore it, or remove its caption")
        data = contents(path)
    with ExitStack() as stack:

        def take(pixels: int) -> None:
            stack.enter_context(decoding.of(pixels * PIXEL_BYTES))

        try:
            image = decoded(path, data, take, background)
        except (UnreadableImage, MemoryError):
            stack.close()
            stack.enter_context(decoding.of(MEMORY))
            image = _alone(path, data, background)
        yield image


def _alone(path: str | Path | Place, data: bytes, background: Colour) -> Image.Image:
    """What `decoded` gives of a picture that it failed on, now that no other is being decoded.

    Decoders call a picture broken that they lack the memory for, and out of memory one whose header asks for far too much: which
    of them it is, is seen by whether the system has what a picture of its size takes. Raises as `opened_rgb`.
    """
    sizes: list[int] = [0]

    def lacks_memory() -> bool:
        return lacks(2 * PIXEL_BYTES * sizes[-1] + 4 * len(data) + 2**26)

    for _ in range(2):
        try:
            return decoded(path, data, sizes.append, background)
        except UnreadableImage as error:
            if lacks_memory():
                raise MemoryError(f"the memory does not suffice to tell whether {shown(path)} is a picture; free some") from error
            raise
        except MemoryError:
            if lacks_memory():
                raise
    raise UnreadableImage(f"cannot read {shown(path)}: it asks for more memory than its size explains; save it again as PNG or remove it")


def decoded(path: str | Path | Place, data: bytes, take: Callable[[int], None], background: Colour = WHITE) -> Image.Image:
    """The picture in `data` as `opened_rgb` gives it; `take` is told of its pixels before they are decoded."""
    with _named(path, data), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        take(image.width * image.height)
        image.load()
        turned = orientation(image, type(image).getexif)
        rgb = _to_rgb(image, background)
    del image
    # not ImageOps.exif_transpose: that writes the other EXIF tags anew, and fails on the odd ones real cameras leave
    return rgb.transpose(_UPRIGHT[turned]) if turned in _UPRIGHT else rgb


@cache
def decoders() -> str:
    """What a verdict on a picture's bytes depends on besides them: the decoders and the bounds."""
    versions = [f"{name} {features.version(name)}" for name in ("jpg", "libjpeg_turbo", "zlib", "libtiff", "webp", "avif")]
    bounds = (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, PICTURE_BYTES)
    return f"Pillow {PIL.__version__} {' '.join(versions)} {' '.join(FORMATS)} {bounds} v{TRANSFORM_VERSION}"


def upright_size(path: str | Path | Place, data: bytes | None = None) -> tuple[int, int]:
    """The picture's (width, height) in pixels, EXIF orientation applied, from its header: no pixel is decoded.

    `data` are the bytes of `path` when they are in hand already. Raises UnreadableImage as open_rgb does, as far as a header tells: a file
    that is truncated later on has a size.
    """
    if data is None and not isinstance(path, (str, Path)):
        data = contents(path)
    with _named(path, data), ExitStack() as stack:
        file = stack.enter_context(open_file(path, PICTURE_BYTES)) if data is None else io.BytesIO(data)
        image = stack.enter_context(Image.open(file, formats=FORMATS))
        if image.format == "TIFF":  # Pillow turns a TIFF by itself
            return image.size
        # Pillow decodes a whole PNG for the EXIF that may follow its pixels
        plain = image.format == "PNG" and not _metadata_after_pixels(image.fp)
        sideways = orientation(image, Image.Image.getexif if plain else type(image).getexif) in _SIDEWAYS
        return image.size[::-1] if sideways else image.size


def apply(image: Image.Image, transform: Transform) -> np.ndarray:
    """An RGB picture as uint8 [height, width, 3]: scaled (Lanczos) to cover that size, then cropped centrally.

    A picture that already fits on one side and covers the other is only cropped, never resampled: pixels stay exact.
    """
    if image.mode != "RGB":
        raise ValueError(f"apply takes an RGB picture, not mode {image.mode}: open it with open_rgb")
    width, height = transform.width, transform.height
    if max(width / image.width, height / image.height) == 1:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    else:
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    array = np.array(image)
    return np.ascontiguousarray(array[:, ::-1]) if transform.flip else array


def load_mask(
    path: str | Path | Place, data: bytes | None, size: tuple[int, int], transform: Transform, factor: int
) -> torch.Tensor:
    """A loss mask at latent resolution, float32 [1, height / factor, width / factor] in [0, 1]: 1 where the mask is white.

    The mask goes through the picture's own transform, as grey, and each latent takes the mean of its factor x factor pixels.
    `data` are the bytes of `path` when they are in hand; `size` is the picture's (width, height).

    Raises UnreadableImage when the mask cannot be read, has not the picture's size, or leaves nothing of the crop to learn from;
    MemoryError as `open_rgb`.
    """
    with opened_rgb(path, data) as mask:
        if mask.size != size:
            sizes = f"{mask.width} x {mask.height}, its picture {size[0]} x {size[1]}"
            raise UnreadableImage(f"the mask {shown(path)} is {sizes}: make them one size")
        pixels = apply(mask, transform)
    grey = torch.from_numpy(pixels.astype(np.float32)).mean(-1)[None] / 255
    reduced = torch.nn.functional.avg_pool2d(grey, factor)
    if not reduced.any():
        raise UnreadableImage(f"the mask {shown(path)} is black wherever the picture is not cropped away: nothing counts; remove it")
    return reduced


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Uint8 [H, W, 3] as float32 [3, H, W] in [-1, 1], a copy. Raises ValueError for another type or shape."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"to_tensor takes uint8 [H, W, 3], not {array.dtype} {list(array.shape)}: make it with load")
    return torch.from_numpy(array.transpose(2, 0, 1).astype(np.float32, order="C")) / 127.5 - 1


def contents(path: str | Path | Place) -> bytes:
    """The bytes of a picture's file or place. Raises UnreadableImage when they cannot be had."""
    try:
        return path.read_bytes() if isinstance(path, Place) else read_bytes(path, PICTURE_BYTES)
    except MemoryError as error:
        raise out_of_memory(path) from error
    except Exception as error:  # a place may be on any storage, which raises errors of its own
        raise UnreadableImage(f"cannot read {shown(path)}: {reason(error)}; restore it or remove its caption") from None


def digest(path: str | Path | Place) -> str:
    """The SHA-256 of the file's bytes, in hexadecimal. Raises UnreadableImage."""
    if isinstance(path, Place):
        return path.sha256 or sha256(contents(path))
    try:
        digest = hashlib.sha256()
        with open_file(path, PICTURE_BYTES) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except (OSError, InputError) as error:
        raise UnreadableImage(f"cannot read {shown(path)}: {reason(error)}; restore it or remove its caption") from None


def out_of_memory(path: str | Path | Place) -> MemoryError:
    return MemoryError(f"the memory does not suffice to read {shown(path)}; free some, or scale the picture down")


@contextmanager
def _named(path: str | Path | Place, data: bytes | None) -> Iterator[None]:
    """A context in which whatever Pillow raises becomes an UnreadableImage that names the file, the reason and the way out.

    A lack of memory stays one.
    """
    try:
        yield
    except MemoryError as error:
        raise out_of_memory(path) from error
    except FileNotFoundError:
        raise UnreadableImage(f"there is no picture {shown(path)}: restore it, or remove its caption") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(f"cannot read {shown(path)}: {reason(error)}; scale it down or remove it") from None
    except UnidentifiedImageError:
        raise UnreadableImage(f"cannot read {shown(path)}: {_unidentified(path, data)}") from None
    except Exception as error:  # on corrupt files Pillow's decoders raise nearly anything: OSError, SyntaxError, ...
        if re.search("out of memory|insufficient memory|cannot allocate", str(error), re.IGNORECASE):
            raise out_of_memory(path) from error
        raise UnreadableImage(f"cannot read {shown(path)}: {reason(error)}; save it again as PNG or remove it") from error


def _unidentified(path: str | Path, data: bytes | None) -> str:
    """What a file is that no decoder takes for a picture, and the way out."""
    if data is None:
        with open_file(path) as file:
            data = file.read(len(POINTER))
    if data.startswith(POINTER):
        return FETCH
    return f"{'not a picture in ' + ', '.join(FORMATS) if data else 'the file is empty'}; save it again as PNG or remove it"


def orientation(image: Image.Image, getexif: Callable[[Image.Image], Image.Exif]) -> int | None:
    """What the EXIF tag says; None without one, or where the EXIF is damaged: the pixels may still be good."""
    try:
        return getexif(image).get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:
        return None


def _metadata_after_pixels(file: BinaryIO) -> bool:
    """Whether a PNG has EXIF or text chunks behind its pixels. Leaves the file where it was."""
    before, pixels = file.tell(), False
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", head)
            pixels = pixels or kind == b"IDAT"
            if pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            file.seek(size + 4, os.SEEK_CUR)  # the data and its checksum
        return False
    finally:
        file.seek(before)


def _to_rgb(image: Image.Image, background: Colour) -> Image.Image:
    """A loaded picture of any Pillow mode as RGB, strip by strip where more than the two would be in memory; RGB is given back."""
    if image.mode.startswith("I") or image.mode == "F":
        convert = _grey_to_8_bits(image)
    elif image.has_transparency_data:
        convert = partial(_on_colour, background)
    else:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        rgb.paste(convert(strip), (0, top))
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """A picture in strips of about STRIP pixels over its whole width, each with its first row."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(image.height, top + rows)))


def _on_colour(background: Colour, image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What brings strips of integer (I, I;16) or float (F) grey to mode L; values below 0 are black.

    White is 65535 for integers, and for floats 1 when no value is above 1, else 255; where values go beyond that, the
    picture's own maximum is white.
    """

    def values(strip: Image.Image) -> np.ndarray:
        return np.asarray(strip).astype(np.float64)

    highest = -np.inf
    for _, strip in _strips(image):
        if not np.isfinite(values(strip)).all():
            raise ValueError("it holds values that are not finite")
        highest = max(highest, values(strip).max())
    scale = max(65535 if image.mode != "F" else 1 if highest <= 1 else 255, highest)
    return lambda strip: Image.fromarray(np.rint(values(strip).clip(min=0) / scale * 255).astype(np.uint8)).convert("RGB")
