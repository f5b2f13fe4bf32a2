"""Pipeline folders on disk: what makes one whole, what it says of itself, and the names that stock diffusers looks for. Needs no torch."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from latentfm.bounds import MOST_GUIDANCE, MOST_STEPS
from latentfm.errors import InputError, nearest
from latentfm.files import read_json
from latentfm.models.encoders import ENCODERS, T5, TEXT
from latentfm.models.manifest import check_manifest
from latentfm.models.presets import PRESETS
from latentfm.models.stored import is_pickle, pickle_refused, read_header, weight_files
from latentfm.words import shown

INFO_FILE, INDEX_FILE = "latentfm.json", "model_index.json"
PARTS = ("transformer", "vae", *TEXT)
GROUPS = {"transformer": ("transformer",), "vae": ("vae",), "text": TEXT}  # as people ask for parts
LIBRARIES = ("diffusers", "transformers")  # what a component's class may be of; nothing else is imported because a file names it
COMPONENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")  # a component's name, which is its folder's, and a class's

# Bounds on what a configuration asks for, well beyond every published model's
MOST_OF = {
    "num_layers": 512, "num_hidden_layers": 512, "num_decoder_layers": 512, "layers_per_block": 32, "upsampling_scaling_factor": 16,
    "num_train_timesteps": 100_000,
}  # fmt: skip
MOST_LEVELS, MOST_BLOCKS = 16, 32  # of a VAE
MOST = 2**24  # of any other whole number: a width, a vocabulary
MOST_T5_TOKENS = 4096
WHOLE = {
    *MOST_OF, "num_attention_heads", "attention_head_dim", "patch_size", "in_channels", "out_channels", "joint_attention_dim",
    "pooled_projection_dim", "caption_projection_dim", "pos_embed_max_size", "sample_size", "latent_channels", "norm_num_groups",
    "vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "projection_dim", "d_model", "d_ff", "d_kv", "num_heads",
    "relative_attention_num_buckets", "relative_attention_max_distance", "base_image_seq_len", "max_image_seq_len",
}  # fmt: skip
NUMBERS = ("scaling_factor", "shift_factor", "shift", "shift_terminal", "base_shift", "max_shift", "layer_norm_eps", "layer_norm_epsilon")
WIDTHS = ("block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels")
DEPTHS = ("num_encoder_blocks", "num_decoder_blocks")
LISTS = (*WIDTHS, *DEPTHS, "down_block_types", "up_block_types")


def check_links(folder: Path, paths: Iterable[Path]) -> None:
    """Raises InputError for one of `paths` in a pipeline folder that is a link out of it, before it is copied into another model.

    Whoever made such a folder would have any file of this machine copied. Links into the blobs of a hub's cache are what its snapshots are
    made of; a VAE or text encoder may lie elsewhere as a whole, as models share them: what is none is not loaded from there.
    """
    for path in paths:
        target, places = path.resolve(), [folder.resolve(), *([path.parent.resolve()] if path.parent.name in ("vae", *TEXT) else [])]
        of_a_hub = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        if not of_a_hub and not any(target.is_relative_to(place) for place in places):
            raise InputError(
                f"{shown(path)} is a link out of the model's folder, to {shown(target)}, and would be copied into every model made "
                "from it; put the file itself in its place (cp -L), or remove the link"
            )


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a component's JSON file, its sizes within bounds. Raises InputError when it is not to be trusted."""
    config = read_json(path, way_out="copy the folder again")
    for key, value in config.items():
        if problem := wrong_setting(key, value):
            raise InputError(f"{shown(path)} says {shown(key, 80)} {shown(json.dumps(value), 80)}, {problem}; copy the folder again")
    return config


def wrong_setting(key: str, value: Any) -> str:
    """What is wrong with a setting of a configuration, in words; "" when nothing is."""
    if key in WHOLE and value is not None:
        most = MOST_OF.get(key, MOST)
        if type(value) is not int or value < 1:
            return "which is no whole number from 1 on"
        if value > most:
            return f"more than the {most:,} that are read"
    if key in LISTS and (not isinstance(value, list) or len(value) > MOST_LEVELS):
        return f"which is no list of at most {MOST_LEVELS}"
    if key in (*WIDTHS, *DEPTHS) and not all(type(size) is int and 1 <= size <= (MOST_BLOCKS if key in DEPTHS else MOST) for size in value):
        return "which is no list of whole numbers from 1 on"
    if key == "dual_attention_layers" and not (
        value is None or (isinstance(value, list) and len(value) <= MOST_OF["num_layers"] and all(type(i) is int for i in value))
    ):
        return "which is no list of blocks"
    if key in NUMBERS and (value is not None or key == "scaling_factor"):
        if type(value) not in (int, float) or not abs(value) < float("inf"):
            return "which is no finite number"
        if (key == "scaling_factor" and value == 0) or (key == "shift" and value <= 0):
            return "which is no number to scale with"
    return ""


