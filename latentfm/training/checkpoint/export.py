"""The result of a run as a stock pipeline folder, and an adapter as the file that diffusers loads."""

import copy
import json
import os
import shutil
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as ADAPTER_FILE
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from latentfm.config import RunConfig
from latentfm.files import whole_or_nothing
from latentfm.interchange.lora.files import Adapter
from latentfm.interchange.lora.writing import spelt
from latentfm.interchange.tensors import Held, LazyTensor, Stored, Tensors, read_folder, write_file, write_shards
from latentfm.models.folder import INFO_FILE, write_stock_names
from latentfm.models.manifest import Saved, hash_of, read_manifest, write_manifest
from latentfm.models.mmdit import MMDiT
from latentfm.training.checkpoint.storage import LARGEST_FILE
from latentfm.training.models import Models, frozen_files
from latentfm.training.pairs import folded_guidance

ADAPTER_FOLDER = "lora"  # beside the pipeline
NETWORK_FILE = "diffusion_pytorch_model"


def write_pipeline(
    target: Path, models: Models, network: MMDiT, averages: Mapping[str, Stored], config: RunConfig, lengths: list[int], link: bool = False
) -> None:
    """Writes `target`: the frozen components of the base folder, the network, the null condition; all of it or nothing.

    The network's weights are its float32 `averages` by name, and its own where there is none.
    An adapter is merged, in float32, into the weights of the base folder, whatever the training held these in, and is also written to
    lora/ beside `target` (`write_adapter`). Frozen blocks are the base folder's too. With `link` the components' files are the base
    folder's own under a second name where the file system allows it, copies elsewhere, so that a checkpoint can be a pipeline without the
    space of text encoders; JSON is copied.
    """
    dtype = getattr(torch, config.output.dtype)
    if config.train.adapter:
        weights = merged(models, network, write_adapter_of(target.parent, network, averages, config))
    else:
        weights = trained_weights(models, network, averages, config)
    with whole_or_nothing(target) as folder:
        (folder / "transformer").mkdir(parents=True)
        network.save_config(folder / "transformer")
        write_around(folder, models, config, lengths, link)
        write_shards(folder / "transformer", NETWORK_FILE, weights, {"format": "pt"}, dtype, LARGEST_FILE)
        write_manifest(folder, hashes_of_frozen(models.folder))


def write_adapter_of(folder: Path, network: MMDiT, averages: Mapping[str, Stored], config: RunConfig) -> dict[str, Tensor]:
    """Writes folder/lora, the adapter in its `averages`, and returns these in memory."""
    values = {name: stored.load() for name, stored in averages.items()}
    write_adapter(folder / ADAPTER_FOLDER, network, values, getattr(torch, config.output.dtype))
    return values


def write_around(folder: Path, models: Models, config: RunConfig, lengths: list[int], link: bool) -> None:
    """Makes `folder`, which holds the network in transformer/, a pipeline folder: frozen components, null condition, what was trained."""
    put = linked if link else shutil.copy
    for name in frozen_files(models.folder):
        (folder / name).parent.mkdir(exist_ok=True)
        put(models.folder / name, folder / name)
    models.null.save(folder)
    train = config.train
    trained: dict[str, Any] = {"steps": train.steps, "batch_size": train.batch_size, "seed": train.seed, "t5_lengths": lengths}
    trained |= {"adapter": train.adapter.model_dump(mode="json")} if train.adapter else {}
    guidance = None if config.data.pairs is None else folded_guidance(config)[1]
    distilled = {} if guidance is None else {"distilled_guidance": guidance}
    (folder / INFO_FILE).write_text(json.dumps({"format": 1, **models.info, **distilled, "trained": trained}, indent=2) + "\n", "utf-8")
    write_stock_names(folder)


