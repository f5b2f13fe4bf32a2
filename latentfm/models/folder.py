"""Pipeline folders on disk: what makes one whole, what it says of itself, and the names that stock diffusers looks for."""

import json
from pathlib import Path
from typing import Any

from latentfm.errors import InputError

INFO_FILE = "latentfm.json"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


def read_info(folder: Path) -> dict[str, Any]:
    """What a pipeline folder says of itself in latentfm.json; empty for a stock folder."""
    path = folder / INFO_FILE
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def t5_length(info: dict[str, Any]) -> int:
    """The number of T5 tokens, padding included, a model is meant for, by its own `info`; SD3's 256 where it says nothing."""
    return info.get("max_sequence_length", 256)


def refuse_pickle(path: Path) -> None:
    """Raises InputError when `path` is a pickle by name, or a folder whose weights are only pickles."""
    found = [path] if path.suffix.lower() in PICKLES else []
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICKLES)
        if any(path.rglob("*.safetensors")):
            return
    if found:
        raise InputError(
            f"{found[0]} is a pickle, which can run code when opened; only safetensors are loaded. Convert it once in a "
            "place you trust: python -c \"import torch, safetensors.torch as s; "
            f"s.save_file(torch.load('{found[0]}', weights_only=True), '{found[0].with_suffix('.safetensors')}')\""
        )


def check_folder(folder: Path, transformer: bool = True) -> None:
    """Raises InputError unless `folder` is a pipeline folder with safetensors weights; `transformer` says whether it must have one."""
    if not folder.is_dir():
        refuse_pickle(folder)
        raise InputError(f"no such model folder: {folder}; give a folder with a model_index.json")
    if not (folder / "model_index.json").is_file():
        refuse_pickle(folder)
        raise InputError(f"{folder} is no pipeline folder: it has no model_index.json; give a folder saved by latentfm or diffusers")
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{folder}/model_index.json is damaged ({error}); copy the folder again") from error
    for name in index:
        refuse_pickle(folder / name)
    if not transformer:
        return
    if not (folder / "transformer" / "config.json").is_file():
        raise InputError(f"{folder} has no transformer/config.json; it is not an SD3-style pipeline, or its copy is not complete")
    if not any((folder / "transformer").glob("*.safetensors")):
        raise InputError(f"{folder}/transformer has no safetensors weights; its copy is not complete")


def write_stock_names(folder: Path) -> None:
    """Makes the folder's JSON files name diffusers' classes and float32 text encoders, so that stock code loads and runs it.

    Without a dtype stock diffusers loads the transformer and the VAE in float32 whatever was saved, but transformers 5 loads
    a text encoder in the dtype its config.json names: float16 there would meet float32 weights and fail.
    """
    for path in [folder / "model_index.json", *folder.glob("*/config.json")]:
        data = json.loads(path.read_text("utf-8"))
        data.pop("_name_or_path", None)  # a path of the machine it was saved on
        component = path.parent.name if path.name == "config.json" else None
        if component is None:
            data |= {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
        elif component == "transformer":
            data["_class_name"] = "SD3Transformer2DModel"
        elif component.startswith("text_encoder"):
            data["dtype"] = "float32"
        path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")
