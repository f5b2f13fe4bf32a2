"""What a preset or a folder says of a model and of the frozen models around it; no weight is read, and no torch needed."""

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

from latentfm.bundled import bundled_model
from latentfm.errors import InputError, nearest
from latentfm.models.cost import SD3_ENCODERS, SD3_VAE, Decoder, Network
from latentfm.models.folder import read_info, t5_length
from latentfm.models.presets import PRESETS

SD3_TOKENS = 77 + 256  # CLIP's, then T5's


class Model(NamedTuple):
    """A network and the frozen models around it."""

    name: str
    network: Network
    encoders: dict[str, int]  # parameters
    vae: int  # parameters
    decoder: Decoder
    text_tokens: int
    side: int  # pixels it was made for

    def image_tokens(self, size: tuple[int, int]) -> int:
        """How many tokens a picture of `size` pixels, (width, height), is to the network."""
        return size[0] * size[1] // (self.decoder.factor * self.network.patch) ** 2


def preset_model(name: str) -> Model:
    """A preset among SD3's frozen models; the bundled model's own for its size. Raises InputError for an unknown name."""
    if name not in PRESETS:
        raise InputError(f"--preset {name!r} does not exist{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    if name == "emoji":
        return read_model(bundled_model())._replace(name=name)
    net, decoder = Network.of(PRESETS[name]), Decoder()
    return Model(name, net, SD3_ENCODERS, SD3_VAE, decoder, SD3_TOKENS, PRESETS[name]["sample_size"] * decoder.factor)


def read_model(folder: Path, network: dict[str, Any] | None = None) -> Model:
    """What a pipeline or transformer folder says of itself; what a transformer's has not is SD3's. Raises InputError when it is neither.

    network: the arguments of a network in the place of the folder's own, which a pipeline folder then need not have.
    """
    if not folder.is_dir():
        what = "is a file; convert it to a folder first (latentfm convert)" if folder.exists() else "does not exist"
        raise InputError(f"--model {folder} {what}")
    pipeline = network is not None or (folder / "transformer" / "config.json").is_file()
    config = network or read_json(folder / "transformer" / "config.json" if pipeline else folder / "config.json")
    if not pipeline:
        net, decoder = Network.of(config), Decoder()
        return Model(str(folder), net, SD3_ENCODERS, SD3_VAE, decoder, SD3_TOKENS, config.get("sample_size", 128) * decoder.factor)
    settings, clip = read_json(folder / "vae" / "config.json"), folder / "text_encoder" / "config.json"
    decoder = Decoder(tuple(settings["block_out_channels"]), settings["layers_per_block"], settings["latent_channels"])
    return Model(
        name=str(folder), network=Network.of(config), decoder=decoder, vae=stored_numbers(folder / "vae"),
        encoders={part.name: stored_numbers(part) for part in sorted(folder.glob("text_encoder*")) if part.is_dir()},
        text_tokens=(read_json(clip)["max_position_embeddings"] if clip.is_file() else 77) + t5_length(read_info(folder)),
        side=config.get("sample_size", 128) * decoder.factor,
    )  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError when it is missing or damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; give a pipeline folder, or one with a transformer's config.json") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} should hold a JSON object, it holds {type(found).__name__}")
    return found


def stored_numbers(folder: Path) -> int:
    """How many numbers the safetensors of a folder hold, by their headers; where they lie there in two precisions, one of them."""
    files = sorted(folder.glob("*.safetensors"))
    files = [file for file in files if ".fp16" not in file.name] or files
    return sum(math.prod(tensor["shape"]) for file in files for name, tensor in header(file).items() if name != "__metadata__")


def header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: an entry a tensor. Raises InputError when it is damaged."""
    try:
        with file.open("rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            return json.loads(content.read(min(length, file.stat().st_size)))
    except (OSError, ValueError, struct.error) as error:
        raise InputError(f"{file} is no safetensors file, or its copy is not complete: {error}") from None
