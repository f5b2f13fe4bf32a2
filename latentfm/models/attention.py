"""Joint attention of image and text tokens, and the image-only attention of SD3.5's dual layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads * head_dim] -> [B, heads, N, head_dim]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class HeadNorm(nn.RMSNorm):
    """RMSNorm in its input's dtype: torch's fused kernel refuses bf16 activations with float32 weights, as under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Attention over [image, text] tokens, each modality with its own projections (SD3 paper, section 4).

    joint=False leaves the text out (SD3.5's second attention). context_pre_only drops the text's output projection,
    as in the last block. qk_norm is None or "rms_norm" (per head, eps 1e-6).
    """

    def __init__(self, dim: int, heads: int, head_dim: int, qk_norm: str | None, joint: bool, context_pre_only: bool = False):
        super().__init__()
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm must be None or 'rms_norm', got {qk_norm!r}")
        self.heads, self.joint, self.context_pre_only = heads, joint, context_pre_only
        inner = heads * head_dim

        def norm() -> nn.Module:
            return HeadNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()

        self.to_q, self.to_k, self.to_v = nn.Linear(dim, inner), nn.Linear(dim, inner), nn.Linear(dim, inner)
        self.norm_q, self.norm_k = norm(), norm()
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])
        if joint:
            self.add_q_proj, self.add_k_proj = nn.Linear(dim, inner), nn.Linear(dim, inner)
            self.add_v_proj = nn.Linear(dim, inner)
            self.norm_added_q, self.norm_added_k = norm(), norm()
            if not context_pre_only:
                self.to_add_out = nn.Linear(inner, dim)

    def forward(self, image: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(image [B, N, dim], text [B, L, dim]) -> the same shapes; text is None where it has no output."""
        query = self.norm_q(split_heads(self.to_q(image), self.heads))
        key = self.norm_k(split_heads(self.to_k(image), self.heads))
        value = split_heads(self.to_v(image), self.heads)
        if self.joint:
            text_query = self.norm_added_q(split_heads(self.add_q_proj(text), self.heads))
            text_key = self.norm_added_k(split_heads(self.add_k_proj(text), self.heads))
            query = torch.cat([query, text_query], dim=2)
            key = torch.cat([key, text_key], dim=2)
            value = torch.cat([value, split_heads(self.add_v_proj(text), self.heads)], dim=2)
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast runs RMSNorm in float32
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        count = image.shape[1]
        image_out = self.to_out[0](out[:, :count])
        if not self.joint or self.context_pre_only:
            return image_out, None
        return image_out, self.to_add_out(out[:, count:])
