"""What every pipeline here is made of: SD3's components, any of them absent, what their folder says of them, and the sizes that follow."""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from latentfm.errors import InputError
from latentfm.interchange.loading.keywords import dtype_asked_for, dtype_of
from latentfm.interchange.loading.parts import check_component
from latentfm.interchange.loading.pipelines import COMPONENTS, PipelineFiles
from latentfm.models import vae as vae_room
from latentfm.models.encoders import ENCODERS
from latentfm.models.folder import distilled_guidance, t5_length
from latentfm.models.mmdit import MMDiT
from latentfm.models.preview import colours_of, latent_rgb
from latentfm.models.text import NullCondition, PromptEncoder
from latentfm.pipelines.arguments import told, whole_number
from latentfm.pipelines.known_prompts import KnownPrompts
from latentfm.pipelines.lora import LoraLoader
from latentfm.words import shown

SHOWN = 80  # characters of a prompt in a warning
# SD3's own numbers, for what a missing component would say
PATCH, LATENTS, FACTOR, CLIP_TOKENS, JOINT, POOLED = 2, 128, 8, 77, 4096, 2048


@dataclass(frozen=True)
class Said:
    """What a model's folder says of itself beside its weights. It hangs on the components, so that it comes along where they go."""

    info: dict[str, Any] = field(default_factory=dict)
    null: NullCondition = field(default_factory=NullCondition)


