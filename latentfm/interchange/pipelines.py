"""How a pipeline comes from disk and goes back: folders and single files."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import PipelineQuantizationConfig

from latentfm.errors import InputError
from latentfm.files import follow_umask, reason
from latentfm.interchange.components import EXTRA, check_together, load_component, read_null, scheduler_from
from latentfm.interchange.weights import CLASSES, completed, load_part, open_weights, tokenizer_of
from latentfm.models.encoders import BY_NAME, ENCODERS, TEXT
from latentfm.models.folder import INFO_FILE, PARTS, check_folder, read_info, refuse_pickle, write_stock_names
from latentfm.models.manifest import write_manifest
from latentfm.models.preview import readable
from latentfm.words import listed, shown

logger = logging.getLogger(__name__)
COMPONENTS = (*CLASSES, *EXTRA)


class PipelineFiles:
    """Loading and saving of a DiffusionPipeline that has SD3's components, an `info` and a `null` condition; the base before that class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, verify: bool = False, **kwargs: Any) -> "PipelineFiles":
        """Loads a pipeline folder: one saved here, or a stock SD3 / SD3.5 folder (a hub name works as in diffusers).

        The keyword arguments are DiffusionPipeline.from_pretrained's: components that stand for the folder's, torch_dtype (or dtype, one
        or by component), float32 unless given, variant, quantization_config, and those of the download. verify: every byte of the
        folder is compared with what was saved there. Raises InputError for a folder that is no pipeline, has changed since it was
        saved, holds only pickles or would need code of its own, and for components cut short, damaged, or of another model.
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
                raise InputError(
                    f"no such model folder: {shown(folder)}; as a model on the hub it did not load either: {reason(error)}"
                ) from error
        given = {name: kwargs[name] for name in COMPONENTS if name in kwargs}
        device, variant = place_asked_for(kwargs.get("device_map")), kwargs.get("variant")
        index = check_folder(folder, transformer="transformer" not in given, without=given.keys(), verify=verify, variant=variant)
        if unknown := index.keys() - set(COMPONENTS):
            logger.warning("%s has components that are not of this pipeline and are left out: %s", shown(folder), listed(sorted(unknown)))
        loaded = dict(given)
        for name in (name for name in COMPONENTS if name in index and name not in given):
            wanted = dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
            quantization = quantisation_of(name, kwargs.get("quantization_config"))
            loaded[name] = load_component(folder, name, index[name][1], wanted, variant, quantization)
        if lost := [name for name in ("transformer", "vae", "scheduler") if name not in loaded]:
            raise InputError(f"{shown(folder)} has no {' and no '.join(lost)}; give one, or another folder")
        for name in (name for name in TEXT if name in index and loaded[name] is not None):
            if (tokenizer := BY_NAME[name].tokenizer) not in loaded:
                raise InputError(f"{shown(folder)} has a {name} and no {tokenizer}; its copy is not complete")
        check_together({name: part for name, part in loaded.items() if name not in given}, folder)
        pipe = cls(**loaded)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        info = read_info(folder)
        rgb = info.pop("latent_rgb", None)
        if "vae" not in given and pipe.vae is not None:
            pipe.vae.latent_rgb = readable(rgb, pipe.vae.config.latent_channels)
        pipe.info = info
        replaced = [number for number, encoder in enumerate(ENCODERS) if {encoder.name, encoder.tokenizer} & given.keys()]
        pipe.null = read_null(folder, pipe.prompt_encoder, replaced)
        return pipe if device is None else pipe.to(device)

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
        components |= {name: tokenizer_of(name, weights) for name in tokenizers}
        pipe = cls(scheduler=scheduler_from(weights.scheduler, weights.path), **components)
        pipe.info = weights.info
        if weights.null:
            pipe.null = read_null(weights.null.parent, pipe.prompt_encoder)
        return pipe

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes a stock StableDiffusion3Pipeline folder (safetensors), plus latentfm.json, the null condition and the manifest."""
        folder = Path(save_directory)
        kwargs["safe_serialization"] = True
        if self.has_encoders:
            self.null.parts(self.max_sequence_length)
        super().save_pretrained(str(folder), **kwargs)
        follow_umask(file for name in self.components for file in (folder / name).glob("*.safetensors"))
        self.null.save(folder)
        rgb = getattr(self.vae, "latent_rgb", None)
        preview = {} if rgb is None else {"latent_rgb": rgb.tolist()}
        (folder / INFO_FILE).write_text(json.dumps({"format": 1, **self.info, **preview}, indent=2) + "\n", "utf-8")
        write_stock_names(folder)
        write_manifest(folder)


def place_asked_for(device_map: Any) -> torch.device | None:
    """The device that device_map names; None for none. Raises InputError for a map over several."""
    try:
        return None if device_map is None else torch.device(device_map)
    except (RuntimeError, TypeError):
        raise InputError(
            f"device_map {device_map!r} is no device; components are put on one, as in device_map='cuda', or moved while drawing: "
            "pipe.enable_model_cpu_offload()"
        ) from None


def quantisation_of(name: str, config: PipelineQuantizationConfig | None) -> Any:
    """How `config` has the component `name` quantised; None for not at all."""
    if config is None or name not in PARTS:
        return None
    return config._resolve_quant_config(is_diffusers=name not in TEXT, module_name=name)
