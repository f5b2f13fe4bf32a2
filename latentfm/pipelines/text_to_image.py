"""LatentFMPipeline: prompts to pictures, with SD3's call and SD3's folder on disk.

    from latentfm import LatentFMPipeline
    pipe = LatentFMPipeline.from_pretrained("assets/emoji")
    pipe("a slice of pizza", generator=torch.Generator().manual_seed(0)).images[0].save("pizza.png")
"""

import logging
from typing import Any, Literal, get_args

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from PIL import Image
from torch import Tensor

from latentfm import flow
from latentfm.bounds import MOST_STEPS, MOST_TOKENS
from latentfm.errors import InputError
from latentfm.models import vae as vae_room
from latentfm.models.onednn import laid_out
from latentfm.models.text import evaluating
from latentfm.pipelines.arguments import names, numbers, pair, real_number, told, whole_number
from latentfm.pipelines.denoising import GuidedVelocity, SkipLayers, StepCallback, StepEnd, Times, integrate, joined, repeated
from latentfm.pipelines.ip_adapter import ImagePrompts
from latentfm.pipelines.prompts import NOTHING_GIVEN, Prompts, Texts
from latentfm.pipelines.starting import Canvas, Generators, Noise, clean_latents, prepared_picture
from latentfm.sampling import Guidance, Sampler, Schedule, Solver

