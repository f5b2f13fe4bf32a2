"""MM-DiT, the network of Stable Diffusion 3 (Esser et al. 2024, figure 2), with SD3Transformer2DModel's parameters.

It speaks SD3's language: timestep = 1000 sigma, and the output is eps - z. models/velocity.py turns that into the
flow's velocity. Shapes: B pictures, C latent channels, H x W latents, N = H W / patch_size^2 image tokens, L text tokens.
"""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin, SD3Transformer2DLoadersMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from latentfm.errors import InputError, nearest
from latentfm.models.backends import ChosenAttention
from latentfm.models.block import Block, Modulation
from latentfm.models.compiled import CompiledBlocks
from latentfm.models.diffusers_hooks import CONTEXT_PARALLEL, check_parallel, lora_scaled
from latentfm.models.embeddings import PatchEmbed, TimeTextEmbed
from latentfm.models.kernels import modulated_norm
from latentfm.models.packing import pack
from latentfm.models.presets import PRESETS
from latentfm.models.recompute import PartlyRecomputed
from latentfm.models.routing import TokenRoute
from latentfm.models.schedule import Precomputed


class MMDiT(
    CompiledBlocks, PartlyRecomputed, ModelMixin, AttentionMixin, ChosenAttention, ConfigMixin, PeftAdapterMixin,
    SD3Transformer2DLoadersMixin, CacheMixin,
):  # fmt: skip
    """The MM-DiT. Arguments, state-dict names and shapes are those of diffusers' SD3Transformer2DModel.

    sample_size: side of the latents the position table is scaled to. caption_projection_dim must equal
    num_attention_heads * attention_head_dim. Raises ValueError when it does not.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]
    _cp_plan = CONTEXT_PARALLEL

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
        self.norm_out = Modulation(dim, 2, (0,))
        self.proj_out = nn.Linear(dim, patch_size**2 * self.out_channels)
        self.image_proj = None  # an IP-Adapter's, made by its loader
        self.gradient_checkpointing = False

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "MMDiT":
        """A freshly initialised network of presets.PRESETS[name], with `changes` to its configuration."""
        if name not in PRESETS:
            raise InputError(f"no preset '{name}'{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
        model = cls(**(PRESETS[name] | changes))
        model.initialize()
        return model

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As ConfigMixin, which looks up the class that a stock folder names, and would import every network of diffusers for it."""
        named = {"_class_name": cls.__name__} if config_dict.get("_class_name") == "SD3Transformer2DModel" else {}
        return super().extract_init_dict(config_dict | named, **kwargs)

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

    @lora_scaled
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
        encoder_attention_mask: Tensor | None = None,
        token_route: TokenRoute | None = None,
        precomputed: Precomputed | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts eps - z, [B, out_channels, H, W], from noisy latents.

        hidden_states [B, C, H, W]; encoder_hidden_states [B, L, joint_attention_dim]; pooled_projections
        [B, pooled_projection_dim]; timestep [B] = 1000 sigma. Blocks listed in skip_layers are passed over;
        block_controlnet_hidden_states are residuals added after the blocks, spread evenly over them;
        joint_attention_kwargs may hold "scale", the strength of a LoRA, and what the attention processors take;
        "ip_adapter_image_embeds" [B, images, width] is what a loaded IP-Adapter looks at.
        encoder_attention_mask [B, L]: True for the text tokens to read; the others are left out of every computation (SD3 itself
        reads its padding). token_route: image tokens that alone pass through some blocks. precomputed: of a schedule and
        these prompts, looked up by a timestep on the CPU; after its first use it stands for pooled_projections and encoder_hidden_states.
        Raises ValueError when a shape does not fit the configuration, or an argument the way the network is spread over processes.
        """
        self.check_shapes(hidden_states, encoder_hidden_states, pooled_projections, timestep)
        batch, patch = hidden_states.shape[0], self.config.patch_size
        rows, columns = hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch
        check_parallel(
            self._parallel_config, self.config.num_attention_heads, rows * columns, encoder_hidden_states.shape[1],
            encoder_attention_mask=encoder_attention_mask, token_route=token_route,
            block_controlnet_hidden_states=block_controlnet_hidden_states,
        )  # fmt: skip
        if token_route is not None and block_controlnet_hidden_states is not None:
            raise ValueError("token_route and block_controlnet_hidden_states do not go together")

        image = self.pos_embed(hidden_states)
        place = precomputed.place(self, timestep, batch, image.device) if precomputed is not None else None
        if place is None:
            conditioning = F.silu(self.time_text_embed(timestep.to(image.device), pooled_projections))
            text, modulations, out = self.context_embedder(encoder_hidden_states), [None] * len(self.transformer_blocks), None
        else:
            conditioning, (text, modulations, out) = None, precomputed.at(place, self, encoder_hidden_states, pooled_projections)
        attention = dict(joint_attention_kwargs or {})
        if self.image_proj is not None and (seen := attention.pop("ip_adapter_image_embeds", None)) is not None:
            attention["ip_hidden_states"], attention["temb"] = self.image_proj(seen, timestep.to(image.device))
        text, packing = (text, None) if encoder_attention_mask is None else pack(text, encoder_attention_mask)
        text = self.as_between_blocks(text)
        if token_route is not None:
            token_route.check(len(self.transformer_blocks), image)

        for index, block in enumerate(self.transformer_blocks):
            if token_route is not None and index == token_route.first:
                every, image = image, image.gather(1, token_route.indices(image))
            if skip_layers is None or index not in skip_layers:
                arguments = (image, text, conditioning, modulations[index], packing, attention)
                if torch.is_grad_enabled() and self.checkpointed(index):
                    image, text = self._gradient_checkpointing_func(block, *arguments)
                else:
                    image, text = block(*arguments)
            if token_route is not None and index == token_route.last:
                image = every.scatter(1, token_route.indices(every), image)
            if block_controlnet_hidden_states is not None and not block.context_pre_only:
                interval = len(self.transformer_blocks) / len(block_controlnet_hidden_states)
                image = image + block_controlnet_hidden_states[int(index / interval)]

        scale, shift = self.norm_out(conditioning) if out is None else out
        tokens = self.proj_out(modulated_norm(image, scale, shift))
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
