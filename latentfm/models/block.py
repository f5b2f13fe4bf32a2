"""One MM-DiT block (Esser et al. 2024, figure 2b): two streams of tokens, image and text, that meet in one attention."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latentfm.models.attention import Attention
from latentfm.models.kernels import gelu_linear, modulated_norm
from latentfm.models.onednn import Linear, linear_gelu
from latentfm.models.packing import Packing


class Modulation(nn.Module):
    """Conditioning vectors [..., dim], already through SiLU -> `parts` vectors [..., 1, dim], those in `scales` with 1 added."""

    def __init__(self, dim: int, parts: int, scales: tuple[int, ...]):
        super().__init__()
        self.parts, self.scales = parts, scales
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        parts = self.linear(conditioning).unflatten(-1, (self.parts, 1, -1)).unbind(-3)
        return tuple(1 + part if i in self.scales else part for i, part in enumerate(parts))


class BlockModulation(NamedTuple):
    """A block's adaLN vectors, each [B, 1, dim], in the order of SD3's weights."""

    image: tuple[Tensor, ...]
    text: tuple[Tensor, ...]


class GELUProjection(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = Linear(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        return linear_gelu(self.proj, x)


class FeedForward(nn.Module):
    """dim -> 4 dim, GELU (tanh), -> dim."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList([GELUProjection(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return gelu_linear(self.net[2], self.net[0].proj(x))
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """Joint attention and a feed-forward for each modality, modulated by the conditioning vector.

    dual adds SD3.5's second, image-only attention. In the last block (last=True) the text is only read.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, qk_norm: str | None, dual: bool, last: bool):
        super().__init__()
        self.dual, self.context_pre_only = dual, last
        self.norm1 = Modulation(dim, 9, (1, 4, 7)) if dual else Modulation(dim, 6, (1, 4))
        self.norm1_context = Modulation(dim, 2, (0,)) if last else Modulation(dim, 6, (1, 4))
        self.attn = Attention(dim, heads, head_dim, qk_norm, joint=True, context_pre_only=last)
        if dual:
            self.attn2 = Attention(dim, heads, head_dim, qk_norm, joint=False)
        self.ff = FeedForward(dim)
        if not last:
            self.ff_context = FeedForward(dim)

    def modulation(self, conditioning: Tensor) -> BlockModulation:
        """The block's adaLN vectors for conditioning vectors [..., dim]; they depend on nothing else."""
        return BlockModulation(self.norm1(conditioning), self.norm1_context(conditioning))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        conditioning: Tensor | None,
        modulation: BlockModulation | None = None,
        packing: Packing | None = None,
        attention: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(image [B, N, dim], text [B, L, dim], conditioning [B, dim]) -> (image, text); the last block gives back the text it got.

        `modulation` stands for the conditioning vector where it was computed before; with `packing` the text is packed;
        `attention` is for attention processors of diffusers'.
        The two streams go by the names that diffusers' caching hooks ask a block's arguments for.
        """
        image, text, attention = hidden_states, encoder_hidden_states, attention or {}
        of_image, of_text = self.modulation(conditioning) if modulation is None else modulation
        if packing is not None:
            of_text = packing.per_token(of_text)
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *second = of_image
        if self.context_pre_only:
            text_scale, text_shift = of_text
        else:
            text_shift, text_scale, text_gate, text_ff_shift, text_ff_scale, text_ff_gate = of_text
        attended = self.attn(
            modulated_norm(image, scale, shift), modulated_norm(text, text_scale, text_shift), packing and packing.lengths, **attention
        )
        attended, text_attended = (attended, None) if self.context_pre_only else attended
        after = torch.addcmul(image, gate, attended)
        if self.dual:
            shift2, scale2, gate2 = second
            after = torch.addcmul(after, gate2, self.attn2(modulated_norm(image, scale2, shift2), **attention))
        image = torch.addcmul(after, ff_gate, self.ff(modulated_norm(after, ff_scale, ff_shift)))
        if self.context_pre_only:
            return image, text
        text = torch.addcmul(text, text_gate, text_attended)
        text = torch.addcmul(text, text_ff_gate, self.ff_context(modulated_norm(text, text_ff_scale, text_ff_shift)))
        return image, text
