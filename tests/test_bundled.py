"""The bundled model: a stock pipeline folder in half precision that draws the same picture here and in stock diffusers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open

from latentfm import LatentFMPipeline, bundled_model
from latentfm.models.folder import read_info
from latentfm.models.manifest import MANIFEST, check_manifest, read_manifest
from latentfm.models.text import NullCondition

LENGTHS = read_info(bundled_model())["max_sequence_length"], 256  # T5 tokens: the model's own, and what stock diffusers pads to


@pytest.fixture(scope="module")
def pipe() -> LatentFMPipeline:
    pipe = LatentFMPipeline.from_pretrained(bundled_model())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, prompt: str, **more) -> np.ndarray:
    settings = {"guidance_scale": 3.0, "num_inference_steps": 8, "output_type": "np", "max_sequence_length": LENGTHS[0]} | more
    return pipe(prompt, generator=torch.Generator().manual_seed(5), **settings).images[0]


@pytest.mark.parametrize("length", LENGTHS)
def test_the_same_picture_in_stock_diffusers(pipe: LatentFMPipeline, length: int) -> None:
    stock = StableDiffusion3Pipeline.from_pretrained(bundled_model(), torch_dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    ours = picture(pipe, "a slice of pizza", max_sequence_length=length)
    theirs = picture(stock, "a slice of pizza", max_sequence_length=length)
    assert ours.std() > 0.05  # a picture, not a blank sheet
    assert np.abs(ours - theirs).max() <= 1 / 255


def test_the_prompt_decides(pipe: LatentFMPipeline) -> None:
    """Same noise, other words: the colours follow the words."""
    tomato, shamrock = (picture(pipe, name, num_inference_steps=16) for name in ("a tomato", "a shamrock"))
    third = len(tomato) // 3
    middle = slice(third, -third)
    red_green = [image[middle, middle].mean(axis=(0, 1)) for image in (tomato, shamrock)]
    assert red_green[0][0] > red_green[0][1] + 0.2, "a tomato should be red"
    assert red_green[1][1] > red_green[1][0], "a shamrock should be green"


def test_its_null_condition_is_the_empty_prompt(pipe: LatentFMPipeline) -> None:
    saved = NullCondition.load(bundled_model())
    assert sorted(saved.by_length) == sorted(LENGTHS)
    for length in LENGTHS:
        for name, value in pipe.prompt_encoder.encode([""], length).items():
            torch.testing.assert_close(getattr(saved.parts(length), name), value, atol=1e-5, rtol=1e-4)


def test_its_files() -> None:
    folder: Path = bundled_model()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 62 * 2**20  # with the detector, under 64 MB
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    for component in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        (weights,) = (folder / component).glob("*.safetensors")
        with safe_open(weights, framework="pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}, component  # noqa: SIM118
    card = (folder / "README.md").read_text("utf-8")
    assert all(word in card for word in ("Apache-2.0", "MIT", "CC BY 4.0", "seed", "build.py"))


def test_the_saved_null_condition_is_that_of_its_encoders_and_is_read(pipe: LatentFMPipeline, monkeypatch) -> None:
    made = {length: pipe.prompt_encoder.encode([""], length) for length in LENGTHS}
    monkeypatch.setattr("latentfm.models.text.PromptEncoder.encode", lambda *given: pytest.fail("it was encoded"))
    for length, parts in made.items():
        for name, value in pipe.null.parts(length).items():
            torch.testing.assert_close(value, getattr(parts, name), rtol=1e-5, atol=1e-5)
def test_every_byte_of_it_is_what_was_saved() -> None:
    check_manifest(bundled_model(), verify=True)
    files = {path.relative_to(bundled_model()).as_posix() for path in bundled_model().rglob("*") if path.is_file()}
    assert read_manifest(bundled_model()).keys() == files - {MANIFEST, "README.md"}
