"""LatentFMPipeline: prompts to pictures, with SD3's call and SD3's folder on disk.

    from latentfm import LatentFMPipeline
    pipe = LatentFMPipeline.from_pretrained("assets/emoji")
    pipe("a slice of pizza", generator=torch.Generator().manual_seed(0)).images[0].save("pizza.png")
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from latentfm.arguments import generators, names, pair, real_number, tensor, texts, told, whole_number
from latentfm.bounds import MOST_STEPS, MOST_TOKENS
from latentfm.errors import InputError
from latentfm.guided import GuidedVelocity, joined, repeated
from latentfm.interchange.pipelines import PipelineFiles
from latentfm.models import vae as vae_room
from latentfm.models.encoders import ENCODERS
from latentfm.models.folder import t5_length
from latentfm.models.text import Condition, NullCondition, PromptEncoder, PromptParts, assemble, evaluating
from latentfm.models.velocity import timesteps
from latentfm.sampling import Sampler
from latentfm.words import shown

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
SHOWN = 80  # characters of a prompt in a warning


@dataclass(frozen=True)
class Said:
    """What a model's folder says of itself beside its weights. It hangs on the components, so that it comes along where they go."""

    info: dict[str, Any] = field(default_factory=dict)
    null: NullCondition = field(default_factory=NullCondition)


