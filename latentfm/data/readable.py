"""Which pictures of an inventory can be decoded: found out once, by all processes together, and remembered by their bytes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentfm.bounds import IMAGES_AT_ONCE
from latentfm.data.cache.fill import Job, fill, verdict_key
from latentfm.data.cache.processes import ONE_PROCESS, Processes
from latentfm.data.cache.store import Cache, key_of
from latentfm.data.images import UnreadableImage, decoders, load, load_mask, opened_rgb
from latentfm.data.inventory import Inventory, unchanged
from latentfm.data.sources import Sample

Picture = tuple[Sample, bool]  # a sample, and whether it is mirrored


class ReadablePictures:
    """The samples of an inventory whose pictures can be decoded: `samples`, once `leave_out_unreadable` or a class of its own has looked.

    What was found is kept in the cache at `folder`, by the pictures' bytes and the decoders.
    """

    def __init__(self, inventory: Inventory, folder: Path, processes: Processes = ONE_PROCESS):
        self.inventory, self.processes = inventory, processes
        # earlier versions kept "unreadable" in place of a picture's moments, even where it was the memory that lacked
        self.cache = Cache(folder, outdated="unreadable")

    @property
    def samples(self) -> tuple[Sample, ...]:
        return self.inventory.samples

    @property
    def bucket_of(self) -> np.ndarray:
        return self.inventory.bucket_of

    def leave_out_unreadable(self, progress: Any) -> None:
        """Decodes, this process its share, what nobody has decoded before, and leaves out, by name, what cannot be."""
        self.fill([self.checks()], progress, verify=True)
        self.leave_out(self.unreadable(self.check_key, self.samples).tolist())

    def leave_out(self, unusable: Sequence[bool]) -> None:
        """Leaves out, by name, those of `samples`. Raises InputError when none is left."""
        self.inventory.leave_out([sample.id for sample, bad in zip(self.samples, unusable, strict=True) if bad])
        if self.processes.rank == 0:
            self.inventory.print_left_out()

    def fill(self, jobs: Sequence[Job], progress: Any, verify: bool) -> dict[str, list[str]]:
        return fill(self.cache, jobs, progress, self.processes.rank, self.processes.world, verify, self.inventory.threads)

    def keys(self, key: Callable[[Sample, bool], str], samples: Sequence[Sample]) -> np.ndarray:
        """The keys of samples, S32, each as it is and then, with flips, mirrored."""
        return np.array([bytes.fromhex(key(sample, flip)) for sample in samples for flip in self.inventory.flips], "S32")

    def unreadable(self, key: Callable[[Sample, bool], str], samples: Sequence[Sample]) -> np.ndarray:
        """Of which of the samples the cache says that under one of their keys nothing could be made, bool [N].

        That an entry is missing says nothing: another process may have found it damaged just now, and make it anew.
        """
        self.cache.refresh()
        keys = self.keys(key, samples)
        bad = self.cache.find(keys) < 0
        bad[bad] = self.cache.find([verdict_key(name.ljust(32, b"\0").hex()) for name in keys[bad].tolist()]) >= 0
        return bad.reshape(len(samples), len(self.inventory.flips)).any(axis=1)

    def check_key(self, sample: Sample, flip: bool) -> str:
        masked = (self.inventory.mask_digests[sample.id], self.inventory.transform(sample, flip).key()) if sample.mask else ()
        return key_of("readable", self.inventory.digests[sample.id], *masked, decoders())

    def can_be_used(self, picture: Picture) -> bool:
        """Whether a picture, and its mask if it has one, can be decoded and used."""
        return self.load_image(picture) is not None and (picture[0].mask is None or self.load_mask(picture) is not None)

    def checks(self) -> Job:
        """Each picture decoded once."""
        checks = {self.check_key(sample, flip): (sample, flip) for sample in self.samples for flip in self.inventory.flips}
        return Job("checks", list(checks.items()), checks_of, IMAGES_AT_ONCE, self.can_be_used)

    def load_image(self, picture: Picture) -> Tensor | None:
        """A picture as it is trained, uint8 [3, H, W]; None when its bytes are no picture. Raises MemoryError when it is the memory."""
        sample, flip = picture
        data = unchanged(sample.path, self.inventory.digests[sample.id])
        try:
            return torch.from_numpy(load(sample.path, self.inventory.transform(sample, flip), data).transpose(2, 0, 1))
        except UnreadableImage:
            return None

    def load_mask(self, picture: Picture) -> Tensor | None:
        """A loss mask at latent resolution, float32 [1, h, w] in [0, 1]; None when it or its picture cannot be used."""
        sample, flip = picture
        inventory, data = self.inventory, unchanged(sample.mask, self.inventory.mask_digests[sample.id])
        try:
            with opened_rgb(sample.path, unchanged(sample.path, inventory.digests[sample.id])) as image:
                size = image.size
            return load_mask(sample.mask, data, size, inventory.transform(sample, flip), inventory.factor)
        except UnreadableImage:
            return None


def checks_of(readable: Sequence[bool]) -> list[dict[str, Tensor] | None]:
    """The entries of pictures that could be decoded; None of the others."""
    return [{"readable": torch.zeros(0, dtype=torch.uint8)} if good else None for good in readable]
