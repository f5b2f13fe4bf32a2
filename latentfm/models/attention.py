"""Joint attention of image and text tokens, and the image-only attention of SD3.5's dual layers.

Which kernel computes it is diffusers' dispatcher's to run and ours to name: BACKENDS. MMDiT.set_attention chooses one for a network,
the environment's LATENTFM_ATTENTION for all those where none was chosen, and diffusers' own default (attention_backend,
DIFFUSERS_ATTN_BACKEND) where neither was. That is "native", PyTorch's choice among its kernels, unless somebody changed it.
"""

import os
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements, dispatch_attention_fn
from torch import Tensor, nn
from torch.nn import functional as F

from latentfm.errors import InputError, nearest
from latentfm.models.layers import PLAIN, Linear, linear, transformed, untouched

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


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads * head_dim] -> [B, N, heads, head_dim]."""
    return x.unflatten(-1, (heads, -1))


class HeadNorm(nn.RMSNorm):
    """RMSNorm in its input's dtype: torch's fused kernel refuses bf16 activations with float32 weights, as under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Unread(torch.autograd.Function):
    """x, with gradients of zero for parameters that no result depends on: data-parallel training waits for a gradient of each."""

    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


class Backend:
    """What diffusers' set_attention_backend and enable_parallelism set on an attention module; it computes nothing."""

    _attention_backend: AttentionBackendName | None = None
    _parallel_config: Any = None