logger = logging.getLogger(__name__)
STOCK_GUIDANCE = float("7")  # StableDiffusion3Pipeline's; this very object stands for none given, which a caller's own 7.0 is not
STRENGTH = 0.6  # of a picture to begin from, StableDiffusion3Img2ImgPipeline's
LongPrompts = Literal["cut", "chunks"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class LatentFMPipeline(Prompts, ImagePrompts):
    """Text-to-image pipeline with StableDiffusion3Pipeline's components, arguments and pictures; from a picture too, or into one.

    See `Components` for what it is made of. Beside stock's it takes solvers, schedules and rules of guidance by name, seeds, and pictures
    to begin with.
    """

    _callback_tensor_inputs = [
        "latents", "prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds", "denoised",
    ]  # fmt: skip
    _guidance_scale, _skip_layer_guidance_scale, _skip_guidance_layers = 7.0, 2.8, None
    _clip_skip, _joint_attention_kwargs = None, None
    _num_timesteps, _evaluations, _interrupt, _told_of_guidance = 0, 0, False, False

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def skip_guidance_layers(self) -> list[int] | None:
        return self._skip_guidance_layers

    @property
    def skip_layer_guidance_scale(self) -> float:
        return self._skip_layer_guidance_scale

    @property
    def clip_skip(self) -> int | None:
        return self._clip_skip

    @property
    def joint_attention_kwargs(self) -> dict[str, Any] | None:
        return self._joint_attention_kwargs

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

    def guidance_of(self, given: Any) -> float:
        """The scale of a call: 1 where none is given to weights that have guidance in them. More than that is told, once, and done."""
        scale = real_number("guidance_scale", given, "to guide with; 1 is no guidance, 3 to 7 is usual")
        inside = self.distilled_guidance
        if inside is None:
            return scale
        if given is STOCK_GUIDANCE:
            return 1.0
        if scale > 1 and not self._told_of_guidance:
            self._told_of_guidance = True
            logger.warning("this model has guidance %g in its weights: guidance %g comes on top of it; 1 is its own", inside, scale)
        return scale

    def check_inputs(
        self,
        prompt: Any,
        prompt_2: Any,
        prompt_3: Any,
        height: Any,
        width: Any,
        negative_prompt: Any = None,
        negative_prompt_2: Any = None,
        negative_prompt_3: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        callback_on_step_end_tensor_inputs: Any = ("latents",),
        max_sequence_length: Any = None,
    ) -> None:
        """Raises InputError for sizes, prompts, embeddings, callback tensors or a length that the call would refuse."""
        self.check_size("height", height)
        self.check_size("width", width)
        if prompt is None and prompt_embeds is None:
            raise InputError(NOTHING_GIVEN)
        self.check_prompts("prompt", [prompt, prompt_2, prompt_3], prompt_embeds, pooled_prompt_embeds)
        negatives = [negative_prompt, negative_prompt_2, negative_prompt_3]
        self.check_prompts("negative_prompt", negatives, negative_prompt_embeds, negative_pooled_prompt_embeds)
        callback_tensors(None, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        if max_sequence_length is not None:
            whole_number("max_sequence_length", max_sequence_length, most=MOST_TOKENS)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators,
        latents: Tensor | None = None,
    ) -> Tensor:
        """The noise that a call begins with, [batch_size, num_channels_latents, height / f, width / f]; given latents are moved there."""
        shape = (batch_size, num_channels_latents, height // self.vae_scale_factor, width // self.vae_scale_factor)
        if latents is not None:
            return latents.to(device, dtype)
        return Noise.of(generator, None, None, 0.0, batch_size).draw(shape, device, dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts = None,
        prompt_2: Texts = None,
        prompt_3: Texts = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = STOCK_GUIDANCE,
        negative_prompt: Texts = None,
        negative_prompt_2: Texts = None,
        negative_prompt_3: Texts = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        max_sequence_length: int | None = None,
        skip_guidance_layers: list[int] | None = None,
        skip_layer_guidance_scale: float = 2.8,
        skip_layer_guidance_stop: float = 0.2,
        skip_layer_guidance_start: float = 0.01,
        mu: float | None = None,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
        padding_mask_crop: int | None = None,
        seed: int | list[int] | None = None,
        variation_seed: int | list[int] | None = None,
        variation_strength: float = 0.0,
        long_prompts: LongPrompts = "cut",
        solver: Solver | None = None,
        schedule: Schedule = "model",
        shift: float | None = None,
        guidance: Guidance = "cfg",
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        zero_init: int = 0,
        noise: float = 1.0,
        reference: torch.nn.Module | None = None,
    ) -> StableDiffusion3PipelineOutput | tuple[list[Image.Image] | Tensor]:
        """Generates pictures; the arguments up to mu are StableDiffusion3Pipeline's, with its picture.

        height, width: pixels, multiples of `size_multiple`. guidance_scale w: v_u + w (v_c - v_u); 1 or less is no guidance,
        and what weights with guidance in them (`distilled_guidance`) draw with unless it is given.
        negative_prompt: what the guidance moves away from, the null condition unless given. generator: one, or a list with one a picture.
        latents: the starting noise [B, C, height / f, width / f]. max_sequence_length: T5 tokens, padding included; the model's own unless
        given (stock diffusers' default is 256). output_type: "pil", "np", "pt" or "latent", in the pipeline's dtype.

        image: a picture (or several, or latents) to begin from, with noise for a share `strength` of the steps on it: 1 is noise alone, 0.6
        unless given. mask_image: white where it is drawn anew, black where `image` stays. padding_mask_crop: pixels around the mask's box;
        that part alone is drawn, at full size. masked_image_latents: for networks that read them. strength without an image: latents are
        taken for the state there, as `invert` returns it.
        seed: instead of generators, a number for each picture, or the first one's, the next having the next. variation_seed and
        variation_strength: the noise is turned towards that of another seed.
        long_prompts: "cut" leaves out, with a warning, the words that an encoder has no room for; "chunks" has it read them piece by piece.
        solver to noise: see `latentfm.sampling.Sampler`; without solver and schedule the pipeline's scheduler makes the steps, any
        flow-matching one of diffusers'. reference: the weaker network of guidance="autoguidance". The network's evaluations are counted in
        `num_evaluations`.
        Raises InputError for arguments that cannot be used.
        """
        self.need("transformer", "scheduler", to="draw with", without="use encode_prompt alone")
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"no output_type {told(output_type)}; there are {', '.join(OUTPUT_TYPES)}")
        if long_prompts not in get_args(LongPrompts):
            raise InputError(f"no long_prompts {told(long_prompts)}; there are {', '.join(get_args(LongPrompts))}")
        if output_type != "latent":
            self.need("vae", to="decode", without='ask for output_type="latent"')
        height = self.check_size("height", self.default_height if height is None else height)
        width = self.check_size("width", self.default_width if width is None else width)
        sigmas = None if sigmas is None else numbers("sigmas", sigmas)
        steps = whole_number("num_inference_steps", num_inference_steps if sigmas is None else len(sigmas), most=MOST_STEPS)
        images_each = whole_number("num_images_per_prompt", num_images_per_prompt)
        scale = self.guidance_of(guidance_scale)
        sampler = Sampler(
            steps, scale, solver, schedule, None if shift is None else real_number("shift", shift, "to shift the times by"), guidance,
            real_number("guidance_rescale", guidance_rescale, "from 0 to 1"),
            None if guidance_interval is None else pair("guidance_interval", guidance_interval),
            whole_number("zero_init", zero_init, least=0), real_number("noise", noise, "from 0 to 2"),
        )  # fmt: skip
        if reference is not None:
            check_reference(self.transformer, reference)
        if (reference is None) == (guidance == "autoguidance"):
            raise InputError('guidance="autoguidance" and reference, the weaker network that it guides against, need each other')
        canvas = Canvas(image, mask_image, masked_image_latents, padding_mask_crop)
        if strength is not None and image is None and latents is None:
            raise InputError(f"strength {told(strength)} needs image, or latents, the state there, as invert returns it")
        left_out = 0 if image is None and strength is None else steps_left_out(steps, STRENGTH if strength is None else strength)
        wanted = callback_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        skip = SkipLayers.of(skip_guidance_layers, skip_layer_guidance_start, skip_layer_guidance_stop, steps - left_out, self.transformer)
        given = self.check_prompts("prompt", [prompt, prompt_2, prompt_3], prompt_embeds, pooled_prompt_embeds)
        negatives = [negative_prompt, negative_prompt_2, negative_prompt_3]
        negative = self.check_prompts("negative_prompt", negatives, negative_prompt_embeds, negative_pooled_prompt_embeds)
        self._guidance_scale, self._interrupt, self._evaluations, self._clip_skip = scale, False, 0, clip_skip
        self._skip_guidance_layers = skip_guidance_layers
        self._skip_layer_guidance_scale = real_number("skip_layer_guidance_scale", skip_layer_guidance_scale, "to guide with")
        guided = self.do_classifier_free_guidance and reference is None

        lora_scale = joint_attention_kwargs.get("scale") if isinstance(joint_attention_kwargs, dict) else None
        condition, against = self.conditions(given, negative, guided, max_sequence_length, clip_skip, lora_scale, long_prompts == "chunks")
        pictures, device = len(condition.embeds) * images_each, self._execution_device
        source = Noise.of(generator, seed, variation_seed, variation_strength, pictures)
        condition = repeated(condition, images_each, device)
        if against is not None:
            condition = joined(repeated(against, images_each, device), condition)
        attention = self.attention_arguments(joint_attention_kwargs, ip_adapter_image, ip_adapter_image_embeds, pictures, guided)
        self._joint_attention_kwargs = attention or None

        tokens = (height // self.size_multiple) * (width // self.size_multiple)
        times = Times.of(self, sampler, tokens, left_out, sigmas, None if mu is None else real_number("mu", mu, "of dynamic shifting"))
        self._num_timesteps = times.steps
        shape = (pictures, self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        level = self.scheduler.sigmas[times.first].item()
        start = canvas.begin(self, shape, source, latents, level, left_out == 0, condition.embeds.dtype)
        field = GuidedVelocity(self, sampler, times, condition, reference, skip, attention, start.channels)
        laid = laid_out(self.transformer, len(times.timesteps))
        with self.progress_bar(total=times.steps) as bar, evaluating(self.transformer, self.vae, reference), laid:
            step_end = StepEnd(self, field, times, bar, callback_on_step_end, wanted, start.kept)
            found = integrate(self, sampler, times, field, start.x, source.generator, step_end)
            if output_type == "latent":
                found = found.to(condition.embeds.dtype)
            else:
                found = self.image_processor.postprocess(vae_room.decode(self.vae, found).float(), output_type=output_type)
        if output_type == "pil":
            found = canvas.overlaid(self, found, height, width)
        self.maybe_free_model_hooks()
        return StableDiffusion3PipelineOutput(images=found) if return_dict else (found,)

    @torch.no_grad()
    def invert(
        self,
        image: Any,
        prompt: Texts = "",
        prompt_2: Texts = None,
        prompt_3: Texts = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 1.0,
        negative_prompt: Texts = None,
        strength: float = 1.0,
        max_sequence_length: int | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        solver: Solver = "midpoint",
        schedule: Schedule = "model",
        shift: float | None = None,
    ) -> Tensor:
        """The noise [B, C, height / f, width / f], float32, that draws `image` with this prompt: the solver run from data to noise.

        Give it back as `latents`, with the same solver, schedule, steps and strength: the same prompt and guidance redraw the picture, to
        the solver's error; another prompt edits it. With a strength below 1 it stops half way, at the state from which so many of the
        steps draw the picture. Guidance above 1 is less exact. Raises InputError as the call.
        """
        self.need("transformer", to="ask for the way back", without="load the pipeline with it")
        height = self.check_size("height", self.default_height if height is None else height)
        width = self.check_size("width", self.default_width if width is None else width)
        steps = whole_number("num_inference_steps", num_inference_steps, most=MOST_STEPS)
        scale = real_number("guidance_scale", guidance_scale, "to guide with; 1 is no guidance")
        sampler = Sampler(steps, scale, solver, schedule, None if shift is None else real_number("shift", shift, "to shift the times by"))
        if solver not in flow.SOLVERS:
            raise InputError(f"solver {told(solver)} cannot go back from data to noise; {', '.join(flow.SOLVERS)} can")
        given = self.check_prompts("prompt", [prompt, prompt_2, prompt_3], None, None)
        against = self.check_prompts("negative_prompt", [negative_prompt, None, None], None, None)
        left_out = steps_left_out(steps, strength)
        self._guidance_scale, self._interrupt, self._evaluations = scale, False, 0
        condition, negative = self.conditions(given, against, self.do_classifier_free_guidance, max_sequence_length)
        count, device = len(condition.embeds), self._execution_device
        condition = repeated(condition, 1, device)
        if negative is not None:
            condition = joined(repeated(negative, 1, device), condition)
        pixels = prepared_picture(self, image, height, width)
        clean = clean_latents(self, pixels, None, count, condition.embeds.dtype, sample=False)
        times = Times.of(self, sampler, (height // self.size_multiple) * (width // self.size_multiple), left_out).reversed()
        attention = self.attention_arguments(joint_attention_kwargs, None, None, count, negative is not None)
        laid = laid_out(self.transformer, len(times.timesteps))
        with self.progress_bar(total=times.steps) as bar, evaluating(self.transformer, self.vae), laid:
            field = GuidedVelocity(self, sampler, times, condition, attention=attention)
            found = integrate(self, sampler, times, field, clean, None, StepEnd(self, field, times, bar, None, [], None))
        self.maybe_free_model_hooks()
        return found


def check_reference(network: torch.nn.Module, reference: Any) -> None:
    """Raises InputError for what is no network, or one that does not read and give what `network` does."""
    if not isinstance(reference, torch.nn.Module):
        raise InputError(f"reference must be a network, as another pipeline's transformer, not {told(reference)}")
    ours, theirs = (getattr(each, "config", None) or {} for each in (network, reference))
    for name in ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim"):
        if name in ours and name in theirs and ours[name] != theirs[name]:
            raise InputError(f"reference is of another model: its {name} is {theirs[name]}, the network's {ours[name]}")


def callback_tensors(callback: Any, inputs: Any, known: list[str]) -> list[str]:
    """The names of the tensors that a step callback is given. Raises InputError for what is none, or a name that is not known."""
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        inputs = callback.tensor_inputs
    if callback is not None and not callable(callback):
        raise InputError(f"callback_on_step_end must be a function, not {told(callback)}")
    return names("callback_on_step_end_tensor_inputs", inputs, known)


def steps_left_out(steps: int, strength: Any) -> int:
    """How many of the first steps a run from a picture leaves out, as StableDiffusion3Img2ImgPipeline counts them.

    Raises InputError for no share from 0 to 1, and for one that leaves no step.
    """
    share = real_number("strength", strength, "from 0, the picture itself, to 1, noise")
    if not 0 <= share <= 1:
        raise InputError(f"strength {share:g} is not from 0, the picture itself, to 1, noise")
    left_out = int(max(steps - min(steps * share, steps), 0))
    if left_out >= steps:
        raise InputError(f"strength {share:g} of {steps} steps is less than one step; give a larger strength, or more num_inference_steps")
    return left_out
