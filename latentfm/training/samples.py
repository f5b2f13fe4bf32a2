"""Pictures drawn while training, from the averaged weights, for fixed prompts and seeds."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from latentfm.config import SampleOptions
from latentfm.models.folder import t5_length
from latentfm.models.mmdit import MMDiT
from latentfm.models.text import Condition, assemble
from latentfm.pictures import grid
from latentfm.pipeline import LatentFMPipeline
from latentfm.training.prepare import CachedDataset, Models

DEFAULT_PROMPTS = 8


class SamplePictures:
    """Draws the same prompts with the same seeds each time it is asked; the text encoders are used once, here."""

    def __init__(self, options: SampleOptions, models: Models, data: CachedDataset, folder: Path, device: torch.device):
        self.options, self.models, self.folder, self.device = options, models, folder, device
        spread = data.samples[:: max(1, len(data.samples) // DEFAULT_PROMPTS)][:DEFAULT_PROMPTS]
        self.prompts = options.prompts or [sample.captions[0] for sample in spread]
        self.size = data.transform[False]
        length = t5_length(models.info)
        self.condition = self.assembled(models.encoder.encode(self.prompts, length))
        null = models.null.parts(length).map(lambda value: value.expand(len(self.prompts), *value.shape[1:]).to(device))
        self.negative = self.assembled(null)

    def assembled(self, parts) -> Condition:
        return assemble(parts, self.models.encoder.joint_dim, self.models.encoder.pooled_dim)

    def draw(self, network: MMDiT, step: int) -> Path:
        """Writes samples/step-<step, 8 digits>.png, a grid with a picture a prompt, and returns its path."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(self.models.folder, subfolder="scheduler")
        pipe = LatentFMPipeline(network, scheduler, self.models.vae)
        pipe.set_progress_bar_config(disable=True)
        pipe.vae.enable_slicing()  # decoding all of them at once would be the peak of the run's memory
        training, checkpointing = network.training, network.gradient_checkpointing
        network.eval()
        with torch.compiler.set_stance("force_eager"):
            images = pipe(
                prompt_embeds=self.condition.embeds, pooled_prompt_embeds=self.condition.pooled,
                negative_prompt_embeds=self.negative.embeds, negative_pooled_prompt_embeds=self.negative.pooled,
                height=self.size.height, width=self.size.width, num_inference_steps=self.options.steps,
                guidance_scale=self.options.guidance,
                generator=[torch.Generator().manual_seed(self.options.seed + i) for i in range(len(self.prompts))],
            ).images  # fmt: skip
        network.train(training)
        network.gradient_checkpointing = checkpointing
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.png"
        grid(images, labels=self.prompts).save(path)
        return path
