"""Pictures drawn while training, from the averaged weights, for fixed prompts and seeds."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from PIL import Image

from latentfm.bounds import DEFAULT_PROMPTS
from latentfm.config import SampleOptions
from latentfm.data.sources import Sample
from latentfm.errors import InputError
from latentfm.interchange.components import load_scheduler
from latentfm.models import vae as vae_room
from latentfm.models.folder import t5_length
from latentfm.models.mmdit import MMDiT
from latentfm.models.text import Condition, PromptParts, assemble
from latentfm.pipelines.text_to_image import LatentFMPipeline
from latentfm.sampling import Sampler
from latentfm.training.distributed.processes import raise_on_all_ranks
from latentfm.training.distributed.shards import is_split
from latentfm.training.models import Models
from latentfm.training.records.sample_files import write_step
from latentfm.training.validation import evaluating


class SamplePictures:
    """Draws the same prompts with the same seeds each time it is asked; the text encoders are used once, here.

    samples: whose first captions are the prompts where the options have none, spread over all of them.
    size: (width, height) of the pictures in pixels.
    folder: where they are written, see `latentfm.training.records.sample_files`.
    encode: gives the prompts' parts for a T5 length; the models' text encoders do where it is not given.
    """

    def __init__(
        self, options: SampleOptions, models: Models, samples: Sequence[Sample], size: tuple[int, int], folder: Path, device: torch.device,
        encode: Callable[[Sequence[str], int], PromptParts] | None = None,
    ):  # fmt: skip
        self.options, self.models, self.size, self.folder, self.device = options, models, size, folder, device
        self.prompts = prompts_of(options, samples)
        length = t5_length(models.info)
        self.condition = self.assembled((encode or models.encoder.encode)(self.prompts, length))
        self.negative = self.assembled(models.null.parts(length).map(lambda value: value.expand(len(self.prompts), *value.shape[1:])))

    def assembled(self, parts: PromptParts) -> Condition:
        """The condition in float32, whose precision the noise of the pictures takes on, whatever the encoders run in."""
        parts = parts.map(lambda value: value.to(self.device, torch.float32))
        return assemble(parts, self.models.joint_dim, self.models.pooled_dim)

    def draw(self, network: MMDiT, step: int, accelerator: Accelerator) -> Path | None:
        """Writes the pictures of `step`, and returns the path of samples/step-<step, 8 digits>.png on the main process.

        Call it on every process, within EMA.applied_to: each draws its share of the prompts, all in as many forward passes of as many
        rows. A picture depends on its prompt and seed alone, whatever the number of processes. Memory that runs out, or pictures that
        are no numbers, is told and leaves this step without pictures (the answer is None everywhere), unless the weights are split over
        the processes and memory ran out, where they would wait for each other: there it is raised. Raises InputError, on every
        process, when the disk does not take the pictures.
        """
        rank, world = accelerator.process_index, accelerator.num_processes
        own = list(range(rank, len(self.prompts), world))
        padded = own + [0] * (-(-len(self.prompts) // world) - len(own))
        problem, images = None, []
        try:
            images = self.pictures(network, padded)[: len(own)]
        except InputError as error:  # latents or pixels that are not finite
            problem = str(error)
        except torch.OutOfMemoryError as error:
            if world > 1 and is_split(network):
                raise
            problem = str(error).split("\n")[0] + ". Take fewer sample.prompts"
        if problem is not None:  # out here the error no longer holds on to what had been allocated
            clear_device_cache(garbage_collection=True)
        gathered = gather_object([(own, images, problem)])
        problems = [problem for _, _, problem in gathered if problem is not None]
        if problems:
            accelerator.print(f"no pictures at step {step}, the training goes on: {problems[0]}")
            return None
        path = None
        with raise_on_all_ranks(accelerator):
            if accelerator.is_main_process:
                numbered = [pair for indices, images, _ in gathered for pair in zip(indices, images, strict=True)]
                images = [image for _, image in sorted(numbered, key=lambda pair: pair[0])]
                options = self.options
                settings = {"seed": options.seed, "steps": options.steps, "guidance": options.guidance, **Sampler.of(options).unusual()}
                path = write_step(self.folder, step, images, self.prompts, settings)
        return path

    def pictures(self, network: MMDiT, indices: list[int]) -> list[Image.Image]:
        """The pictures of the prompts `indices`; the network is afterwards as it was before. The VAE runs in float32, autocast or not."""
        checkpointing = network.gradient_checkpointing
        try:
            with self.models.vae_on(self.device) as vae, evaluating(network):
                pipe = LatentFMPipeline(network, load_scheduler(self.models.folder), vae)
                pipe.set_progress_bar_config(disable=True)
                latents = pipe(
                    prompt_embeds=self.condition.embeds[indices], pooled_prompt_embeds=self.condition.pooled[indices],
                    negative_prompt_embeds=self.negative.embeds[indices], negative_pooled_prompt_embeds=self.negative.pooled[indices],
                    width=self.size[0], height=self.size[1], **asdict(Sampler.of(self.options)),
                    generator=[torch.Generator().manual_seed(self.options.seed + index) for index in indices], output_type="latent",
                ).images  # fmt: skip
                # one by one: decoding all of them at once would be the peak of the run's memory
                with torch.autocast(latents.device.type, enabled=False):
                    pixels = torch.cat([vae_room.decode(vae, picture[None]) for picture in latents])
                return pipe.image_processor.postprocess(pixels, output_type="pil")
        finally:
            network.gradient_checkpointing = checkpointing


def prompts_of(options: SampleOptions, samples: Sequence[Sample]) -> list[str]:
    """What is drawn: the options' prompts, or first captions spread over all samples."""
    captions = list(dict.fromkeys(sample.captions[0] for sample in samples))
    return options.prompts or captions[:: max(1, len(captions) // DEFAULT_PROMPTS)][:DEFAULT_PROMPTS]