def network_settings(folder: Path, preset: str | None) -> dict[str, Any]:
    """The arguments of a pipeline folder's network: its own, or a preset's with the widths of the folder's VAE and text encoders.

    Raises InputError for an unknown preset and for a configuration that cannot be read.
    """
    if preset is None:
        return read_config(folder / "transformer" / "config.json")
    if preset not in PRESETS:
        raise InputError(f"no preset '{preset}'{nearest(preset, PRESETS)}; there are {', '.join(PRESETS)}")
    channels = read_config(folder / "vae" / "config.json")["latent_channels"]
    changes = {"in_channels": channels, "out_channels": channels}
    for encoder in ENCODERS:
        path = folder / encoder.name / "config.json"
        if path.is_file() and encoder.family is T5:
            changes["joint_attention_dim"] = read_config(path)["d_model"]
        elif path.is_file():
            changes["pooled_projection_dim"] = changes.get("pooled_projection_dim", 0) + read_config(path)["projection_dim"]
    return PRESETS[preset] | changes


def read_info(folder: Path) -> dict[str, Any]:
    """What a pipeline folder says of itself in latentfm.json; empty for a stock folder. Raises InputError when it is damaged."""
    path = folder / INFO_FILE
    if not path.exists():
        return {}
    info = read_json(path, way_out="copy the folder again")
    if problem := wrong_info(info):
        raise InputError(f"{shown(path)} says {problem}; copy the folder again")
    return info


def wrong_info(info: Mapping[str, Any]) -> str:
    """What is wrong with what a model says of itself, in words; "" when nothing is."""
    length = info.get("max_sequence_length", 1)
    if type(length) is not int or not 1 <= length <= MOST_T5_TOKENS:
        return f"max_sequence_length {shown(json.dumps(length), 80)}, which is no number of tokens from 1 to {MOST_T5_TOKENS:,}"
    guidance = info.get("distilled_guidance", 1.0)
    if type(guidance) not in (int, float) or not 0 <= guidance < float("inf"):
        return f"distilled_guidance {shown(json.dumps(guidance), 80)}, which is no strength"
    steps, guidance = info.get("steps", 1), info.get("guidance", 1.0)
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        return f"steps {shown(json.dumps(steps), 80)}, which is no number from 1 to {MOST_STEPS:,}"
    if type(guidance) not in (int, float) or not 0 <= guidance <= MOST_GUIDANCE:
        return f"guidance {shown(json.dumps(guidance), 80)}, which is no strength from 0 to {MOST_GUIDANCE:g}"
    return ""


def distilled_guidance(info: Mapping[str, Any]) -> float | None:
    """The guidance that a model's weights were trained to draw with by themselves, so that its own is 1; None of other weights."""
    return info.get("distilled_guidance")


class Usual(NamedTuple):
    """What is drawn with where nothing else is asked for."""

    steps: int = 28
    guidance: float = 3.0

    def unless(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """{"steps", "guidance"}: those of `given`, where they are neither missing nor None, else these."""
        return {name: value if given.get(name) is None else given[name] for name, value in self._asdict().items()}


def usual_sampling(folder: Path) -> Usual:
    """What a model's folder says of itself, or the usual; guidance 1 where its weights have guidance in them."""
    info = read_info(folder)
    own = Usual(**{name: info[name] for name in Usual._fields if name in info})
    return own if distilled_guidance(info) is None else own._replace(guidance=1.0)


def t5_length(info: dict[str, Any]) -> int:
    """The number of T5 tokens, padding included, a model is meant for, by its own `info`; SD3's 256 where it says nothing."""
    return info.get("max_sequence_length", 256)


def read_index(folder: Path) -> dict[str, tuple[str, str]]:
    """(library, class) of each component that a folder's model_index.json names and does not leave out.

    Raises InputError for a name that is no folder's beside it, and for a class that is not of diffusers or transformers.
    """
    path = folder / INDEX_FILE
    found = {}
    for name, value in read_json(path, way_out="it is damaged: copy the folder again").items():
        if name.startswith("_") or not isinstance(value, list):
            continue  # the pipeline's class, versions, flags
        where = f"{shown(path)} names the component {shown(name, 80)}"
        if not COMPONENT.fullmatch(name):
            raise InputError(f"{where}, which is no name of a folder beside it; copy the folder again")
        if value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(word, str) for word in value) or not COMPONENT.fullmatch(value[1]):
            raise InputError(f"{where} as {shown(json.dumps(value), 80)}, not as a library and a class; copy the folder again")
        if value[0] not in LIBRARIES:
            raise InputError(f"{where} of the library {shown(value[0], 80)}; only classes of {' and '.join(LIBRARIES)} are loaded")
        found[name] = (value[0], value[1])
    return found