def hashes_of_frozen(folder: Path) -> dict[str, Saved]:
    """The size and hash of the frozen components' weights in the base folder, by name: as it was saved, else read once in a process."""
    found, saved = {}, read_manifest(folder) or {}
    for name in frozen_files(folder):
        if name.endswith(".safetensors"):
            status = (folder / name).stat()
            found[name] = saved.get(name) or hash_once(folder / name, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    return found


@cache
def hash_once(path: Path, status: tuple[int, ...]) -> Saved:
    """hash_of(path), read again only where its status is another."""
    return hash_of(path)


def trained_weights(models: Models, network: MMDiT, averages: Mapping[str, Stored], config: RunConfig) -> Tensors:
    """The state dict of the trained network; frozen blocks from the base folder, as the training may have rounded its own to bfloat16."""
    if config.train.blocks is None or config.model.preset:
        return {name: averages[name] if name in averages else Held.of(value) for name, value in network.state_dict().items()}
    frozen, _ = read_folder(models.folder / "transformer")
    return {name: averages.get(name, stored) for name, stored in frozen.items()}


def merged(models: Models, network: MMDiT, values: Mapping[str, Tensor]) -> Tensors:
    """The base folder's network with the adapter of `network`, in the given values, merged into it in float32, a linear at a time."""
    found, _ = read_folder(models.folder / "transformer")
    by_module: dict[str, dict[str, Tensor]] = {}
    for name, value in own_weights(network, values).items():
        module, _, rest = name.partition(".lora_")
        by_module.setdefault(module, {})[f"linear.lora_{rest}"] = value.to("cpu", torch.float32)
    for module, own in by_module.items():
        weight = found.get(f"{module}.weight")
        if weight is None or weight.shape[::-1] != linear_size(own):
            raise ValueError(f"the adapter does not fit the network in {models.folder}: {module}")
        merge = partial(merged_weight, weight, network.peft_config["default"], own)
        found[f"{module}.weight"] = LazyTensor(torch.float32, weight.shape, (), merge)
    return found


def linear_size(own: Mapping[str, Tensor]) -> tuple[int, int]:
    """(numbers in, numbers out) of the linear that an adapter's matrices belong to."""
    return own["linear.lora_A.default.weight"].shape[1], own["linear.lora_B.default.weight"].shape[0]


def merged_weight(weight: Stored, config: LoraConfig, own: Mapping[str, Tensor]) -> Tensor:
    """A linear's weight with its adapter merged, by peft."""
    holder = nn.Module()
    holder.linear = nn.Linear(*linear_size(own), bias=False, device="meta")
    holder.linear.weight = nn.Parameter(weight.load(torch.float32), requires_grad=False)
    config = copy.deepcopy(config)
    config.target_modules = {"linear"}
    with torch.random.fork_rng(devices=[]):  # peft draws a start that the trained values replace
        inject_adapter_in_model(config, holder)
    holder.load_state_dict(own, strict=False)
    holder.linear.merge(safe_merge=True)
    return holder.linear.get_base_layer().weight


def own_weights(network: MMDiT, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained parameters by name: their averages, and the parameter itself where there is none."""
    return {name: averages.get(name, parameter.detach()) for name, parameter in network.named_parameters() if parameter.requires_grad}


def write_adapter(folder: Path, network: MMDiT, averages: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Writes `folder`/pytorch_lora_weights.safetensors, the adapter "default" as load_lora_weights takes it; all of it or nothing.

    Its values are the `averages` by the parameters' names, and the network's own where there is none, in `dtype`. Rank, alpha and
    targets are in the file's metadata.
    """
    tensors = get_peft_model_state_dict(network, state_dict=own_weights(network, averages))
    held = {name: Held.of(value) for name, value in tensors.items()}
    with whole_or_nothing(folder) as partial:
        partial.mkdir()
        path = partial / ADAPTER_FILE
        config = network.peft_config["default"].to_dict()
        named, described = spelt(Adapter(path, {"transformer": held}, {"transformer": config}, {}, {}), "diffusers")
        write_file(path, named, described, dtype)
        write_manifest(partial)


def linked(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Gives the file `source` a second name `target`; a copy where the file system refuses, and of JSON, which is changed in place."""
    real = Path(source).resolve()  # a hub's cache holds links to its files
    if real.suffix != ".json" and Path(target).suffix != ".json":
        try:
            return os.link(real, target)
        except OSError:
            pass
    shutil.copy(real, target)
