"""What there is to work with: versions, processors, kernels of attention, and what is missing with the command that brings it.

The first lines of a bug report. Torch is imported when it is asked for.
"""

import importlib.metadata
import os
import platform
import sys
from typing import Any

import platformdirs
import psutil

from latentfm import __version__

GIB = 2**30
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "tokenizers", "sentencepiece", "numpy", "pillow")
# package: what it is for
OPTIONAL = {
    "xformers": "attention 'xformers'", "bitsandbytes": "8-bit optimizers and 4-bit weights on a GPU", "torchao": "quantised weights",
    "torchdiffeq": "solver dormand_prince", "datasets": "data from hubs", "tensorboard": "train.trackers=tensorboard",
    "wandb": "train.trackers=wandb", "prodigyopt": "optimizer prodigy", "lion-pytorch": "optimizer lion",
}  # fmt: skip


def describe() -> dict[str, Any]:
    """Everything, by heading: {"versions": {...}, "processor": {...}, "devices": [...], "attention": [...], "missing": {...}}."""
    import torch

    from latentfm.models.backends import available_backends
    from latentfm.models.onednn import processor

    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    versions = {"latentfm": __version__, "python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return {
        "versions": versions | {name: version(name) for name in OPTIONAL if version(name)},
        "processor": {
            "system": platform.platform(),
            "name": processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory": f"{psutil.virtual_memory().total / GIB:.1f} GiB, {psutil.virtual_memory().available / GIB:.1f} GiB free",
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "devices": [gpu(device) for device in devices[1:]],
        "attention": {
            str(each): available_backends(each, torch.float32 if each.type == "cpu" else torch.float16) for each in devices
        },
        "folders": {"python": sys.executable, "cache": platformdirs.user_cache_dir("latentfm")},
        "missing": {name: f"{use}: pip install {name}" for name, use in OPTIONAL.items() if not version(name)},
    }


def version(package: str) -> str | None:
    """The version that is installed, without importing the package; None for none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu(device: Any) -> dict[str, str]:
    """What torch tells of a GPU."""
    import torch

    known = torch.cuda.get_device_properties(device)
    return {
        "device": str(device), "name": known.name, "memory": f"{known.total_memory / GIB:.1f} GiB",
        "capability": f"{known.major}.{known.minor}", "driver": f"CUDA {torch.version.cuda}",
    }  # fmt: skip
