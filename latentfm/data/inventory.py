"""What there is to train on: each sample's digests and the shape it is brought to, and what is left out and why."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from latentfm.data.buckets import DataPlan
from latentfm.data.cache.fill import map_ahead
from latentfm.data.cache.processes import ONE_PROCESS, Processes
from latentfm.data.cache.stat_cache import NOTHING_KEPT, StatCache, signature
from latentfm.data.cache.store import key_of
from latentfm.data.images import Transform, UnreadableImage, contents, decoders, digest, load_mask, opened_rgb, upright_size
from latentfm.data.sources import Dataset, Place, Sample
from latentfm.data.sources.base import sha256
from latentfm.errors import InputError
from latentfm.words import count, shown


class Inventory:
    """A dataset's samples in their shapes. `samples` are the usable ones, in order; `bucket_of` has each one's number in `buckets`.

    With `flip` each is trained on mirrored too. All `processes` read, each its share, but for what is `kept` of files that did not change.
    Raises InputError when there is no picture that can be used.
    """

    def __init__(
        self, dataset: Dataset, plan: DataPlan, flip: bool = False, processes: Processes = ONE_PROCESS, kept: StatCache = NOTHING_KEPT
    ):
        self.dataset, self.plan, self.buckets, self.factor = dataset, plan, plan.buckets, plan.factor
        self.flips = (False, True) if flip else (False,)
        self.transforms = [[Transform(height=h, width=w, flip=flip) for flip in self.flips] for w, h in plan.buckets.shapes]
        # one thread where a source is read in order
        self.threads = 1 if any(isinstance(sample.path, Place) for sample in dataset.samples) else min(8, os.cpu_count() or 1)
        self.unreadable: dict[str, str | None] = {}  # id -> why, where it is known
        self.cropped: dict[str, str] = {}
        self.bucket_by_id = dict.fromkeys((sample.id for sample in dataset.samples), 0)
        self.find_digests(processes, kept)
        if len(plan.buckets.shapes) > 1 or plan.max_crop < 1:
            self.find_buckets(processes, kept)
        self.keep(sample for sample in dataset.samples if sample.id not in self.unreadable and sample.id not in self.cropped)

    def find_digests(self, processes: Processes, kept: StatCache) -> None:
        """Finds the SHA-256 of every picture and mask."""
        samples = self.dataset.samples
        files = [sample.path for sample in samples] + [sample.mask for sample in samples if sample.mask]
        unknown = [file for file in files if not (isinstance(file, Place) and file.sha256)]

        def read(own: Sequence[Path | Place]) -> list[str]:
            return list(map_ahead(digest, own, self.threads, 64))

        found = iter(kept.values(f"pictures of {self.dataset.folder}", unknown, str, signature_of, read, processes))
        digests = [file.sha256 if isinstance(file, Place) and file.sha256 else next(found) for file in files]
        self.digests = dict(zip((sample.id for sample in samples), digests, strict=False))
        self.mask_digests = dict(zip((sample.id for sample in samples if sample.mask), digests[len(samples) :], strict=True))

    def find_buckets(self, processes: Processes, kept: StatCache) -> None:
        """Finds every picture's size and so its bucket, and which are left out for what they would lose to the crop."""
        samples = self.dataset.samples

        def read(own: Sequence[Sample]) -> list[list]:
            return list(map_ahead(lambda sample: size_or_reason(sample.path, self.digests[sample.id]), own, self.threads, 64))

        def key(sample: Sample) -> str:
            return self.digests[sample.id] if isinstance(sample.path, Place) else str(sample.path)

        name = f"sizes in {self.dataset.folder} by {decoders()}"
        sizes = kept.values(name, samples, key, lambda s: signature_of(s.path, []), read, processes, keep=lambda size: len(size) == 2)
        self.unreadable |= {sample.id: size[0] for sample, size in zip(samples, sizes, strict=True) if len(size) == 1}
        measured = [(sample, size) for sample, size in zip(samples, sizes, strict=True) if len(size) == 2]
        for (sample, (width, height)), bucket, lost, used in zip(measured, *self.plan.place([size for _, size in measured]), strict=True):
            self.bucket_by_id[sample.id] = int(bucket)
            if not used:
                where = f"{shown(sample.path)} ({width} x {height})"
                self.cropped[sample.id] = f"{where} would lose {lost:.0%} to the crop, data.max_crop is {self.plan.max_crop:.0%}"

    def keep(self, samples: Iterable[Sample]) -> None:
        """Makes these the usable samples. Raises InputError when there is none."""
        self.samples = tuple(samples)
        if not self.samples:
            first = next((reason for reason in self.unreadable.values() if reason), None)
            raise InputError(
                f"none of the {count(len(self.dataset.samples), 'picture')} in {shown(self.dataset.folder)} can be read"
                + (f", or {len(self.cropped)} would lose too much to the crop; raise data.max_crop" if self.cropped else "")
                + (f" (the first: {first})" if first else "")
            )
        self.bucket_of = np.array([self.bucket_by_id[sample.id] for sample in self.samples], np.int32)

    def transform(self, sample: Sample, flip: bool) -> Transform:
        """What brings a sample's picture to the shape of its bucket."""
        return self.transforms[self.bucket_by_id[sample.id]][int(flip)]

    def identity(self) -> dict[str, str]:
        """What the training sees, as a hash of each kind (pictures with their masks); another hash is another run."""
        samples, masks = self.samples, {id: f"\0{digest}" for id, digest in self.mask_digests.items()}
        return {
            "pictures": key_of(*(f"{s.id}\0{self.digests[s.id]}{masks.get(s.id, '')}" for s in samples)),
            "captions": key_of(*(json.dumps([s.id, *s.captions, *([s.caption_weights] if s.caption_weights else [])]) for s in samples)),
        }

    def leave_out(self, ids: Iterable[str]) -> None:
        """Leaves out samples that turned out unreadable. Raises InputError when none is left."""
        unreadable = dict.fromkeys(ids)
        self.unreadable |= unreadable
        self.keep(sample for sample in self.samples if sample.id not in unreadable)

    def print_left_out(self) -> None:
        """Prints what is left out, by name, and how many they are."""
        everything = {sample.id: sample for sample in self.dataset.samples}
        for names, what in ((self.unreadable, "cannot be read"), (self.cropped, "would lose too much to the crop")):
            for id, reason in names.items():
                print(f"left out: {reason or self.reason(everything[id])}", flush=True)
            if names:
                number = f"{len(names):,} of {count(self.dataset.pictures, 'picture')}"
                print(f"{number} {what} and {'is' if len(names) == 1 else 'are'} left out (named above)", flush=True)

    def reason(self, sample: Sample) -> str:
        """Why a picture or its mask could not be read."""
        try:
            with opened_rgb(sample.path) as picture:
                size = picture.size
            for flip in self.flips if sample.mask else ():
                load_mask(sample.mask, None, size, self.transform(sample, flip), self.factor)
        except (UnreadableImage, MemoryError) as error:
            return str(error)
        return f"{shown(sample.path)}: it could not be read when it was cached"


def signature_of(file: Path | Place, of_place: list | None = None) -> list | None:
    """A file's signature; `of_place`, where what is kept goes by a hash, of what has no file."""
    return of_place if isinstance(file, Place) else signature(file)


def size_or_reason(path: Path | Place, digest: str) -> list:
    """[width, height] of a picture by its header, or [why it has none]."""
    try:
        return list(upright_size(path, unchanged(path, digest) if isinstance(path, Place) else None))
    except UnreadableImage as error:
        return [str(error)]


def unchanged(path: Path | Place, digest: str) -> bytes:
    """The bytes of a picture. Raises InputError when they are not those that were listed: what is made of them would belong to others."""
    try:
        data = contents(path)
    except UnreadableImage as error:
        raise InputError(f"{error}; it was there when it was listed") from error
    if sha256(data) != digest:
        raise InputError(f"{shown(path)} changed while it was being cached; start again when nothing writes to it")
    return data