class Attention(nn.Module, AttentionModuleMixin):
    """Attention over [image, text] tokens, each modality with its own projections (SD3 paper, section 4).

    joint=False leaves the text out (SD3.5's second attention). context_pre_only drops the text's output projection and with it
    the text's queries, as in the last block. qk_norm is None or "rms_norm" (per head, eps 1e-6).
    """

    def __init__(self, dim: int, heads: int, head_dim: int, qk_norm: str | None, joint: bool, context_pre_only: bool = False):
        super().__init__()
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm must be None or 'rms_norm', got {qk_norm!r}")
        self.heads, self.joint, self.context_pre_only = heads, joint, context_pre_only
        self.processor = Backend()
        self.fused_projections = False
        self.register_state_dict_post_hook(apart)
        inner = heads * head_dim

        def norm() -> nn.Module:
            return HeadNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()

        self.to_q, self.to_k, self.to_v = Linear(dim, inner), Linear(dim, inner), Linear(dim, inner)
        self.norm_q, self.norm_k = norm(), norm()
        self.to_out = nn.ModuleList([Linear(inner, dim)])
        if joint:
            self.add_q_proj, self.add_k_proj = Linear(dim, inner), Linear(dim, inner)
            self.add_v_proj = Linear(dim, inner)
            self.norm_added_q, self.norm_added_k = norm(), norm()
            if not context_pre_only:
                self.to_add_out = Linear(inner, dim)

    def set_processor(self, processor: Any) -> None:
        """Raises ValueError for anything but a Backend: another way of computing the attention would be passed over in silence."""
        if not isinstance(processor, Backend):
            raise ValueError(f"MMDiT's attention takes no processor of another kind, got {type(processor).__name__}")
        self.processor = processor

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """Lays the weights of query, key and value side by side, so that inference computes the three in one product.

        The parameters stay what they were, under their names, as parts of one tensor: no second copy of them in the model. A
        state dict holds copies of these, for accelerate's saving keeps only one of the tensors that share a piece of memory.
        """
        if not self.fusible():
            raise ValueError(
                "query, key and value cannot be fused while an adapter is on them or their weights are quantised or sharded; "
                "unload the adapter first (fuse_lora and then unload_lora keep what it learned)"
            )
        for names in self.projections():
            layers = [getattr(self, name) for name in names]
            for kind in ("weight", "bias"):
                values = [getattr(layer, kind) for layer in layers]
                if side_by_side(values) is None:
                    for value, part in zip(values, torch.cat([value.data for value in values]).chunk(3), strict=True):
                        value.data = part
        self.fused_projections = True

    @torch.no_grad()
    def unfuse_projections(self) -> None:
        """Gives query, key and value tensors of their own again."""
        for layer in (getattr(self, name) for names in self.projections() for name in names):
            for kind in ("weight", "bias"):
                value = getattr(layer, kind)
                value.data = value.data.clone()
        self.fused_projections = False

    def _apply(self, fn: Any, recurse: bool = True) -> "Attention":
        """What Module.to, .half and their like do; it gives each parameter a tensor of its own, so that fused ones are laid out again."""
        super()._apply(fn, recurse)
        if self.fused_projections and self.fusible():
            self.fuse_projections()
        return self

    def fusible(self) -> bool:
        """Whether query, key and value are made by plain Linears of plain tensors."""
        layers = [getattr(self, name) for names in self.projections() for name in names]
        return all(type(layer) is Linear and type(layer.weight) in PLAIN for layer in layers)

    def projections(self) -> list[tuple[str, str, str]]:
        """The names of the layers that make query, key and value: the image's and, in joint attention, the text's."""
        return [("to_q", "to_k", "to_v")] + ([("add_q_proj", "add_k_proj", "add_v_proj")] if self.joint else [])

    def project(
        self, x: Tensor, names: tuple[str, str, str], norm_query: nn.Module, norm_key: nn.Module, with_query: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Query, key and value [B, N, heads, head_dim] of tokens x [B, N, dim]; the query is None unless `with_query`."""
        layers = [getattr(self, name) for name in names][0 if with_query else 1 :]
        weight = side_by_side([layer.weight for layer in layers]) if self.one_product(layers) else None
        if weight is None:
            *query, key, value = (split_heads(layer(x), self.heads) for layer in layers)
        else:
            joined = linear(x, weight, side_by_side([layer.bias for layer in layers]))
            *query, key, value = joined.unflatten(-1, (len(layers), self.heads, -1)).unbind(2)
        normed = norm_query(query[0]).to(value.dtype) if query else None  # autocast runs RMSNorm in float32
        return normed, norm_key(key).to(value.dtype), value

    def one_product(self, layers: list[nn.Module]) -> bool:
        """Whether the layers are fused and nothing needs them to be called one by one: a gradient, the compiler, an adapter, a hook."""
        return (
            self.fused_projections
            and not torch.is_grad_enabled()
            and not transformed()
            and all(untouched(layer) for layer in layers)
        )

    def forward(
        self, image: Tensor, text: Tensor | None = None, lengths: list[int] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(image [B, N, dim], text [B, L, dim]) -> the same shapes, or the image's output alone where the text has none.

        With `lengths`, text is [1, sum(lengths), dim]: the tokens of each sample behind those of the one before, none of them padding.
        """
        query, key, value = self.project(image, self.projections()[0], self.norm_q, self.norm_k)
        backend = (self.processor._attention_backend, self.processor._parallel_config)
        if not self.joint:
            return self.to_out[0](attend(query, key, value, *backend).flatten(2))
        of_text = self.project(text, self.projections()[1], self.norm_added_q, self.norm_added_k, with_query=not self.context_pre_only)
        if lengths is None:
            image_out, text_out = self.join((query, key, value), of_text, backend)
        else:
            image_rows = zip(query.split(1), key.split(1), value.split(1), strict=True)
            nothing = [None] * len(lengths)
            text_rows = zip(*(nothing if part is None else part.split(lengths, dim=1) for part in of_text), strict=True)
            rows = [self.join(image_row, text_row, backend) for image_row, text_row in zip(image_rows, text_rows, strict=True)]
            image_out = torch.cat([row[0] for row in rows])
            text_out = None if self.context_pre_only else torch.cat([row[1] for row in rows], dim=1)
        image_out = self.to_out[0](image_out.flatten(2))
        if not self.context_pre_only:
            return image_out, self.to_add_out(text_out.flatten(2))
        if torch.is_grad_enabled() and (torch.compiler.is_compiling() or not transformed()):  # torch.func gives zeros by itself
            parameters = [p for part in (self.add_q_proj, self.norm_added_q) for p in part.parameters()]
            unread = [p for p in parameters if p.requires_grad and not hasattr(p, "ds_id")]  # ZeRO 3 waits for none, and has none whole
            image_out = Unread.apply(image_out, *unread)
        return image_out

    def join(self, image: tuple[Tensor, ...], text: tuple[Tensor, ...], backend: tuple[Any, Any]) -> tuple[Tensor, Tensor | None]:
        """What the image's and the text's queries find among the keys of both; None for the text where nothing reads it."""
        key, value = (torch.cat(pair, dim=1) for pair in zip(image[1:], text[1:], strict=True))
        if self.context_pre_only:
            return attend(image[0], key, value, *backend), None
        found = attend(torch.cat([image[0], text[0]], dim=1), key, value, *backend)
        return found.split([image[0].shape[1], text[0].shape[1]], dim=1)


def apart(attention: Attention, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
    """Gives fused weights in a state dict memory of their own."""
    if attention.fused_projections:
        for name in (f"{prefix}{layer}.{kind}" for names in attention.projections() for layer in names for kind in ("weight", "bias")):
            if name in state and not isinstance(state[name], nn.Parameter):
                state[name] = state[name].clone()


def side_by_side(parts: list[Tensor]) -> Tensor | None:
    """The one tensor whose parts along the first axis `parts` are in memory, or None when they are apart."""
    first, size = parts[0], parts[0].numel() * parts[0].element_size()
    memory = first.untyped_storage().data_ptr()  # neighbours in two pieces of memory are no one tensor
    if any(p.data_ptr() != first.data_ptr() + i * size or p.untyped_storage().data_ptr() != memory for i, p in enumerate(parts)):
        return None
    return first.as_strided((len(parts) * first.shape[0], *first.shape[1:]), first.stride(), first.storage_offset())
