"""The cache of a run filled before its first step, and what reads it."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from latentfm.config import DataOptions
from latentfm.data.buckets import DataPlan
from latentfm.data.cache import Cache, fingerprint, key_of, tokenizer_fingerprint
from latentfm.data.check.captions import limits_of
from latentfm.data.entries import Entries
from latentfm.data.images import UnreadableImage, decoders, load, load_mask, opened_rgb
from latentfm.data.loader import Batch, CachedReader, Draws, Dropout, Reader, Routing
from latentfm.data.sources import Dataset, Sample
from latentfm.data.table import SampleTable
from latentfm.errors import InputError
from latentfm.files import expanded
from latentfm.models import vae as vae_room
from latentfm.models.encoders import ENCODERS
from latentfm.models.text import PromptEncoder
from latentfm.training.distributed.processes import find_by_one
from latentfm.training.models import Models
from latentfm.training.pictures import Pictures, unchanged
from latentfm.words import count, shown

logger = logging.getLogger(__name__)
IMAGES_AT_ONCE, CAPTIONS_AT_ONCE, TOKENIZED_AT_ONCE = 8, 32, 1024
LARGE = 512**2  # pixels: pictures beyond it are encoded one by one
SECONDS_BETWEEN_LOOKS = 0.5  # at the cache, while other processes fill it


@dataclass(frozen=True)
class Work:
    """Entries of one kind: (key, item) of each, and what makes them: None of an item of which nothing can be made."""

    kind: str
    wanted: list[tuple[str, Any]]
    make: Callable[[Sequence[Any]], list[dict[str, Tensor] | None]]
    at_once: int
    load: Callable[[Any], Any] | None = None

    @cached_property
    def keys(self) -> np.ndarray:
        """The keys, S32 [N]."""
        return np.array([bytes.fromhex(key) for key, _ in self.wanted], "S32")

    @cached_property
    def verdicts(self) -> np.ndarray:
        """The keys under which it is kept that nothing can be made of an item, S32 [N]."""
        return np.array([bytes.fromhex(verdict_key(key)) for key, _ in self.wanted], "S32")


class CachedDataset(Pictures):
    """A dataset whose pictures and captions are in the cache; knows every entry's key.

    After `fill`, `samples` are without what cannot be read.
    """

    def __init__(
        self, dataset: Dataset, models: Models, options: DataOptions, plan: DataPlan, share: Callable[..., list] = find_by_one
    ):
        self.models, self.lengths = models, tuple(sorted(plan.t5_lengths))
        # earlier versions kept "unreadable" in place of a picture's moments, even where it was the memory that lacked
        self.cache = Cache(expanded(options.cache), outdated="unreadable")
        self.made: dict[str, list[str]] = {}  # the keys that this process made, by kind
        self.vae_print = fingerprint(models.vae)
        self.text_print = key_of(
            str(models.encoder.joint_dim),  # the width of the zeros that stand for an absent T5
            *(fingerprint(e) for e in models.encoder.encoders), *(tokenizer_fingerprint(t) for t in models.encoder.tokenizers)
        )  # fmt: skip
        super().__init__(dataset, plan, options, share)
        if max(width * height for width, height in self.buckets.shapes) > LARGE:
            models.vae.enable_slicing()  # one by one: at 1024 px the encoder takes 2.5 GiB a picture

    # What entries depend on

    def image_key(self, sample: Sample, flip: bool) -> str:
        return key_of("moments", self.digests[sample.id], self.transform(sample, flip).key(), self.vae_print, self.options.cache_dtype)

    def mask_key(self, sample: Sample, flip: bool) -> str | None:
        """The key of a sample's loss mask at latent resolution; None without a mask."""
        if sample.mask is None:
            return None
        digests = (self.mask_digests[sample.id], self.digests[sample.id])
        return key_of("mask", *digests, self.transform(sample, flip).key(), str(self.factor))

    def caption_key(self, caption: str, length: int) -> str:
        return key_of("prompt", caption, str(length), self.text_print)

    def identity(self) -> dict[str, str]:
        """What the training sees, as a hash of each kind (pictures with their masks); another hash is another run."""
        return super().identity() | {"VAE": self.vae_print, "text encoders": self.text_print}

    # Making entries

    def load_image(self, item: tuple[Sample, bool]) -> Tensor | None:
        """A picture as it is trained, uint8 [3, H, W]; None when its bytes are no picture. Raises MemoryError when it is the memory."""
        sample, flip = item
        data = unchanged(sample.path, self.digests[sample.id])
        try:
            return torch.from_numpy(load(sample.path, self.transform(sample, flip), data).transpose(2, 0, 1))
        except UnreadableImage:
            return None

    def encode_images(self, pictures: Sequence[Tensor | None]) -> list[dict[str, Tensor] | None]:
        """The entries of pictures; None of None."""
        dtype = getattr(torch, self.options.cache_dtype)
        entries: list[dict[str, Tensor] | None] = [None] * len(pictures)
        for shape in {picture.shape for picture in pictures if picture is not None}:
            places = [place for place, picture in enumerate(pictures) if picture is not None and picture.shape == shape]
            # always as many: an entry made again has the bits it had, whatever else was missing then
            padded = (places + [places[0]] * IMAGES_AT_ONCE)[:IMAGES_AT_ONCE]
            moments = self.moments(torch.stack([pictures[place] for place in padded])).to(dtype)
            for place, value in zip(places, moments, strict=False):
                entries[place] = {"moments": value}
        return entries

    def moments(self, pixels: Tensor) -> Tensor:
        """The VAE's moments, float32 [B, 2C, h, w] on its device, of pictures uint8 [B, 3, H, W]."""
        pixels = pixels.to(self.models.vae.device).float()
        half = torch.full((1,), 127.5, device=pixels.device)  # CUDA multiplies by the rounded inverse of a number, and divides by a tensor
        return vae_room.encode_moments(self.models.vae, pixels / half - 1)

    def load_mask(self, item: tuple[Sample, bool]) -> Tensor | None:
        """A loss mask at latent resolution, float32 [1, h, w] in [0, 1]; None when it or its picture cannot be used."""
        sample, flip = item
        data = unchanged(sample.mask, self.mask_digests[sample.id])
        try:
            with opened_rgb(sample.path, unchanged(sample.path, self.digests[sample.id])) as picture:
                size = picture.size
            return load_mask(sample.mask, data, size, self.transform(sample, flip), self.factor)
        except UnreadableImage:
            return None

    def encode_captions(self, items: Sequence[tuple[str, int]]) -> list[dict[str, Tensor]]:
        """The entries of (caption, T5 length) pairs, all of one length, in bfloat16."""
        captions = [caption for caption, _ in items]
        padded = (captions + [""] * CAPTIONS_AT_ONCE)[: max(CAPTIONS_AT_ONCE, len(captions))]
        with untold(self.models.encoder):
            parts = self.models.encoder.encode(padded, items[0][1]).map(lambda value: value.to(torch.bfloat16).cpu())
        return [{name: value[row] for name, value in parts.items()} for row in range(len(items))]

    def work(self) -> list[Work]:
        """All that should be in the cache, each key once: captions by length, pictures by shape, masks."""
        ordered = sorted(self.samples, key=lambda sample: self.bucket_by_id[sample.id])
        images = {self.image_key(s, f): (s, f) for s in ordered for f in self.flips}
        masks = {self.mask_key(s, f): (s, f) for s in ordered if s.mask for f in self.flips}
        texts = sorted({caption for sample in self.samples for caption in sample.captions})
        prompts = [{self.caption_key(c, n): (c, n) for c in texts} for n in self.lengths]
        return [
            *(Work("prompts", list(entries.items()), self.encode_captions, CAPTIONS_AT_ONCE) for entries in prompts),
            Work("moments", list(images.items()), self.encode_images, IMAGES_AT_ONCE, self.load_image),
            Work("masks", list(masks.items()), masks_of, IMAGES_AT_ONCE, self.load_mask),
        ]

    def prepare(self, accelerator: Accelerator, progress: Any) -> None:
        """Fills the cache, each process its share, VAE and text encoders on the device; all processes leave it together."""
        self.models.frozen_to(accelerator.device)
        self.fill(accelerator.process_index, accelerator.num_processes, progress)
        accelerator.wait_for_everyone()  # what one found damaged and made again, the others have not seen

    def fill(self, rank: int, world: int, progress: Any) -> dict[str, tuple[int, int]]:
        """Makes what is missing or damaged, this process its share; returns (made here, wanted by all) for each kind.

        Waits for the others, of this run or another, by looking at the folder, not in a collective, which would time out. Leaves out, by
        name, what cannot be read.
        """
        work = self.work()
        if rank == 0:
            self.tell_of_the_cache(work)
        keys, verdicts = (np.concatenate([getattr(part, name) for part in work]) for name in ("keys", "verdicts"))
        shares = [replace(part, wanted=part.wanted[rank::world]) for part in work]
        task = progress.add_task("caching pictures and captions", total=sum(len(part.wanted) for part in shares))
        made, verify = Counter(), self.options.verify

        def settled(number: int) -> None:
            progress.advance(task, number)

        while True:
            for part in shares:
                made[part.kind] += self.cache.fill(
                    part.kind, part.wanted, part.make, part.at_once, settled, verify=verify, load=part.load, threads=self.threads,
                    verdict=verdict_key, on_made=self.made.setdefault(part.kind, []).extend,
                )  # fmt: skip
            self.cache.refresh()
            missing = self.missing(keys, verdicts)
            if not missing.any():
                break
            progress.update(task, description=f"waiting for other processes ({count(int(missing.sum()), 'entry', 'entries')})")
            verify = False
            time.sleep(SECONDS_BETWEEN_LOOKS)
            lacking = (np.flatnonzero(self.missing(part.keys, part.verdicts)) for part in shares)
            shares = [replace(part, wanted=[part.wanted[i] for i in mine]) for part, mine in zip(shares, lacking, strict=True)]
        progress.remove_task(task)
        unreadable = {sample.id: None for sample, bad in zip(self.samples, self.unreadable_now(), strict=True) if bad}
        self.unreadable |= unreadable
        if rank == 0:
            self.tell_left_out()
        self.keep(sample for sample in self.samples if sample.id not in unreadable)
        wanted = Counter()
        for part in work:
            wanted[part.kind] += len(part.wanted)
        return {kind: (made[kind], wanted[kind]) for kind in wanted}

    def missing(self, keys: np.ndarray, verdicts: np.ndarray) -> np.ndarray:
        """Which keys have neither an entry nor a verdict, bool [N]."""
        return (self.cache.find(keys) < 0) & (self.cache.find(verdicts) < 0)

    def tell_of_the_cache(self, work: Sequence[Work]) -> None:
        """Says what is odd about the cache, and how many of the captions that are to be encoded are cut."""
        if self.cache.old_entries():
            logger.warning(
                "%s also holds a cache of an earlier version, one file an entry, which is not read any more; to remove it: rm -r %s",
                shown(self.cache.folder), shown(self.cache.folder / "[0-9a-f][0-9a-f]"),
            )  # fmt: skip
        self.cache.refresh()
        for said in self.cache.distrust():
            logger.warning("%s", said)
        prompts = [part for part in work if part.kind == "prompts"]
        new = [part.wanted[i][1] for part in prompts for i in np.flatnonzero(self.cache.find(part.keys) < 0)]
        tell_what_is_cut(self.models.encoder, new)

    def keys_there(self) -> np.ndarray:
        """The keys of all entries that are there, S32."""
        self.cache.refresh()
        return self.cache.index["key"].copy()

    def contents(self, before: np.ndarray) -> dict[str, tuple[int, int, int]]:
        """(entries that are there, those of them made since `before`, bytes) for each kind, of the samples that are used.

        Made are those whose keys were not there, and what this process made again.
        """
        self.cache.refresh()
        found = {kind: (0, 0, 0) for kind in ("moments", "prompts", "masks")}
        for part in self.work():
            places = self.cache.find(part.keys)
            there, keys = places[places >= 0], part.keys[places >= 0]
            again = np.array([bytes.fromhex(key) for key in self.made.get(part.kind, [])], "S32")
            new = int((~np.isin(keys, before) | np.isin(keys, again)).sum())
            more = (len(there), new, int(self.cache.index["length"][there].sum()))
            found[part.kind] = tuple(a + b for a, b in zip(found[part.kind], more, strict=True))
        return found

    def unreadable_now(self) -> list[bool]:
        """Which samples have a picture or a mask of which nothing could be made."""
        self.cache.refresh()
        bad = (self.cache.find(self.image_keys(self.samples)) < 0).reshape(len(self.samples), -1).any(axis=1)
        masked = [index for index, sample in enumerate(self.samples) if sample.mask]
        if masked:
            keys = [self.mask_key(self.samples[index], flip) for index in masked for flip in self.flips]
            bad[masked] |= (self.cache.find(keys) < 0).reshape(len(masked), -1).any(axis=1)
        return bad.tolist()

    # Training on it

    def image_keys(self, samples: Sequence[Sample]) -> np.ndarray:
        """The keys of pictures, each as it is and then, with flips, mirrored."""
        return np.array([bytes.fromhex(self.image_key(sample, flip)) for sample in samples for flip in self.flips], "S32")

    def entries(self, keys: Sequence[str] | np.ndarray) -> Entries:
        """Entries of the filled cache. Raises InputError when one went since."""
        try:
            return self.cache.entries(keys)
        except KeyError as error:
            raise InputError(f"the entry {error.args[0]} went from {shown(self.cache.folder)} since it was filled; start again") from None

    def reader(self, seed: int, dropout: Dropout, routing: Routing | None = None) -> Reader:
        """What reads batches of `samples`, which it counts by, and makes their draws."""
        table, masks, mask_of = SampleTable.of(self.samples), None, None
        masked = [index for index, sample in enumerate(self.samples) if sample.mask]
        if masked:
            masks = self.entries([self.mask_key(self.samples[index], flip) for index in masked for flip in self.flips])
            mask_of = np.full((len(self.samples), len(self.flips)), -1, np.int32)
            mask_of[masked] = np.arange(len(masks), dtype=np.int32).reshape(len(masked), -1)
        texts = [table.texts[number] for number in range(len(table.texts))]
        prompts = {length: self.entries([self.caption_key(text, length) for text in texts]) for length in self.lengths}
        draws = Draws(seed, dropout, self.options.flip, routing)
        return CachedReader(table, draws, self.entries(self.image_keys(self.samples)), prompts, masks, mask_of)

    def complete(self, batch: Batch, device: torch.device) -> Batch:
        """The batch on `device`, with all that a forward pass needs."""
        return batch.to(device)

    def release(self) -> None:
        """Takes the VAE and the text encoders off the device: all they had to say is in the cache."""
        self.models.frozen_to(torch.device("cpu"))


