"""Which kernel computes the attention: diffusers' dispatcher runs it, the names are ours.

MMDiT.set_attention chooses one for a network, the environment's LATENTFM_ATTENTION for all those where none was chosen, and diffusers'
own default (attention_backend, DIFFUSERS_ATTN_BACKEND) where neither was. That is "native", PyTorch's choice among its kernels, unless
somebody changed it.
"""

import os
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements, dispatch_attention_fn
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from torch import Tensor

from latentfm.bounds import SHORT_ATTENTION
from latentfm.errors import InputError, nearest

# our names for diffusers' attention backends; diffusers' own names (flash, sage, ...) are taken too where they are no name of ours
BACKENDS = {
    "auto": None,
    "native": "native",
    "flash": "_native_flash",
    "efficient": "_native_efficient",
    "math": "_native_math",
    "cudnn": "_native_cudnn",
    "xformers": "xformers",
    "flex": "flex",
}
ENVIRONMENT = "LATENTFM_ATTENTION"
PLAIN_PROCESSORS = (JointAttnProcessor2_0, FusedJointAttnProcessor2_0)


def attention_backend(name: str) -> AttentionBackendName | None:
    """The dispatcher's backend called `name`; None for "auto". Raises InputError for an unknown name or one that is not installed."""
    theirs = [backend.value for backend in AttentionBackendName]
    if name not in BACKENDS and name not in theirs:
        raise InputError(f"no attention backend {name!r}{nearest(name, (*BACKENDS, *theirs))}; there are {', '.join(BACKENDS)}")
    backend = BACKENDS.get(name, name)
    if backend is None:
        return None
    try:
        _check_attention_backend_requirements(AttentionBackendName(backend))
    except RuntimeError as error:
        raise InputError(f"attention backend {name!r} is not installed: {error}") from error
    return AttentionBackendName(backend)


def available_backends(device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> list[str]:
    """The names of BACKENDS that compute attention on this device, in this dtype and head width: each is tried on eight tokens."""
    found = []
    for name in BACKENDS:
        try:
            check_backend(name, 2, head_dim, device, dtype)
        except (InputError, RuntimeError, ValueError):
            continue
        found.append(name)
    return found


def check_backend(name: str, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, training: bool = False) -> None:
    """Raises InputError unless the backend `name` computes such attention, and its gradient if `training`: tried on eight tokens."""
    tokens = torch.zeros(1, 8, heads, head_dim, device=device, dtype=dtype, requires_grad=training)
    if attend(tokens, tokens, tokens, attention_backend(name)).requires_grad != training:
        raise InputError(f"attention {name!r} has no gradient, it is for sampling; use 'auto'")


def attend(query: Tensor, key: Tensor, value: Tensor, backend: AttentionBackendName | None, parallel_config: Any = None) -> Tensor:
    """softmax(query key^T / sqrt(d)) value, [B, Sq, H, d], by `backend` or, where that is None, the environment's or diffusers' choice.

    query [B, Sq, H, d]; key and value [B, Sk, H, d]. Raises InputError when the backend cannot run on these tensors.
    """
    if backend is None and (name := os.environ.get(ENVIRONMENT)):
        backend = attention_backend(name)
    if backend is None and sooner_in_float32(query, key):
        with torch.autocast("cpu", enabled=False):
            return attend(query.float(), key.float(), value.float(), None, parallel_config).to(value.dtype)
    if torch.compiler.is_compiling():
        return dispatch_attention_fn(query, key, value, backend=backend, parallel_config=parallel_config)
    try:
        return dispatch_attention_fn(query, key, value, backend=backend, parallel_config=parallel_config)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if backend is None or isinstance(error, torch.OutOfMemoryError):
            raise
        name = next((ours for ours, theirs in BACKENDS.items() if theirs == backend.value), backend.value)
        raise InputError(
            f"attention backend {name!r} cannot compute {tuple(query.shape)} {query.dtype} on {query.device.type}: "
            f"{str(error).splitlines()[0]} Use 'auto', which can"
        ) from error


def sooner_in_float32(query: Tensor, key: Tensor) -> bool:
    """Whether this is training on a CPU in bfloat16 with few keys, for which the backward pass of PyTorch's kernel is slow."""
    return query.dtype == torch.bfloat16 and query.device.type == "cpu" and torch.is_grad_enabled() and key.shape[1] <= SHORT_ATTENTION


class Backend:
    """What diffusers' set_attention_backend and enable_parallelism set on an attention module; it computes nothing."""

    _attention_backend: AttentionBackendName | None = None
    _parallel_config: Any = None


class Processed:
    """An attention that a processor of diffusers' may compute in our place: an IP-Adapter's, PAG's."""

    def set_processor(self, processor: Any) -> None:
        """Has `processor` compute the attention; a plain one of diffusers' gives it back to us. Raises ValueError for what is none."""
        if not (callable(processor) or isinstance(processor, Backend)):
            raise ValueError(f"MMDiT's attention takes a processor of diffusers', got {type(processor).__name__}")
        self._modules.pop("processor", None)  # an IP-Adapter's has weights
        self.processor = Backend() if type(processor) in PLAIN_PROCESSORS else processor


class ChosenAttention:
    """A network whose attentions' backend is chosen by name."""

    def set_attention(self, name: str) -> None:
        """Has every attention computed by the backend `name` of attention.BACKENDS; "auto" leaves the choice to others.

        The others are, in this order, LATENTFM_ATTENTION in the environment, diffusers' default, and PyTorch.
        Raises InputError for an unknown name or one whose package is missing.
        """
        backend = attention_backend(name)
        for module in self.modules():
            if isinstance(module, AttentionModuleMixin):
                module.processor._attention_backend = backend
