"""How a pipeline comes from disk and goes back: folders and single files."""

import json
import os
import re
from pathlib import Path
from typing import Any

from latentfm.errors import InputError
from latentfm.files import check_can_be_written, follow_umask
from latentfm.interchange.components import read_null
from latentfm.interchange.loading.keywords import FILE_KEYWORDS, FOLDER_KEYWORDS, UPLOAD, check_keywords
from latentfm.interchange.loading.parts import COMPONENTS, components_in, folder_of, load_file, load_folder, replaced_by
from latentfm.models.folder import INFO_FILE, read_info, write_stock_names
from latentfm.models.manifest import write_manifest
from latentfm.models.preview import readable
from latentfm.words import shown

__all__ = ["COMPONENTS", "PipelineFiles"]


class PipelineFiles:
    """Loading and saving of a DiffusionPipeline that has SD3's components, an `info` and a `null` condition; the base before that class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, verify: bool = False, **kwargs: Any) -> "PipelineFiles":
        """Loads a pipeline folder: one saved here, or a stock SD3 / SD3.5 folder (a hub name works as in diffusers).

        The keyword arguments are DiffusionPipeline.from_pretrained's, none of them passed over: components that stand for the folder's,
        None to leave one out; dtype (or torch_dtype: one, or one by component), float32 unless given; variant; quantization_config (a
        PipelineQuantizationConfig, or configurations by component); device_map (a device, one by component, or "balanced", within
        max_memory); and those of the download. verify: every byte of the folder is compared with what was saved there. Raises InputError
        for a folder that is no pipeline, has changed since it was saved, holds only pickles or would need code of its own, for components
        cut short, damaged, or of another model, and for a keyword that is unknown or cannot be served.
        """
        given = components_in(kwargs)
        check_keywords("from_pretrained", kwargs, FOLDER_KEYWORDS)
        folder = folder_of(cls, pretrained_model_name_or_path, given | kwargs)
        parts = load_folder(folder, given, kwargs, verify)
        pipe = cls(**parts.components)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        info = read_info(folder)
        rgb = info.pop("latent_rgb", None)
        if "vae" not in given and pipe.vae is not None:
            pipe.vae.latent_rgb = readable(rgb, pipe.vae.config.latent_channels)
        pipe.info = info
        pipe.null = read_null(folder, pipe.prompt_encoder, replaced_by(given))
        pipe.hf_device_map = parts.places.devices
        if parts.quantization is not None:
            pipe.quantization_config = parts.quantization
        return pipe

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | Path, pipeline: str | Path | None = None, **kwargs: Any
    ) -> "PipelineFiles":
        """Loads an SD3 / SD3.5 safetensors file in the original naming or diffusers', straight into the networks.

        The file may be a link to one on the hub. What it lacks (often the VAE, the text encoders, T5's tokenizer) comes from `pipeline`,
        a pipeline folder; without it text encoders are None where absent, CLIP's tokenizers are CLIP's own, the scheduler is SD3's.

        The keyword arguments are StableDiffusion3Pipeline.from_single_file's: config, a folder (or a name on the hub) that need hold no
        weights; components that stand for the file's, None to leave one out; dtype (or torch_dtype), float32 unless given; device_map;
        and those of the download. sample_size, ours: the side of the latents that default pictures have, 128 in a file that does not say.
        Raises InputError naming what is missing, what the file is instead, or a keyword that cannot be served.
        """
        given = components_in(kwargs)
        check_keywords("from_single_file", kwargs, FILE_KEYWORDS)
        weights, parts = load_file(pretrained_model_link_or_path, pipeline, given, kwargs)
        pipe = cls(**parts.components)
        pipe.info = weights.info
        if weights.null:
            pipe.null = read_null(weights.null.parent, pipe.prompt_encoder, replaced_by(given))
        pipe.hf_device_map = parts.places.devices
        return pipe

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes a stock StableDiffusion3Pipeline folder (safetensors), plus latentfm.json, the null condition and the manifest.

        The arguments are DiffusionPipeline.save_pretrained's; those of the upload (repo_id, token, ...) go with push_to_hub. Raises
        InputError for pickles, which are not written either, and for an argument that cannot be served.
        """
        if not isinstance(save_directory, str | os.PathLike):
            raise InputError(f"save_directory {shown(repr(save_directory), 60)} is no path of a folder")
        folder = Path(save_directory)
        check_can_be_written(folder, "save_directory")
        if variant is not None and not re.fullmatch(r"[\w-]+", str(variant)):
            raise InputError(f"variant {shown(repr(variant), 60)} is no part of a file's name; give one word, as fp16")
        check_keywords("save_pretrained", kwargs | {"safe_serialization": safe_serialization}, UPLOAD if push_to_hub else ())
        for name, part in self.components.items():
            if getattr(part, "peft_config", None):  # whose weights would be saved under names that no model has
                raise InputError(
                    f"a LoRA is on {name}: pipe.unload_lora_weights() takes it off, after pipe.fuse_lora() with its change in the weights; "
                    "save then (save_lora_weights saves a LoRA)"
                )
        if self.has_encoders:
            self.null.parts(self.max_sequence_length)
        super().save_pretrained(str(folder), variant=variant, max_shard_size=max_shard_size)
        follow_umask(file for name in self.components for file in (folder / name).glob("*.safetensors"))
        self.null.save(folder)
        rgb = getattr(self.vae, "latent_rgb", None)
        preview = {} if rgb is None else {"latent_rgb": rgb.tolist()}
        (folder / INFO_FILE).write_text(json.dumps({"format": 1, **self.info, **preview}, indent=2) + "\n", "utf-8")
        write_stock_names(folder)
        write_manifest(folder)
        if push_to_hub:  # which saves it once more, elsewhere: the library's own upload comes before what is written here
            self.push_to_hub(**{"repo_id": folder.name, "variant": variant} | kwargs)