def masks_of(masks: Sequence[Tensor | None]) -> list[dict[str, Tensor] | None]:
    """The entries of loss masks; None of None."""
    return [None if mask is None else {"mask": mask} for mask in masks]


def verdict_key(key: str) -> str:
    """Under which key it is kept that nothing can be made of an entry's item: by these decoders, within these bounds."""
    return key_of("unreadable", key, decoders())


@contextmanager
def untold(encoder: PromptEncoder) -> Iterator[None]:
    """A context in which the encoder does not say of each prompt what is cut off: that was said of all together."""
    encoder.tells_cuts = False
    try:
        yield
    finally:
        encoder.tells_cuts = True


def tell_what_is_cut(encoder: PromptEncoder, items: Sequence[tuple[str, int]]) -> None:
    """Logs one line on the captions among (caption, T5 length) pairs that are longer than an encoder reads; nothing when none is."""
    found, cut = [], set()
    for index, limit in limits_of(encoder, {length for _, length in items}):
        captions = list(dict.fromkeys(caption for caption, length in items if index < 2 or length == limit))
        long = []
        for start in range(0, len(captions), TOKENIZED_AT_ONCE):
            part = captions[start : start + TOKENIZED_AT_ONCE]
            ids = encoder.tokenizers[index](part, verbose=False).input_ids
            long += [caption for caption, row in zip(part, ids, strict=True) if len(row) > limit]
        cut |= set(long)
        found += [f"{len(long):,} by {ENCODERS[index]} after {limit} tokens"] if long else []
    if cut:
        number = len({caption for caption, _ in items})
        logger.warning(
            "%s cut: %s; `latentfm data check` shows them and what they lose, the longest begins %s",
            f"{len(cut):,} of {count(number, 'caption')} {'is' if len(cut) == 1 else 'are'}", ", ".join(found),
            f'"{shown(max(cut, key=len), 60)}"',
        )  # fmt: skip
