"""MM-DiT, the network of Stable Diffusion 3 (Esser et al. 2024, figure 2), with SD3Transformer2DModel's parameters.

It speaks SD3's language: timestep = 1000 sigma, and the output is eps - z. models/velocity.py turns that into the
flow's velocity. Shapes: B pictures, C latent channels, H x W latents, N = H W / patch_size^2 image tokens, L text tokens.
"""

from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn
from torch.nn import functional as F

from latentfm.errors import InputError, nearest
from latentfm.models.attention import attention_backend
from latentfm.models.block import Block, BlockModulation, Modulation, Packing
from latentfm.models.cost import checkpointed
from latentfm.models.embeddings import PatchEmbed, TimeTextEmbed
from latentfm.models.layers import Linear, modulated_norm
from latentfm.models.memory import MODULATIONS
from latentfm.models.presets import PRESETS


class TokenRoute(NamedTuple):
    """Image tokens that alone pass through a stretch of blocks; the others go round it unchanged (TREAD, Krause et al. 2025)."""

    kept: Tensor  # [B, K] int64: indices of image tokens, each row without repeats
    first: int  # the first block of the stretch
    last: int  # its last block, where the others rejoin


class Precomputed:
    """What the network computes from prompts and times alone, once for a whole schedule: projected text and modulations.

    Make one for the timesteps [S] of a schedule and the prompts it is run with, set `step`, and pass it to each forward call. In SD3
    medium the modulations are a third of the weights; they are read once for as many steps as make ROWS rows (28 steps of two guided
    pictures), not at every step. Memory: at most 16 dim numbers a block and row (150 MB for SD3 medium in bf16).
    """

    ROWS = MODULATIONS  # prompts times steps in one product

    def __init__(self, timesteps: Tensor):
        self.timesteps, self.step, self.first = timesteps, 0, 0
        self.text: Tensor | None = None  # [B, L, dim]
        self.blocks: list[list[BlockModulation]] = []  # [block][step - first]
        self.out: list[tuple[Tensor, ...]] = []  # [step - first]

    def fits(self, batch: int) -> bool:
        """Whether it is, or will be, of `batch` prompts; FasterCache leaves half of a guided batch out."""
        return self.text is None or self.text.shape[0] == batch

    def at_step(self, network: "MMDiT", text: Tensor, pooled: Tensor) -> tuple[Tensor, list[BlockModulation], tuple[Tensor, ...]]:
        """(projected text, each block's modulation, the output's) at `step`, for the prompts' `text` [B, L, width] and `pooled` [B, P]."""
        if self.text is None:
            self.text = network.context_embedder(text)
        if not 0 <= self.step - self.first < len(self.out):
            self.compute(network, pooled)
        index = self.step - self.first
        return self.text, [block[index] for block in self.blocks], self.out[index]

    def compute(self, network: "MMDiT", pooled: Tensor) -> None:
        """Computes the modulations of the steps from `step` on that make ROWS rows, in one product for each block."""
        self.first = self.step
        times = self.timesteps[self.first :][: max(1, self.ROWS // pooled.shape[0])].to(pooled.device)
        conditioning = F.silu(network.time_text_embed.schedule(times, pooled))

        def by_step(parts: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
            return list(zip(*(part.unbind(0) for part in parts), strict=True))

        both = (block.modulation(conditioning) for block in network.transformer_blocks)
        self.blocks = [[BlockModulation(*step) for step in zip(by_step(image), by_step(text), strict=True)] for image, text in both]
        self.out = by_step(network.norm_out(conditioning))


class MMDiT(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """The MM-DiT. Arguments, state-dict names and shapes are those of diffusers' SD3Transformer2DModel.

    sample_size: side of the latents the position table is scaled to. caption_projection_dim must equal
    num_attention_heads * attention_head_dim. Raises ValueError when it does not.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]
    _cp_plan = {
        "pos_embed": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "context_embedder": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

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
        self.context_embedder = Linear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            Block(dim, num_attention_heads, attention_head_dim, qk_norm, i in dual_attention_layers, i == num_layers - 1)
            for i in range(num_layers)
        )
        self.norm_out = Modulation(dim, 2, (0,))
        self.proj_out = Linear(dim, patch_size**2 * self.out_channels)
        self.gradient_checkpointing = False
        self.checkpointed_fraction = 1.0

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

    def set_gradient_checkpointing(self, fraction: float) -> None:
        """Recomputes this share of the blocks in the backward pass, evenly spread: 0 none, 1 all. Raises ValueError outside [0, 1]."""
        if not 0 <= fraction <= 1:
            raise ValueError(f"the fraction of blocks to checkpoint must be from 0 to 1, got {fraction}")
        self.checkpointed_fraction = float(fraction)
        if fraction:
            self.enable_gradient_checkpointing()
        else:
            self.disable_gradient_checkpointing()

    def checkpointed(self, index: int) -> bool:
        """Whether block `index` is recomputed in the backward pass."""
        return self.gradient_checkpointing and checkpointed(index, self.checkpointed_fraction)

    def set_attention(self, name: str) -> None:
        """Has every attention computed by the backend `name` of attention.BACKENDS; "auto" leaves the choice to others.

        The others are, in this order, LATENTFM_ATTENTION in the environment, diffusers' default, and PyTorch.
        Raises InputError for an unknown name or one whose package is missing.
        """
        backend = attention_backend(name)
        for module in self.modules():
            if isinstance(module, AttentionModuleMixin):
                module.processor._attention_backend = backend

    @apply_lora_scale("joint_attention_kwargs")
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
        joint_attention_kwargs may hold "scale", the strength of a LoRA.
        encoder_attention_mask [B, L]: True for the text tokens to read; the others are left out of every computation (SD3 itself
        reads its padding). token_route: image tokens that alone pass through some blocks. precomputed: of this schedule and these
        prompts; it stands for timestep, pooled_projections and encoder_hidden_states after its first use.
        Raises ValueError when a shape does not fit the configuration, or an argument the way the network is spread over processes.
        """
        if joint_attention_kwargs:
            raise ValueError(f"MMDiT takes no joint_attention_kwargs but scale, got {sorted(joint_attention_kwargs)}")
        self.check_shapes(hidden_states, encoder_hidden_states, pooled_projections, timestep)
        self.check_parallel(hidden_states, encoder_hidden_states, encoder_attention_mask, token_route, block_controlnet_hidden_states)
        blocks, residuals, route = self.transformer_blocks, block_controlnet_hidden_states, token_route
        image = self.pos_embed(hidden_states)
        conditioning, modulations = None, [None] * len(blocks)
        if precomputed is not None and self.can_precompute(image.device) and precomputed.fits(image.shape[0]):
            text, modulations, out = precomputed.at_step(self, encoder_hidden_states, pooled_projections)
        else:
            conditioning = F.silu(self.time_text_embed(timestep, pooled_projections))
            text, out = self.context_embedder(encoder_hidden_states), None
        packing = None
        if encoder_attention_mask is not None:
            text, packing = pack(text, encoder_attention_mask)
        if route is not None:
            self.check_route(route, image, residuals)
            kept = route.kept.unsqueeze(-1).expand(-1, -1, image.shape[-1])
        for index, block in enumerate(blocks):
            if route is not None and index == route.first:
                bypass, image = image, image.gather(1, kept)
            if skip_layers is None or index not in skip_layers:
                arguments = (image, text, conditioning, modulations[index], packing)
                if torch.is_grad_enabled() and self.checkpointed(index):
                    image, text = self._gradient_checkpointing_func(block, *arguments)
                else:
                    image, text = block(*arguments)
            if route is not None and index == route.last:
                image = bypass.scatter(1, kept, image)
            if residuals is not None and not block.context_pre_only:
                image = image + residuals[int(index / (len(blocks) / len(residuals)))]
        scale, shift = self.norm_out(conditioning) if out is None else out
        tokens = self.proj_out(modulated_norm(image, scale, shift))
        patch = self.config.patch_size
        rows, columns = hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch
        patches = tokens.unflatten(-1, (patch, patch, -1)).unflatten(1, (rows, columns))  # b r c p q C
        sample = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def can_precompute(self, device: torch.device) -> bool:
        """Whether the modulations' weights lie on `device` as plain tensors: not offloaded, not sharded over processes."""
        if torch.is_grad_enabled() or hasattr(next(self.parameters()), "ds_id"):  # ZeRO 3 would gather a weight that is only looked at
            return False
        weights = (block.norm1.linear.weight for block in self.transformer_blocks)
        return all(weight.device == device and not hasattr(weight, "device_mesh") for weight in weights)

    def check_route(self, route: TokenRoute, image: Tensor, residuals: list[Tensor] | None) -> None:
        """Raises ValueError unless the route fits the blocks and the batch."""
        if residuals is not None:
            raise ValueError("token_route and block_controlnet_hidden_states do not go together")
        if not 0 <= route.first <= route.last < len(self.transformer_blocks):
            raise ValueError(f"a token route from block {route.first} to {route.last} does not fit {len(self.transformer_blocks)} blocks")
        if route.kept.ndim != 2 or route.kept.shape[0] != image.shape[0] or not 1 <= route.kept.shape[1] <= image.shape[1]:
            raise ValueError(f"kept tokens of shape {tuple(route.kept.shape)} should be [{image.shape[0]}, 1 to {image.shape[1]}]")

    def check_parallel(
        self, latents: Tensor, text: Tensor, mask: Tensor | None, route: TokenRoute | None, residuals: list[Tensor] | None
    ) -> None:
        """Raises ValueError for what cannot be computed while the tokens are spread over processes (enable_parallelism)."""
        spread = getattr(self._parallel_config, "context_parallel_config", None)
        if spread is None:
            return
        whole = {"encoder_attention_mask": mask, "token_route": route, "block_controlnet_hidden_states": residuals}
        given = [name for name, value in whole.items() if value is not None]
        if given:
            raise ValueError(f"{', '.join(given)} cannot be used with context parallelism: each process has a part of the tokens only")
        if getattr(spread, "ulysses_anything", False) or getattr(spread, "ring_anything", False):
            return
        processes, patch = spread.ring_degree * spread.ulysses_degree, self.config.patch_size
        tokens = (latents.shape[-2] // patch) * (latents.shape[-1] // patch)
        if tokens % processes or text.shape[1] % processes or self.config.num_attention_heads % spread.ulysses_degree:
            raise ValueError(
                f"{tokens} image tokens, {text.shape[1]} text tokens and {self.config.num_attention_heads} heads do not divide over "
                f"{processes} processes; ContextParallelConfig(ulysses_anything=True), or ring_anything=True, takes any number"
            )

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


def pack(text: Tensor, mask: Tensor) -> tuple[Tensor, Packing]:
    """The tokens of text [B, L, dim] that mask [B, L] marks, behind each other, [1, total, dim], and where they belong.

    Raises ValueError when the mask has another shape or a sample has no token left.
    """
    if mask.shape != text.shape[:2]:
        raise ValueError(f"encoder_attention_mask of shape {tuple(mask.shape)} should be {tuple(text.shape[:2])}")
    mask = mask.bool()
    lengths = mask.sum(1).tolist()
    if not all(lengths):
        raise ValueError(f"encoder_attention_mask leaves sample {lengths.index(0)} without a text token; keep at least one")
    samples, _ = mask.nonzero(as_tuple=True)
    return text[mask][None], Packing(lengths, samples)


# diffusers' caching hooks (enable_cache) find a block's two streams by this
TransformerBlockRegistry.register(
    Block,
    TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1),
)
