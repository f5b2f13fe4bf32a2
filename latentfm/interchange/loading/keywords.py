"""What stock diffusers' loading calls take beside components: which of it is served here, which is not, and why. None is passed over.

DiffusionPipeline.from_pretrained's and FromSingleFileMixin.from_single_file's, of diffusers 0.42.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from diffusers import PipelineQuantizationConfig

from latentfm.errors import InputError, nearest
from latentfm.models.folder import PARTS
from latentfm.words import shown

DOWNLOAD = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only")  # of a model of the hub
COMMON = (*DOWNLOAD, "dtype", "torch_dtype", "device_map", "max_memory")
FOLDER_KEYWORDS = (*COMMON, "variant", "quantization_config")
UPLOAD = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder")  # to the hub
FILE_KEYWORDS = (*COMMON, "config", "sample_size")
# What asks for the way in which weights are read here anyway: once, into no second copy, neither mapped nor put on a disk. And leave for
# code that a model may bring along, and for pipelines that a model may be one of: a Stable Diffusion 3 pipeline has neither.
SO_ANYWAY = ("low_cpu_mem_usage", "disable_mmap", "offload_state_dict", "offload_folder", "trust_remote_code", "load_connected_pipeline")
# What is taken where it says what is done here, and the reason why nothing else is
ALONE = {
    "use_safetensors": (True, "only safetensors are loaded, since a pickle can run code"),
    "safe_serialization": (True, "only safetensors are written, since a pickle can run code"),
    "use_onnx": (False, "ONNX models are not read here"),
    "use_flashpack": (False, "FlashPack files are not read here; give the model's safetensors"),
}
NOT_HERE = {
    "custom_pipeline": "another pipeline's code is not run here; use diffusers' own DiffusionPipeline for it",
    "custom_revision": "another pipeline's code is not run here; use diffusers' own DiffusionPipeline for it",
    "provider": "it is for ONNX models, which are not read here",
    "sess_options": "it is for ONNX models, which are not read here",
    "provider_options": "it is for ONNX models, which are not read here",
    "subfolder": "a pipeline is a whole folder; give that folder's own path",
    "original_config": "what it says is read from the weights, and what leaves no trace there from config=, a pipeline's folder",
    "original_config_file": "what it says is read from the weights, and what leaves no trace there from config=, a pipeline's folder",
    "scaling_factor": "it is the VAE's own; give another VAE, as in vae=AutoencoderKL.from_pretrained(...)",
    "load_safety_checker": "a Stable Diffusion 3 pipeline has none",
    "quantization_config": "a single file is loaded as it is; make a folder of it (latentfm convert), and load that with it",
    "variant": "a single file is of one variant; give that file",
    "dduf_file": "such files are read no more, in diffusers neither; give a folder",
}


def check_keywords(call: str, given: Mapping[str, Any], served: Collection[str]) -> None:
    """Raises InputError for a keyword of `call` that is neither `served` nor asks for what is done anyway; it says why."""
    for name, value in given.items():
        if name in served or name in SO_ANYWAY:
            continue
        if name not in ALONE and name not in NOT_HERE:
            raise InputError(f"{call} has no keyword {shown(name, 60)}{nearest(name, [*served, *SO_ANYWAY, *ALONE])}")
        taken, why = ALONE.get(name, (None, NOT_HERE.get(name)))
        if value is not None and value is not taken:
            raise InputError(f"{call} does not serve {name}={shown(repr(value), 60)}: {why}")


def dtype_asked_for(given: Mapping[str, Any]) -> Any:
    """What dtype, or as it is also called torch_dtype, is given as; None for neither. Raises InputError for two that differ."""
    found = [given[name] for name in ("dtype", "torch_dtype") if given.get(name) is not None]
    if len(found) == 2 and found[0] != found[1]:
        raise InputError(f"dtype is {shown(repr(found[0]), 60)} and torch_dtype {shown(repr(found[1]), 60)}; give one of the two")
    return found[0] if found else None


def dtype_of(name: str, given: Any) -> torch.dtype:
    """The dtype of component `name`: of one for all, or of a mapping by component, whose "default" is for the others; float32 for None.

    A name, as in "bfloat16", is a dtype too. Raises InputError for anything else.
    """
    if isinstance(given, Mapping):
        if unknown := given.keys() - {*PARTS, "default", "image_encoder"}:
            name = min(map(str, unknown))
            raise InputError(f"dtype is given for {shown(name, 60)}, which is no component{nearest(name, [*PARTS, 'default'])}")
        given = given.get(name, given.get("default"))
    found = torch.float32 if given is None else given
    if isinstance(found, str):
        found = getattr(torch, found.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize == 1:
        raise InputError(
            f"dtype {shown(repr(given), 60)} is none that a model is loaded in; there are torch.float32, torch.bfloat16 and torch.float16"
        )
    return found


def quantisation(given: Any) -> PipelineQuantizationConfig | None:
    """`given`, a PipelineQuantizationConfig, a mapping of configurations by component, or None, as the first.

    Raises InputError for anything else.
    """
    if isinstance(given, Mapping):
        try:
            given = PipelineQuantizationConfig(quant_mapping=dict(given))
        except ValueError as error:
            raise InputError(f"quantization_config: {error}") from error
    if given is not None and not isinstance(given, PipelineQuantizationConfig):
        example = 'PipelineQuantizationConfig(quant_mapping={"transformer": ...})'
        raise InputError(f"quantization_config must be a PipelineQuantizationConfig, as in {example}, not {shown(repr(given), 60)}")
    return given


def quantisation_of(name: str, config: PipelineQuantizationConfig | None) -> Any:
    """How `config` has the component `name` quantised, a configuration of diffusers' or transformers'; None for not at all."""
    if config is None or name not in PARTS:
        return None
    return config._resolve_quant_config(is_diffusers=name in ("transformer", "vae"), module_name=name)


def named_by(config: PipelineQuantizationConfig | None) -> set[str]:
    """The components that `config` names; empty where it is for all."""
    return set(config.components_to_quantize or config.quant_mapping or ()) if config is not None else set()
