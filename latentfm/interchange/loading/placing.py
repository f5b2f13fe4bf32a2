"""Which device each component of a pipeline is put on as it is loaded (device_map), as stock diffusers places whole components."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.utils import get_max_memory
from torch import nn

from latentfm.errors import InputError, nearest
from latentfm.models.folder import PARTS
from latentfm.words import shown

BALANCED = "balanced"
Device = int | str


@dataclass(frozen=True)
class Places:
    """devices: of each component by name, or one for all, or None for where they are loaded, the CPU.

    main: where a component that lies on the CPU is sent while it runs; None where it runs there.
    """

    devices: str | dict[str, Device] | None
    main: Device | None = None

    def device(self, name: str) -> Device | None:
        """Where the component `name` is to lie; None for where it is loaded."""
        return self.devices if isinstance(self.devices, str | None) else self.devices.get(name)

    def put(self, name: str, network: nn.Module) -> nn.Module:
        """The component `name` where it belongs; among several devices its inputs follow it there, whatever device they are on."""
        if (device := self.device(name)) is None:
            return network
        if isinstance(self.devices, str):
            return network if lies_on(network, device) else network.to(device)
        more = {"main_device": self.main} if device == "cpu" and self.main is not None else {}
        return dispatch_model(network, device_map={"": device}, force_hooks=True, **more)


def places_of(given: Any, max_memory: Mapping[Any, Any] | None, sizes: Callable[[], Mapping[str, int]]) -> Places:
    """Where from_pretrained's device_map has the components put.

    given: a device, "balanced" (over the GPUs there are, within max_memory by device), or a device for components by name. sizes: tells the
    bytes of each component. Raises InputError for a map that is none of these, and for a device that is not there.
    """
    if max_memory is not None and given != BALANCED:
        raise InputError(f'max_memory is for device_map="{BALANCED}", which weighs the devices by it; leave it out, or give that')
    if given is None:
        return Places(None)
    if isinstance(given, str) and given == BALANCED:
        try:
            memory = get_max_memory(max_memory and dict(max_memory))
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"max_memory {shown(repr(max_memory), 60)} is no memory by device, as {{0: '20GB'}}: {error}") from error
        room = {device: most for device, most in memory.items() if device != "cpu"}
        return Places(balanced(sizes(), room), next(iter(room))) if room else Places(None)
    if isinstance(given, Mapping):
        if unknown := [str(name) for name in given if name not in (*PARTS, "image_encoder")]:
            hint = nearest(unknown[0], PARTS)
            raise InputError(f"device_map has {shown(unknown[0], 60)}, which is no component{hint}; there are {', '.join(PARTS)}")
        return Places({name: there(device) for name, device in given.items()})
    return Places(str(torch.device(there(given))))


def there(device: Any) -> Device:
    """`device`, as it is. Raises InputError when it is no device, or not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, AttributeError, NotImplementedError) as error:
        raise InputError(
            f"device_map {shown(repr(device), 60)} is no device here ({shown(str(error).splitlines()[0], 120)}); give one, as in "
            f"device_map='cuda', or '{BALANCED}' for all GPUs; components are moved while drawing by pipe.enable_model_cpu_offload()"
        ) from None
    return device if isinstance(device, int) else str(device)


def balanced(sizes: Mapping[str, int], room: Mapping[Device, int]) -> dict[str, Device]:
    """A device for each component: the largest first, over the devices to and fro, those with the most room first.

    A component that its turn's device has no room for stays on the CPU, and is sent over while it runs.
    """
    left = dict(sorted(room.items(), key=lambda item: -item[1]))
    turns, found, turn = [*left, *reversed(left)], {}, 0
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        device = turns[turn % len(turns)]
        if size > left[device]:
            found[name] = "cpu"
            continue
        found[name], left[device], turn = device, left[device] - size, turn + 1
    return found


def lies_on(network: nn.Module, device: str) -> bool:
    """Whether a network lies on a device already: what is quantised may not be moved, not even to where it is."""
    wanted, found = torch.device(device), next(iter(network.parameters())).device
    return found.type == wanted.type and wanted.index in (None, found.index)


def bytes_of(network: nn.Module, dtype: torch.dtype | None = None) -> int:
    """The bytes that a network takes, with floating-point numbers in `dtype` (None: as they are); it may be without memory."""
    values = (*network.parameters(), *network.buffers())
    return sum(value.numel() * (dtype if dtype is not None and value.is_floating_point() else value.dtype).itemsize for value in values)
