"""The models of a run: the network to train and the frozen models around it."""

import re
from pathlib import Path

import torch

from latentfm.bundled import pipeline_folder
from latentfm.config import ModelOptions
from latentfm.errors import InputError
from latentfm.interchange.components import load_component
from latentfm.interchange.frozen import CPU, FrozenModels
from latentfm.interchange.weights import empty
from latentfm.models.folder import INDEX_FILE, INFO_FILE, check_folder, check_links, network_settings, read_index, read_info
from latentfm.models.mmdit import MMDiT
from latentfm.models.stored import names_in, own_files, read_header
from latentfm.models.text import NULL_FILE
from latentfm.words import shown

LICENCE = re.compile(r"(licen[cs]e|notice|copying)[\w-]*(\.md|\.txt|\.pdf)?", re.IGNORECASE)


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
    frozen_files(folder)
    return folder


def frozen_files(folder: Path) -> list[str]:
    """The names, relative and with slashes, of the files that a model trained from the one in `folder` takes over as they are.

    They are model_index.json, licences, and what lies in the folders of the frozen components, pickles and hidden files left out. Other
    weights beside these folders are of the untrained network, and folders in them nobody reads. Raises InputError as check_links does.
    """
    names = [name for name in names_in(folder) if name == INDEX_FILE or LICENCE.fullmatch(name)]
    for part in sorted(read_index(folder).keys() - {"transformer"}):
        names += [f"{part}/{name}" for name in own_files(folder / part)] if (folder / part).is_dir() else []
    names = [name for name in names if (folder / name).is_file()]
    check_links(folder, filter(Path.is_file, (folder / name for name in [*names, INFO_FILE])))
    return names


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
