"""The models of a run: the network to train and the frozen models around it."""

from pathlib import Path

import torch

from latentfm.bundled import pipeline_folder
from latentfm.config import ModelOptions
from latentfm.errors import InputError
from latentfm.interchange.components import load_component
from latentfm.interchange.frozen import CPU, FrozenModels
from latentfm.interchange.weights import empty
from latentfm.models.folder import check_folder, network_settings, read_info
from latentfm.models.mmdit import MMDiT
from latentfm.models.stored import read_header
from latentfm.models.text import NULL_FILE
from latentfm.words import shown


class Models(FrozenModels):
    """The network to train beside the frozen models of the folder it came from; `info` is the folder's latentfm.json."""

    def __init__(self, folder: Path, network: MMDiT, text_dtype: torch.dtype, device: torch.device):
        super().__init__(folder, text_dtype, network.config.joint_attention_dim, network.config.pooled_projection_dim, device)
        self.network, self.info = network, read_info(folder)


def checked_folder(options: ModelOptions) -> Path:
    """The pipeline folder of `options`. Raises InputError for one that lacks something."""
    folder = pipeline_folder(options.pipeline)
    check_folder(folder, transformer=options.preset is None)
    if not (folder / "vae" / "config.json").is_file():
        raise InputError(f"{shown(folder)} has no vae/config.json; it is not an SD3-style pipeline, or its copy is not complete")
    return folder


def load_models(options: ModelOptions, weights: bool = True, device: torch.device = CPU) -> Models:
    """The models of `options`: a pipeline's own network to fine-tune, or a new one of a preset beside its frozen models.

    The frozen ones are loaded when they are asked for, onto `device`, the VAE in float32 and the text encoders as the options say; with
    weights=False the network has no memory (it is on the meta device). Raises InputError for a folder that lacks something.
    """
    folder = checked_folder(options)
    if (folder / NULL_FILE).exists():
        read_header(folder / NULL_FILE)
    settings = network_settings(folder, options.preset)
    if not weights:
        network = empty("transformer", settings)
    elif options.preset is None:
        network = load_component(folder, "transformer", "SD3Transformer2DModel", torch.float32)
    else:
        network = MMDiT(**settings)
        network.initialize()
    return Models(folder, network, getattr(torch, options.text_encoders), device)
