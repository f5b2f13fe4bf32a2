"""Where a network computes while its weights lie elsewhere: accelerate's offloading and diffusers' group offloading."""

import torch
from diffusers.hooks.group_offloading import _get_group_onload_device
from torch import nn


def execution_device(network: nn.Module) -> torch.device:
    """The device that a network of diffusers' or transformers' computes on: what it is given must be there."""
    try:
        return torch.device(_get_group_onload_device(network))
    except ValueError:  # it is not offloaded by groups
        pass
    hooks = (getattr(module, "_hf_hook", None) for module in network.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((place for place in places if place is not None), None)
    return network.device if found is None else torch.device(found)
