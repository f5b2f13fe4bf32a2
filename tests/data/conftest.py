"""What the tests of a run's data share: the tiny pipeline's models, and a folder of two pictures."""

import numpy as np
import pytest
from PIL import Image

from latentfm.config import ModelOptions
from latentfm.training.models import load_models


@pytest.fixture(scope="module")
def models(tiny_folder):
    return load_models(ModelOptions(pipeline=str(tiny_folder)))


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, caption in enumerate(("a red apple", "a blue car\ntwo cars")):
        rng = np.random.default_rng(index)
        Image.fromarray(rng.integers(0, 256, (40, 32, 3), np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption)
    return folder
