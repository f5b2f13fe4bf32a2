"""The VAE and the text encoders of a pipeline folder: in memory while they are asked; sizes and fingerprints are told by their files."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from latentfm.interchange.components import load_component, load_text_encoders, read_null
from latentfm.interchange.networks import empty
from latentfm.interchange.weights import CLASSES, load_part_tensors, open_component
from latentfm.models import vae as vae_room
from latentfm.models.encoders import ENCODERS, TEXT
from latentfm.models.folder import read_config
from latentfm.models.text import NullCondition, PromptEncoder
from latentfm.models.tokenizers import load_tokenizer

CPU = torch.device("cpu")


class FrozenModels:
    """The frozen models of a pipeline folder: each is read when it is first asked for, onto `device`, and gone after `release`.

    `text_dtype` is what the text encoders run in, `joint_dim` and `pooled_dim` the widths of what the network is conditioned on; the
    VAE runs in float32.
    """

    def __init__(self, folder: Path, text_dtype: torch.dtype, joint_dim: int, pooled_dim: int, device: torch.device = CPU):
        self.folder, self.text_dtype, self.device = folder, text_dtype, device
        self.joint_dim, self.pooled_dim = joint_dim, pooled_dim
        self.outline: AutoencoderKL = empty("vae", read_config(folder / "vae" / "config.json"))  # the VAE without its weights
        self.factor = vae_room.downsampling(self.outline)  # pixels a side that are one latent
        self._vae: AutoencoderKL | None = None
        self._encoder: PromptEncoder | None = None

    @property
    def vae(self) -> AutoencoderKL:
        """The VAE, read now if it is not in memory. Raises InputError when its files are damaged."""
        self._vae = self._vae or self.read_vae().to(self.device)
        return self._vae

    @property
    def encoder(self) -> PromptEncoder:
        """The tokenizers and text encoders, read now if they are not in memory. Raises InputError when their files are damaged."""
        if self._encoder is None:
            self._encoder = load_text_encoders(self.folder, self.joint_dim, self.pooled_dim, self.text_dtype).to(self.device)
            for encoder in filter(None, self._encoder.encoders):
                encoder.requires_grad_(False)
        return self._encoder

    def read_vae(self) -> AutoencoderKL:
        return load_component(self.folder, "vae", type(self.outline).__name__, torch.float32).requires_grad_(False)

    @cached_property
    def null(self) -> NullCondition:
        """The folder's null condition, which reads the text encoders where it has to be made or compared with them."""
        return read_null(self.folder, self.encoder)

    def release(self) -> None:
        """Gives back the memory of the VAE, the text encoders, and what of the null condition refers to them."""
        held = self._vae is not None or self._encoder is not None
        self._vae = self._encoder = None
        if "null" in self.__dict__ and self.null.encoder is not None:
            del self.null
        if held and self.device.type != "cpu":
            torch.accelerator.empty_cache()

    @contextmanager
    def vae_on(self, device: torch.device) -> Iterator[AutoencoderKL]:
        """A context with the VAE in which the VAE is on `device`; afterwards it is where it was, or, if it had to be read, on the CPU."""
        self._vae = self._vae or self.read_vae()
        vae, before = self._vae, self._vae.device
        vae.to(device)
        try:
            yield vae
        finally:
            vae.to(before)

    # What they are, by their files

    @property
    def encoders(self) -> list[str]:
        """The folders of the text encoders there are."""
        return [name for name in TEXT if (self.folder / name).is_dir()]

    def files(self, *names: str) -> list[Path]:
        """The files of components, which their fingerprints are made of."""
        return sorted(path for name in names for path in (self.folder / name).glob("*") if path.is_file())

    def vae_fingerprint(self) -> str:
        """SHA-256 of the VAE as it is computed with."""
        return self.fingerprint("vae", torch.float32)

    def text_fingerprints(self) -> tuple[str, ...]:
        """SHA-256 of each text encoder and of each tokenizer as they are computed with; "absent" for one that is not there."""
        tokenizers = [load_tokenizer(self.folder / kind.tokenizer) if kind.name in self.encoders else None for kind in ENCODERS]
        return (*(self.fingerprint(name, self.text_dtype) for name in TEXT), *map(tokenizer_fingerprint, tokenizers))

    def fingerprint(self, name: str, dtype: torch.dtype) -> str:
        """SHA-256 of a component's configuration and weights, a tensor in memory at a time; "absent" where there is none."""
        if not (self.folder / name).is_dir():
            return "absent"
        if read_config(self.folder / name / "config.json").get("quantization_config") is not None:  # its library alone knows its tensors
            kind = type(self.outline).__name__ if name == "vae" else CLASSES[name][1]
            module = load_component(self.folder, name, kind, dtype)
            return fingerprint(module, module.state_dict().items())
        part, _ = open_component(self.folder / name, name)
        return fingerprint(empty(name, part.config), load_part_tensors(name, part, dtype))


def fingerprint(module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of a module's configuration and of its `tensors`: names, shapes, dtypes, values."""
    config = {k: v for k, v in dict(module.config.to_dict() if hasattr(module.config, "to_dict") else module.config).items() if k[0] != "_"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in tensors:
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's whole definition; "absent" for None."""
    if tokenizer is None:
        return "absent"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    state = json.loads(text) if backend is not None else {"vocabulary": text}
    for volatile in ("padding", "truncation"):  # set by the last call, no part of the definition
        state.pop(volatile, None)
    parts = (json.dumps(state, sort_keys=True), str(tokenizer.pad_token), str(tokenizer.model_max_length))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
