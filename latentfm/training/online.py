"""Training without a cache: pictures and captions are encoded at every step, on the training's device."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from latentfm.config import DataOptions
from latentfm.data.buckets import DataPlan
from latentfm.data.cache import key_of
from latentfm.data.images import decoders
from latentfm.data.loader import Batch, Draws, Dropout, PictureReader, Reader, Routing
from latentfm.data.sources import Dataset, Sample
from latentfm.data.table import SampleTable
from latentfm.training.distributed.processes import find_by_one
from latentfm.training.models import Models
from latentfm.training.pictures import unchanged
from latentfm.training.prepare import IMAGES_AT_ONCE, CachedDataset, Work, tell_what_is_cut, untold


class OnlineDataset(CachedDataset):
    """A dataset that is encoded as it is trained on. The cache holds only which pictures, by their bytes, could be decoded.

    Its batches are the cached ones, up to what the cache rounds: prompts to bfloat16, as here, moments to data.cache_dtype.
    """

    def check_key(self, sample: Sample, flip: bool) -> str:
        masked = (self.mask_digests[sample.id], self.transform(sample, flip).key()) if sample.mask else ()
        return key_of("readable", self.digests[sample.id], *masked, decoders())

    def load_check(self, item: tuple[Sample, bool]) -> bool:
        """Whether a picture, and its mask if it has one, can be decoded and used."""
        sample, _ = item
        return self.load_image(item) is not None and (sample.mask is None or self.load_mask(item) is not None)

    def work(self) -> list[Work]:
        """What should be known before the first step: each picture decoded once."""
        checks = {self.check_key(s, f): (s, f) for s in self.samples for f in self.flips}
        return [Work("checks", list(checks.items()), checks_of, IMAGES_AT_ONCE, self.load_check)]

    def unreadable_now(self) -> list[bool]:
        """Which samples cannot be used."""
        self.cache.refresh()
        keys = [self.check_key(sample, flip) for sample in self.samples for flip in self.flips]
        return (self.cache.find(keys) < 0).reshape(len(self.samples), -1).any(axis=1).tolist()

    def tell_of_the_cache(self, work: Sequence[Work]) -> None:
        """As of the cached run; how many captions are cut is counted over all, as none is encoded now."""
        super().tell_of_the_cache(work)
        texts = sorted({caption for sample in self.samples for caption in sample.captions})
        tell_what_is_cut(self.models.encoder, [(text, length) for text in texts for length in self.lengths])

    def reader(self, seed: int, dropout: Dropout, routing: Routing | None = None) -> Reader:
        """What reads the pixels and captions of batches of `samples`, and makes their draws."""
        draws = Draws(seed, dropout, self.options.flip, routing)
        digests = [self.digests[sample.id] for sample in self.samples]
        return PictureReader(
            SampleTable.of(self.samples), draws, self.samples, digests, self.mask_digests, self.bucket_of, self.transforms,
            self.models.vae.config.latent_channels, self.factor, unchanged,
        )  # fmt: skip

    def complete(self, batch: Batch, device: torch.device) -> Batch:
        """The batch on `device`, its pictures and captions encoded there; one that is encoded already only moves."""
        batch = batch.to(device)
        if batch.pixels is None or batch.captions is None:
            return batch
        with untold(self.models.encoder):
            parts = self.models.encoder.encode(batch.captions, batch.t5_length).map(lambda value: value.to(device, torch.bfloat16))
        return replace(batch, moments=self.moments(batch.pixels).to(device), parts=parts, pixels=None, captions=None)

    def release(self) -> None:
        """Nothing: the VAE and the text encoders are needed at every step."""


def checks_of(readable: Sequence[bool]) -> list[dict[str, Tensor] | None]:
    """The entries of pictures that could be decoded; None of the others."""
    return [{"readable": torch.zeros(0, dtype=torch.uint8)} if good else None for good in readable]


def dataset_of(
    dataset: Dataset, models: Models, options: DataOptions, plan: DataPlan, share: Callable[..., list] = find_by_one
) -> CachedDataset:
    """The dataset of a run: out of the cache, or with data.online encoded at every step; `share` as in `Pictures`."""
    return (OnlineDataset if options.online else CachedDataset)(dataset, models, options, plan, share)
