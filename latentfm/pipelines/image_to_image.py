"""LatentFMPipeline with the calls of diffusers' SD3 pipelines that begin from a picture, for AutoPipeline and scripts written for them."""

from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from torch import Tensor

from latentfm.bounds import MOST_STEPS
from latentfm.errors import InputError
from latentfm.pipelines.denoising import StepCallback
from latentfm.pipelines.prompts import Texts
from latentfm.pipelines.starting import Generators, Noise, at_level, clean_latents, mask_for_latents
from latentfm.pipelines.text_to_image import STOCK_GUIDANCE, STRENGTH, LatentFMPipeline, steps_left_out


class FromPicture(LatentFMPipeline):
    """What the two share. needs: the arguments that a call cannot do without, and what each is."""

    needs: dict[str, str] = {"image": "the picture to begin from"}

    def get_timesteps(self, num_inference_steps: int, strength: float, device: torch.device) -> tuple[Tensor, int]:
        """The timesteps of the run that the scheduler is set to, less those that `strength` leaves out, and how many steps remain."""
        left_out = steps_left_out(num_inference_steps, strength)
        first = left_out * getattr(self.scheduler, "order", 1)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return self.scheduler.timesteps[first:].to(device), num_inference_steps - left_out

    def check_inputs(
        self,
        prompt: Any,
        prompt_2: Any,
        prompt_3: Any,
        height: Any,
        width: Any,
        strength: Any,
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
        """Raises InputError for what the call would refuse; `strength` apart it is LatentFMPipeline's."""
        steps_left_out(MOST_STEPS, strength)
        super().check_inputs(
            prompt, prompt_2, prompt_3, height, width, negative_prompt, negative_prompt_2, negative_prompt_3, prompt_embeds,
            negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds, callback_on_step_end_tensor_inputs,
            max_sequence_length,
        )  # fmt: skip

    def called(self, given: dict[str, Any], more: dict[str, Any]) -> StableDiffusion3PipelineOutput | tuple:
        """LatentFMPipeline's answer to the arguments of a call, `given` by name, and to those that it alone has."""
        for name, what in self.needs.items():
            if given[name] is None:
                raise InputError(f"give {name}, {what}; LatentFMPipeline draws without one")
        return LatentFMPipeline.__call__(self, **{name: value for name, value in given.items() if name not in ("self", "more")}, **more)


class LatentFMImg2ImgPipeline(FromPicture):
    """A picture drawn from another one: StableDiffusion3Img2ImgPipeline's call and pictures; see LatentFMPipeline."""

    def prepare_latents(
        self,
        image: Tensor,
        timestep: Tensor,
        batch_size: int,
        num_images_per_prompt: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators = None,
    ) -> Tensor:
        """The state at `timestep` that a call begins with, of pictures [N, 3, H, W] in [-1, 1] or latents, for all pictures of a batch."""
        count = batch_size * num_images_per_prompt
        source = Noise.of(generator, None, None, 0.0, count)
        clean = clean_latents(self, image, source.generator, count, dtype)
        return at_level(clean, source.draw(clean.shape, device, dtype), timestep.flatten()[0].item() / 1000.0)

    def __call__(
        self,
        prompt: Texts = None,
        prompt_2: Texts = None,
        prompt_3: Texts = None,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
        strength: float = STRENGTH,
        num_inference_steps: int = 50,
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
        output_type: str = "pil",
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Tensor | None = None,
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        max_sequence_length: int | None = None,
        mu: float | None = None,
        **more: Any,
    ) -> StableDiffusion3PipelineOutput | tuple:
        """Pictures drawn from `image`, with noise for a share `strength` of the steps on it; `more` and all else are LatentFMPipeline's."""
        return self.called(locals(), more)


class LatentFMInpaintPipeline(FromPicture):
    """A part of a picture drawn anew: StableDiffusion3InpaintPipeline's call and latents; see LatentFMPipeline."""

    needs = FromPicture.needs | {"mask_image": "white where it is drawn anew, black where it stays"}

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
        image: Tensor | None = None,
        timestep: Tensor | None = None,
        is_strength_max: bool = True,
        return_noise: bool = False,
        return_image_latents: bool = False,
    ) -> tuple[Tensor, ...]:
        """(the state that a call begins with, its noise if return_noise, the clean latents if return_image_latents)."""
        source, clean = Noise.of(generator, None, None, 0.0, batch_size), None
        if return_image_latents or (latents is None and not is_strength_max):
            if image is None or timestep is None:
                raise InputError("image and timestep are needed, unless is_strength_max says that noise alone is meant")
            clean = clean_latents(self, image, source.generator, batch_size, dtype)
        noise = super().prepare_latents(batch_size, num_channels_latents, height, width, dtype, device, source.generator, latents)
        plain = latents is not None or is_strength_max
        start = noise if plain else at_level(clean, noise, timestep.flatten()[0].item() / 1000.0)
        return (start, *([noise] if return_noise else []), *([clean] if return_image_latents else []))

    def prepare_mask_latents(
        self,
        mask: Tensor,
        masked_image: Tensor,
        batch_size: int,
        num_images_per_prompt: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators,
        do_classifier_free_guidance: bool,
    ) -> tuple[Tensor, Tensor]:
        """The mask in the latents' size and the latents of the masked picture, for all pictures of a batch, with guidance twice."""
        count, twice = batch_size * num_images_per_prompt, 2 if do_classifier_free_guidance else 1
        small = mask_for_latents(mask, (height // self.vae_scale_factor, width // self.vae_scale_factor), count)
        latents = clean_latents(self, masked_image, generator, count, dtype)
        return tuple(each.to(device, dtype).repeat(twice, 1, 1, 1) for each in (small, latents))

    def __call__(
        self,
        prompt: Texts = None,
        prompt_2: Texts = None,
        prompt_3: Texts = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Any = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = STRENGTH,
        num_inference_steps: int = 50,
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
        mu: float | None = None,
        **more: Any,
    ) -> StableDiffusion3PipelineOutput | tuple:
        """`image` drawn anew where `mask_image` is white; `more` and all else are LatentFMPipeline's.

        Unlike the diffusers pipeline it decodes with the VAE's shift, takes latents of any number of channels, and keeps those under black
        to the bit.
        """
        return self.called(locals(), more)
