"""Everything a run needs before its first step: the models, the dataset, and a filled cache."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor

from latentfm.bundled import bundled_model
from latentfm.config import DataOptions, ModelOptions, SourceOptions
from latentfm.data.cache import Cache, fingerprint, key_of, tokenizer_fingerprint
from latentfm.data.images import Transform, UnreadableImage, apply, contents, digest, load_mask, open_rgb, to_tensor
from latentfm.data.sources import Columns, Dataset, Place, Sample, Source, read_folder, read_sources, summary
from latentfm.data.sources.base import sha256
from latentfm.errors import InputError
from latentfm.interchange.weights import check_transformer
from latentfm.models import vae as vae_room
from latentfm.models.folder import check_folder, read_info
from latentfm.models.mmdit import MMDiT
from latentfm.models.text import NullCondition, PromptEncoder

IMAGES_AT_ONCE, CAPTIONS_AT_ONCE = 8, 32


@dataclass
class Models:
    """The network to train and the frozen models around it, with the folder they came from."""

    folder: Path
    network: MMDiT
    vae: AutoencoderKL
    encoder: PromptEncoder
    null: NullCondition
    info: dict[str, Any]  # the folder's latentfm.json

    @property
    def multiple(self) -> int:
        """Picture sides must be multiples of this."""
        return vae_room.downsampling(self.vae) * self.network.config.patch_size


def load_models(options: ModelOptions) -> Models:
    """The models of `options`: a pipeline's own network to fine-tune, or a new one of a preset beside its frozen models."""
    folder = Path(options.pipeline).expanduser() if options.pipeline else bundled_model()
    check_folder(folder, transformer=options.preset is None)
    if not (folder / "vae" / "config.json").is_file():
        raise InputError(f"{folder} has no vae/config.json; it is not an SD3-style pipeline, or its copy is not complete")
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True).eval()
    if options.preset is None:
        check_transformer(folder / "transformer")
        network = MMDiT.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32, use_safetensors=True)
        encoder = PromptEncoder.from_folder(folder, network.config.joint_attention_dim, network.config.pooled_projection_dim)
    else:
        encoder = PromptEncoder.from_folder(folder, 4096, 2048)
        widths = [e.config.projection_dim for e in encoder.encoders[:2] if e is not None]
        t5 = encoder.encoders[2]
        changes = {"in_channels": vae.config.latent_channels, "out_channels": vae.config.latent_channels}
        changes |= {"pooled_projection_dim": sum(widths)} if widths else {}
        changes |= {"joint_attention_dim": t5.config.d_model} if t5 is not None else {}
        network = MMDiT.from_preset(options.preset, **changes)
        encoder.joint_dim, encoder.pooled_dim = network.config.joint_attention_dim, network.config.pooled_projection_dim
    for frozen in (vae, *encoder.encoders):
        if frozen is not None:
            frozen.requires_grad_(False)
    return Models(folder, network, vae, encoder, NullCondition.load(folder, encoder), read_info(folder))


