"""What a preset or a folder says of a model and of the frozen models around it; no weight is read, and no torch needed."""

from pathlib import Path
from typing import Any, NamedTuple

from latentfm.bundled import bundled_model
from latentfm.errors import InputError, nearest
from latentfm.files import reading
from latentfm.models.cost import SD3_ENCODERS, SD3_VAE, Decoder, Network
from latentfm.models.encoders import TEXT
from latentfm.models.folder import read_config, read_info, t5_length
from latentfm.models.manifest import check_manifest
from latentfm.models.presets import PRESETS
from latentfm.models.stored import stored_numbers
from latentfm.words import shown

SD3_TOKENS = 77 + 256  # CLIP's, then T5's
SIZES = (
    "num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "in_channels", "joint_attention_dim",
    "pooled_projection_dim", "pos_embed_max_size",
)  # fmt: skip


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
    """What a pipeline or transformer folder says of itself; what a transformer's has not is SD3's.

    network: the arguments of a network in the place of the folder's own, which a pipeline folder then need not have. Raises InputError
    when it is neither, is damaged, or has changed since it was saved.
    """
    if not folder.is_dir():
        what = "is a file; convert it to a folder first (latentfm convert)" if folder.exists() else "does not exist"
        raise InputError(f"--model {shown(folder)} {what}")
    pipeline = network is not None or (folder / "transformer" / "config.json").is_file()
    path = folder / "transformer" / "config.json" if pipeline else folder / "config.json"
    if network is None and not path.is_file():
        raise InputError(f"{shown(path)} is missing; give a pipeline folder, or one with a transformer's config.json")
    config = network or read_config(path)
    with reading(path):
        net = Network.of(config)
        if unsaid := [key for key in SIZES if config[key] is None]:
            raise KeyError(unsaid[0])
    latents = config.get("sample_size") or 128
    if not pipeline:
        check_manifest(folder)
        decoder = Decoder()
        return Model(str(folder), net, SD3_ENCODERS, SD3_VAE, decoder, SD3_TOKENS, latents * decoder.factor)
    clip = folder / "text_encoder" / "config.json"
    settings, clip_tokens = read_config(folder / "vae" / "config.json"), read_config(clip) if clip.is_file() else {}
    with reading(folder / "vae" / "config.json"):
        if unsaid := [key for key in ("block_out_channels", "layers_per_block", "latent_channels") if not settings[key]]:
            raise KeyError(unsaid[0])
        decoder = Decoder(tuple(settings["block_out_channels"]), settings["layers_per_block"], settings["latent_channels"])
    encoders = {part: stored_numbers(folder / part) for part in TEXT if (folder / part).is_dir()}
    vae, text_tokens = stored_numbers(folder / "vae"), (clip_tokens.get("max_position_embeddings") or 77) + t5_length(read_info(folder))
    check_manifest(folder, without=("transformer",) if network is not None else ())
    return Model(
        name=str(folder), network=net, decoder=decoder, vae=vae, encoders=encoders, text_tokens=text_tokens,
        side=latents * decoder.factor,
    )  # fmt: skip
