"""What tests draw: one short call, quiet, the same for stock diffusers and for ours, and the difference of two answers."""

import math

import torch
from diffusers import StableDiffusion3Pipeline

CALL = {"prompt": "a red apple", "num_inference_steps": 2, "guidance_scale": 5.0, "max_sequence_length": 16, "output_type": "latent"}
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **changes):
    """What `pipe` makes of CALL with `changes`: latents, where nothing else is asked for."""
    return quiet(pipe)(**{**CALL, "generator": torch.Generator().manual_seed(0), **changes}).images


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference; infinite when the shapes differ or a value is not finite."""
    apart = a.float() - b.float() if a.shape == b.shape else torch.tensor(math.nan)
    return float(apart.abs().max()) if bool(torch.isfinite(apart).all()) else math.inf


def stock_of(folder, **more) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(folder, **{"torch_dtype": torch.float32, **more})
