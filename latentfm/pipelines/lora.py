"""What a pipeline does with LoRA adapters, as diffusers' SD3LoraLoaderMixin has it: load, save, weigh, fuse."""

import inspect
import itertools
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import SD3LoraLoaderMixin
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils import delete_adapter_layers, recurse_remove_peft_layers
from safetensors import SafetensorError
from torch import Tensor

from latentfm.errors import InputError, nearest
from latentfm.files import follow_umask, reading
from latentfm.interchange.lora.files import ADAPTER_FILE, Adapter, adapter_of, loaded, open_adapter, with_alphas
from latentfm.interchange.lora.fit import check_fit, weights_by_module
from latentfm.interchange.lora.formats import MAGNITUDE, OWNERS
from latentfm.models.folder import refuse_pickle
from latentfm.models.manifest import renew_entry
from latentfm.pipelines.arguments import real_number, told
from latentfm.words import listed, shown

OF_THE_HUB = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
OPTIONS = (*OF_THE_HUB, "subfolder", "weight_name", "use_safetensors", "verify", "return_lora_metadata", "low_cpu_mem_usage")


class LoraLoader(SD3LoraLoaderMixin):
    """LoRA adapters of a DiffusionPipeline that has SD3's components, in any spelling of interchange/lora; a base before that class."""

    _lora_loadable_modules = list(OWNERS)

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor], **kwargs: Any) -> Any:
        """The tensors of a LoRA, and its metadata with return_lora_metadata=True, as SD3LoraLoaderMixin; a peft adapter folder too.

        The keyword arguments are SD3LoraLoaderMixin's, and verify=True, which compares every byte of a folder with what was saved there.
        Names are diffusers' whatever the file's spelling was, and the metadata is always there; without it an alpha is multiplied in.
        Raises InputError for a pickle, a file that cannot be read, or a LoRA of another model or kind.
        """
        adapter = found_adapter(pretrained_model_name_or_path_or_dict, kwargs)
        tensors, metadata = loaded(adapter)
        return (tensors, metadata) if kwargs.get("return_lora_metadata") else with_alphas(tensors, adapter)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Adds a LoRA to the components that it adapts, as SD3LoraLoaderMixin, T5 among them: to all of them or to none.

        adapter_name: default_0, default_1, ... unless given. The keyword arguments are lora_state_dict's and low_cpu_mem_usage. Raises
        InputError for what lora_state_dict refuses, for one that does not fit, and for a component that is not loaded.
        """
        adapter = found_adapter(pretrained_model_name_or_path_or_dict, kwargs)
        there = self.get_list_adapters()
        taken = {name for names in there.values() for name in names}
        if hotswap and adapter_name not in taken:
            raise InputError(f"hotswap=True is for a LoRA that is loaded, adapter_name {told(adapter_name)}; there are: {listed(taken)}")
        if adapter_name and (not isinstance(adapter_name, str) or "." in adapter_name):
            raise InputError(f"adapter_name {told(adapter_name)} must be a text without a dot in it: peft names modules by it")
        name = adapter_name or next(name for number in itertools.count() if (name := f"default_{number}") not in taken)
        for owner, tensors in adapter.tensors.items():
            if (network := getattr(self, owner, None)) is None:
                raise InputError(f"the LoRA adapts {owner}, which is not loaded; load the model with it")
            if name in there.get(owner, ()) and not hotswap:
                raise InputError(f"adapter_name {told(name)} is in use; give another name, or hotswap=True to replace what is loaded")
            check_fit(network, owner, {f"{owner}.{key}": value for key, value in tensors.items()})
        state_dict, metadata = loaded(adapter)
        more = {"adapter_name": name, "metadata": metadata, "hotswap": hotswap, "_pipeline": self}
        more["low_cpu_mem_usage"] = kwargs.get("low_cpu_mem_usage", True)
        done: list[str] = []
        try:
            for owner in adapter.tensors:
                if owner == "transformer":
                    self.load_lora_into_transformer(state_dict, self.transformer, **more)
                else:
                    self.load_lora_into_text_encoder(state_dict, None, getattr(self, owner), owner, lora_scale=self.lora_scale, **more)
                done.append(owner)
        except Exception:
            for network in (getattr(self, owner) for owner in (() if hotswap else done)):
                delete_adapter_layers(network, name)
                if not getattr(network, "peft_config", None):
                    recurse_remove_peft_layers(network)  # its layers are plain ones again, drawn with as fast and to the same bit
            raise

    @classmethod
    def load_lora_into_transformer(cls, state_dict: dict[str, Tensor], transformer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """Adds the adapter to the transformer. Raises InputError when it does not fit."""
        check_fit(transformer, "transformer", state_dict)
        with reading("the LoRA", "it does not fit this model"):
            super().load_lora_into_transformer(state_dict, transformer, *args, **kwargs)
        transformer.train(transformer.training)  # peft's layers begin in training mode, with their dropout on

    @classmethod
    def load_lora_into_text_encoder(
        cls, state_dict: dict[str, Tensor], network_alphas: Any, text_encoder: torch.nn.Module | None, prefix: str, **kwargs: Any
    ) -> None:
        """Adds the adapter to a text encoder. Raises InputError when it does not fit, or there is no such encoder."""
        own = {name: value for name, value in state_dict.items() if name.startswith(f"{prefix}.")}
        if text_encoder is None:
            if own:
                raise InputError(f"the LoRA adapts {prefix}, which is not loaded; load the model with its text encoders")
            return
        check_fit(text_encoder, prefix, own)
        # diffusers reads peft's names of some modules alone, its own older ones of all; transformers has a module for the magnitudes
        theirs = {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up", MAGNITUDE: f"{MAGNITUDE}.weight"}
        spelt = {".".join(theirs.get(part, part) for part in name.split(".")): value for name, value in own.items()}
        with reading("the LoRA", "it does not fit this model"):
            super().load_lora_into_text_encoder(spelt, network_alphas, text_encoder, prefix, **kwargs)

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Makes these adapters the active ones, with these weights, as SD3LoraLoaderMixin.

        adapter_weights: a number, or by component a number or the numbers of its blocks: {"transformer": {"transformer_blocks.1": 0.5}};
        or a list of such, one an adapter. A block's name is the whole or a part of its modules' names; the others' weight is 1. Raises
        InputError for what is no number, and for names that no module has.
        """
        if not adapter_names:
            raise InputError(f"adapter_names {told(adapter_names)} names no LoRA; disable_lora() turns all of them off")
        given = adapter_weights if isinstance(adapter_weights, list | tuple) else [adapter_weights]
        weights = [
            {owner: self.weight_of(owner, weight) for owner, weight in each.items()} if isinstance(each, dict) else weight_as_number(each)
            for each in given
        ]
        super().set_adapters(adapter_names, weights if given is adapter_weights else weights[0])

    def weight_of(self, owner: str, weight: Any) -> float | dict[str, float] | None:
        """A component's weight, or its modules' weights where it is given by block."""
        network = getattr(self, owner, None) if owner in OWNERS else None
        if not isinstance(weight, dict) or network is None:
            return weight if isinstance(weight, dict) else weight_as_number(weight)
        return weights_by_module(network, owner, {str(name): weight_as_number(value) for name, value in weight.items()})

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """Merges the adapters into the weights of the components, by default of all that a LoRA may adapt, as SD3LoraLoaderMixin.

        Raises InputError for a scale that is no number and for adapters that are not loaded.
        """
        scale = real_number("lora_scale", lora_scale, "that adapters are multiplied with")
        there = {name for names in self.get_list_adapters().values() for name in names}
        if unknown := [name for name in adapter_names or () if name not in there]:
            raise InputError(f"adapter_names: no LoRA {told(unknown[0])} is loaded to be fused; there are: {listed(there) or 'none'}")
        super().fuse_lora(self._lora_loadable_modules if components is None else components, scale, safe_fusing, adapter_names)

    def unfuse_lora(self, components: list[str] | None = None) -> None:
        """Takes the adapters out of the weights again, as SD3LoraLoaderMixin."""
        super().unfuse_lora(self._lora_loadable_modules if components is None else components)

    @classmethod
    def save_lora_weights(cls, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Writes a LoRA file as SD3LoraLoaderMixin, whose arguments these are, and keeps its folder's manifest right."""
        save = super().save_lora_weights
        given = inspect.signature(save).bind(save_directory, *args, **kwargs).arguments
        save(save_directory, *args, **kwargs)
        follow_umask(Path(save_directory).glob("*.safetensors"))
        name = given.get("weight_name") or ADAPTER_FILE
        if given.get("is_main_process", True) and (Path(save_directory) / name).is_file():
            renew_entry(Path(save_directory), name)


def weight_as_number(value: Any) -> float | None:
    return None if value is None else real_number("adapter_weights", value, "that an adapter is multiplied with")


def found_adapter(source: str | Path | dict[str, Tensor], options: dict[str, Any]) -> Adapter:
    """A LoRA given as a state dict, as a file or folder, or as a name on the hub. Raises InputError for options that there are not."""
    if unknown := next((key for key in options if key not in OPTIONS), None):
        raise InputError(f"there is no option {unknown!r} for loading a LoRA{nearest(unknown, OPTIONS)}")
    if isinstance(source, dict):
        if wrong := [name for name, value in source.items() if not (isinstance(name, str) and isinstance(value, Tensor))]:
            raise InputError(f"the given state dict is no LoRA: {told(wrong[0])} is no name of a tensor in it")
        return adapter_of(Path("the given state dict"), source, {})
    if not isinstance(source, str | Path):
        raise InputError(f"a LoRA is given by its file, its folder, its name on the hub or a dict of tensors, not by {told(source)}")
    path, name = Path(source), options.get("weight_name")
    if path.exists():
        return open_adapter(path / (options.get("subfolder") or ""), name, bool(options.get("verify")))
    return fetched(path, options)


def fetched(name: Path, options: dict[str, Any]) -> Adapter:
    """A LoRA of the hub's. Raises InputError for one that is not there, or is no safetensors."""
    wanted = options.get("weight_name")
    if wanted is not None:
        refuse_pickle(Path(wanted))
        if not str(wanted).endswith(".safetensors"):
            raise InputError(f"the LoRA {shown(wanted)} is no safetensors file by its name; only these are loaded")
    refuse_pickle(name)
    of_the_hub = {key: options.get(key) for key in (*OF_THE_HUB, "subfolder", "weight_name")}
    agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    with reading(f"the LoRA {shown(name)}", "give a file, a folder, or a name on the hub", also=(SafetensorError,)):
        # not the mixin's lora_state_dict, which leaves a DoRA's magnitudes out
        tensors, said = _fetch_state_dict(str(name), use_safetensors=True, allow_pickle=False, user_agent=agent, **of_the_hub)
    return adapter_of(name, tensors, said or {})
