"""Training out of a cache: pictures and captions are encoded once, before the first step."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from latentfm.bounds import CAPTIONS_AT_ONCE, IMAGES_AT_ONCE, captions_at_once, images_at_once
from latentfm.data.cache.entries import Entries
from latentfm.data.cache.fill import Job, Made
from latentfm.data.cache.store import key_of
from latentfm.data.loader import Batch, Draws, Dropout, Reader, Request, Routing, stacked_masks
from latentfm.data.prepared import PreparedData
from latentfm.data.readable import Picture
from latentfm.data.sources import Sample
from latentfm.data.sources.base import sha256
from latentfm.data.table import SampleTable
from latentfm.errors import InputError
from latentfm.files import read_bytes
from latentfm.models.text import MOST_BYTES, NULL_FILE, NullCondition, PromptParts
from latentfm.words import shown


class CachedData(PreparedData):
    """Samples whose pictures, masks and captions are read from the cache, under the hash of all that each entry depends on."""

    # What entries depend on

    def image_key(self, sample: Sample, flip: bool) -> str:
        transform = self.inventory.transform(sample, flip).key()
        return key_of("moments", self.inventory.digests[sample.id], transform, self.vae_print, self.options.cache_dtype)

    def mask_key(self, sample: Sample, flip: bool) -> str:
        """The key of a sample's loss mask at latent resolution."""
        digests = (self.inventory.mask_digests[sample.id], self.inventory.digests[sample.id])
        return key_of("mask", *digests, self.inventory.transform(sample, flip).key(), str(self.inventory.factor))

    def caption_key(self, caption: str, length: int) -> str:
        return key_of("prompt", caption, str(length), self.text_print)

    def prompt_key(self, prompt: str, length: int) -> str:
        """The key of a prompt that is drawn from: not rounded."""
        return key_of("prompt in float32", prompt, str(length), self.text_print)

    # Making entries

    def jobs(self) -> list[Job]:
        """All that should be in the cache, each key once: captions by length, pictures by shape, masks."""
        pictures = [(sample, flip) for sample in self.samples for flip in self.inventory.flips]
        masks = {self.mask_key(*picture): picture for picture in pictures if picture[0].mask}
        mask_job = Job("masks", list(masks.items()), masks_of, IMAGES_AT_ONCE, self.load_mask)
        return [*self.caption_jobs(), *self.image_jobs(pictures), mask_job]

    def image_jobs(self, pictures: Iterable[Picture]) -> list[Job]:
        """A job for each bucket's shape: every picture, each once."""
        by_bucket: dict[int, dict[str, Picture]] = defaultdict(dict)
        for sample, flip in pictures:
            by_bucket[self.inventory.bucket_by_id[sample.id]][self.image_key(sample, flip)] = sample, flip
        made = []
        for bucket, images in sorted(by_bucket.items()):
            width, height = self.inventory.buckets.shapes[bucket]
            at_once = images_at_once(width * height, self.models.device.type == "cpu")
            made.append(Job("moments", list(images.items()), partial(self.encode_images, at_once=at_once), at_once, self.load_image))
        return made

    def caption_jobs(self) -> list[Job]:
        """A job for each T5 length: every caption, each once."""
        texts = sorted({caption for sample in self.samples for caption in sample.captions})
        made = []
        for length in self.lengths:
            entries = {self.caption_key(text, length): (text, length) for text in texts}
            at_once = captions_at_once(length, self.models.device.type == "cpu")
            made.append(Job("prompts", list(entries.items()), partial(self.encode_captions, at_once=at_once), at_once))
        return made

    def captions_to_encode(self, jobs: Sequence[Job]) -> list[tuple[str, int]]:
        return [job.wanted[number][1] for job in jobs if job.kind == "prompts" for number in job.missing(self.cache)]

    def encode_images(self, pictures: Sequence[Tensor | None], at_once: int) -> list[dict[str, Tensor] | None]:
        """The entries of pictures of one shape; None of None.

        They are encoded as `at_once`, however few: an entry made again has the bits it had, whatever else was missing then.
        """
        places = [place for place, picture in enumerate(pictures) if picture is not None]
        entries: list[dict[str, Tensor] | None] = [None] * len(pictures)
        if places:
            padded = places + [places[0]] * (at_once - len(places))
            moments = self.moments(torch.stack([pictures[place] for place in padded])).to(getattr(torch, self.options.cache_dtype))
            for place, value in zip(places, moments.cpu(), strict=False):
                entries[place] = {"moments": value}
        return entries

    def encode_captions(
        self, items: Sequence[tuple[str, int]], at_once: int = CAPTIONS_AT_ONCE, dtype: torch.dtype = torch.bfloat16
    ) -> list[dict[str, Tensor]]:
        """The entries of (caption, T5 length) pairs, all of one length, in `dtype`; encoded as `at_once`, however few."""
        captions = [caption for caption, _ in items]
        padded = captions + [""] * (at_once - len(captions))
        parts = self.encoded(padded, items[0][1]).map(lambda value: value.to(dtype).cpu())
        return [{name: value[row] for name, value in parts.items()} for row in range(len(items))]

    def unusable(self) -> list[bool]:
        """Which samples have a picture or a mask of which nothing could be made."""
        bad = self.unreadable(self.image_key, self.samples)
        masked = [index for index, sample in enumerate(self.samples) if sample.mask]
        bad[masked] |= self.unreadable(self.mask_key, [self.samples[index] for index in masked])
        return bad.tolist()

    # Conditions that belong to no picture

    def encode(self, prompts: Sequence[str], t5_length: int) -> PromptParts:
        def make(items: Sequence[tuple[str, int]]) -> list[dict[str, Tensor]]:
            return self.encode_captions(items, dtype=torch.float32)

        found = self.condition_entries([(self.prompt_key(prompt, t5_length), (prompt, t5_length)) for prompt in prompts], make)
        return PromptParts(**{name: torch.stack([parts[name] for parts in found]) for name in found[0]})

    def null(self, lengths: Sequence[int], device: torch.device) -> NullCondition:
        """The null condition, kept as the bytes of the file that it is saved as."""
        file = self.models.folder / NULL_FILE
        saved, ordered = sha256(read_bytes(file, MOST_BYTES)) if file.exists() else "absent", sorted(lengths)
        key = key_of("null condition", str(ordered), self.text_print, saved)

        def make(items: Sequence[None]) -> list[dict[str, Tensor]]:
            data = bytearray(self.models.null.kept(ordered).to_bytes())
            return [{"file": torch.frombuffer(data, dtype=torch.uint8)} for _ in items]

        (found,) = self.condition_entries([(key, None)], make)
        return NullCondition.from_bytes(found["file"].numpy().tobytes()).kept(ordered, device)

    def condition_entries(self, wanted: Sequence[tuple[str, Any]], make: Callable[[Sequence[Any]], Made]) -> list[Mapping[str, Tensor]]:
        """The entries of `wanted`, (key, item) each, made where they are missing; a cache that cannot be written is left as it is."""
        job = Job("conditions", list(dict(wanted).items()), make, CAPTIONS_AT_ONCE)
        self.cache.refresh()
        if len(job.missing(self.cache)) and self.cache.folder.exists() and not os.access(self.cache.folder, os.W_OK):
            made = dict(zip(dict(wanted), make(list(dict(wanted).values())), strict=True))
            return [made[key] for key, _ in wanted]
        self.fill([job], Progress(disable=True), verify=True)
        entries = self.entries([key for key, _ in wanted])
        return [entries.read(number) for number in range(len(entries))]

    # Training on it

    def entries(self, keys: Sequence[str] | np.ndarray) -> Entries:
        """Entries of the filled cache. Raises InputError when one went since."""
        try:
            return self.cache.entries(keys)
        except KeyError as error:
            raise InputError(f"the entry {error.args[0]} went from {shown(self.cache.folder)} since it was filled; start again") from None

    def reader(self, seed: int, dropout: Dropout, routing: Routing | None = None) -> Reader:
        table, masks, mask_of = SampleTable.of(self.samples), None, None
        masked = [index for index, sample in enumerate(self.samples) if sample.mask]
        if masked:
            masks = self.entries(self.keys(self.mask_key, [self.samples[index] for index in masked]))
            mask_of = np.full((len(self.samples), len(self.inventory.flips)), -1, np.int32)
            mask_of[masked] = np.arange(len(masks), dtype=np.int32).reshape(len(masked), -1)
        draws = Draws(seed, dropout, self.options.flip, routing)
        moments = self.entries(self.keys(self.image_key, self.samples))
        return CachedReader(table, draws, moments, self.caption_entries(table), masks, mask_of)

    def caption_entries(self, table: SampleTable) -> dict[int, Entries]:
        """The entries of the table's texts, in its order, for each T5 length."""
        texts = [table.texts[number] for number in range(len(table.texts))]
        return {length: self.entries([self.caption_key(text, length) for text in texts]) for length in self.lengths}

    def complete(self, batch: Batch, device: torch.device) -> Batch:
        return batch.to(device)

    def release(self) -> None:
        """Gives back the VAE and the text encoders: all they had to say is in the cache."""
        self.models.release()

    # What there is

    def existing_keys(self) -> np.ndarray:
        """The keys of all entries that are there, S32."""
        self.cache.refresh()
        return self.cache.index["key"].copy()

    def contents(self, before: np.ndarray, made: dict[str, list[str]]) -> dict[str, tuple[int, int, int]]:
        """(entries that are there, those of them made since `before`, bytes) for each kind, of the samples that are used.

        Made are those whose keys were not there, and what this process `made` again.
        """
        self.cache.refresh()
        found = {kind: (0, 0, 0) for kind in ("moments", "pairs", "prompts", "masks")}
        for job in self.jobs():
            places = self.cache.find(job.keys)
            there, keys = places[places >= 0], job.keys[places >= 0]
            again = np.array([bytes.fromhex(key) for key in made.get(job.kind, [])], "S32")
            new = int((~np.isin(keys, before) | np.isin(keys, again)).sum())
            more = (len(there), new, int(self.cache.index["length"][there].sum()))
            found[job.kind] = tuple(a + b for a, b in zip(found[job.kind], more, strict=True))
        return found