class Components(PipelineFiles, LoraLoader, DiffusionPipeline):
    """The components of StableDiffusion3Pipeline, by its names. Any may be None: what needs an absent one says so when it is asked.

    LoRA and IP-Adapters load, mix, fuse and unload as there: load_lora_weights, set_adapters, fuse_lora, load_ip_adapter and so on.

    `info` holds what the model's folder says of itself in latentfm.json ("max_sequence_length": the T5 length it is
    meant for); `null` is its null condition, for the text encoders that are loaded now. Both go with the components: a pipeline made of
    another's draws what that one draws.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->image_encoder->transformer->vae"
    _optional_components = [
        "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor",
        "transformer", "vae",
    ]  # fmt: skip

    def __init__(
        self,
        transformer: MMDiT | None,  # or diffusers' own, see registered.py
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | AutoencoderTiny | None,
        text_encoder: torch.nn.Module | None = None,
        tokenizer: Any = None,
        text_encoder_2: torch.nn.Module | None = None,
        tokenizer_2: Any = None,
        text_encoder_3: torch.nn.Module | None = None,
        tokenizer_3: Any = None,
        image_encoder: torch.nn.Module | None = None,
        feature_extractor: Any = None,
    ):
        super().__init__()
        parts = {
            "vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "text_encoder_3": text_encoder_3,
            "tokenizer": tokenizer, "tokenizer_2": tokenizer_2, "tokenizer_3": tokenizer_3, "transformer": transformer,
            "scheduler": scheduler, "image_encoder": image_encoder, "feature_extractor": feature_extractor,
        }  # fmt: skip
        for name, part in parts.items():
            check_component(name, part)
        self.register_modules(**parts)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, vae_latent_channels=self.latent_channels)
        self.known_prompts = KnownPrompts()
        self.say(next((said for part in self.carriers() if (said := getattr(part, "said", None))), Said()))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, dtype: torch.dtype | None = None, **parts: Any) -> "Components":
        """A pipeline of this class on the components of another of diffusers' or ours; `parts` stand for some of them.

        dtype (or torch_dtype): what the components are converted to; they stay as they are unless given.
        """
        wanted = dtype_asked_for({"dtype": dtype, "torch_dtype": parts.pop("torch_dtype", None)})
        if not isinstance(pipeline, DiffusionPipeline):
            raise InputError(f"from_pipe takes another pipeline's components, not {told(pipeline)}; from_pretrained loads a folder's")
        if isinstance(wanted, dict):
            raise InputError(f"from_pipe takes one dtype for all components, not {told(wanted)}; give parts that have theirs")
        if unknown := parts.keys() - set(COMPONENTS):
            raise InputError(f"{cls.__name__} has no component {', '.join(sorted(unknown))}; there are {', '.join(COMPONENTS)}")
        pipe = cls(**{name: pipeline.components.get(name) for name in COMPONENTS} | parts)
        pipe.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        return pipe if wanted is None else pipe.to(dtype=dtype_of("all", wanted))

    @property
    def config(self) -> Any:
        """The components' names and classes. Diffusers reads it first when it makes another pipeline of this one, and learns of us then."""
        from latentfm.pipelines.registered import register

        register()
        return super().config

    def carriers(self) -> list[torch.nn.Module]:
        """The components that what their folder says goes with; the network's own word goes before the text encoders'."""
        parts = (self.transformer, *(getattr(self, kind.name) for kind in reversed(ENCODERS)))
        return [part for part in parts if part is not None]

    def say(self, said: Said) -> None:
        """Takes on what a folder says, and hangs it on the components."""
        self._said = said
        for part in self.carriers():
            part.said = said

    @property
    def info(self) -> dict[str, Any]:
        return self._said.info

    @info.setter
    def info(self, value: dict[str, Any]) -> None:
        self.say(Said(value, self._said.null))

    @property
    def distilled_guidance(self) -> float | None:
        """The guidance that the weights were trained to draw with by themselves, so that 1 is their own; None of other weights."""
        return distilled_guidance(self.info)

    @property
    def null(self) -> NullCondition:
        return self._said.null.read_by(self.prompt_encoder)

    @null.setter
    def null(self, value: NullCondition) -> None:
        value = NullCondition(self.prompt_encoder, value.by_length) if value.is_bare() else value
        self.say(Said(self._said.info, value.read_by(None)))  # an encoder that is taken out of the pipeline is not held on to

    @property
    def widths(self) -> tuple[int, int]:
        """The widths of prompt_embeds and pooled_prompt_embeds: the network's; without it what the text encoders give, or SD3's."""
        if self.transformer is not None:
            return self.transformer.config.joint_attention_dim, self.transformer.config.pooled_projection_dim
        first, second, t5 = (getattr(self, kind.name) for kind in ENCODERS)
        pooled = POOLED if first is None or second is None else first.config.projection_dim + second.config.projection_dim
        return JOINT if t5 is None else t5.config.d_model, pooled

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """The tokenizers and encoders as one; made anew at each use, so that replaced components count."""
        parts = [[getattr(self, name) for name in names] for names in zip(*((kind.tokenizer, kind.name) for kind in ENCODERS), strict=True)]
        return PromptEncoder(*parts, *self.widths)

    @property
    def has_encoders(self) -> bool:
        return any(getattr(self, kind.name) is not None for kind in ENCODERS)

    @property
    def vae_scale_factor(self) -> int:
        """How many pixels a side one latent covers."""
        return FACTOR if self.vae is None else vae_room.downsampling(self.vae)

    @property
    def latent_channels(self) -> int:
        """How many channels the latents have; an inpainting network reads more."""
        config = getattr(self.transformer, "config", None)
        return 16 if config is None else min(config.in_channels, config.out_channels or config.in_channels)

    @property
    def patch_size(self) -> int:
        return PATCH if self.transformer is None else self.transformer.config.patch_size

    @property
    def default_sample_size(self) -> int:
        """Height and width of the latents of a picture whose size is not given."""
        return LATENTS if self.transformer is None else self.transformer.config.sample_size

    @property
    def tokenizer_max_length(self) -> int:
        return CLIP_TOKENS if self.tokenizer is None else self.tokenizer.model_max_length

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this many pixels."""
        return self.vae_scale_factor * self.patch_size

    @property
    def default_height(self) -> int:
        return self.default_sample_size * self.vae_scale_factor

    default_width = default_height

    @property
    def max_side(self) -> int:
        """The largest height or width in pixels that the position table allows."""
        return self.transformer.config.pos_embed_max_size * self.size_multiple

    @property
    def max_sequence_length(self) -> int:
        """The number of T5 tokens, padding included, this model is meant for: what its folder says, or SD3's 256."""
        return t5_length(self.info)

    def check_size(self, name: str, value: Any) -> int:
        """A height or width in pixels that can be drawn. Raises InputError naming the nearest that can."""
        multiple, value = self.size_multiple, whole_number(name, value, least=None)
        if self.transformer is not None and value > self.max_side:
            raise InputError(f"{name} {value} is larger than this model's {self.max_side}; use {self.max_side} or less")
        if value < multiple:
            raise InputError(f"{name} {value} is too small; it must be a multiple of {multiple}, {multiple} or more")
        if value % multiple:
            low = value // multiple * multiple
            raise InputError(f"{name} {value} is not a multiple of {multiple}; the nearest are {low} and {low + multiple}")
        return value

    def need(self, *names: str, to: str, without: str) -> None:
        """Raises InputError when a component is None, or the VAE another network's; `without` is the way out that needs none."""
        for name in names:
            if getattr(self, name) is None:
                raise InputError(f"no {name} is loaded to {to}; load one, or {without}")
        if "vae" in names and self.transformer is not None and self.vae.config.latent_channels != self.latent_channels:
            channels = f"{self.vae.config.latent_channels} channels, the transformer's {self.latent_channels}"
            raise InputError(f"the vae's latents have {channels}: it cannot {to} here; load the transformer's own, or {without}")

    def preview(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents [B, C, h, w] without decoding them, a colour for each, in the size that the VAE would give.

        For the "denoised" of a step callback, the estimate of the finished latents. The map to colours is fitted to the VAE when it is
        first asked for, in about the time of a picture, and saved with the pipeline.
        """
        self.need("vae", to="see latents by", without="decode them elsewhere")
        if not isinstance(latents, Tensor) or latents.ndim != 4 or latents.shape[1] != self.vae.config.latent_channels:
            raise InputError(f"latents of shape (any, {self.vae.config.latent_channels}, any, any) can be seen, not {told(latents)}")
        small = self.image_processor.postprocess(colours_of(latents, latent_rgb(self.vae)), output_type="pil")
        factor = self.vae_scale_factor
        return [image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC) for image in small]

    def prompt_warnings(self, prompts: list[str], max_sequence_length: int | None = None) -> list[str]:
        """One line for each encoder that would cut a prompt, with the words it would lose."""
        encoder, length = self.prompt_encoder, max_sequence_length or self.max_sequence_length
        lengths = encoder.lengths(length)
        return [
            f"prompt '{shown(text, SHOWN)}' is longer than the {lengths[i]:,} tokens {kind.title} reads; it loses '{shown(lost, SHOWN)}'"
            for i, (kind, _, network) in enumerate(encoder.rows())
            if network is not None
            for text, lost in encoder.lost_text(i, prompts, lengths[i])
        ]
