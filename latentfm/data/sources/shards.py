"""WebDataset shards -> samples: tar archives in which the files of one sample stand together and share a key.

    0001.jpg  0001.txt              the part before the first dot is the key, the rest a column
    0002.jpg  0002.json             the entries of a .json are columns too

Archives are read with tarfile through fsspec, never through a shell. While they are listed every file is read once, in order;
afterwards a picture is read at its place in the archive (of a compressed archive: by reading on to it).
"""

import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from latentfm.data.sources.base import (
    CAPTION_COLUMNS,
    Columns,
    Dataset,
    Place,
    Problem,
    Sample,
    Unusable,
    captions_of,
    is_image,
    lines_of,
    nothing_usable,
    sha256,
)
from latentfm.data.sources.urls import expand, open_url
from latentfm.errors import InputError, nearest

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MASK_COLUMN = "mask.png"
WAY_OUT = "each sample needs a picture and a caption of one key, as in 0001.jpg beside 0001.txt"


class CutOff(Exception):
    """An archive that ends, or cannot be read any further, before its end: the reason."""


@dataclass
class Group:
    """The files of one key: their extensions, where their bytes are, and the texts among them."""

    key: str
    files: dict[str, tuple[int, int, str]] = field(default_factory=dict)  # extension -> offset, size, SHA-256
    texts: dict[str, bytes] = field(default_factory=dict)


class Shard:
    """One archive, kept open between reads."""

    def __init__(self, url: str):
        self.url = url
        self.file: BinaryIO | None = None

    def read(self, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset` of the archive, decompressed. Raises OSError when it has fewer."""
        if self.file is None:
            self.file = open_url(self.url)
        self.file.seek(offset)
        data = self.file.read(size)
        if len(data) < size:
            raise OSError(f"{self.url} ends early; it was changed since it was listed")
        return data

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.file = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "file": None}  # another process opens it for itself


class Open:
    """The one shard that is open: samples are asked for shard by shard, and there may be thousands."""

    def __init__(self) -> None:
        self.shard: Shard | None = None

    def read(self, shard: Shard, offset: int, size: int) -> bytes:
        if self.shard is not None and self.shard is not shard:
            self.shard.close()
        self.shard = shard
        return shard.read(offset, size)


def read_shards(place: str, columns: Columns | None = None) -> Dataset:
    """Returns a sample a key of the tar archives that `place` names, in the archives' order; ids are "<archive>/<key>".

    `place` is a path or any fsspec URL, with {000..012} or * for several, or a folder of them. Columns are extensions and the entries of a
    .json. Unless `columns` says otherwise the picture is the first .jpg, .png, ... (before any .alt.jpg), the captions are the lines
    of the .txt or else the .json's `text`, `caption` or `prompt`, and the mask is the file mask.png. An archive that is cut off or
    damaged is named with the sample after which it breaks off; what comes before is used. A key that comes again in an archive is
    a problem.

    Raises InputError when there is no archive, no usable sample, or when no sample has a column that `columns` names.
    """
    columns, opened = columns or Columns(), Open()
    samples: list[Sample] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    files = expand(place, SUFFIXES)
    names = [file.rpartition("/")[2] for file in files]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"two archives are called {twice[0]}: their samples could not be told apart; rename one, or make them two sources")
    for file, name in zip(files, names, strict=True):
        shard, keys, last = Shard(file), set(), "its beginning"
        try:
            for group in groups(file):
                id = last = f"{name}/{group.key}"
                try:
                    if group.key in keys:
                        raise Unusable("key that came before in the archive")
                    keys.add(group.key)
                    row = row_of(group)
                    seen |= row.keys()
                    samples.append(sample_of(group, row, columns, id, partial(opened.read, shard)))
                except Unusable as error:
                    problems.append(Problem(id, str(error)))
        except CutOff as error:
            where = f"{file} after {last}, {len(keys)} samples read ({error})"
            problems.append(Problem(where, "archive cut off or damaged, the rest of it is lost"))
    for wanted in (columns.image, columns.mask, *columns.captions):
        if wanted is not None and wanted not in seen and seen:
            raise InputError(f"no sample of {place} has '{wanted}'{nearest(wanted, seen)}; there are {', '.join(sorted(seen))}")
    if not samples:
        raise nothing_usable(place, problems, WAY_OUT)
    return Dataset(place, tuple(samples), tuple(problems))


def groups(url: str) -> Iterator[Group]:
    """Yields the samples of an archive, files of one key that stand together. Raises CutOff when it breaks off; the sample in which it
    breaks off is not given.
    """
    group: Group | None = None
    try:
        with open_url(url) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members.clear()  # tarfile remembers every header otherwise
                key, dot, extension = split(member.name)
                if not member.isreg() or not dot:
                    continue
                if group is not None and key != group.key:
                    yield group
                    group = None
                group = group or Group(key)
                file.seek(member.offset_data)
                data = file.read(member.size)
                if len(data) < member.size:
                    raise CutOff(f"in {member.name}")
                group.files[extension] = (member.offset_data, member.size, sha256(data))
                if extension in ("txt", "json") or not is_image(f"x.{extension}"):
                    group.texts[extension] = data
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0") or file.tell() < archive.offset + tarfile.BLOCKSIZE:
                raise CutOff("its end mark is missing")  # tarfile takes a missing or damaged header for the end
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise CutOff(" ".join(str(error).split()) or type(error).__name__) from error
    if group is not None:
        yield group


def split(name: str) -> tuple[str, str, str]:
    """Returns (key, ".", extension) of a member's name, cut at the first dot of its last part, as WebDataset does."""
    path = PurePosixPath(name)
    stem, dot, extension = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, dot if stem else "", extension.lower()


def row_of(group: Group) -> dict[str, Any]:
    """Returns the columns of a sample: texts decoded, the entries of its .json, and None for other files. Raises Unusable."""
    row: dict[str, Any] = dict.fromkeys(group.files)
    for extension, data in group.texts.items():
        if extension == "json":
            try:
                entries = json.loads(data)
            except (ValueError, RecursionError):
                raise Unusable("sample whose .json is malformed") from None
            if not isinstance(entries, dict):
                raise Unusable("sample whose .json is malformed")
            row = entries | row
        else:
            try:
                row[extension] = list(lines_of(data.decode("utf-8-sig")))
            except UnicodeDecodeError:
                if extension == "txt":
                    raise Unusable("caption file that is not UTF-8") from None
    return row


def sample_of(group: Group, row: dict[str, Any], columns: Columns, id: str, read: Any) -> Sample:
    """Returns the sample of a group. Raises Unusable when it has no picture or no caption."""
    mask = columns.mask or (MASK_COLUMN if columns.image != MASK_COLUMN else None)
    pictures = [extension for extension in group.files if is_image(f"x.{extension}") and extension != mask]
    image = columns.image or min(pictures, key=lambda extension: "." in extension, default=None)
    if image not in group.files:
        raise Unusable("sample without a picture")
    found = columns.captions or {name: 1.0 for name in [n for n in ("txt", *CAPTION_COLUMNS) if row.get(n) is not None][:1]}
    captions, weights = captions_of(row, found)
    places = {}
    for extension in (image, mask):
        if extension in group.files:
            offset, size, digest = group.files[extension]
            places[extension] = Place(f"{id}.{extension}", partial(read, offset, size), digest)
    return Sample(places[image], captions, id, weights, places.get(mask))
