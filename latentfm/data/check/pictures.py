"""What is to be known of each picture of a dataset, found in one pass over the files: a few hundred bytes are kept of each."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from latentfm.data.buckets import Buckets
from latentfm.data.cache.fill import map_ahead
from latentfm.data.images import FORMATS, Transform, UnreadableImage, contents, load_mask, opened_rgb, orientation
from latentfm.data.sources.base import Sample, sha256

HUGE = 50e6  # pixels; such a picture takes half a second or more, and 200 MB, whenever it is decoded
HASH_SHAPE, COLOURS = (9, 8), 4  # of the difference hash, and how many mean colours a side tell near hashes apart

ODD = {
    "animated": "more than one frame or page: the first is used",
    "CMYK": "CMYK: converted by the plain formula, colours may shift",
    "deep": "16 bits or more a channel: scaled to 8 bits",
    "palette": "palette colours: converted",
    "transparent": "transparency: laid on white",
    "ICC": "an ICC profile that is not sRGB's: ignored, colours may shift",
    "huge": f"more than {HUGE / 1e6:g} million pixels: slow to read",
    "rotated": "turned upright, as its EXIF orientation says",
}


@dataclass(frozen=True)
class Facts:
    """Of one picture: what `Survey` holds of all. A picture with a `reason` cannot be used, for that reason."""

    digest: bytes = b""
    size: tuple[int, int] = (0, 0)
    odd: tuple[str, ...] = ()
    hash: int = 0
    colours: bytes = b""
    reason: str | None = None


@dataclass
class Survey:
    """Of N pictures, in the order of the samples: usable [N] bool, sizes [N, 2] int32 (width, height, upright, 0 where unusable),
    digests [N, 32] uint8 (SHA-256), hashes [N] uint64 (difference hash), colours [N, 48] uint8, odd {kind: indices},
    reasons {index: why it cannot be used}.
    """

    usable: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    hashes: np.ndarray
    colours: np.ndarray
    odd: dict[str, list[int]]
    reasons: dict[int, str]


def survey(
    samples: Sequence[Sample], buckets: Buckets, factor: int, advance: Callable[[], None] = lambda: None, workers: int | None = None
) -> Survey:
    """The facts of every picture and whether its loss mask can be used; `factor` pixels a side are one latent.

    Every picture is decoded whole, as the training does it, so that a truncated file is found. Decoding is native code beside which
    other threads run: `workers` of them, None is one a core. Twice as many pictures are in memory at a time, and no more.
    """
    count = len(samples)
    found = Survey(
        np.zeros(count, bool), np.zeros((count, 2), np.int32), np.zeros((count, 32), np.uint8), np.zeros(count, np.uint64),
        np.zeros((count, 3 * COLOURS**2), np.uint8), {kind: [] for kind in ODD}, {},
    )  # fmt: skip
    for index, facts in enumerate(all_facts(samples, buckets, factor, workers or min(16, os.cpu_count() or 1))):
        if facts.digest:
            found.digests[index] = np.frombuffer(facts.digest, np.uint8)
        for kind in facts.odd:
            found.odd[kind].append(index)
        if facts.reason is not None:
            found.reasons[index] = facts.reason
        else:
            found.usable[index], found.sizes[index], found.hashes[index] = True, facts.size, facts.hash
            found.colours[index] = np.frombuffer(facts.colours, np.uint8)
        advance()
    return found


def all_facts(samples: Sequence[Sample], buckets: Buckets, factor: int, workers: int) -> Iterator[Facts]:
    """The facts of each sample, in order."""
    # a place in a shard or a stream is read here, in order: that is how it is fast, and only one may read it
    items = ((sample, None if isinstance(sample.path, Path) else read(sample)) for sample in samples)
    return map_ahead(lambda item: facts_of(*item, buckets, factor), items, workers, 2 * workers - 1)


def read(sample: Sample) -> tuple[bytes, bytes | None] | UnreadableImage:
    """The bytes of a sample's picture and of its mask, None without one, or why they cannot be had."""
    try:
        return contents(sample.path), None if sample.mask is None else contents(sample.mask)
    except UnreadableImage as error:
        return error


def facts_of(
    sample: Sample, data: tuple[bytes, bytes | None] | UnreadableImage | None, buckets: Buckets, factor: int
) -> Facts:
    """The facts of one picture; `data` is what `read` gave, or None to read it now."""
    data = read(sample) if data is None else data
    if isinstance(data, UnreadableImage):
        return Facts(reason=str(data))
    picture, mask = data
    digest, odd = bytes.fromhex(sha256(picture)), oddities(picture)
    try:
        with opened_rgb(sample.path, picture) as image:
            size = image.size
            small = image.resize((4 * HASH_SHAPE[0], 4 * HASH_SHAPE[1]), Image.Resampling.BOX)
        if mask is not None:
            (bucket,), _ = buckets.of([size])
            width, height = buckets.shapes[bucket]
            load_mask(sample.mask, mask, size, Transform(height, width), factor)
    except UnreadableImage as error:
        return Facts(digest, odd=odd, reason=str(error))
    odd += ("huge",) if size[0] * size[1] > HUGE else ()
    return Facts(digest, size, odd, difference_hash(small), small.resize((COLOURS, COLOURS), Image.Resampling.BOX).tobytes())


def difference_hash(image: Image.Image) -> int:
    """The 64-bit difference hash: in 9 x 8 grey means, whether each is brighter than the one on its right."""
    grey = np.asarray(image.convert("L").resize(HASH_SHAPE, Image.Resampling.BOX))
    return int.from_bytes(np.packbits(grey[:, :-1] > grey[:, 1:]).tobytes(), "big")


def oddities(data: bytes) -> tuple[str, ...]:
    """Which of ODD the header of a picture shows; () when it cannot be read, which `open_rgb` says better."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            profile = image.info.get("icc_profile")
            shown = {
                "animated": getattr(image, "is_animated", False),  # n_frames would look at a million of them
                "CMYK": image.mode == "CMYK",
                "deep": image.mode.startswith("I") or image.mode == "F",
                "palette": image.mode in ("P", "PA"),
                "transparent": image.has_transparency_data,
                "ICC": bool(profile) and b"sRGB" not in profile and b"s\0R\0G\0B" not in profile,
                "rotated": orientation(image, type(image).getexif) in range(2, 9),
            }
    except MemoryError:
        raise
    except Exception:  # whatever a damaged header makes a decoder raise
        return ()
    return tuple(kind for kind, there in shown.items() if there)
