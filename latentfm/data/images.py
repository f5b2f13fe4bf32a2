"""A picture file -> RGB -> exactly height x width pixels -> a tensor in [-1, 1]. One path for training and checking."""

import hashlib
import io
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from latentfm.data.sources.base import Place, sha256
from latentfm.errors import InputError

# Only these decoders are tried, whatever the extension says: Pillow's EPS decoder, for one, would run Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
TRANSFORM_VERSION = 1  # raise it when open_rgb or apply changes a pixel: caches keyed by Transform.key then miss

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
        """Returns every setting and the version of the code as one canonical string, for content-addressed caches."""
        settings = " ".join(f"{field.name}={int(getattr(self, field.name))}" for field in fields(self))
        return f"cover-lanczos-centre v{TRANSFORM_VERSION} {settings}"


def load(path: str | Path, transform: Transform) -> np.ndarray:
    """Returns the picture at `path` as uint8 [height, width, 3]. Raises UnreadableImage."""
    return apply(open_rgb(path), transform)


def open_rgb(path: str | Path | Place, data: bytes | None = None) -> Image.Image:
    """Returns the picture as 8-bit RGB, upright (EXIF orientation applied), transparency laid on white.

    `data` are the bytes of `path` when they are in hand already; then `path` is only a name for messages.

    16-bit grey is scaled to 8 bits, not clipped; an animation or a multi-page file gives its first frame. Embedded ICC
    profiles are ignored: RGB values are taken as sRGB, CMYK is converted by the plain formula. Damaged EXIF is ignored.

    Raises UnreadableImage when the file is missing, empty, truncated, corrupt, not a picture in FORMATS, or larger than
    Pillow's limit against decompression bombs (twice Image.MAX_IMAGE_PIXELS).
    """
    if data is None and not isinstance(path, (str, Path)):
        data = contents(path)
    with _named(path, data), Image.open(path if data is None else io.BytesIO(data), formats=FORMATS) as image:
        image.load()
        return _to_rgb(_upright(image))


def upright_size(path: str | Path | Place, data: bytes | None = None) -> tuple[int, int]:
    """Returns the picture's (width, height) in pixels, EXIF orientation applied, from its header: no pixel is decoded.

    `data` are the bytes of `path` when they are in hand already. Raises UnreadableImage as open_rgb does, as far as a header tells: a file
    that is truncated later on has a size.
    """
    if data is None and not isinstance(path, (str, Path)):
        data = contents(path)
    with _named(path, data), Image.open(path if data is None else io.BytesIO(data), formats=FORMATS) as image:
        if image.format == "TIFF":  # Pillow turns a TIFF by itself
            return image.size
        # Pillow decodes a whole PNG for the EXIF that may follow its pixels
        plain = image.format == "PNG" and not _metadata_after_pixels(image.fp)
        orientation = _orientation(image, Image.Image.getexif if plain else type(image).getexif)
        return image.size[::-1] if orientation in _SIDEWAYS else image.size


def apply(image: Image.Image, transform: Transform) -> np.ndarray:
    """Returns an RGB picture as uint8 [height, width, 3]: scaled (Lanczos) to cover that size, then cropped centrally.

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
    """Returns a loss mask at latent resolution, float32 [1, height / factor, width / factor] in [0, 1]: 1 where the mask is white.

    The mask goes through the picture's own transform, as grey, and each latent takes the mean of its factor x factor pixels.
    `data` are the bytes of `path` when they are in hand; `size` is the picture's (width, height).

    Raises UnreadableImage when the mask cannot be read, has not the picture's size, or leaves nothing of the crop to learn from.
    """
    mask = open_rgb(path, data)
    if mask.size != size:
        raise UnreadableImage(f"the mask {path} is {mask.width} x {mask.height}, its picture {size[0]} x {size[1]}: make them one size")
    grey = torch.from_numpy(apply(mask, transform).astype(np.float32)).mean(-1)[None] / 255
    reduced = torch.nn.functional.avg_pool2d(grey, factor)
    if not reduced.any():
        raise UnreadableImage(f"the mask {path} is black wherever the picture is not cropped away: nothing counts; remove it")
    return reduced


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Returns uint8 [H, W, 3] as float32 [3, H, W] in [-1, 1], a copy. Raises ValueError for another type or shape."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"to_tensor takes uint8 [H, W, 3], not {array.dtype} {list(array.shape)}: make it with load")
    return torch.from_numpy(array.transpose(2, 0, 1).astype(np.float32, order="C")) / 127.5 - 1


def contents(path: str | Path | Place) -> bytes:
    """Returns the bytes of a picture's file or place. Raises UnreadableImage when they cannot be had."""
    try:
        return Path(path).read_bytes() if isinstance(path, str) else path.read_bytes()
    except Exception as error:  # a place may be on any storage, which raises errors of its own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"cannot read {path}: {reason}; restore it or remove its caption") from None


def digest(path: str | Path | Place) -> str:
    """Returns the SHA-256 of the file's bytes, in hexadecimal. Raises UnreadableImage."""
    if isinstance(path, Place):
        return path.sha256 or sha256(contents(path))
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise UnreadableImage(f"cannot read {path}: {error.strerror}; restore it or remove its caption") from None


@contextmanager
def _named(path: str | Path | Place, data: bytes | None) -> Iterator[None]:
    """A context in which whatever Pillow raises becomes an UnreadableImage that names the file, the reason and the way out."""
    try:
        yield
    except FileNotFoundError:
        raise UnreadableImage(f"there is no picture {path}: restore it, or remove its caption") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(f"cannot read {path}: {error}; scale it down or remove it") from None
    except UnidentifiedImageError:
        size = os.path.getsize(path) if data is None else len(data)
        reason = "the file is empty" if size == 0 else f"not a picture in {', '.join(FORMATS)}"
        raise UnreadableImage(f"cannot read {path}: {reason}; save it again as PNG or remove it") from None
    except Exception as error:  # on corrupt files Pillow's decoders raise nearly anything: OSError, SyntaxError, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"cannot read {path}: {reason}; save it again as PNG or remove it") from error


def _orientation(image: Image.Image, getexif: Callable[[Image.Image], Image.Exif]) -> int | None:
    """Returns what the EXIF tag says; None without one, or where the EXIF is damaged: the pixels may still be good."""
    try:
        return getexif(image).get(ExifTags.Base.Orientation)
    except Exception:
        return None


def _metadata_after_pixels(file: BinaryIO) -> bool:
    """Returns whether a PNG has EXIF or text chunks behind its pixels. Leaves the file where it was."""
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


def _upright(image: Image.Image) -> Image.Image:
    """Returns the picture turned as its EXIF orientation says.

    Not ImageOps.exif_transpose: that writes the other EXIF tags anew, and fails on the odd ones real cameras leave.
    """
    orientation = _orientation(image, type(image).getexif)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Returns a loaded picture of any Pillow mode as RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")  # a new picture, also when it is RGB already


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Returns integer (I, I;16) or float (F) grey as mode L; values below 0 are black.

    White is 65535 for integers, and for floats 1 when no value is above 1, else 255; where values go beyond that, the
    picture's own maximum is white.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    highest = values.max()
    scale = 65535 if image.mode != "F" else 1 if highest <= 1 else 255
    return Image.fromarray(np.rint(values.clip(min=0) / max(scale, highest) * 255).astype(np.uint8))
