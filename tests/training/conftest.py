"""What the training tests share: ten small captioned pictures, one cache, and a way to run a training in this process."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

CAPTIONS = [
    "a red apple on a white plate", "a small brown dog in the park", "a blue car, flat style", "two green trees under a yellow sun",
    "a cat sleeping on an old chair", "the moon and seven stars", "an orange fish in a glass bowl", "smiling face with purple hat",
    "a glass of water", "black shoes\na photo of black shoes\nshoes",
]  # fmt: skip
SETTINGS = [
    "train.steps=6", "train.batch_size=4", "train.mixed_precision=no", "train.learning_rate=1e-3", "train.warmup_steps=2",
    "data.t5_lengths={8: 0.5, 12: 0.5}", "data.workers=0", "sample.every=1000", "sample.steps=1", "sample.prompts=[a red apple]",
]  # fmt: skip


def write_pictures(folder: Path, count: int = len(CAPTIONS), size: tuple[int, int] = (32, 32), opening: str = "") -> Path:
    """A new folder of smooth random pictures, each a function of its number alone; `opening` is put before every caption."""
    folder.mkdir(parents=True)
    for index, caption in enumerate(CAPTIONS[:count]):
        rng = np.random.default_rng(index)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(opening + caption.replace("\n", f"\n{opening}"), "utf-8")
    return folder


@pytest.fixture(scope="session")
def make_pictures() -> Callable[..., Path]:
    return write_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten 32 x 32 pictures; the last has three captions. Read it, never write into it."""
    return write_pictures(tmp_path_factory.mktemp("pictures") / "pictures")


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums come out the same in this process and in those started here with `environment()`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment for a training in another process."""
    root = str(Path(__file__).parents[2])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "LATENTFM_DEBUG": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def options(pictures: Path, cache_folder: Path, tiny_folder: Path) -> Callable[..., list[str]]:
    """options(out, *more) -> the command line's overrides of a run of six steps into `out`; `more` goes before."""

    def build(out: Path, *more: str) -> list[str]:
        return [
            f"data.folder={pictures}",
            f"data.cache={cache_folder}",
            f"model.pipeline={tiny_folder}",
            f"output.folder={out}",
            *SETTINGS,
            *more,
        ]

    return build


@pytest.fixture(scope="session")
def start(options) -> Callable:
    """start(out, *overrides, resume=False) -> a Trainer of that run, in this process."""
    from accelerate.state import AcceleratorState, GradientState

    from latentfm.config import load_config
    from latentfm.training.trainer import Trainer

    def build(out: Path, *overrides: str, resume: bool = False) -> Trainer:
        AcceleratorState._reset_state(True)  # Accelerate keeps one configuration a process
        GradientState._reset_state()
        return Trainer(load_config(None, options(out, *overrides)), resume)

    return build


@pytest.fixture
def after_listing(monkeypatch) -> Callable:
    """after_listing(act) has trainers call act() when their pictures are listed and none of them is cached yet."""
    from latentfm.training.trainer import Trainer

    claimed = Trainer.claimed

    def call(act: Callable[[], None]) -> None:
        monkeypatch.setattr(Trainer, "claimed", lambda trainer: (act(), claimed(trainer))[1])

    return call


@pytest.fixture(scope="session")
def run(start) -> Callable[..., Path]:
    """run(out, *overrides, resume=False) -> `out`, trained in this process."""

    def train(out: Path, *overrides: str, resume: bool = False) -> Path:
        start(out, *overrides, resume=resume).train()
        return out

    return train
