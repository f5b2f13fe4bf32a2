"""WebDataset shards -> samples: tar archives in which the files of one sample share a key.

    0001.jpg  0001.txt              the part before the first dot is the key, the rest a column
    0002.jpg  0002.json             the entries of a .json are columns too

Archives are read with tarfile through fsspec, never through a shell. While they are listed every file is read once, in order;
afterwards a picture is read at its place in the archive (of a compressed archive: by reading on to it). The files of a sample need not
stand together.
"""

import hashlib
import lzma
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from latentfm.data.cache.stat_cache import NOTHING_KEPT, StatCache
from latentfm.data.sources.base import (
    CAPTION_COLUMNS,
    PICTURE_BYTES,
    Columns,
    Dataset,
    Place,
    Problem,
    Sample,
    captions_of,
    finished,
    is_image,
    nothing_usable,
)
from latentfm.data.sources.kept import kept_listing
from latentfm.data.sources.texts import CAPTION_BYTES, FETCH, POINTER, Unusable, composed, decoded, lines_of
from latentfm.data.sources.urls import BLOCK, expand, names_of, open_url
from latentfm.files import CONTENT_ERRORS, JSON_BYTES, Refused, own_json, reason
from latentfm.words import count, is_text, shown

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MASK_COLUMN = "mask.png"
HEADER_BYTES = 2**20  # the most that is read at once of what tar says about a file, long names among it
WAY_OUT = "each sample needs a picture and a caption of one key, as in 0001.jpg beside 0001.txt"
BROKEN = "archive cut off or damaged, the rest of it is lost"


class CutOff(Exception):
    """An archive that ends, or cannot be read any further, before its end: the reason, and the key of the file where it does."""

    def __init__(self, reason: str, key: str | None):
        super().__init__(reason)
        self.key = key


@dataclass
class Group:
    """The files of one key: their extensions, where their bytes are, and the texts among them."""

    key: str
    files: dict[str, tuple[int, int, str]] = field(default_factory=dict)  # extension -> offset, size, SHA-256
    texts: dict[str, bytes] = field(default_factory=dict)
    problem: str | None = None  # why it cannot be used