def picture_size(options: DataOptions, models: Models) -> tuple[int, int]:
    """(width, height) in pixels of the training pictures. Raises InputError for sides that do not divide."""
    own = models.network.config.sample_size * vae_room.downsampling(models.vae)
    size = own if options.size is None else options.size
    width, height = (size, size) if isinstance(size, int) else size
    for side in (width, height):
        if side < models.multiple or side % models.multiple:
            low = max(models.multiple, side // models.multiple * models.multiple)
            raise InputError(f"data.size {side} is not a multiple of {models.multiple}; the nearest are {low} and {low + models.multiple}")
        if side > models.network.config.pos_embed_max_size * models.multiple:
            raise InputError(f"data.size {side} is larger than this network's {models.network.config.pos_embed_max_size * models.multiple}")
    return width, height


class CachedDataset:
    """A dataset whose pictures and captions are in the cache; knows every entry's key."""

    def __init__(self, dataset: Dataset, models: Models, options: DataOptions, lengths: Sequence[int]):
        width, height = picture_size(options, models)
        self.dataset, self.models, self.lengths = dataset, models, tuple(lengths)
        self.cache = Cache(Path(options.cache).expanduser())
        self.flips = (False, True) if options.flip else (False,)
        self.transform = {flip: Transform(height=height, width=width, flip=flip) for flip in self.flips}
        self.vae_print = fingerprint(models.vae)
        self.text_print = key_of(
            str(models.encoder.joint_dim),  # the width of the zeros that stand for an absent T5
            *(fingerprint(e) for e in models.encoder.encoders), *(tokenizer_fingerprint(t) for t in models.encoder.tokenizers)
        )
        self.digests = {sample.id: digest(sample.path) for sample in dataset.samples}
        self.mask_digests = {sample.id: digest(sample.mask) for sample in dataset.samples if sample.mask}
        self.samples = dataset.samples

    def image_key(self, sample: Sample, flip: bool) -> str:
        return key_of("moments", self.digests[sample.id], self.transform[flip].key(), self.vae_print)

    def mask_key(self, sample: Sample, flip: bool) -> str | None:
        """The key of a sample's loss mask at latent resolution; None without a mask."""
        if sample.mask is None:
            return None
        factor = str(vae_room.downsampling(self.models.vae))
        return key_of("mask", self.mask_digests[sample.id], self.digests[sample.id], self.transform[flip].key(), factor)

    def caption_key(self, caption: str, length: int) -> str:
        return key_of("prompt", caption, str(length), self.text_print)

    def identity(self) -> dict[str, str]:
        """What the training sees, as a hash of each kind (pictures with their masks); another hash is another run."""
        samples, masks = self.samples, {id: f"\0{digest}" for id, digest in self.mask_digests.items()}
        return {
            "pictures": key_of(*(f"{s.id}\0{self.digests[s.id]}{masks.get(s.id, '')}" for s in samples)),
            "captions": key_of(*(json.dumps([s.id, *s.captions, *([s.caption_weights] if s.caption_weights else [])]) for s in samples)),
            "VAE": self.vae_print,
            "text encoders": self.text_print,
        }

    def encode_images(self, items: Sequence[tuple[Sample, bool]]) -> list[dict[str, Tensor]]:
        """The entries of pictures; one that cannot be read gets the entry {"unreadable"}."""
        pictures: dict[int, Tensor] = {}
        for place, (sample, flip) in enumerate(items):
            data = unchanged(sample.path, self.digests[sample.id])
            try:
                pictures[place] = to_tensor(apply(open_rgb(sample.path, data), self.transform[flip]))
            except UnreadableImage:
                continue
        entries: list[dict[str, Tensor]] = [{"unreadable": torch.zeros(0)} for _ in items]
        if pictures:
            encoded = vae_room.encode_moments(self.models.vae, torch.stack(list(pictures.values())))
            for place, moments in zip(pictures, encoded, strict=True):
                entries[place] = {"moments": moments}
        return entries

    def encode_masks(self, items: Sequence[tuple[Sample, bool]]) -> list[dict[str, Tensor]]:
        """The entries of loss masks, [1, h, w] in [0, 1] at latent resolution; one that cannot be used gets {"unreadable"}."""
        entries: list[dict[str, Tensor]] = []
        for sample, flip in items:
            data = unchanged(sample.mask, self.mask_digests[sample.id])
            try:
                picture = open_rgb(sample.path, unchanged(sample.path, self.digests[sample.id]))
                mask = load_mask(sample.mask, data, picture.size, self.transform[flip], vae_room.downsampling(self.models.vae))
                entries.append({"mask": mask})
            except UnreadableImage:
                entries.append({"unreadable": torch.zeros(0)})
        return entries

    def encode_captions(self, items: Sequence[tuple[str, int]]) -> list[dict[str, Tensor]]:
        """The entries of (caption, T5 length) pairs, all of one length, in bfloat16."""
        parts = self.models.encoder.encode([caption for caption, _ in items], items[0][1])
        return [{name: value[row].to(torch.bfloat16) for name, value in parts.items()} for row in range(len(items))]

    def fill(self, accelerator: Accelerator, progress: Any) -> None:
        """Makes what is missing, each process its share; waits for the others by looking, not in a collective."""
        rank, world = accelerator.process_index, accelerator.num_processes
        images = {self.image_key(s, f): (s, f) for s in self.dataset.samples for f in self.flips}
        texts = sorted({caption for sample in self.dataset.samples for caption in sample.captions})
        wanted = [({self.caption_key(c, n): (c, n) for c in texts}, self.encode_captions, CAPTIONS_AT_ONCE) for n in self.lengths]
        masks = {self.mask_key(s, f): (s, f) for s in self.dataset.samples if s.mask for f in self.flips}
        wanted += [(images, self.encode_images, IMAGES_AT_ONCE), (masks, self.encode_masks, IMAGES_AT_ONCE)]
        keys = [key for entries, _, _ in wanted for key in entries]
        task = progress.add_task("caching pictures and captions", total=sum(len(list(e)[rank::world]) for e, _, _ in wanted))
        for entries, make, at_once in wanted:
            self.cache.fill(list(entries.items())[rank::world], make, at_once, lambda count: progress.advance(task, count))
        while missing := [key for key in keys if not self.cache.path(key).exists()]:
            progress.update(task, description=f"waiting for other processes ({len(missing)} entries)")
            time.sleep(0.2)
        progress.remove_task(task)
        readable = {s.id for s in self.dataset.samples if self.usable(s)}
        self.samples = tuple(s for s in self.dataset.samples if s.id in readable)
        unreadable = [s for s in self.dataset.samples if s.id not in readable]
        if unreadable and accelerator.is_main_process:
            for sample in unreadable:
                accelerator.print(f"left out: {self.reason(sample)}")
            accelerator.print(f"{len(unreadable)} of {len(self.dataset.samples)} pictures cannot be read and are left out (named above)")
        if not self.samples:
            raise InputError(f"none of the {len(self.dataset.samples)} pictures in {self.dataset.folder} can be read")

    def usable(self, sample: Sample) -> bool:
        """Whether a sample's picture, and its mask if it has one, could be read when they were cached."""
        keys = [key for flip in self.flips for key in (self.image_key(sample, flip), self.mask_key(sample, flip)) if key]
        return not any("unreadable" in self.cache.read(key) for key in keys)

    def reason(self, sample: Sample) -> str:
        """Why a picture or its mask could not be read."""
        try:
            picture = open_rgb(sample.path)
            for flip in self.flips if sample.mask else ():
                load_mask(sample.mask, None, picture.size, self.transform[flip], vae_room.downsampling(self.models.vae))
        except UnreadableImage as error:
            return str(error)
        return f"{sample.path}: it could not be read when it was cached"


def unchanged(path: Path | Place, digest: str) -> bytes:
    """The bytes of a picture. Raises InputError when they are not those that were listed: the entry would belong to something else."""
    try:
        data = contents(path)
    except UnreadableImage as error:
        raise InputError(f"{error}; it was there when it was listed") from error
    if sha256(data) != digest:
        raise InputError(f"{path} changed while it was being cached; start again when nothing writes to it")
    return data


def open_dataset(options: DataOptions, accelerator: Accelerator) -> Dataset:
    """The dataset of `options`, its problems printed by name. Raises InputError when there is nothing to train on."""
    dataset = read_folder(Path(options.folder).expanduser()) if options.folder else read_sources([source(o) for o in options.sources])
    accelerator.print(summary(dataset))
    return dataset


def source(options: SourceOptions) -> Source:
    """The source that an entry of data.sources describes."""
    captions = options.caption_columns or {}
    columns = Columns(options.image_column, {captions: 1.0} if isinstance(captions, str) else captions, options.mask_column)
    kind = "datasets" if options.dataset else options.kind
    return Source(
        options.path or options.url or options.dataset, kind, columns, options.name, options.repeats, options.weight,
        options.regularisation, options.subset, options.split, options.revision, options.streaming,
    )  # fmt: skip
