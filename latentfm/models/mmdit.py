"""MM-DiT, the network of Stable Diffusion 3 (Esser et al. 2024, figure 2), with SD3Transformer2DModel's parameters.

It speaks SD3's language: timestep = 1000 sigma, and the output is eps - z. models/velocity.py turns that into the
flow's velocity. Shapes: B pictures, C latent channels, H x W latents, N = H W / patch_size^2 image tokens, L text tokens.
"""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from latentfm.errors import InputError, nearest
from latentfm.models.attention import Attention
from latentfm.models.embeddings import PatchEmbed, TimeTextEmbed
from latentfm.models.presets import PRESETS


class Modulation(nn.Module):
    """Conditioning vector [B, dim], already through SiLU -> `parts` vectors [B, 1, dim]."""

    def __init__(self, dim: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        return self.linear(conditioning).unsqueeze(1).chunk(self.parts, dim=-1)


def normalise(x: Tensor) -> Tensor:
    """LayerNorm over the features, without parameters, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class GELUProjection(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """dim -> 4 dim, GELU (tanh), -> dim."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList([GELUProjection(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """One MM-DiT block: joint attention and a feed-forward per modality, modulated by the conditioning vector.

    dual adds SD3.5's second, image-only attention. In the last block (last=True) the text is only read.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, qk_norm: str | None, dual: bool, last: bool):
        super().__init__()
        self.dual, self.context_pre_only = dual, last
        self.norm1 = Modulation(dim, 9 if dual else 6)
        self.norm1_context = Modulation(dim, 2 if last else 6)
        self.attn = Attention(dim, heads, head_dim, qk_norm, joint=True, context_pre_only=last)
        if dual:
            self.attn2 = Attention(dim, heads, head_dim, qk_norm, joint=False)
        self.ff = FeedForward(dim)
        if not last:
            self.ff_context = FeedForward(dim)

    def forward(self, image: Tensor, text: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor | None]:
        """(image [B, N, dim], text [B, L, dim], conditioning [B, dim]) -> (image, text); text is None after the last block."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *second = self.norm1(conditioning)
        normed = normalise(image)
        if self.context_pre_only:
            text_scale, text_shift = self.norm1_context(conditioning)
        else:
            text_shift, text_scale, text_gate, text_ff_shift, text_ff_scale, text_ff_gate = self.norm1_context(conditioning)
        attended, text_attended = self.attn(
            modulate(normed, shift, scale), modulate(normalise(text), text_shift, text_scale)
        )
        image = image + gate * attended
        if self.dual:
            shift2, scale2, gate2 = second
            image = image + gate2 * self.attn2(modulate(normed, shift2, scale2))[0]
        image = image + ff_gate * self.ff(modulate(normalise(image), ff_shift, ff_scale))
        if self.context_pre_only:
            return image, None
        text = text + text_gate * text_attended
        text = text + text_ff_gate * self.ff_context(modulate(normalise(text), text_ff_shift, text_ff_scale))
        return image, text


class MMDiT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The MM-DiT. Arguments, state-dict names and shapes are those of diffusers' SD3Transformer2DModel.

    sample_size: side of the latents the position table is scaled to. caption_projection_dim must equal
    num_attention_heads * attention_head_dim. Raises ValueError when it does not.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int | None = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        if caption_projection_dim != dim:
            raise ValueError(
                f"caption_projection_dim {caption_projection_dim} must equal "
                f"num_attention_heads * attention_head_dim = {num_attention_heads} * {attention_head_dim} = {dim}"
            )
        self.out_channels = out_channels or in_channels
        self.pos_embed = PatchEmbed(sample_size, patch_size, in_channels, dim, pos_embed_max_size)
        self.time_text_embed = TimeTextEmbed(dim, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            Block(dim, num_attention_heads, attention_head_dim, qk_norm, i in dual_attention_layers, i == num_layers - 1)
            for i in range(num_layers)
        )
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, patch_size**2 * self.out_channels)
        self.gradient_checkpointing = False

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "MMDiT":
        """A freshly initialised network of presets.PRESETS[name], with `changes` to its configuration."""
        if name not in PRESETS:
            raise InputError(f"no preset '{name}'{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
        model = cls(**(PRESETS[name] | changes))
        model.initialize()
        return model

    def to_json_string(self) -> str:
        """The configuration as it is saved: under diffusers' class name, so that a saved folder is a stock one."""
        return super().to_json_string().replace('"_class_name": "MMDiT"', '"_class_name": "SD3Transformer2DModel"')

    @torch.no_grad()
    def initialize(self) -> None:
        """Initialise for training from scratch: Xavier linears, and zero modulations and output (DiT's adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.pos_embed.proj.bias)
        for part in (self.time_text_embed.timestep_embedder, self.time_text_embed.text_embedder):
            nn.init.normal_(part.linear_1.weight, std=0.02)
            nn.init.normal_(part.linear_2.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.proj_out.weight)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        block_controlnet_hidden_states: list[Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: list[int] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts eps - z, [B, out_channels, H, W], from noisy latents.

        hidden_states [B, C, H, W]; encoder_hidden_states [B, L, joint_attention_dim]; pooled_projections
        [B, pooled_projection_dim]; timestep [B] = 1000 sigma. Blocks listed in skip_layers are passed over;
        block_controlnet_hidden_states are residuals added after the blocks, spread evenly over them.
        Raises ValueError when a shape does not fit the configuration.
        """
        if joint_attention_kwargs:
            raise ValueError(f"MMDiT takes no joint_attention_kwargs, got {sorted(joint_attention_kwargs)}")
        self.check_shapes(hidden_states, encoder_hidden_states, pooled_projections, timestep)
        patch = self.config.patch_size
        rows, columns = hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch
        image = self.pos_embed(hidden_states)
        conditioning = F.silu(self.time_text_embed(timestep, pooled_projections))
        text = self.context_embedder(encoder_hidden_states)
        residuals = block_controlnet_hidden_states
        for index, block in enumerate(self.transformer_blocks):
            if skip_layers is None or index not in skip_layers:
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    image, text = self._gradient_checkpointing_func(block, image, text, conditioning)
                else:
                    image, text = block(image, text, conditioning)
            if residuals is not None and not block.context_pre_only:
                image = image + residuals[int(index / (len(self.transformer_blocks) / len(residuals)))]
        scale, shift = self.norm_out(conditioning)
        tokens = self.proj_out(modulate(normalise(image), shift, scale))
        patches = tokens.unflatten(-1, (patch, patch, -1)).unflatten(1, (rows, columns))  # b r c p q C
        sample = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def check_shapes(self, latents: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor) -> None:
        """Raises ValueError naming the first shape that does not fit this network."""
        config = self.config
        if latents.ndim != 4 or latents.shape[1] != config.in_channels:
            raise ValueError(f"latents of shape {tuple(latents.shape)} should be [B, {config.in_channels}, H, W]")
        if latents.shape[-2] % config.patch_size or latents.shape[-1] % config.patch_size:
            raise ValueError(f"latents of {latents.shape[-2]} x {latents.shape[-1]} do not divide into patches of {config.patch_size}")
        batch = latents.shape[0]
        if text.ndim != 3 or text.shape[0] != batch or text.shape[-1] != config.joint_attention_dim:
            raise ValueError(f"text features of shape {tuple(text.shape)} should be [{batch}, L, {config.joint_attention_dim}]")
        if pooled.shape != (batch, config.pooled_projection_dim):
            raise ValueError(f"pooled text of shape {tuple(pooled.shape)} should be [{batch}, {config.pooled_projection_dim}]")
        if timestep.shape not in ((batch,), (1,)):
            raise ValueError(f"timestep of shape {tuple(timestep.shape)} should be [{batch}], one for each of the latents")
