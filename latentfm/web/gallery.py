"""The gallery: the PNGs of the outputs folder, which carry their settings. What is not a picture of that very folder is not in it."""

import hashlib
import io
import os
import re
import stat
from functools import lru_cache
from pathlib import Path
from typing import Any

from latentfm.errors import InputError
from latentfm.files import whole_or_nothing
from latentfm.pictures import read_settings
from latentfm.requests import own_settings
from latentfm.words import shown

PICTURE = re.compile(r"[^./\\\x00][^/\\\x00]*\.png")  # a name in the folder, and no way out of it
SOURCE = re.compile(r"[0-9a-f]{16}\.png")
SOURCES = "sources"  # the folder, within, of pictures that others were drawn from
MOST_BYTES = 256 * 2**20  # of a picture that is handed out
SOURCE_BYTES = 2 * 2**30  # of all sources together; beyond it those go that were used longest ago
SMALL = 320  # pixels a side of a thumbnail


class Gallery:
    """The pictures in `folder`, newest first."""

    def __init__(self, folder: Path):
        self.folder = folder

    def names(self, most: int | None = None) -> list[str]:
        """The names of the newest pictures."""
        try:
            with os.scandir(self.folder) as entries:
                found = [(each.stat(follow_symlinks=False).st_mtime_ns, each.name) for each in entries
                         if PICTURE.fullmatch(each.name) and each.is_file(follow_symlinks=False)]  # fmt: skip
        except FileNotFoundError:  # nothing was drawn yet, or it was taken away
            return []
        return [name for _, name in sorted(found, reverse=True)[:most]]

    def read(self, name: str) -> bytes:
        """The bytes of a picture as they are on disk. Raises InputError for a name that is none of the folder's own pictures."""
        missing = InputError(f"there is no picture {shown(name, 100)} in the gallery")
        if not PICTURE.fullmatch(name):
            raise missing
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (OSError, ValueError):
            raise missing from None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
                raise missing
            return file.read()

    def small(self, name: str) -> bytes:
        """A picture as a thumbnail, a WebP. Raises InputError as `read`, and for what is no picture."""
        data = self.read(name)
        return thumbnail(name, data) if len(data) < 2**16 else kept_thumbnail(self, name, hashlib.sha256(data).digest())

    def settings(self, name: str) -> dict[str, Any]:
        """What a picture says of itself. Raises InputError for one that says nothing, or is not there."""
        self.read(name)
        return own_settings(Path(name), read_settings(self.folder / name))

    def keep_source(self, data: bytes) -> Path:
        """The path of a picture that others are drawn from, a PNG kept under what it contains, for as long as SOURCE_BYTES allow."""
        path = self.folder / SOURCES / f"{hashlib.sha256(data).hexdigest()[:16]}.png"
        if path.exists():
            os.utime(path)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_nothing(path) as partial:
            partial.write_bytes(data)
        self.forget_sources(path)
        return path

    def forget_sources(self, kept: Path) -> None:
        """Removes the sources used longest ago, copies of what was sent in, until all are within SOURCE_BYTES; never `kept`."""
        with os.scandir(kept.parent) as entries:
            found = [(each.stat(follow_symlinks=False), Path(each.path)) for each in entries if SOURCE.fullmatch(each.name)]
        room = SOURCE_BYTES - kept.stat().st_size
        for status, path in sorted(found, key=lambda each: each[0].st_mtime_ns, reverse=True):
            if path != kept:
                room -= status.st_size
                if room < 0:
                    path.unlink(missing_ok=True)

    def source(self, path: object) -> Path | None:
        """The source that a picture's settings name, where it is one that was kept here."""
        name = Path(path).name if isinstance(path, str) else ""
        found = self.folder / SOURCES / name
        return found if SOURCE.fullmatch(name) and found.is_file() and not found.is_symlink() else None


def thumbnail(name: str, data: bytes) -> bytes:
    """A picture's bytes made small."""
    from PIL import Image

    from latentfm.data.images import open_rgb

    image = open_rgb(name, data)
    image.thumbnail((SMALL, SMALL), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=85)
    return encoded.getvalue()


@lru_cache(maxsize=1024)
def kept_thumbnail(gallery: Gallery, name: str, digest: bytes) -> bytes:
    """The thumbnail of a picture with this digest, made once."""
    return thumbnail(name, gallery.read(name))
