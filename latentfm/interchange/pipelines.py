"""How a pipeline comes from disk and goes back: folders, single files, LoRA adapters."""

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.loaders import SD3LoraLoaderMixin
from safetensors import SafetensorError
from torch import Tensor

from latentfm.errors import InputError
from latentfm.files import follow_umask, read_json, reading
from latentfm.interchange.lora import ADAPTER_METADATA, check_names, diffusers_adapter, is_adapter, open_adapter
from latentfm.interchange.weights import check_transformer, completed, load_part, load_tokenizer, open_weights
from latentfm.models.folder import INFO_FILE, check_folder, read_info, refuse_pickle, write_stock_names
from latentfm.models.mmdit import MMDiT
from latentfm.models.text import NullCondition
from latentfm.words import shown

logger = logging.getLogger(__name__)
DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 41) else "torch_dtype"  # the old name warns


def scheduler_of(config: dict[str, Any], where: object) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a configuration. Raises InputError for one of another kind, and for values that it does not take."""
    own = FlowMatchEulerDiscreteScheduler.__name__
    if (name := config.get("_class_name", own)) != own:
        raise InputError(f"{shown(where)} has a {shown(name, 80)}, which steps in another way; here there is {own} alone")
    with reading(f"the scheduler's configuration in {where}", also=(ImportError,)):
        return FlowMatchEulerDiscreteScheduler.from_config(config)


def scheduler_in(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a pipeline folder. Raises InputError as `scheduler_of`."""
    named = read_json(folder / "model_index.json").get("scheduler")
    kind = {"_class_name": named[1]} if isinstance(named, list) and len(named) == 2 and named[1] else {}
    return scheduler_of(read_json(folder / "scheduler" / "scheduler_config.json") | kind, folder)


class PipelineFiles(SD3LoraLoaderMixin):
    """Loading and saving of a DiffusionPipeline that has SD3's components, an `info` and a `null` condition; the base before that class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "PipelineFiles":
        """Loads a pipeline folder: one saved here, or a stock SD3 / SD3.5 folder (a hub name works as in diffusers).

        The keyword arguments are DiffusionPipeline.from_pretrained's; torch_dtype (or dtype) is float32 unless given.
        Raises InputError for a folder that is no pipeline or holds only pickles, and for a transformer that is another model's (saying
        which it looks like), cut short, or unlike its configuration.
        """
        folder = Path(pretrained_model_name_or_path)
        names = [kwargs.pop(name, None) for name in ("dtype", "torch_dtype")]
        dtype = next((given for given in names if given is not None), torch.float32)
        kwargs["use_safetensors"] = True
        if not folder.is_dir():
            if folder.exists() or folder.is_absolute() or len(folder.parts) != 2 or folder.parts[0] in (".", ".."):
                check_folder(folder)
            refuse_pickle(folder)
            try:
                folder = Path(cls.download(str(pretrained_model_name_or_path), **kwargs))
            except (OSError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                raise InputError(f"no such model folder: {folder}; as a model on the hub it did not load either: {reason}") from error
        check_folder(folder, transformer="transformer" not in kwargs)
        if "transformer" not in kwargs:
            check_transformer(folder / "transformer")
            kwargs["transformer"] = MMDiT.from_pretrained(
                folder, subfolder="transformer", use_safetensors=True, variant=kwargs.get("variant"),
                torch_dtype=dtype.get("transformer", dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype,
            )  # fmt: skip
        pipe = super().from_pretrained(str(folder), **kwargs, **{DTYPE: dtype})
        pipe.info = read_info(folder)
        replaced = [i for i, suffix in enumerate(("", "_2", "_3")) if {f"text_encoder{suffix}", f"tokenizer{suffix}"} & kwargs.keys()]
        pipe.null = NullCondition.load(folder, pipe.prompt_encoder, replaced)
        return pipe

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        pipeline: str | Path | None = None,
        torch_dtype: torch.dtype = torch.float32,
        sample_size: int | None = None,
    ) -> "PipelineFiles":
        """Loads an SD3 / SD3.5 safetensors file in the original naming or diffusers', straight into the networks.

        What the file lacks (often the VAE, the text encoders, T5's tokenizer) comes from `pipeline`, a pipeline folder; without
        it text encoders are None where absent, CLIP's tokenizers are CLIP's own, the scheduler is SD3's. sample_size: the side
        of the latents that default pictures have, 128 in a file that does not say. Raises InputError naming what is missing, or
        what the file is instead.
        """
        base = open_weights(pipeline) if pipeline is not None else None
        weights = completed(open_weights(path, like=base, sample_size=sample_size), base)
        for note in weights.notes:
            logger.warning(note)
        components = {name: load_part(name, part, torch_dtype) for name, part in weights.parts.items()}
        tokenizers = [name.replace("text_encoder", "tokenizer") for name in components if name.startswith("text_encoder")]
        components |= {name: load_tokenizer(name, weights) for name in tokenizers}
        pipe = cls(scheduler=scheduler_of(weights.scheduler, pipeline or path), **components)
        pipe.info = weights.info
        if weights.null:
            pipe.null = NullCondition.load(weights.null.parent, pipe.prompt_encoder)
        return pipe

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor], **kwargs: Any) -> Any:
        """The tensors of a LoRA, and its metadata with return_lora_metadata=True, as SD3LoraLoaderMixin; a peft adapter folder too.

        The keyword arguments are SD3LoraLoaderMixin's. Raises InputError for a pickle, a file that cannot be read, or a LoRA of
        another model or in a form that would load as nothing.
        """
        given = pretrained_model_name_or_path_or_dict
        source = Path("the given state dict" if isinstance(given, dict) else given)
        refuse_pickle(source / (kwargs.get("weight_name") or ""))
        if source.is_dir() and is_adapter(source):
            stored, metadata = diffusers_adapter(open_adapter(source))
            tensors = {name: value.load() for name, value in stored.items()}
            return (tensors, json.loads(metadata[ADAPTER_METADATA])) if kwargs.get("return_lora_metadata") else tensors
        try:
            found = super().lora_state_dict(given if isinstance(given, dict) else str(given), **kwargs | {"use_safetensors": True})
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"the LoRA {source} cannot be read: {str(error).partition(chr(10))[0]}") from error
        check_names(source, list(found[0] if isinstance(found, tuple) else found))
        return found

    @classmethod
    def save_lora_weights(cls, save_directory: str | Path, *layers: Any, **kwargs: Any) -> None:
        """Writes LoRA adapters as SD3LoraLoaderMixin, whose arguments these are; readable by whom the umask says."""
        super().save_lora_weights(save_directory, *layers, **kwargs)
        follow_umask(Path(save_directory).glob("*.safetensors"))

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes a stock StableDiffusion3Pipeline folder (safetensors), plus latentfm.json and the null condition."""
        folder = Path(save_directory)
        kwargs["safe_serialization"] = True
        if self.has_encoders:
            self.null.parts(self.max_sequence_length)
        super().save_pretrained(str(folder), **kwargs)
        follow_umask(file for name in self.components for file in (folder / name).glob("*.safetensors"))
        self.null.save(folder)
        (folder / INFO_FILE).write_text(json.dumps({"format": 1, **self.info}, indent=2) + "\n", "utf-8")
        write_stock_names(folder)
