"""Training without a cache: pictures and captions are encoded at every step, on the training's device."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from latentfm.data.cache.fill import Job
from latentfm.data.images import apply, load_mask, opened_rgb
from latentfm.data.inventory import Inventory, unchanged
from latentfm.data.loader import Batch, Draws, Dropout, Reader, Request, Routing, stacked_masks
from latentfm.data.prepared import PreparedData
from latentfm.data.table import SampleTable
from latentfm.models.text import NullCondition, PromptParts


class OnlineData(PreparedData):
    """Samples that are encoded as they are trained on. The cache holds only which pictures, by their bytes, could be decoded.

    Its batches are the cached ones, up to what the cache rounds: prompts to bfloat16, as here, moments to data.cache_dtype.
    """

    def jobs(self) -> list[Job]:
        """What should be known before the first step: each picture decoded once."""
        return [self.checks()]

    def captions_to_encode(self, jobs: Sequence[Job]) -> list[tuple[str, int]]:
        texts = sorted({caption for sample in self.samples for caption in sample.captions})
        return [(text, length) for text in texts for length in self.lengths]

    def unusable(self) -> list[bool]:
        return self.unreadable(self.check_key, self.samples).tolist()

    def encode(self, prompts: Sequence[str], t5_length: int) -> PromptParts:
        return self.encoded(prompts, t5_length).map(lambda value: value.float().cpu())

    def null(self, lengths: Sequence[int], device: torch.device) -> NullCondition:
        return self.models.null.kept(lengths, device)

    def reader(self, seed: int, dropout: Dropout, routing: Routing | None = None) -> Reader:
        return PictureReader(self.inventory, Draws(seed, dropout, self.options.flip, routing), self.models.outline.config.latent_channels)

    def complete(self, batch: Batch, device: torch.device) -> Batch:
        """The batch on `device`, its pictures and captions encoded there; one that is encoded already only moves."""
        batch = batch.to(device)
        if batch.pixels is None or batch.captions is None:
            return batch
        parts = self.encoded(batch.captions, batch.t5_length).map(lambda value: value.to(device, torch.bfloat16))
        return replace(batch, moments=self.moments(batch.pixels).to(device), parts=parts, pixels=None, captions=None)

    def release(self) -> None:
        """Nothing: the VAE and the text encoders are needed at every step."""


class PictureReader(Reader):
    """Micro-batches straight from the pictures: CachedReader's with the same draws, but pixels and captions, to be encoded.

    Latents of `channels` are the inventory's factor smaller than pictures.
    """

    def __init__(self, inventory: Inventory, draws: Draws, channels: int):
        self.table, self.draws, self.inventory, self.channels = SampleTable.of(inventory.samples), draws, inventory, channels

    def __getitem__(self, request: Request) -> Batch:
        (members, t5_length), inventory = request, self.inventory
        plain = inventory.transform(inventory.samples[members[0][1]], False)
        height, width = plain.height // inventory.factor, plain.width // inventory.factor
        batch, captions, flipped = self.draws.make(self.table, members, (self.channels, height, width))
        pixels, masks = [], []
        for (_, index, _), flip in zip(members, flipped, strict=True):
            sample, mask = inventory.samples[index], None
            transform = inventory.transform(sample, flip)
            with opened_rgb(sample.path, unchanged(sample.path, inventory.digests[sample.id])) as picture:
                size, array = picture.size, apply(picture, transform)
            if sample.mask:
                data = unchanged(sample.mask, inventory.mask_digests[sample.id])
                mask = load_mask(sample.mask, data, size, transform, inventory.factor)
            pixels.append(torch.from_numpy(array).permute(2, 0, 1))
            masks.append(mask)
        return replace(
            batch,
            pixels=torch.stack(pixels),
            captions=[self.table.texts[number] for number in captions],
            mask=stacked_masks(masks, height, width),
            t5_length=t5_length,
        )
