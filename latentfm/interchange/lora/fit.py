"""Whether a LoRA fits a network, and what each of the network's adapted modules weighs where a weight is given by block."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from latentfm.errors import InputError
from latentfm.interchange.lora.formats import A, B
from latentfm.interchange.tensors import Stored
from latentfm.words import shown


def check_fit(network: nn.Module, owner: str, tensors: Mapping[str, Tensor | Stored]) -> None:
    """Raises InputError unless the LoRA's matrices for `owner`, under diffusers' names, fit linears that `network` has."""
    for name, value in tensors.items():
        if not name.startswith(f"{owner}.") or not name.endswith((A, B)):
            continue
        module = name.removeprefix(f"{owner}.").removesuffix(f".{A}").removesuffix(f".{B}")
        try:
            linear = network.get_submodule(module)
        except AttributeError:
            raise InputError(f"the LoRA does not fit this model, whose {owner} has no {shown(module, 120)}") from None
        weight = getattr(getattr(linear, "base_layer", linear), "weight", None)
        if getattr(linear, "in_features", None) is None and getattr(weight, "ndim", 0) != 4:
            raise InputError(f"the LoRA does not fit this model: {shown(module, 120)} of its {owner} is no linear")
        sizes = (linear.out_features, linear.in_features) if hasattr(linear, "in_features") else weight.shape[:2]
        side = 0 if name.endswith(B) else 1
        if value.shape[side] != sizes[side]:
            raise InputError(
                f"the LoRA does not fit this model: {shown(name, 120)} is {list(value.shape)}, and {shown(module, 120)} has "
                f"{sizes[1]} numbers in and {sizes[0]} out"
            )


def weights_by_module(network: nn.Module, owner: str, weights: Mapping[str, float]) -> dict[str, float]:
    """The weight of each module that has an adapter, of `weights` by names or parts of names; 1 where none of these is in its name.

    The first that is in a module's name counts, as in diffusers, but a number counts whole: transformer_blocks.1 is not in
    transformer_blocks.11. Raises InputError for a name that is in none of the network's modules.
    """
    patterns = {name: re.compile(re.escape(name) + (r"(?!\d)" if name[-1:].isdigit() else "")) for name in weights}
    modules = [module for module, _ in network.named_modules()]
    if unknown := [name for name, pattern in patterns.items() if not name or not any(map(pattern.search, modules))]:
        raise InputError(f"adapter_weights has no module of the {owner} in {shown(unknown[0], 80)!r}; name a block, as in 'blocks.0'")
    adapted = [module for module, layer in network.named_modules() if hasattr(layer, "base_layer") and hasattr(layer, "scaling")]
    return {
        module: next((weights[name] for name, pattern in patterns.items() if pattern.search(module)), 1.0)
        for module in sorted(adapted, key=len, reverse=True)
    }
