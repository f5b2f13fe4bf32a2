"""What every source gives: samples with a stable id, captions, the picture's bytes on demand, and problems by name."""

import hashlib
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypeVar

from latentfm.data.sources.texts import Unusable, checked, oddity, visible
from latentfm.errors import InputError, nearest
from latentfm.words import count, is_text, listed, shown

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
CAPTION_COLUMNS = ("text", "caption", "prompt")
IMAGE_COLUMNS = ("image", "picture", "img", "jpg", "png", "webp")
NAMES_SHOWN = 5
PICTURE_BYTES = 2**30  # the most that a picture's file, or the cell that holds it, may have

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where bytes are that have no file of their own; like a Path, it has a name to print and read_bytes().

    read(*at) fetches the bytes and raises OSError when they are not there any more; `at` is what JSON holds. `sha256` is their hash,
    hexadecimal, where the source had them in hand when it was listed; None where it did not look.
    """

    name: str
    read: Callable[..., bytes]
    sha256: str | None = None
    at: tuple = ()

    def read_bytes(self) -> bytes:
        return self.read(*self.at)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Share:
    """How the samples of one source take part: `rate` draws of each an epoch, in the mean, and whether they are a regularisation set."""

    source: str = ""
    rate: float = 1.0
    regularisation: bool = False


@dataclass(frozen=True)
class Sample:
    """One picture and its captions (one is drawn each time).

    `id` is the same on every machine and never shared by two samples: in a folder the path relative to it, with `/`. `path` is
    where the picture's bytes are. `caption_weights` has one positive weight a caption, their chances up to a factor; () is equal chances.
    `mask` is where a picture of the same size is, whose white counts in the loss and whose black does not; None counts all.
    """

    path: Path | Place
    captions: tuple[str, ...]
    id: str
    caption_weights: tuple[float, ...] = ()
    mask: Path | Place | None = None
    share: Share = Share()


@dataclass(frozen=True)
class Problem:
    """Something in a source that is not used. `path` names it (a metadata row as "metadata.jsonl:3 cat.png").

    `reason` is the same text for every problem of a kind, so problems can be counted by it. With `used` nothing is lost by it: it is
    only said.
    """

    path: str
    reason: str
    used: bool = False


@dataclass(frozen=True)
class Dataset:
    """The usable samples, in an order that depends on the source alone (a folder's by id), and what could not be used.

    `found` is how many pictures there are, the unusable ones with them; None is as many as samples.
    """

    folder: Path | str
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    found: int | None = None

    @property
    def pictures(self) -> int:
        """How many pictures there are, used or not."""
        return len(self.samples) if self.found is None else self.found

    def problems_by_reason(self, used: bool) -> dict[str, list[str]]:
        """What is not used, or what is `used` and only said, by its reason."""
        found: dict[str, list[str]] = {}
        for problem in self.problems:
            if problem.used == used:
                found.setdefault(problem.reason, []).append(problem.path)
        return found


@dataclass(frozen=True)
class Columns:
    """Which columns of a row hold what; None or {} is found by name. `captions` maps each caption column to its weight.

    `caption` is the one caption of every picture, whatever captions the source holds.
    """

    image: str | None = None
    captions: Mapping[str, float] = field(default_factory=dict)
    mask: str | None = None
    caption: str | None = None

    def check_in(self, names: Collection[str], otherwise: str) -> None:
        """Raises InputError, beginning with `otherwise`, for a column that is not among `names`."""
        for wanted in (self.image, self.mask, *self.captions):
            if wanted is not None and wanted not in names:
                raise InputError(f"{otherwise} '{shown(wanted)}'{shown(nearest(wanted, names))}; there are {listed(names, 50)}")

    def found_in(self, names: Iterable[str], where: str) -> "Columns":
        """These columns, the ones left open chosen among `names`. Raises InputError for one that is not there."""
        names = list(names)
        self.check_in(names, f"{shown(where)} has no column")
        there = f"there are {listed(names, 50)}"
        image = self.image or next((name for name in IMAGE_COLUMNS if name in names), None)
        if image is None:
            raise InputError(f"{shown(where)} has no column {' or '.join(IMAGE_COLUMNS)}; name one as image_column, {there}")
        captions = self.captions or {name: 1.0 for name in [n for n in CAPTION_COLUMNS if n in names][:1]}
        if not captions and self.caption is None:
            raise InputError(f"{shown(where)} has no column {' or '.join(CAPTION_COLUMNS)}; name yours as caption_columns, {there}")
        return replace(self, image=image, captions={} if self.caption is not None else captions)


class Forward(Generic[T]):
    """The items of something that is read in order, by number: going forward reads on, going back starts anew."""

    def __init__(self, start: Callable[[], Iterator[T]]):
        self.start = start
        self.rows: Iterator[T] | None = None
        self.number, self.row = -1, None

    def __getitem__(self, number: int) -> T:
        """Item `number`, from 0. Raises OSError when there are fewer."""
        if self.rows is None or number < self.number:
            self.rows, self.number = self.start(), -1
        while self.number < number:
            try:
                self.row = next(self.rows)
            except StopIteration:
                self.rows = None
                raise OSError(f"it ends before row {number}; it was changed since it was listed") from None
            self.number += 1
        return self.row

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"rows": None, "number": -1, "row": None}  # another process opens it for itself


def texts_of(row: Mapping[str, Any], columns: Iterable[str]) -> dict[str, list[str]]:
    """The captions of each of a row's caption columns: a text, or a list of them; one that is absent or null is passed over.

    Raises Unusable when there is no caption, or one is not a text.
    """
    found: dict[str, list[str]] = {}
    for column in columns:
        value = row.get(column)
        texts = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(text, str) and is_text(text) for text in texts):
            raise Unusable("row whose caption is not a text")
        if texts:
            found[column] = [checked(text) for text in texts]
    if not found:
        raise Unusable("row without a caption")
    return found


def weighted(texts: Mapping[str, Sequence[str]], weights: Mapping[str, float]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """(the captions of all columns, their weights): each column's texts share its weight equally; () when all weights are equal."""
    captions = tuple(text for column in texts for text in texts[column])
    shares = tuple(weights[column] / len(texts[column]) for column in texts for _ in texts[column])
    return captions, () if len(set(shares)) == 1 else shares


def captions_of(row: Mapping[str, Any], columns: Columns) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The captions of a row and their weights: () when all are equal. Raises Unusable as `texts_of` does."""
    if columns.caption is not None:
        return (columns.caption,), ()
    return weighted(texts_of(row, columns.captions), columns.captions)


def path_within(name: object, what: str = "file_name", root: Path | None = None) -> str:
    """The normalised relative path that a row's `what` stands for; an absolute one is taken where it leads into `root`.

    Raises Unusable when it is none, or leads out of its folder.
    """
    if not isinstance(name, str) or not name.strip() or not is_text(name):
        raise Unusable(f"row without a {what}")
    if "://" in name.removeprefix("file://"):
        raise Unusable(f"row whose {what} is a URL, which is not followed (fetch it beside)")
    name = name.removeprefix("file://")
    path = Path(name)
    if path.anchor and root is not None and "\0" not in name:
        places = {os.path.abspath(root): os.path.normpath(name)}
        places[os.path.realpath(root)] = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
        for folder, place in places.items():
            if place == folder or place.startswith(os.path.join(folder, "")):
                path = Path(os.path.relpath(place, folder))
                break
    normal = posixpath.normpath(path.as_posix())
    if path.anchor or normal.split("/")[0] == "..":
        raise Unusable(f"row whose {what} leads out of the folder")
    if normal == ".":
        raise Unusable(f"row whose {what} is the folder itself")
    return normal


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def finished(place: Path | str, samples: Iterable[Sample], problems: Iterable[Problem], found: int) -> Dataset:
    """The dataset, its captions looked at: what is odd about one is said, and one that shows nothing is the empty caption."""
    kept, said = [], list(problems)
    for sample in samples:
        odd = dict.fromkeys(filter(None, map(oddity, sample.captions)))
        said += [Problem(sample.id, reason, used=True) for reason in odd]
        if odd:
            sample = replace(sample, captions=tuple(caption if visible(caption) else "" for caption in sample.captions))
        kept.append(sample)
    return Dataset(place, tuple(kept), tuple(said), found)


def summary(dataset: Dataset) -> str:
    """A line with the numbers of pictures and captions, one for each of several sources, then one for each kind of problem."""
    captions = sum(len(sample.captions) for sample in dataset.samples)
    lines = [f"{count(len(dataset.samples), 'picture')}, {count(captions, 'caption')} in {shown(dataset.folder)}"]
    shares = Counter(sample.share for sample in dataset.samples)
    for share, number in shares.items() if any(share.source for share in shares) else ():
        lines.append(
            f"{shown(share.source)}: {count(number, 'picture')}, {share.rate:g} x an epoch"
            + (", a regularisation set" if share.regularisation else "")
        )
    for used, what in ((False, "not used"), (True, "used")):
        for reason, paths in dataset.problems_by_reason(used).items():
            lines.append(f"{what}, {shown(reason)}: {len(paths):,} ({listed(paths, NAMES_SHOWN)})")
    return "\n".join(lines)


def nothing_usable(where: str, problems: list[Problem], way_out: str) -> InputError:
    """The error of a source without a usable sample, with the first problem."""
    return InputError(f"nothing to train on in {shown(where)}: no usable row{first_of(problems)}; {way_out}")


def first_of(problems: Sequence[Problem]) -> str:
    """The first problem in brackets; "" where there is none."""
    return f" (first problem: {shown(problems[0].path, 300)}, {shown(problems[0].reason)})" if problems else ""


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
