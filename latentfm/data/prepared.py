"""A run's data made ready for its batches: what the cached and the online way have in common."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentfm.bounds import LARGE
from latentfm.config import DataOptions
from latentfm.data.cache.fill import Job
from latentfm.data.cache.processes import ONE_PROCESS, Processes
from latentfm.data.cache.stat_cache import StatCache
from latentfm.data.cache.store import key_of
from latentfm.data.check.captions import limits_of, load_tokenizers, token_counts
from latentfm.data.inventory import Inventory
from latentfm.data.loader import Batch, Dropout, Reader, Routing
from latentfm.data.readable import ReadablePictures
from latentfm.files import expanded
from latentfm.interchange.frozen import FrozenModels
from latentfm.models import vae as vae_room
from latentfm.models.encoders import ENCODERS
from latentfm.models.text import NullCondition, PromptEncoder, PromptParts
from latentfm.words import count, shown

logger = logging.getLogger(__name__)


class PreparedData(ReadablePictures, ABC):
    """The samples of an inventory, ready to be read in batches once `prepare` has been called: `samples` are then the usable ones.

    `models` encode them, for prompts of `lengths` T5 tokens. Nothing is loaded that is not needed: the models are told by the
    fingerprints of their files.
    """

    def __init__(
        self, inventory: Inventory, models: FrozenModels, options: DataOptions, lengths: Sequence[int], processes: Processes = ONE_PROCESS
    ):
        super().__init__(inventory, expanded(options.cache), processes)
        self.models, self.options, self.lengths = models, options, tuple(lengths)
        self.vae_print, self.text_print = fingerprints(models, StatCache(self.cache.folder), processes)

    @abstractmethod
    def jobs(self) -> list[Job]:
        """What should be in the cache before the first step."""

    @abstractmethod
    def unusable(self) -> list[bool]:
        """Which of `samples` turned out to be of no use, by the filled cache."""

    @abstractmethod
    def reader(self, seed: int, dropout: Dropout, routing: Routing | None = None) -> Reader:
        """What reads batches of `samples`, which it counts by, and makes their draws."""

    @abstractmethod
    def complete(self, batch: Batch, device: torch.device) -> Batch:
        """The batch on `device`, with all that a forward pass needs."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], t5_length: int) -> PromptParts:
        """Each encoder's share of prompts that are no captions, as float32 on the CPU."""

    @abstractmethod
    def null(self, lengths: Sequence[int], device: torch.device) -> NullCondition:
        """The null condition for prompts of these T5 lengths, on `device`, complete without the text encoders."""

    @abstractmethod
    def release(self) -> None:
        """Gives back the memory of what is not needed from now on."""

    def prepare(self, progress: Any) -> dict[str, list[str]]:
        """Fills the cache, this process its share, and leaves out, by name, what cannot be read; returns the keys made here, by kind."""
        jobs = self.jobs()
        if self.processes.rank == 0:
            self.warn(jobs)
        made = self.fill(jobs, progress, self.options.verify)
        self.leave_out(self.unusable())
        return made

    def warn(self, jobs: Sequence[Job]) -> None:
        """Says what is odd about the cache, and how many of the captions that are to be encoded are cut."""
        if self.cache.old_entries():
            logger.warning(
                "%s also holds a cache of an earlier version, one file an entry, which is not read any more; to remove it: rm -r %s",
                shown(self.cache.folder), shown(self.cache.folder / "[0-9a-f][0-9a-f]"),
            )  # fmt: skip
        self.cache.refresh()
        for said in self.cache.distrust():
            logger.warning("%s", said)
        if items := self.captions_to_encode(jobs):
            warn_of_cuts(load_tokenizers(self.models.folder), items)

    @abstractmethod
    def captions_to_encode(self, jobs: Sequence[Job]) -> list[tuple[str, int]]:
        """The (caption, T5 length) pairs that this run will encode."""

    def identity(self) -> dict[str, str]:
        """What the training sees, as a hash of each kind (pictures with their masks); another hash is another run."""
        return self.inventory.identity() | {"VAE": self.vae_print, "text encoders": self.text_print}

    # Pictures and captions as they are encoded

    def moments(self, pixels: Tensor) -> Tensor:
        """The VAE's moments, float32 [B, 2C, h, w] on its device, of pictures uint8 [B, 3, H, W]."""
        vae = self.models.vae
        if max(width * height for width, height in self.inventory.buckets.shapes) > LARGE:
            vae.enable_slicing()  # one by one: at 1024 px the encoder takes 2.5 GiB a picture
        pixels = pixels.to(vae.device).float()
        half = torch.full((1,), 127.5, device=pixels.device)  # CUDA multiplies by the rounded inverse of a number, and divides by a tensor
        return vae_room.encode_moments(vae, pixels / half - 1)

    def encoded(self, prompts: Sequence[str], t5_length: int) -> PromptParts:
        """What the text encoders give, without a word on what they cut: that was said of all together."""
        encoder = self.models.encoder
        encoder.tells_cuts = False
        try:
            return encoder.encode(list(prompts), t5_length)
        finally:
            encoder.tells_cuts = True


def fingerprints(models: FrozenModels, kept: StatCache, processes: Processes) -> tuple[str, str]:
    """(the VAE's, the text encoders' and tokenizers'): hashes of all that decides what they give, read where they are not `kept`."""
    import diffusers
    import transformers

    text = [name for encoder in ENCODERS for name in (encoder.name, encoder.tokenizer)]
    libraries = (diffusers.__version__, transformers.__version__)  # whose defaults are part of a configuration

    def of_text() -> str:
        return key_of(str(models.joint_dim), *models.text_fingerprints())  # the width of the zeros that stand for an absent T5

    made: dict[str, tuple[tuple, list, Callable[[], str]]] = {
        "VAE": (libraries, models.files("vae"), models.vae_fingerprint),
        "text": ((*libraries, models.text_dtype, models.joint_dim), models.files(*text), of_text),
    }

    def of(which: str) -> str:
        name, files, make = made[which]
        return kept.value(("fingerprint", which, models.folder.absolute(), *name), files, lambda: (make(), ()))

    vae_print, text_print = processes.share(lambda own: [of(which) for which in own], list(made), "fingerprints")
    return vae_print, text_print


def warn_of_cuts(encoder: PromptEncoder, items: Sequence[tuple[str, int]]) -> None:
    """Logs one line on the captions among (caption, T5 length) pairs that are longer than an encoder reads; nothing when none is."""
    found, cut = [], set()
    for index, limit in limits_of(encoder, {length for _, length in items}):
        captions = list(dict.fromkeys(caption for caption, length in items if index < 2 or length == limit))
        long = [captions[place] for place in np.flatnonzero(token_counts(encoder, index, captions) > limit)]
        cut |= set(long)
        found += [f"{len(long):,} by {ENCODERS[index]} after {limit} tokens"] if long else []
    if cut:
        number = len({caption for caption, _ in items})
        logger.warning(
            "%s cut: %s; `latentfm data check` shows them and what they lose, the longest begins %s",
            f"{len(cut):,} of {count(number, 'caption')} {'is' if len(cut) == 1 else 'are'}", ", ".join(found),
            f'"{shown(max(cut, key=len), 60)}"',
        )  # fmt: skip