class LatentFMPipeline(PipelineFiles, DiffusionPipeline):
    """Text-to-image pipeline with the components of StableDiffusion3Pipeline; text encoders and tokenizers may be None.

    LoRA adapters load, save, mix, fuse and unload as there: load_lora_weights, save_lora_weights, set_adapters, fuse_lora,
    unload_lora_weights.

    `info` holds what the model's folder says of itself in latentfm.json ("max_sequence_length": the T5 length it is
    meant for); `null` is its null condition, for the text encoders that are loaded now. Both go with the components: a pipeline made of
    another's draws what that one draws.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _optional_components = [
        "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor",
    ]  # fmt: skip
    _callback_tensor_inputs = ["latents", "prompt_embeds", "pooled_prompt_embeds"]

    def __init__(
        self,
        transformer: torch.nn.Module,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
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
        self.register_modules(
            vae=vae, text_encoder=text_encoder, text_encoder_2=text_encoder_2, text_encoder_3=text_encoder_3, tokenizer=tokenizer,
            tokenizer_2=tokenizer_2, tokenizer_3=tokenizer_3, transformer=transformer, scheduler=scheduler,
            image_encoder=image_encoder, feature_extractor=feature_extractor,
        )  # fmt: skip
        self.vae_scale_factor = vae_room.downsampling(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.say(next((said for part in self.carriers() if (said := getattr(part, "said", None))), Said()))

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
    def null(self) -> NullCondition:
        return self._said.null.read_by(self.prompt_encoder)

    @null.setter
    def null(self, value: NullCondition) -> None:
        value = NullCondition(self.prompt_encoder, value.by_length) if value.is_bare() else value
        self.say(Said(self._said.info, value.read_by(None)))  # an encoder that is taken out of the pipeline is not held on to

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """The tokenizers and encoders as one; made anew at each use, so that replaced components count."""
        config = self.transformer.config
        return PromptEncoder(
            [getattr(self, kind.tokenizer) for kind in ENCODERS],
            [getattr(self, kind.name) for kind in ENCODERS],
            config.joint_attention_dim,
            config.pooled_projection_dim,
        )

    @property
    def has_encoders(self) -> bool:
        return any(encoder is not None for encoder in self.prompt_encoder.encoders)

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this many pixels."""
        return self.vae_scale_factor * self.transformer.config.patch_size

    @property
    def default_height(self) -> int:
        return self.transformer.config.sample_size * self.vae_scale_factor

    default_width = default_height

    @property
    def max_side(self) -> int:
        """The largest height or width in pixels that the position table allows."""
        return self.transformer.config.pos_embed_max_size * self.size_multiple

    @property
    def max_sequence_length(self) -> int:
        """The number of T5 tokens, padding included, this model is meant for: what its folder says, or SD3's 256."""
        return t5_length(self.info)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def num_evaluations(self) -> int:
        """How often the network was asked in the last call: once a step with Euler's method, a guided step counting once."""
        return self._evaluations

    @property
    def interrupt(self) -> bool:
        """Set pipe._interrupt = True in a step callback to keep the latents as they are from then on."""
        return self._interrupt

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

    def check_size(self, name: str, value: Any) -> int:
        """A height or width in pixels that can be drawn. Raises InputError naming the nearest that can."""
        multiple, value = self.size_multiple, whole_number(name, value, least=None)
        if value > self.max_side:
            raise InputError(f"{name} {value} is larger than this model's {self.max_side}; use {self.max_side} or less")
        if value < multiple:
            raise InputError(f"{name} {value} is too small; it must be a multiple of {multiple}, {multiple} or more")
        if value % multiple:
            low = value // multiple * multiple
            raise InputError(f"{name} {value} is not a multiple of {multiple}; the nearest are {low} and {low + multiple}")
        return value

    def check_prompts(self, name: str, prompts: list[Any], embeds: Any, pooled: Any) -> tuple[list[Any], Tensor | None, Tensor | None]:
        """What is given of a prompt or of the negative one: its texts for the three encoders, or its embeddings.

        Raises InputError for what is neither, is both, or does not go together.
        """
        config = self.transformer.config
        prompts = [texts(f"{name}{suffix}", value) for suffix, value in zip(("", "_2", "_3"), prompts, strict=True)]
        prefix = name.removesuffix("prompt")
        if embeds is not None and any(prompt is not None for prompt in prompts):
            raise InputError(f"give {name} or {name}_embeds, one of the two")
        tokens = (None, None, config.joint_attention_dim)
        embeds = tensor(f"{name}_embeds", embeds, tokens, "(prompts, tokens, the network's joint width)")
        widths = (None, config.pooled_projection_dim)
        pooled = tensor(f"{prefix}pooled_prompt_embeds", pooled, widths, "(prompts, the network's pooled width)")
        for given, lacking in ((f"{name}_embeds", f"{prefix}pooled_prompt_embeds"), (f"{prefix}pooled_prompt_embeds", f"{name}_embeds")):
            if (embeds is None) != (pooled is None) and (pooled if "pooled" in lacking else embeds) is None:
                raise InputError(f"{given} needs {lacking} beside it")
        if embeds is not None and pooled is not None and len(embeds) != len(pooled):
            raise InputError(f"{name}_embeds are of {len(embeds)} prompts, {prefix}pooled_prompt_embeds of {len(pooled)}")
        return prompts, embeds, pooled

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 7.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        negative_prompt_3: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["LatentFMPipeline", int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        max_sequence_length: int | None = None,
        solver: str = "euler",
        schedule: str = "model",
        shift: float | None = None,
        guidance: str = "cfg",
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        zero_init: int = 0,
        noise: float = 1.0,
        reference: torch.nn.Module | None = None,
    ) -> StableDiffusion3PipelineOutput | tuple[list[Image.Image] | Tensor]:
        """Generates pictures; the arguments up to max_sequence_length are StableDiffusion3Pipeline's, with its picture.

        height, width: pixels, multiples of `size_multiple`. guidance_scale w: v_u + w (v_c - v_u); 1 or less is no guidance.
        negative_prompt: what the guidance moves away from, the null condition unless given. generator: one, or a list with
        one a picture. latents: the starting noise [B, C, height / f, width / f]. max_sequence_length: T5 tokens, padding
        included; the model's own unless given (stock diffusers' default is 256). output_type: "pil", "np", "pt" or "latent".
        solver to noise: see `latentfm.sampling.Sampler`, by name. reference: the weaker network of guidance="autoguidance". The network's
        evaluations are counted in `num_evaluations`.
        Raises InputError for arguments that cannot be used.
        """
        height = self.check_size("height", self.default_height if height is None else height)
        width = self.check_size("width", self.default_width if width is None else width)
        steps = whole_number("num_inference_steps", num_inference_steps, most=MOST_STEPS)
        images_each = whole_number("num_images_per_prompt", num_images_per_prompt)
        length = self.max_sequence_length if max_sequence_length is None else max_sequence_length
        length = whole_number("max_sequence_length", length, most=MOST_TOKENS)
        scale = real_number("guidance_scale", guidance_scale, "to guide with; 1 is no guidance, 3 to 7 is usual")
        shift = None if shift is None else real_number("shift", shift, "to shift the times by")
        interval = None if guidance_interval is None else pair("guidance_interval", guidance_interval)
        sampler = Sampler(
            steps, scale, solver, schedule, shift, guidance, real_number("guidance_rescale", guidance_rescale, "from 0 to 1"), interval,
            whole_number("zero_init", zero_init, least=0), real_number("noise", noise, "from 0 to 2"),
        )  # fmt: skip
        if reference is not None and not isinstance(reference, torch.nn.Module):
            raise InputError(f"reference must be a network, as another pipeline's transformer, not {told(reference)}")
        if (reference is None) == (guidance == "autoguidance"):
            raise InputError('guidance="autoguidance" and reference, the weaker network that it guides against, need each other')
        given, embeds, pooled = self.check_prompts("prompt", [prompt, prompt_2, prompt_3], prompt_embeds, pooled_prompt_embeds)
        negatives = [negative_prompt, negative_prompt_2, negative_prompt_3]
        negative_given = self.check_prompts("negative_prompt", negatives, negative_prompt_embeds, negative_pooled_prompt_embeds)
        if embeds is None and (given[0] is None or given[0] == []):
            raise InputError('give prompt or prompt_embeds, one of the two; the empty prompt is ""')
        if embeds is None and not self.has_encoders:
            raise InputError("no text encoder is loaded to read the prompt; load one, or give prompt_embeds and pooled_prompt_embeds")
        generator = generators(generator)
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"no output_type {told(output_type)}; there are {', '.join(OUTPUT_TYPES)}")
        wanted = callback_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        self._guidance_scale, self._interrupt, self._evaluations = scale, False, 0
        guided = self.do_classifier_free_guidance and reference is None
        device = self._execution_device

        if embeds is None:
            prompts = [given[0]] if isinstance(given[0], str) else given[0]
            condition = self.assemble(self.prompt_encoder.encode(prompts, length, *(aligned(other, prompts) for other in given[1:])))
        else:
            condition = Condition(embeds, pooled)
        count = condition.embeds.shape[0]
        negative = None
        if guided:
            negative = self.negative_condition(count, length, *negative_given[0], *negative_given[1:])
            if negative.embeds.shape != condition.embeds.shape:
                raise InputError(
                    f"prompt_embeds of shape {tuple(condition.embeds.shape)}, the negative's are {tuple(negative.embeds.shape)}; "
                    f"max_sequence_length, here {length}, must be the one that the given embeddings were made with"
                )
        condition = repeated(condition, images_each, device)
        if negative is not None:
            condition = joined(repeated(negative, images_each, device), condition)

        shape = (count * images_each, self.transformer.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        latents = starting_noise(latents, shape, generator, device, condition.embeds.dtype)
        grid = sampler.grid(self.scheduler, shape[-2] * shape[-1] // self.transformer.config.patch_size**2)
        self._num_timesteps = steps
        field = GuidedVelocity(self, sampler, grid, condition, reference)

        def on_step(i: int, t: Tensor, x: Tensor) -> Tensor | None:
            if self._interrupt:
                return None
            bar.update()
            if callback_on_step_end is None:
                return None
            tensors = {"latents": x, "prompt_embeds": field.condition.embeds, "pooled_prompt_embeds": field.condition.pooled}
            answer = callback_on_step_end(self, i, timesteps(grid[i]), {name: tensors[name] for name in wanted}) or {}
            if not isinstance(answer, dict):
                raise InputError(f"callback_on_step_end must return a dict of tensors or nothing, not {told(answer)}")
            field.change(answer.get("prompt_embeds"), answer.get("pooled_prompt_embeds"))
            return answer.get("latents")

        with self.progress_bar(total=steps) as bar, evaluating(self.transformer, self.vae, reference):
            images = sampler.integrate(field, latents, grid, generator, on_step)
            if output_type != "latent":
                images = self.image_processor.postprocess(vae_room.decode(self.vae, images).float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return StableDiffusion3PipelineOutput(images=images) if return_dict else (images,)

    def assemble(self, parts: PromptParts) -> Condition:
        config = self.transformer.config
        return assemble(parts, config.joint_attention_dim, config.pooled_projection_dim)

    def negative_condition(
        self,
        count: int,
        length: int,
        prompt: str | list[str] | None,
        prompt_2: str | list[str] | None,
        prompt_3: str | list[str] | None,
        embeds: Tensor | None,
        pooled: Tensor | None,
    ) -> Condition:
        """The condition guided against, [count, ...]: the given embeddings or prompt, or the null condition."""
        if embeds is not None and pooled is not None:
            return Condition(embeds, pooled)
        if not (prompt or prompt_2 or prompt_3):
            return self.assemble(self.null.parts(length).map(lambda value: value.expand(count, *value.shape[1:])))
        prompts = [prompt or ""] * count if prompt is None or isinstance(prompt, str) else list(prompt)
        if len(prompts) != count:
            raise InputError(f"{len(prompts)} negative prompts for {count} prompts; give one for each, or a single one")
        return self.assemble(self.prompt_encoder.encode(prompts, length, aligned(prompt_2, prompts), aligned(prompt_3, prompts)))


def callback_tensors(callback: Any, inputs: Any, known: list[str]) -> list[str]:
    """The names of the tensors that a step callback is given. Raises InputError for what is none, or a name that is not known."""
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        inputs = callback.tensor_inputs
    if callback is not None and not callable(callback):
        raise InputError(f"callback_on_step_end must be a function, not {told(callback)}")
    return names("callback_on_step_end_tensor_inputs", inputs, known)


def starting_noise(latents: Any, shape: tuple[int, ...], generator: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The noise that a call begins with, on `device`: `latents` as given, or drawn. Raises InputError for another shape than `shape`."""
    if latents is None:
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise InputError(f"{len(generator)} generators for {shape[0]} pictures; give one for each, or a single one")
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    if not isinstance(latents, Tensor) or not latents.is_floating_point() or tuple(latents.shape) != shape:
        what = f"of shape {tuple(latents.shape)}" if isinstance(latents, Tensor) else told(latents)
        raise InputError(f"latents {what}, these arguments need floating-point ones of shape {shape}")
    return latents.to(device)


def aligned(given: str | list[str] | None, prompts: list[str]) -> list[str] | None:
    """A second prompt as a list as long as `prompts`; None stays None. Raises InputError for a list of another length."""
    if not given or isinstance(given, str):
        return [given] * len(prompts) if given else None
    if len(given) != len(prompts):
        raise InputError(f"{len(given)} texts for another encoder beside {len(prompts)} prompts; give one for each, or a single one")
    return list(given)
