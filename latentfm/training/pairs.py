"""A run's data as its options describe them, pictures or pairs, and the pipeline that draws the pairs."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from latentfm.bundled import pipeline_folder
from latentfm.config import RunConfig
from latentfm.data.cache.processes import Processes
from latentfm.data.cache.stat_cache import StatCache
from latentfm.data.cache.store import key_of
from latentfm.data.from_options import open_dataset, prepared_data
from latentfm.data.pairs import PairData, pair_dataset
from latentfm.data.prepared import PreparedData
from latentfm.data.sources import Dataset
from latentfm.data.sources.base import sha256
from latentfm.files import expanded, read_bytes
from latentfm.interchange.frozen import FrozenModels
from latentfm.models.folder import check_folder, distilled_guidance, network_settings, read_info, usual_sampling
from latentfm.models.text import MOST_BYTES, NULL_FILE
from latentfm.pipelines.text_to_image import LatentFMPipeline
from latentfm.planning.run import RunPlan
from latentfm.requests import read_prompts


def listed_data(config: RunConfig, plan: RunPlan, models: FrozenModels, processes: Processes) -> tuple[Dataset, PreparedData]:
    """The dataset of a run's options, and its data, which `prepare` has still to be called on."""
    options, kept = config.data, StatCache(expanded(config.data.cache))
    if options.pairs is None:
        dataset = open_dataset(options, kept, processes)
        return dataset, prepared_data(dataset, plan.data, models, options, processes)
    dataset = pairs_of(config)
    teacher = PipelineTeacher(config, plan.size, models.device, kept, processes)
    return dataset, PairData(dataset, plan.data, models, options, teacher, processes)


def pairs_of(config: RunConfig) -> Dataset:
    """The pairs of data.pairs, by their prompts. Raises InputError for a file of prompts that cannot be read."""
    file = expanded(config.data.pairs.prompts)
    return pair_dataset([str(prompt) for prompt in read_prompts(file, "data.pairs.prompts")], config.data.pairs.count, file)


def teacher_folder(config: RunConfig) -> Path:
    """The folder of the pipeline that draws the pairs."""
    return pipeline_folder(config.data.pairs.teacher or config.model.pipeline)


def folded_guidance(config: RunConfig) -> tuple[float, float | None]:
    """(the scale that the teacher draws with, the guidance that its student has in its weights; None where it has none)."""
    inherited = distilled_guidance(read_info(teacher_folder(config)))
    given = config.data.pairs.guidance
    scale = given if given is not None else usual_sampling(teacher_folder(config)).guidance
    return scale, inherited if scale == 1 else scale


class PipelineTeacher:
    """A pipeline that draws latents [C, h, w] of the run's size, guided, by the sampler of data.pairs; read when it is first asked."""

    def __init__(self, config: RunConfig, size: tuple[int, int], device: torch.device, kept: StatCache, processes: Processes):
        self.options, self.folder, self.device = config.data.pairs, teacher_folder(config), device
        self.guidance, _ = folded_guidance(config)
        check_folder(self.folder)
        (weights,) = processes.share(lambda own: [self.weights(kept) for _ in own], [str(self.folder)], "the teacher")
        drawn = {"steps": self.options.steps, "guidance": self.guidance, "solver": self.options.solver, "dtype": self.options.dtype}
        self.fingerprint = key_of(weights, json.dumps(drawn), json.dumps(size))

    def weights(self, kept: StatCache) -> str:
        """A hash of the folder's weights and settings, the VAE's apart."""
        settings = network_settings(self.folder, None)
        dtype = getattr(torch, self.options.dtype)
        models = FrozenModels(self.folder, dtype, settings["joint_attention_dim"], settings["pooled_projection_dim"])
        null = self.folder / NULL_FILE
        names = ("transformer", "scheduler", *models.encoders, *(name.replace("text_encoder", "tokenizer") for name in models.encoders))
        files = [*models.files(*names), *([null] if null.exists() else [])]

        def made() -> tuple[str, tuple]:
            scheduler = sha256(read_bytes(self.folder / "scheduler" / "scheduler_config.json", MOST_BYTES))
            nothing = sha256(read_bytes(null, MOST_BYTES)) if null.exists() else "absent"
            info = json.dumps(read_info(self.folder).get("max_sequence_length"))
            return key_of(models.fingerprint("transformer", dtype), *models.text_fingerprints(), scheduler, nothing, info), ()

        return kept.value(("teacher", self.folder.absolute(), self.options.dtype, torch.__version__), files, made)

    @cached_property
    def pipe(self) -> LatentFMPipeline:
        """The pipeline, on the device, without its VAE."""
        pipe = LatentFMPipeline.from_pretrained(self.folder, torch_dtype=getattr(torch, self.options.dtype), vae=None)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device)

    def draw(self, prompts: Sequence[str], noise: Tensor) -> Tensor:
        """The latents that the flow carries the noise to, float32 [B, C, h, w] on the CPU."""
        height, width = (side * self.pipe.vae_scale_factor for side in noise.shape[2:])  # SD3's factor, where there is no VAE
        found = self.pipe(
            prompt=list(prompts), latents=noise, width=width, height=height, num_inference_steps=self.options.steps,
            guidance_scale=self.guidance, solver=self.options.solver, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        return found.float().cpu()

    def release(self) -> None:
        """Gives back its memory until it is asked again."""
        self.__dict__.pop("pipe", None)
