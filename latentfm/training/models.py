"""The models of a run: the network to train and the frozen models around it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from latentfm.bundled import bundled_model
from latentfm.config import ModelOptions
from latentfm.errors import InputError
from latentfm.files import expanded
from latentfm.interchange.components import load_component, load_text_encoders, read_null
from latentfm.interchange.weights import empty
from latentfm.models.folder import check_folder, network_settings, read_info
from latentfm.models.mmdit import MMDiT
from latentfm.models.text import NullCondition, PromptEncoder
from latentfm.words import shown


@dataclass
class Models:
    """The network to train and the frozen models around it, with the folder they came from."""

    folder: Path
    network: MMDiT
    vae: AutoencoderKL
    encoder: PromptEncoder
    null: NullCondition
    info: dict[str, Any]  # the folder's latentfm.json

    def frozen_to(self, device: torch.device) -> None:
        """Moves the VAE and the text encoders."""
        self.vae.to(device)
        self.encoder.to(device)

    @contextmanager
    def vae_on(self, device: torch.device) -> Iterator[None]:
        """A context in which the VAE is on `device`; afterwards it is where it was."""
        before = self.vae.device
        self.vae.to(device)
        try:
            yield
        finally:
            self.vae.to(before)


def load_models(options: ModelOptions, weights: bool = True) -> Models:
    """The models of `options`: a pipeline's own network to fine-tune, or a new one of a preset beside its frozen models.

    The frozen ones are loaded whole, the VAE in float32 and the text encoders as the options say; with weights=False the network has no
    memory (it is on the meta device), only its configuration. Raises InputError for a folder that lacks something.
    """
    folder = expanded(options.pipeline) if options.pipeline else bundled_model()
    check_folder(folder, transformer=options.preset is None)
    if not (folder / "vae" / "config.json").is_file():
        raise InputError(f"{shown(folder)} has no vae/config.json; it is not an SD3-style pipeline, or its copy is not complete")
    vae = load_component(folder, "vae", "AutoencoderKL", torch.float32)
    settings = network_settings(folder, options.preset)
    if not weights:
        network = empty("transformer", settings)
    elif options.preset is None:
        network = load_component(folder, "transformer", "SD3Transformer2DModel", torch.float32)
    else:
        network = MMDiT(**settings)
        network.initialize()
    widths = network.config.joint_attention_dim, network.config.pooled_projection_dim
    encoder = load_text_encoders(folder, *widths, getattr(torch, options.text_encoders))
    for frozen in (vae, *encoder.encoders):
        if frozen is not None:
            frozen.requires_grad_(False)
    return Models(folder, network, vae, encoder, read_null(folder, encoder), read_info(folder))
