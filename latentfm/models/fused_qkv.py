"""Query, key and value in one matrix product (MMDiT.fuse_qkv_projections): the weights laid side by side, with no second copy of them.

What it replaces: three products of the same tokens, at inference. What it gains: fewer, wider products, most where they are small, as in
the bundled model on a CPU.
"""

from typing import Any

import torch
from torch import Tensor, nn

from latentfm.models.onednn import Linear, product, transformed, untouched

# Parameter for weights as they are; a subclass of Tensor (quantised, sharded) has ways of its own to be multiplied by
PLAIN = (Tensor, nn.Parameter)


class FusedProjections:
    """What an attention needs for it; the attention has `joint` and the layers that `projections` names."""

    joint: bool
    fused_projections = False

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

    def _apply(self, fn: Any, recurse: bool = True) -> "FusedProjections":
        """What Module.to, .half and their like do; it gives each parameter a tensor of its own, so that fused ones are laid out again."""
        super()._apply(fn, recurse)
        if self.fused_projections and self.fusible():
            self.fuse_projections()
        return self

    def fusible(self) -> bool:
        """Whether query, key and value are made by plain Linears of plain tensors."""
        layers = [getattr(self, name) for names in self.projections() for name in names]
        return all(type(layer) in (Linear, nn.Linear) and type(layer.weight) in PLAIN for layer in layers)

    def projections(self) -> list[tuple[str, str, str]]:
        """The names of the layers that make query, key and value: the image's and, in joint attention, the text's."""
        return [("to_q", "to_k", "to_v")] + ([("add_q_proj", "add_k_proj", "add_v_proj")] if self.joint else [])

    def products(self, x: Tensor, names: tuple[str, ...]) -> list[Tensor]:
        """What each of the layers called `names` makes of tokens x [B, N, dim]: [B, N, inner] each."""
        layers = [getattr(self, name) for name in names]
        weights = [layer.weight for layer in layers]
        weight = side_by_side(weights) if self.one_product(layers) else None
        if weight is None:
            return [layer(x) for layer in layers]
        return list(product(x, weight, side_by_side([layer.bias for layer in layers]), parts=weights).chunk(len(layers), dim=-1))

    def one_product(self, layers: list[nn.Module]) -> bool:
        """Whether the layers are fused and nothing needs them to be called one by one: a gradient, the compiler, an adapter, a hook."""
        return (
            self.fused_projections
            and not torch.is_grad_enabled()
            and not transformed()
            and all(untouched(layer) for layer in layers)
        )


def apart(attention: FusedProjections, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
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
