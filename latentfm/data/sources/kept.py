"""A source's listing as JSON holds it, so that a source whose files did not change is not read again at a run's start."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from latentfm.data.cache.stat_cache import Files, StatCache
from latentfm.data.sources.base import Dataset, Place, Problem, Sample

VERSION = 1  # raise it when a reader makes another listing of the same files
MAY_PASS = ("cannot be read", "is missing", "cut off or damaged")  # of a problem that need not lie in the bytes: a disk may have failed


def kept_listing(
    kept: StatCache, kind: str, name: Iterable[object], files: Files | None, place: str | Path,
    read: Callable[..., bytes] | None, make: Callable[[], tuple[Dataset, Files]],
) -> Dataset:  # fmt: skip
    """What `make` gives, the listing of a source and what files it came upon; kept by `name` and `files` as StatCache.value says.

    `read` fetches the bytes of its places. A listing with a problem that may pass is made again the next time.
    """

    def made() -> tuple[Any, Files | None]:
        dataset, more = make()
        passing = [problem.path for problem in dataset.problems if any(words in problem.reason for words in MAY_PASS)]
        return packed(dataset), None if passing else more

    return unpacked(kept.value((VERSION, kind, *name), files, made), place, read)


def packed(dataset: Dataset) -> dict[str, Any]:
    """A listing as plain values."""
    return {
        "samples": [[s.id, s.captions, s.caption_weights, *map(packed_place, (s.path, s.mask))] for s in dataset.samples],
        "problems": [[problem.path, problem.reason, problem.used] for problem in dataset.problems],
        "found": dataset.found,
    }


def packed_place(place: Path | Place | None) -> Any:
    return [place.name, place.sha256, place.at] if isinstance(place, Place) else None if place is None else str(place)


def unpacked(value: dict[str, Any], folder: str | Path, read: Callable[..., bytes] | None) -> Dataset:
    """The listing that `packed` made plain values of, its places read by `read`."""

    def place(packed: Any) -> Path | Place | None:
        if packed is None or isinstance(packed, str):
            return None if packed is None else Path(packed)
        name, sha256, at = packed
        assert read is not None
        return Place(name, read, sha256, tuple(at))

    samples = [Sample(place(path), tuple(texts), id, tuple(weights), place(mask)) for id, texts, weights, path, mask in value["samples"]]
    return Dataset(folder, tuple(samples), tuple(Problem(*problem) for problem in value["problems"]), value["found"])
