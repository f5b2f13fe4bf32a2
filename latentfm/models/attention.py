"""Joint attention of image and text tokens, and the image-only attention of SD3.5's dual layers (SD3 paper, section 4)."""

from typing import Any

import torch
from diffusers.models import attention_processor
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn

from latentfm.models.backends import Backend, Processed, attend
from latentfm.models.fused_qkv import FusedProjections, apart
from latentfm.models.kernels import HeadNorm, unread
from latentfm.models.onednn import Linear
from latentfm.models.packing import Heads, each_with_its_own


class Attention(Processed, FusedProjections, AttentionModuleMixin, attention_processor.Attention):
    """Attention over [image, text] tokens, each modality with its own projections.

    joint=False leaves the text out (SD3.5's second attention). context_pre_only drops the text's output projection and with it
    the text's queries, as in the last block. qk_norm is None or "rms_norm" (per head, eps 1e-6). It is one of diffusers' by class alone,
    for those who look for these (PAG): nothing of theirs is built or run.
    """

    is_cross_attention = False

    def __init__(self, dim: int, heads: int, head_dim: int, qk_norm: str | None, joint: bool, context_pre_only: bool = False):
        nn.Module.__init__(self)
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm must be None or 'rms_norm', got {qk_norm!r}")
        self.heads, self.joint, self.context_pre_only = heads, joint, context_pre_only
        self.processor = Backend()
        self.register_state_dict_post_hook(apart)
        inner = heads * head_dim

        def norm() -> nn.Module:
            return HeadNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()

        self.to_q, self.to_k, self.to_v = Linear(dim, inner), Linear(dim, inner), Linear(dim, inner)
        self.norm_q, self.norm_k = norm(), norm()
        self.to_out = nn.ModuleList([Linear(inner, dim), nn.Identity()])  # diffusers' processors apply a dropout there
        if joint:
            self.add_q_proj, self.add_k_proj = Linear(dim, inner), Linear(dim, inner)
            self.add_v_proj = Linear(dim, inner)
            self.norm_added_q, self.norm_added_k = norm(), norm()
            if not context_pre_only:
                self.to_add_out = Linear(inner, dim)

    def forward(
        self, image: Tensor, text: Tensor | None = None, lengths: list[int] | None = None, **extra: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(image [B, N, dim], text [B, L, dim]) -> the same shapes, or the image's output alone where the text has none.

        With `lengths`, text is [1, sum(lengths), dim]: the tokens of each sample behind those of the one before, none of them padding.
        `extra` is a processor's of diffusers'. Raises ValueError for what the processor does not take.
        """
        if not isinstance(self.processor, Backend):
            if lengths is not None:
                raise ValueError(f"an encoder_attention_mask does not go together with {type(self.processor).__name__}")
            out = self.processor(self, image, text, **extra)
            return out[0] if self.context_pre_only and self.joint else out
        if extra:
            raise ValueError(f"MMDiT takes no joint_attention_kwargs but scale, got {sorted(extra)}; an IP-Adapter's need load_ip_adapter")
        of_image = self.heads_of(image, ("to_q", "to_k", "to_v"), self.norm_q, self.norm_k)
        if not self.joint:
            return self.to_out[0](self.attend(*of_image).flatten(2))
        names = ("add_q_proj", "add_k_proj", "add_v_proj")[1 if self.context_pre_only else 0 :]
        of_text = self.heads_of(text, names, self.norm_added_q, self.norm_added_k)
        image_out, text_out = self.join(of_image, of_text) if lengths is None else each_with_its_own(self.join, of_image, of_text, lengths)
        image_out = self.to_out[0](image_out.flatten(2))
        if self.context_pre_only:
            return unread(image_out, self.add_q_proj, self.norm_added_q)
        return image_out, self.to_add_out(text_out.flatten(2))

    def heads_of(self, x: Tensor, names: tuple[str, ...], norm_query: nn.Module, norm_key: nn.Module) -> Heads:
        """Query, key and value of tokens x [B, N, dim] by the layers called `names`; of two names there is no query."""
        *query, key, value = (product.unflatten(-1, (self.heads, -1)) for product in self.products(x, names))
        normed = norm_query(query[0]).to(value.dtype) if query else None  # autocast runs RMSNorm in float32
        return normed, norm_key(key).to(value.dtype), value

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, self.processor._attention_backend, self.processor._parallel_config)

    def join(self, image: Heads, text: Heads) -> tuple[Tensor, Tensor | None]:
        """What the image's and the text's queries find among the keys of both; None for the text where nothing reads it."""
        key, value = (torch.cat(pair, dim=1) for pair in zip(image[1:], text[1:], strict=True))
        if self.context_pre_only:
            return self.attend(image[0], key, value), None
        found = self.attend(torch.cat([image[0], text[0]], dim=1), key, value)
        return found.split([image[0].shape[1], text[0].shape[1]], dim=1)
