"""What diffusers is told of our classes: the AutoPipeline tables, and our network where its SD3 pipelines ask for theirs (from_pipe)."""

import sys

from diffusers import DiffusionPipeline

from latentfm.models.mmdit import MMDiT
from latentfm.pipelines.image_to_image import LatentFMImg2ImgPipeline, LatentFMInpaintPipeline
from latentfm.pipelines.text_to_image import LatentFMPipeline

TASKS = {
    "AUTO_TEXT2IMAGE_PIPELINES_MAPPING": LatentFMPipeline,
    "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING": LatentFMImg2ImgPipeline,
    "AUTO_INPAINT_PIPELINES_MAPPING": LatentFMInpaintPipeline,
}
signature_types = DiffusionPipeline._get_signature_types.__func__


def register() -> None:
    """Enters the three pipelines into AutoPipeline's tables, once somebody has imported these, which takes a while."""
    if (tables := sys.modules.get("diffusers.pipelines.auto_pipeline")) is not None:
        for table, pipeline in TASKS.items():
            getattr(tables, table)["latentfm"] = pipeline


def with_our_network(cls: type[DiffusionPipeline]) -> dict[str, tuple[type, ...]]:
    """The classes that a pipeline's components may have: wherever one of MMDiT and SD3Transformer2DModel is, both."""
    from diffusers import SD3Transformer2DModel

    both = (MMDiT, SD3Transformer2DModel)
    found = signature_types(cls)
    return {name: (*kinds, *(one for one in both if one not in kinds)) if set(both) & {*kinds} else kinds for name, kinds in found.items()}


DiffusionPipeline._get_signature_types = classmethod(with_our_network)
