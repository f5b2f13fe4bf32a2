"""The README's section on the pipeline, run as it is written."""

from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_the_pipeline_section_runs():
    section = README.read_text("utf-8").split("## Load as a pipeline")[1].split("\n## ")[0]
    code = section.split("```python\n")[1].split("```")[0]
    found: dict = {}
    exec(compile(code, str(README), "exec"), found)
    pixels = {name: np.asarray(found[name], float) for name in ("image", "near", "redrawn", "filled", "same", "edited")}
    assert len(found["eight"]) == 8 and len(found["forming"]) == 28 and type(found["other"]).__name__ == "LatentFMImg2ImgPipeline"
    psnr = -10 * np.log10(np.mean((pixels["same"] - pixels["image"]) ** 2) / 255**2)
    assert psnr > 34  # the VAE alone gives 35.5
    half = pixels["image"].shape[1] // 2
    assert np.abs(pixels["filled"][:, half + 8 :] - pixels["image"][:, half + 8 :]).mean() < 12
    least = {"near": 0.5, "redrawn": 2, "filled": 2, "edited": 2}  # a plain name has one drawing: other noise changes little of it
    for name, difference in least.items():
        assert np.abs(pixels[name] - pixels["image"]).mean() > difference, name
