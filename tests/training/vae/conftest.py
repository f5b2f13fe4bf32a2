"""What the tests of a VAE's training share: twelve small pictures with transparency, a tiny run, and a way to train in this process."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TINY = [
    "data.size=32", "data.workers=0", "data.flip=true", "data.random_background=0.5", "data.permute_colours=0.2",
    "model.widths=[8, 16]", "model.norm_groups=4", "model.layers=1", "model.latent_channels=4",
    "train.steps=6", "train.batch_size=4", "train.warmup_steps=2", "train.learning_rate=3e-3", "train.mixed_precision=no",
    "train.ema_decay=0.5", "output.trackers=[]",
]  # fmt: skip


@pytest.fixture(scope="session")
def clear_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve 40 x 36 PNG pictures of RGBA noise, without captions: read it, never write into it."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 256, (5, 5, 4), np.uint8)
        Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="session")
def vae_options(clear_pictures: Path, cache_folder: Path) -> Callable[..., list[str]]:
    """vae_options(out, *more) -> the overrides of a run of six steps into `out`; `more` goes over them."""

    def build(out: Path, *more: str) -> list[str]:
        given = any(option.startswith("model.vae=") for option in more)
        tiny = [option for option in TINY if not (given and option.startswith("model."))]
        return [f"data.folder={clear_pictures}", f"data.cache={cache_folder}", f"output.folder={out}", *tiny, *more]

    return build


@pytest.fixture(scope="session")
def vae_trainer(vae_options) -> Callable:
    """vae_trainer(out, *overrides, resume=False) -> a VAETrainer of that run, in this process."""
    from accelerate.state import AcceleratorState, GradientState

    from latentfm.config import load_config
    from latentfm.training.vae.options import VAEConfig
    from latentfm.training.vae.trainer import VAETrainer

    def build(out: Path, *overrides: str, resume: bool = False) -> VAETrainer:
        AcceleratorState._reset_state(True)  # Accelerate keeps one configuration a process
        GradientState._reset_state()
        return VAETrainer(load_config(None, vae_options(out, *overrides), VAEConfig), resume)

    return build


@pytest.fixture(scope="session")
def train_vae(vae_trainer) -> Callable[..., Path]:
    """train_vae(out, *overrides, resume=False) -> `out`, trained in this process."""

    def train(out: Path, *overrides: str, resume: bool = False) -> Path:
        vae_trainer(out, *overrides, resume=resume).train()
        return out

    return train