def left_out(folder: Path) -> list[str]:
    """The components that a folder's model_index.json names as left out; none where there is no such file."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return []
    return [name for name, value in read_json(path, way_out="it is damaged: copy the folder again").items() if value == [None, None]]


def refuse_pickle(path: Path) -> None:
    """Raises InputError when `path` is a pickle by its name, or a folder of whose weights only pickles would be opened."""
    if is_pickle(path):
        raise pickle_refused(path)
    if path.is_dir():
        files = sorted(file for pattern in ("*", "*/*") for file in path.glob(pattern))
        if (pickles := [file for file in files if is_pickle(file)]) and not any(file.suffix == ".safetensors" for file in files):
            raise pickle_refused(pickles[0])


def check_folder(
    folder: Path, transformer: bool = True, without: Collection[str] = (), verify: bool = False, variant: str | None = None
) -> dict[str, tuple[str, str]]:
    """The components of a pipeline folder, as read_index, once it is clear that what will be opened is there and is safetensors.

    transformer: whether it must have one. without: components that are not loaded. variant: of the weights, as weight_files. verify: as
    check_manifest. Raises InputError for a folder that is no pipeline, lacks something, is damaged, or has changed since it was saved.
    """
    if not folder.is_dir():
        refuse_pickle(folder)
        raise InputError(f"no such model folder: {shown(folder)}; give a folder with a {INDEX_FILE}")
    if not (folder / INDEX_FILE).is_file():
        refuse_pickle(folder)
        raise InputError(f"{shown(folder)} is no pipeline folder: it has no {INDEX_FILE}; give a folder saved by latentfm or diffusers")
    index = read_index(folder)
    without = {*without} if transformer else {*without, "transformer"}
    if transformer and not (folder / "transformer" / "config.json").is_file():
        refuse_pickle(folder / "transformer")
        raise InputError(f"{shown(folder)} has no transformer/config.json; it is not an SD3-style pipeline, or its copy is not complete")
    named = [name for name in index if name not in without]
    if lost := [name for name in named if not (folder / name).is_dir()]:
        raise InputError(f"{shown(folder)} lacks the folder {', '.join(lost)}, which its {INDEX_FILE} names; {ways_out(lost)}")
    for name in (name for name in named if name in PARTS):  # what is wrong with a file says more than that it is another than was saved
        read_config(folder / name / "config.json")
        for path in weight_files(folder / name, variant).paths:
            read_header(path)
    read_info(folder)
    check_manifest(folder, verify, without)
    return index


def ways_out(lost: list[str]) -> str:
    """What to say of components whose folders are missing: the text encoders are those that a model can do without."""
    ways = [f"it has no {name}/config.json" for name in lost if name in PARTS][:1] + ["its copy is not complete"]
    pairs = {name: encoder for encoder in ENCODERS for name in (encoder.name, encoder.tokenizer)}
    if all(name in pairs for name in lost):
        names = dict.fromkeys(own for name in lost for own in (pairs[name].name, pairs[name].tokenizer))
        ways += [f"or draw without: {', '.join(f'{name}=None' for name in names)} when it is loaded, --without of latentfm generate"]
    return ", ".join(ways)


def write_stock_names(folder: Path) -> None:
    """Makes the folder's JSON files name diffusers' classes and float32 text encoders, so that stock code loads and runs it.

    Without a dtype stock diffusers loads the transformer and the VAE in float32 whatever was saved, but transformers 5 loads
    a text encoder in the dtype its config.json names: float16 there would meet float32 weights and fail. A VAE's shift of None, which
    stock code adds, is 0.
    """
    index = read_json(folder / INDEX_FILE)
    index.pop("_name_or_path", None)  # a path of the machine it was saved on
    index |= {"_class_name": "StableDiffusion3Pipeline"}
    index |= {"transformer": ["diffusers", "SD3Transformer2DModel"]} if index.get("transformer") != [None, None] else {}
    write_json(folder / INDEX_FILE, index)
    for name in read_index(folder):
        path = folder / name / "config.json"
        if not path.is_file():
            continue
        config = read_json(path)
        config.pop("_name_or_path", None)
        config |= {"_class_name": "SD3Transformer2DModel"} if name == "transformer" else {}
        config |= {"dtype": "float32"} if name in TEXT else {}
        config |= {"shift_factor": 0.0} if name == "vae" and config.get("shift_factor", 0.0) is None else {}
        write_json(path, config)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
