"""The spaces that pictures are compared in, each by a network of a local folder or file: nothing is downloaded."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from latentfm.errors import InputError
from latentfm.files import read_json, reading
from latentfm.models.manifest import hash_of
from latentfm.models.stored import names_in, read_header
from latentfm.words import shown

if TYPE_CHECKING:
    from PIL import Image

DECIDING = (".safetensors", ".json", ".txt", ".model")  # what transformers reads of a folder


class Clip:
    """A CLIP or SigLIP of transformers' in `folder`: pictures and texts on one unit sphere.

    Raises InputError for a folder that holds none.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.model = vision_model(folder, AutoModel, "--clip", device)
        if not hasattr(self.model, "get_text_features"):
            raise InputError(f"--clip {shown(folder)} is a {type(self.model).__name__}, which reads no text; give a CLIP or SigLIP")
        with reading(f"--clip {shown(folder)}", "its folder needs the tokenizer and the image processor"):
            self.images_as = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.name, self.fingerprint = f"{type(self.model).__name__} {folder}", fingerprint(folder)

    @torch.no_grad()
    def images(self, pictures: "Sequence[Image.Image]") -> Tensor:
        """[N, D] float32 on the CPU, of length 1."""
        inputs = self.images_as([picture.convert("RGB") for picture in pictures], return_tensors="pt").to(self.model.device)
        return F.normalize(tensor_of(self.model.get_image_features(**inputs)).float(), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """[N, D] float32 on the CPU, of length 1; text beyond the encoder's length is cut."""
        length = {"max_length": self.model.config.text_config.max_position_embeddings}
        inputs = self.tokenizer(list(texts), return_tensors="pt", padding="max_length", truncation=True, **length).to(self.model.device)
        return F.normalize(tensor_of(self.model.get_text_features(**inputs)).float(), dim=-1).cpu()

    features = images


class VisionModel:
    """Features of any vision model of transformers' in `folder`: CLIP's and SigLIP's projections, else what the model pools (DINOv2)."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        from transformers import AutoImageProcessor, AutoModel

        self.model = vision_model(folder, AutoModel, "--features", device)
        with reading(f"--features {shown(folder)}", "its folder needs the image processor, preprocessor_config.json"):
            self.images_as = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self.name, self.fingerprint = f"{type(self.model).__name__} {folder}", fingerprint(folder)

    @torch.no_grad()
    def features(self, pictures: "Sequence[Image.Image]") -> Tensor:
        """[N, D] float32 on the CPU."""
        inputs = self.images_as([picture.convert("RGB") for picture in pictures], return_tensors="pt").to(self.model.device)
        of = getattr(self.model, "get_image_features", self.model)
        return tensor_of(of(**inputs)).float().cpu()


class Inception:
    """The 2048 features of torchvision's Inception v3 with weights of a safetensors `file`.

    Raises InputError for other weights. With torchvision's own weights its FID is near that of the usual TensorFlow network, not equal.
    """

    def __init__(self, file: Path, device: torch.device | str = "cpu"):
        from torchvision.models import inception_v3

        self.model = inception_v3(weights=None, init_weights=False, transform_input=False)
        with reading(f"--features {shown(file)}", "give inception_v3's weights as safetensors, or a folder of a transformers vision model"):
            self.model.load_state_dict(stored(file))
        self.model.fc = torch.nn.Identity()
        self.model.to(device).eval()
        self.device, self.name, self.fingerprint = device, f"Inception v3 {file}", fingerprint(file)

    @torch.no_grad()
    def features(self, pictures: "Sequence[Image.Image]") -> Tensor:
        """[N, 2048] float32 on the CPU."""
        sized = [np.asarray(picture.convert("RGB").resize((299, 299), 2), np.float32) for picture in pictures]
        return self.model((torch.from_numpy(np.stack(sized)).permute(0, 3, 1, 2) / 127.5 - 1).to(self.device)).float().cpu()


def fingerprint(place: Path, names: Sequence[str] = ()) -> str:
    """The SHA-256 of what decides a network's answers, wherever it lies: a file, or of a folder its weights, settings and vocabulary.

    names: of the folder's files those that are its.
    """
    if place.is_file():
        return hash_of(place).sha256
    told = sorted(names or (name for name in names_in(place) if name.endswith(DECIDING) and (place / name).is_file()))
    return hashlib.sha256(" ".join(hash_of(place / name).sha256 for name in told).encode()).hexdigest()


def stored(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises InputError for what is none, or is damaged."""
    read_header(file)
    return load_file(file)


def vision_model(folder: Path, kind: Any, option: str, device: torch.device | str) -> Any:
    """The model of a transformers folder, on `device`, in evaluation mode. Raises InputError for a folder without a vision model."""
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder" if folder.exists() else "does not exist"
        raise InputError(f"{option} {shown(folder)} {what}; give a folder of a transformers model, as CLIP's, with safetensors")
    if (folder / "preprocessor_config.json").is_file() is False and (folder / "processor_config.json").is_file() is False:
        raise InputError(f"{option} {shown(folder)} has no preprocessor_config.json; give a model of pictures, with its image processor")
    kind_of_model = read_json(folder / "config.json").get("model_type")
    with reading(f"{option} {shown(folder)}", f"a {shown(kind_of_model, 40)} may be no model of pictures, or its copy not complete"):
        return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(device).eval()


def tensor_of(output: Any) -> Tensor:
    """The pooled features of what a model returns."""
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    return output.last_hidden_state[:, 0] if pooled is None else pooled
