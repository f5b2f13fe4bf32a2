"""What tests of loading share."""

import shutil

import pytest
from drawn import draw, stock_of


@pytest.fixture(scope="session")
def picture(tiny_folder):
    """Stock's latents of the tiny folder."""
    return draw(stock_of(tiny_folder))


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A copy of the tiny folder to change."""
    return shutil.copytree(tiny_folder, tmp_path / "model")
