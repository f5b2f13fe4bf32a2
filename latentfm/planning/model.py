"""What a preset or a folder says of a network and of the frozen models around it; no weight is read, and no torch needed."""

from pathlib import Path
from typing import Any, NamedTuple

from latentfm.bundled import bundled_model
from latentfm.errors import InputError, nearest
from latentfm.files import reading
from latentfm.models.encoders import BY_NAME, T5, TEXT
from latentfm.models.folder import read_config, read_info, t5_length
from latentfm.models.manifest import check_manifest
from latentfm.models.presets import PRESETS
from latentfm.models.stored import stored_numbers
from latentfm.planning.cost import Decoder, Network
from latentfm.words import shown

SIZES = (
    "num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "in_channels", "joint_attention_dim",
    "pooled_projection_dim", "pos_embed_max_size",
)  # fmt: skip


class EncoderSpec(NamedTuple):
    """A text encoder: its parameters, the widths of what it gives, and what T5's working memory depends on."""

    parameters: int
    width: int
    pooled: int = 0  # of a CLIP
    feed_forward: int = 0  # of T5
    heads: int = 0  # of T5

    def numbers(self, tokens: int) -> int:
        """Numbers in memory beside the weights while one prompt is encoded by a T5: its feed-forward's inner ones, attention's scores."""
        return tokens * (3 * (self.feed_forward + self.width) + 2 * self.heads * tokens) if self.feed_forward else 0


# around SD3's transformers; of T5 the encoder
SD3_ENCODERS = {
    "CLIP-L": EncoderSpec(123_650_304, 768, pooled=768), "CLIP-G": EncoderSpec(694_659_840, 1280, pooled=1280),
    "T5-XXL": EncoderSpec(4_762_310_656, 4096, feed_forward=10_240, heads=64),
}  # fmt: skip
SD3_VAE = 83_819_683  # parameters
SD3_TOKENS = 77, 256  # CLIP's and T5's


class ModelSpec(NamedTuple):
    """A network and the frozen models around it."""

    name: str
    network: Network
    encoders: dict[str, EncoderSpec]
    vae: int  # parameters
    decoder: Decoder
    clip_tokens: int
    t5_tokens: int
    side: int  # pixels it was made for

    @property
    def multiple(self) -> int:
        """Picture sides are multiples of this: a patch."""
        return self.decoder.factor * self.network.patch

    @property
    def encoder_parameters(self) -> dict[str, int]:
        """Parameters of each text encoder."""
        return {name: encoder.parameters for name, encoder in self.encoders.items()}

    def image_tokens(self, size: tuple[int, int]) -> int:
        """How many tokens a picture of `size` pixels, (width, height), is to the network."""
        return size[0] * size[1] // self.multiple**2


def preset_model(name: str) -> ModelSpec:
    """A preset among SD3's frozen models; the bundled model's own for its size. Raises InputError for an unknown name."""
    if name not in PRESETS:
        raise InputError(f"--preset {name!r} does not exist{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    if name == "emoji":
        return read_model(bundled_model())._replace(name=name)
    return among_sd3(name, Network.of(PRESETS[name]), PRESETS[name]["sample_size"])


def among_sd3(name: str, network: Network, latents: int) -> ModelSpec:
    """A network, made for so many latents a side, among SD3's frozen models."""
    decoder = Decoder()
    return ModelSpec(name, network, SD3_ENCODERS, SD3_VAE, decoder, *SD3_TOKENS, side=latents * decoder.factor)


def read_model(folder: Path, network: dict[str, Any] | None = None) -> ModelSpec:
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
        return among_sd3(str(folder), net, latents)
    settings, clip = read_config(folder / "vae" / "config.json"), folder / "text_encoder" / "config.json"
    if settings.get("_class_name") == "AutoencoderTiny":
        raise InputError(f"{shown(folder)} has an AutoencoderTiny as its VAE, which draws; to plan and train give the model's own")
    with reading(folder / "vae" / "config.json"):
        if unsaid := [key for key in ("block_out_channels", "layers_per_block", "latent_channels") if not settings[key]]:
            raise KeyError(unsaid[0])
        decoder = Decoder(tuple(settings["block_out_channels"]), settings["layers_per_block"], settings["latent_channels"])
    encoders = {name: read_encoder(folder / name) for name in TEXT if (folder / name).is_dir()}
    vae = stored_numbers(folder / "vae")
    clip_tokens = (read_config(clip).get("max_position_embeddings") if clip.is_file() else None) or 77
    check_manifest(folder, without=("transformer",) if network is not None else ())
    tokens = clip_tokens, t5_length(read_info(folder))
    return ModelSpec(str(folder), net, encoders, vae, decoder, *tokens, side=latents * decoder.factor)


def read_encoder(folder: Path) -> EncoderSpec:
    """What a text encoder's folder says of it."""
    config = read_config(folder / "config.json")
    with reading(folder / "config.json"):
        if BY_NAME[folder.name].family is T5:
            sizes = EncoderSpec(0, config["d_model"], feed_forward=config["d_ff"], heads=config["num_heads"])
        else:
            sizes = EncoderSpec(0, config["hidden_size"], pooled=config["projection_dim"])
    return sizes._replace(parameters=stored_numbers(folder))