class Archives:
    """Reads files at their places in archives, of which the one asked last stays open: samples come archive by archive."""

    def __init__(self) -> None:
        self.url: str | None = None
        self.file: BinaryIO | None = None

    def read(self, url: str, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset` of an archive, decompressed. Raises OSError when it has fewer."""
        if self.file is None or url != self.url:
            self.close()
            self.url, self.file = url, open_url(url)
        self.file.seek(offset)
        data = self.file.read(size)
        if len(data) < size:
            raise OSError(f"{url} ends early; it was changed since it was listed")
        return data

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.url = self.file = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": None, "file": None}  # another process opens it for itself


def read_shards(place: str, columns: Columns | None = None, kept: StatCache = NOTHING_KEPT) -> Dataset:
    """A sample a key of the tar archives that `place` names, in the archives' order; ids are "<archive>/<key>".

    `place` is a path or any fsspec URL, with {000..012} or * for several, or a folder of them. Columns are extensions and the entries of a
    .json. Unless `columns` says otherwise the picture is the first .jpg, .png, ... (before any .alt.jpg), the captions are the lines
    of the .txt or else the .json's `text`, `caption` or `prompt`, and the mask is the file mask.png. An archive that is cut off or
    damaged is named with the sample after which it breaks off; what comes before is used. A file that comes again in an archive is
    a problem.

    Raises InputError when there is no archive, no usable sample, or when no sample has a column that `columns` names.
    """
    columns, files = columns or Columns(), expand(place, SUFFIXES)
    read = Archives().read
    return kept_listing(kept, "shards", (files, columns), files, place, read, lambda: (list_shards(place, files, columns, read), ()))


def list_shards(place: str, files: Sequence[str], columns: Columns, read: Callable[..., bytes]) -> Dataset:
    """The samples of archives, each read once from beginning to end; their bytes are fetched by `read`."""
    samples: list[Sample] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    found = 0
    for file, name in zip(files, names_of(files, "archives"), strict=True):
        groups, broken = {}, None
        try:
            read_groups(file, columns, groups)
        except CutOff as error:
            groups.pop(error.key, None)  # more of it may be lost
            broken = error
        found += len(groups)
        for group in groups.values():
            id = f"{name}/{group.key}"
            try:
                row = row_of(group)
                seen |= row.keys()
                samples.append(sample_of(group, row, columns, id, file, read))
            except Unusable as error:
                group.problem = group.problem or str(error)
            if group.problem:
                problems.append(Problem(id, group.problem))
        if broken is not None:
            last = f"{name}/{next(reversed(groups))}" if groups else "its beginning"
            where = f"{file} after {last}, {count(len(groups), 'sample')} read ({broken})"
            problems.append(Problem(where, FETCH if str(broken) == FETCH else BROKEN))
    if seen:
        columns.check_in(sorted(seen), f"no sample of {shown(place)} has")
    if not samples:
        raise nothing_usable(place, problems, WAY_OUT)
    return finished(place, samples, problems, found)


class Headers:
    """What tarfile reads of an archive: headers, which say themselves how long they are, and are not believed beyond HEADER_BYTES."""

    def __init__(self, file: BinaryIO):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER_BYTES:
            raise OSError(f"a header of {size:,} bytes")
        return self.file.read(size)


def read_groups(url: str, columns: Columns, groups: dict[str, Group]) -> None:
    """Adds the samples of an archive to `groups`, by key. Raises CutOff when it breaks off."""
    key: str | None = None
    try:
        with open_url(url) as file:
            if file.read(len(POINTER)) == POINTER:
                raise CutOff(FETCH, None)
            file.seek(0)
            with tarfile.open(fileobj=Headers(file), mode="r:") as archive:
                for member in archive:
                    archive.members.clear()  # tarfile remembers every header otherwise
                    name, dot, extension = split(member.name)
                    key = name if member.isreg() and dot else key
                    if member.size < 0 or archive.offset < member.offset_data:
                        raise CutOff(f"a file of {member.size:,} bytes", key)
                    if not member.isreg() or not dot:
                        continue
                    add(groups.setdefault(key, Group(key)), extension, member, file, columns)
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0") or file.tell() < archive.offset + tarfile.BLOCKSIZE:
                    raise CutOff("its end mark is missing", key)  # tarfile takes a missing or damaged header for the end
                if file.read(tarfile.RECORDSIZE).strip(b"\0"):
                    raise CutOff("more follows its end mark, as of two archives in one file; pack them as one, or keep them apart", None)
    except (tarfile.TarError, lzma.LZMAError, *CONTENT_ERRORS) as error:
        raise CutOff(reason(error), key) from error


def add(group: Group, extension: str, member: tarfile.TarInfo, file: BinaryIO, columns: Columns) -> None:
    """Reads a file of an archive into its group, a text whole and anything else for its hash. Raises CutOff when it ends early."""
    picture = is_image(f"x.{extension}") or extension in (columns.image, columns.mask)
    most = PICTURE_BYTES if picture else JSON_BYTES if extension == "json" else CAPTION_BYTES
    if extension in group.files:
        group.problem = "key that came before in the archive"
        return
    if member.issparse() or not is_text(member.name):
        group.problem = "file in an archive that is sparse, or whose name is not UTF-8"
        return
    group.files[extension] = (member.offset_data, member.size, "")
    if member.size > most:
        if picture or extension in ("txt", "json", *columns.captions):
            group.problem = f"file in an archive of more than {most:,} bytes"
            del group.files[extension]
        return
    file.seek(member.offset_data)
    digest, parts, left = hashlib.sha256(), [], member.size
    while left:
        part = file.read(min(left, BLOCK))
        if not part:
            raise CutOff(f"in {member.name}", group.key)
        left -= len(part)
        digest.update(part)
        if not picture:
            parts.append(part)
    group.files[extension] = (member.offset_data, member.size, digest.hexdigest())
    if not picture:
        group.texts[extension] = b"".join(parts)


def split(name: str) -> tuple[str, str, str]:
    """(key, ".", extension) of a member's name, cut at the first dot of its last part, as WebDataset does; accents composed."""
    path = PurePosixPath(composed(name))
    stem, dot, extension = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, dot if stem else "", extension.lower()


def row_of(group: Group) -> dict[str, Any]:
    """The columns of a sample: texts decoded, the entries of its .json, and None for other files. Raises Unusable."""
    row: dict[str, Any] = dict.fromkeys(group.files)
    for extension, data in group.texts.items():
        if extension == "json":
            try:
                entries = own_json(data)
            except Refused as error:
                raise Unusable(f"sample whose .json {error}") from None
            except (ValueError, RecursionError):
                raise Unusable("sample whose .json is malformed") from None
            if not isinstance(entries, dict):
                raise Unusable("sample whose .json is malformed")
            row = entries | row
        else:
            try:
                row[extension] = list(lines_of(decoded(data)))
            except Unusable:
                if extension == "txt":
                    raise
    return row


def sample_of(group: Group, row: dict[str, Any], columns: Columns, id: str, file: str, read: Callable[..., bytes]) -> Sample:
    """The sample of a group in the archive `file`. Raises Unusable when it has no picture or no caption."""
    mask = columns.mask or (MASK_COLUMN if columns.image != MASK_COLUMN else None)
    pictures = [extension for extension in group.files if is_image(f"x.{extension}") and extension != mask]
    image = columns.image or min(pictures, key=lambda extension: "." in extension, default=None)
    if image not in group.files:
        raise Unusable("sample without a picture")
    names = ("txt", f"{image}.txt", *CAPTION_COLUMNS)
    found = columns.captions or {name: 1.0 for name in [n for n in names if row.get(n) is not None][:1]}
    captions, weights = captions_of(row, replace(columns, captions=found))
    places = {}
    for extension in (image, mask):
        if extension in group.files:
            offset, size, digest = group.files[extension]
            places[extension] = Place(f"{id}.{extension}", read, digest, (file, offset, size))
    return Sample(places[image], captions, id, weights, places.get(mask))
