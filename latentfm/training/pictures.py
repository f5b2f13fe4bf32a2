"""The pictures of a run as they will be trained: their digests, the shape each is brought to, and which are left out and why."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from latentfm.config import DataOptions
from latentfm.data.buckets import DataPlan
from latentfm.data.cache import ahead, key_of
from latentfm.data.images import Transform, UnreadableImage, contents, digest, load_mask, opened_rgb, upright_size
from latentfm.data.sources import Dataset, Place, Sample
from latentfm.data.sources.base import sha256
from latentfm.errors import InputError
from latentfm.training.distributed.processes import find_by_one
from latentfm.words import count, shown


class Pictures:
    """A dataset's pictures in their shapes. `samples` are the usable ones, in order; `bucket_of` has each one's number in `buckets`.

    `share` has the pictures read by all processes of a training, each its share, as `parallel.shared` does.
    Raises InputError when there is no picture that can be used.
    """

    def __init__(self, dataset: Dataset, plan: DataPlan, options: DataOptions, share: Callable[..., list] = find_by_one):
        self.dataset, self.plan, self.options = dataset, plan, options
        self.buckets, self.factor = plan.buckets, plan.factor
        self.flips = (False, True) if options.flip else (False,)
        self.transforms = [[Transform(height=h, width=w, flip=flip) for flip in self.flips] for w, h in self.buckets.shapes]
        self.threads = 1 if any(isinstance(sample.path, Place) for sample in dataset.samples) else min(8, os.cpu_count() or 1)
        self.unreadable: dict[str, str | None] = {}  # id -> why, where it is known
        self.cropped: dict[str, str] = {}
        self.look_at_pictures(share)

    def look_at_pictures(self, share: Callable[..., list]) -> None:
        """Finds every picture's digest and bucket, and which are left out for what they would lose to the crop."""
        sized = self.options.buckets > 1 or self.options.max_crop < 1
        samples = self.dataset.samples
        found = share(lambda own: list(ahead(lambda sample: seen(sample.path, sized), own, self.threads, 64)), samples, "pictures")
        self.digests = {sample.id: digest for sample, (digest, _) in zip(samples, found, strict=True)}
        masked = [sample for sample in samples if sample.mask]
        masks = share(lambda own: list(ahead(lambda sample: digest(sample.mask), own, self.threads, 64)), masked, "masks")
        self.mask_digests = {sample.id: value for sample, value in zip(masked, masks, strict=True)}
        self.bucket_by_id = {sample.id: 0 for sample in samples}  # without sizes there is one shape; what has no size is never read
        self.unreadable |= {sample.id: size for sample, (_, size) in zip(samples, found, strict=True) if isinstance(size, str)}
        measured = [(sample, size) for sample, (_, size) in zip(samples, found, strict=True) if isinstance(size, tuple | list)]
        for (sample, (width, height)), bucket, lost, used in zip(measured, *self.plan.place([size for _, size in measured]), strict=True):
            self.bucket_by_id[sample.id] = int(bucket)
            if not used:
                where = f"{shown(sample.path)} ({width} x {height})"
                self.cropped[sample.id] = f"{where} would lose {lost:.0%} to the crop, data.max_crop is {self.plan.max_crop:.0%}"
        self.keep(sample for sample in samples if sample.id not in self.unreadable and sample.id not in self.cropped)

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

    def tell_left_out(self) -> None:
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


def seen(path: Path | Place, sized: bool) -> tuple[str, tuple[int, int] | str | None]:
    """(SHA-256 of a picture's bytes, its size or why it has none); None instead where no size is asked for. Raises UnreadableImage."""
    if isinstance(path, Place):
        data = None if path.sha256 and not sized else contents(path)
        value = path.sha256 or sha256(data)
    else:
        data, value = None, digest(path)
    if not sized:
        return value, None
    try:
        return value, upright_size(path, data)
    except UnreadableImage as error:
        return value, str(error)


def unchanged(path: Path | Place, digest: str) -> bytes:
    """The bytes of a picture. Raises InputError when they are not those that were listed: what is made of them would belong to others."""
    try:
        data = contents(path)
    except UnreadableImage as error:
        raise InputError(f"{error}; it was there when it was listed") from error
    if sha256(data) != digest:
        raise InputError(f"{shown(path)} changed while it was being cached; start again when nothing writes to it")
    return data
