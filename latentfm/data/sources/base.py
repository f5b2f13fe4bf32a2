"""What every source gives: samples with a stable id, captions, the picture's bytes on demand, and problems by name."""

import hashlib
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypeVar

from latentfm.errors import InputError, nearest
from latentfm.words import count

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
CAPTION_COLUMNS = ("text", "caption", "prompt")
IMAGE_COLUMNS = ("image", "picture", "img", "jpg", "png", "webp")
NAMES_SHOWN = 5

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where bytes are that have no file of their own; like a Path, it has a name to print and read_bytes().

    `read` fetches the bytes and raises OSError when they are not there any more. `sha256` is their hash, hexadecimal, where the source had
    them in hand when it was listed; None where it did not look.
    """

    name: str
    read: Callable[[], bytes]
    sha256: str | None = None

    def read_bytes(self) -> bytes:
        return self.read()

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

    `reason` is the same text for every problem of a kind, so problems can be counted by it.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """The usable samples, in an order that depends on the source alone (a folder's by id), and what could not be used."""

    folder: Path | str
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Columns:
    """Which columns of a row hold what; None or {} is found by name. `captions` maps each caption column to its weight."""

    image: str | None = None
    captions: Mapping[str, float] = field(default_factory=dict)
    mask: str | None = None

    def found_in(self, names: Iterable[str], where: str) -> "Columns":
        """These columns, the ones left open chosen among `names`. Raises InputError for one that is not there."""
        names = list(names)
        for wanted in (self.image, self.mask, *self.captions):
            if wanted is not None and wanted not in names:
                raise InputError(f"{where} has no column '{wanted}'{nearest(wanted, names)}; there are {', '.join(names)}")
        image = self.image or next((name for name in IMAGE_COLUMNS if name in names), None)
        if image is None:
            raise InputError(f"{where} has no column {' or '.join(IMAGE_COLUMNS)}; name one as image_column, there are {', '.join(names)}")
        captions = self.captions or {name: 1.0 for name in [n for n in CAPTION_COLUMNS if n in names][:1]}
        if not captions:
            raise InputError(
                f"{where} has no column {' or '.join(CAPTION_COLUMNS)}; name yours as caption_columns, there are {', '.join(names)}"
            )
        return Columns(image, captions, self.mask)


class Unusable(Exception):
    """A row that becomes a Problem: its reason."""


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


def captions_of(row: Mapping[str, Any], weights: Mapping[str, float]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Returns the captions of a row's caption columns, and their weights: () when all are equal.

    A column holds a text or a list of texts, which share its weight equally; one that is absent or null is passed over.
    Raises Unusable when there is no caption, or one is not a text.
    """
    captions: list[str] = []
    shares: list[float] = []
    for column, weight in weights.items():
        value = row.get(column)
        texts = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(text, str) and is_text(text) for text in texts):
            raise Unusable("row whose caption is not a text")
        captions += [text.strip() for text in texts]
        shares += [weight / len(texts) for _ in texts]
    if not captions:
        raise Unusable("row without a caption")
    return tuple(captions), () if len(set(shares)) == 1 else tuple(shares)


def lines_of(text: str) -> tuple[str, ...]:
    """Returns the non-empty lines of a caption file; ("",) when there is none."""
    # Not splitlines(), which also cuts at U+2028 and other characters a caption may hold.
    lines = (line.strip() for line in text.split("\n"))
    return tuple(line for line in lines if line) or ("",)


def path_within(name: object, what: str = "file_name") -> str:
    """Returns the normalised relative path that a row's `what` stands for. Raises Unusable when it is none, or leads out of its folder."""
    if not isinstance(name, str) or not name.strip() or not is_text(name):
        raise Unusable(f"row without a {what}")
    path = Path(name)
    normal = posixpath.normpath(path.as_posix())
    if path.anchor or normal.split("/")[0] == "..":
        raise Unusable(f"row whose {what} leads out of the folder")
    return normal


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def summary(dataset: Dataset) -> str:
    """Returns a line with the numbers of pictures and captions, one for each of several sources, then one for each kind of problem."""
    captions = sum(len(sample.captions) for sample in dataset.samples)
    lines = [f"{count(len(dataset.samples), 'picture')}, {count(captions, 'caption')} in {dataset.folder}"]
    shares = Counter(sample.share for sample in dataset.samples)
    for share, number in shares.items() if any(share.source for share in shares) else ():
        lines.append(
            f"{share.source}: {count(number, 'picture')}, {share.rate:g} x an epoch"
            + (", a regularisation set" if share.regularisation else "")
        )
    kinds = defaultdict(list)
    for problem in dataset.problems:
        kinds[problem.reason].append(problem.path)
    for reason, paths in kinds.items():
        rest = f" and {len(paths) - NAMES_SHOWN} more" if len(paths) > NAMES_SHOWN else ""
        lines.append(f"not used, {reason}: {len(paths)} ({', '.join(paths[:NAMES_SHOWN])}{rest})")
    return "\n".join(lines)


def nothing_usable(where: str, problems: list[Problem], way_out: str) -> InputError:
    """The error of a source without a usable sample, with the first problem."""
    first = f" (first problem: {problems[0].path}, {problems[0].reason})" if problems else ""
    return InputError(f"nothing to train on in {where}: no usable row{first}; {way_out}")


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def is_text(text: str) -> bool:
    """Returns False for lone surrogates: undecodable file names, or half an emoji in JSON. No tokenizer takes them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