class CachedReader(Reader):
    """Micro-batches out of the cache.

    `moments` has an entry for each sample as it is and, with flips, one for each mirrored, after one another; `prompts` has one
    for each of the table's texts, by length; `masks` one for each that `mask_of` [N, flips] numbers, -1 where a sample has none.
    """

    def __init__(
        self, table: SampleTable, draws: Draws, moments: Entries, prompts: dict[int, Entries], masks: Entries | None = None,
        mask_of: np.ndarray | None = None,
    ):  # fmt: skip
        self.table, self.draws = table, draws
        self.moments, self.prompts, self.masks, self.mask_of = moments, prompts, masks, mask_of

    def __getitem__(self, request: Request) -> Batch:
        members, t5_length = request
        step = 2 if self.draws.flip else 1
        channels, height, width = dict(self.moments.layout(members[0][1] * step).shapes)["moments"]
        batch, captions, flipped = self.draws.make(self.table, members, (channels // 2, height, width))
        chosen = [(index, int(flip)) for (_, index, _), flip in zip(members, flipped, strict=True)]
        places = [] if self.mask_of is None else [self.mask_of[at] for at in chosen]
        masks = [None if place < 0 else self.masks.read(place)["mask"] for place in places]
        return replace(
            batch,
            moments=self.moments.stack([index * step + flip for index, flip in chosen])["moments"].float(),
            parts=PromptParts(**self.prompts[t5_length].stack(captions)),
            mask=stacked_masks(masks, height, width),
            t5_length=t5_length,
        )


def masks_of(masks: Sequence[Tensor | None]) -> list[dict[str, Tensor] | None]:
    """The entries of loss masks; None of None."""
    return [None if mask is None else {"mask": mask} for mask in masks]
