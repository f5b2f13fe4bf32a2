"""Prompts to the conditions that a call draws with: embeddings are taken, texts encoded, nothing at all is the null condition."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor

from latentfm.bounds import MOST_TOKENS
from latentfm.errors import InputError
from latentfm.models.prints import one_glance
from latentfm.models.text import Condition, PromptParts, assemble
from latentfm.pipelines.arguments import real_number, tensor, texts, whole_number
from latentfm.pipelines.components import Components
from latentfm.pipelines.denoising import repeated

NOTHING_GIVEN = 'give prompt or prompt_embeds, one of the two; the empty prompt is ""'
Texts = str | list[str] | None


class Prompts(Components):
    """A pipeline that reads prompts."""

    def encode_prompt(
        self,
        prompt: Texts,
        prompt_2: Texts = None,
        prompt_3: Texts = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Texts = None,
        negative_prompt_2: Texts = None,
        negative_prompt_3: Texts = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        max_sequence_length: int | None = None,
        lora_scale: float | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """(prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds) as the call takes them.

        The arguments are StableDiffusion3Pipeline's. Embeddings that are given come back as they are; those made here have a row for each
        picture, [prompts * num_images_per_prompt, ...]. The negative ones are None without guidance, and those of the null condition
        where no negative prompt is given.
        """
        given = self.check_prompts("prompt", [prompt, prompt_2, prompt_3], prompt_embeds, pooled_prompt_embeds)
        negatives = [negative_prompt, negative_prompt_2, negative_prompt_3]
        negative = self.check_prompts("negative_prompt", negatives, negative_prompt_embeds, negative_pooled_prompt_embeds)
        found = self.conditions(given, negative, do_classifier_free_guidance, max_sequence_length, clip_skip, lora_scale)
        device, times = device or self._execution_device, whole_number("num_images_per_prompt", num_images_per_prompt)
        made = [
            condition if condition is None or was[1] is not None else repeated(condition, times, device)
            for condition, was in zip(found, (given, negative), strict=True)
        ]
        embeds, pooled = zip(*((None, None) if each is None else (each.embeds, each.pooled) for each in made), strict=True)
        return *embeds, *pooled

    def check_prompts(self, name: str, prompts: list[Any], embeds: Any, pooled: Any) -> tuple[list[Any], Tensor | None, Tensor | None]:
        """What is given of a prompt or of the negative one: its texts for the three encoders, or its embeddings.

        Raises InputError for what is neither, is both, or does not go together.
        """
        joint_width, pooled_width = self.widths
        prompts = [texts(f"{name}{suffix}", value) for suffix, value in zip(("", "_2", "_3"), prompts, strict=True)]
        prefix = name.removesuffix("prompt")
        if embeds is not None and any(prompt is not None for prompt in prompts):
            raise InputError(f"give {name} or {name}_embeds, one of the two")
        embeds = tensor(f"{name}_embeds", embeds, (None, None, joint_width), "(prompts, tokens, the network's joint width)")
        pooled = tensor(f"{prefix}pooled_prompt_embeds", pooled, (None, pooled_width), "(prompts, the network's pooled width)")
        for given, lacking in ((f"{name}_embeds", f"{prefix}pooled_prompt_embeds"), (f"{prefix}pooled_prompt_embeds", f"{name}_embeds")):
            if (embeds is None) != (pooled is None) and (pooled if "pooled" in lacking else embeds) is None:
                raise InputError(f"{given} needs {lacking} beside it")
        if embeds is not None and pooled is not None and len(embeds) != len(pooled):
            raise InputError(f"{name}_embeds are of {len(embeds)} prompts, {prefix}pooled_prompt_embeds of {len(pooled)}")
        return prompts, embeds, pooled

    def conditions(
        self,
        given: tuple[list[Any], Tensor | None, Tensor | None],
        negative: tuple[list[Any], Tensor | None, Tensor | None],
        guided: bool,
        length: int | None = None,
        clip_skip: int | None = None,
        lora_scale: float | None = None,
        chunked: bool = False,
    ) -> tuple[Condition, Condition | None]:
        """The prompts' condition, a row each, and where `guided` the one to guide against; the two come from `check_prompts`.

        length: of T5, the model's own if None. clip_skip: how many more of CLIP's last layers are left out, of the prompts alone.
        lora_scale: the strength of the LoRAs on the text encoders while they read. chunked: a prompt too long is read in chunks, not cut.
        Raises InputError where nothing is given, nobody can read it, or the two do not fit together.
        """
        length = self.max_sequence_length if length is None else whole_number("max_sequence_length", length, most=MOST_TOKENS)
        skip = 0 if clip_skip is None else whole_number("clip_skip", clip_skip, least=0)
        prompts, embeds, pooled = given
        if embeds is None and (prompts[0] is None or prompts[0] == []):
            raise InputError(NOTHING_GIVEN)
        if embeds is None and not self.has_encoders:
            raise InputError("no text encoder is loaded to read the prompt; load one, or give prompt_embeds and pooled_prompt_embeds")
        scale = None if lora_scale is None else real_number("lora_scale", lora_scale, "to scale LoRAs by")
        against, chunks = None, 1
        if chunked and embeds is None and negative[1] is None:
            each = [[text for said in (prompts, negative[0]) for text in listed(said[i] or said[0])] for i in range(len(prompts))]
            chunks = self.prompt_encoder.chunks_of(each, length)
        with lora_scaled([self.text_encoder, self.text_encoder_2, self.text_encoder_3], scale), one_glance():
            if embeds is None:
                first = [prompts[0]] if isinstance(prompts[0], str) else prompts[0]
                others = [aligned(other, first) for other in prompts[1:]]
                parts = self.known_prompts.encode(self.prompt_encoder, first, length, *others, clip_skip=skip, chunks=chunks)
                condition = self.assemble(parts)
            else:
                condition = Condition(embeds, pooled)
            if guided:
                against = self.negative_condition(len(condition.embeds), length, *negative, scale is not None, chunks)
        if against is not None and len(against.embeds) != len(condition.embeds):
            raise InputError(f"negative_prompt_embeds are of {len(against.embeds)} prompts, and {len(condition.embeds)} are drawn")
        if against is not None and against.embeds.shape != condition.embeds.shape:
            raise InputError(
                f"prompt_embeds of shape {tuple(condition.embeds.shape)}, the negative's are {tuple(against.embeds.shape)}; "
                f"max_sequence_length, here {length}, must be the one that the given embeddings were made with"
            )
        return condition, against

    def negative_condition(
        self,
        count: int,
        length: int,
        texts: list[Texts],
        embeds: Tensor | None = None,
        pooled: Tensor | None = None,
        read_anew: bool = False,
        chunks: int = 1,
    ) -> Condition:
        """The condition guided against, [count, ...]: the given embeddings or prompt, or the null condition.

        read_anew: the null condition is not taken as it is kept, but read by the text encoders as they are at this moment.
        """
        if embeds is not None and pooled is not None:
            return Condition(embeds, pooled)
        prompt, prompt_2, prompt_3 = texts
        if not any(texts) and chunks == 1 and not (read_anew and self.has_encoders):
            return self.assemble(self.null.parts(length).map(lambda value: value.expand(count, *value.shape[1:])))
        prompts = [prompt or ""] * count if prompt is None or isinstance(prompt, str) else list(prompt)
        if len(prompts) != count:
            raise InputError(f"{len(prompts)} negative prompts for {count} prompts; give one for each, or a single one")
        others = [aligned(other, prompts) for other in (prompt_2, prompt_3)]
        return self.assemble(self.known_prompts.encode(self.prompt_encoder, prompts, length, *others, chunks=chunks))

    def assemble(self, parts: PromptParts) -> Condition:
        return assemble(parts, *self.widths)


@contextmanager
def lora_scaled(encoders: list[Any], scale: float | None) -> Iterator[None]:
    """A context with the LoRAs on the text encoders at `scale` times their weight; None leaves them."""
    scaled = [encoder for encoder in encoders if encoder is not None] if scale is not None else []
    for encoder in scaled:
        scale_lora_layers(encoder, scale)
    try:
        yield
    finally:
        for encoder in scaled:
            unscale_lora_layers(encoder, scale)


def listed(given: Texts) -> list[str]:
    """One text or several as a list; nothing is the empty text."""
    return [given or ""] if given is None or isinstance(given, str) else list(given)


def aligned(given: Texts, prompts: list[str]) -> list[str] | None:
    """A second prompt as a list as long as `prompts`; None stays None. Raises InputError for a list of another length."""
    if not given or isinstance(given, str):
        return [given] * len(prompts) if given else None
    if len(given) != len(prompts):
        raise InputError(f"{len(given)} texts for another encoder beside {len(prompts)} prompts; give one for each, or a single one")
    return list(given)
