"""latentfm: latent text-to-image generation by flow matching, in the Stable Diffusion 3 style.

Public names are imported when first used, so that `import latentfm` is instant.
"""

import importlib
from typing import Any

from latentfm import lazy_imports

__version__ = "0.1.0"

_HOMES = {
    "LatentFMPipeline": "latentfm.pipelines.text_to_image",
    "LatentFMImg2ImgPipeline": "latentfm.pipelines.image_to_image",
    "LatentFMInpaintPipeline": "latentfm.pipelines.image_to_image",
    "MMDiT": "latentfm.models.mmdit",
    "NullCondition": "latentfm.models.text",
    "PromptEncoder": "latentfm.models.text",
    "RunConfig": "latentfm.config",
    "train": "latentfm.training.trainer",
    "bundled_model": "latentfm.bundled",
    "InputError": "latentfm.errors",
    "flow": "latentfm.flow",
}
__all__ = ["__version__", *_HOMES]

lazy_imports.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latentfm' has no attribute '{name}'")
    module = importlib.import_module(_HOMES[name])
    return module if name == "flow" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
