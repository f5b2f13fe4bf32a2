"""The state of a run as tensors by name: trained weights, averages, and what the optimizer has learnt."""

import torch

from latentfm.errors import InputError
from latentfm.interchange.tensors import Tensors
from latentfm.training.distributed.shards import Chunk, LocalShards
from latentfm.training.optimizers.ema import EMA
from latentfm.training.optimizers.state import optimizer_state, restore_optimizer_state
from latentfm.words import listed


def pack(shards: LocalShards, ema: EMA | None, optimizer: torch.optim.Optimizer) -> dict[str, Chunk]:
    """What this process has of "model.*", "ema.*" (where there are averages) and "optimizer.*"; they share the run's memory."""
    chunks = {f"model.{name}": shards.chunk(name, value.detach()) for name, value in shards.parameters.items()}
    chunks |= {f"ema.{name}": shards.chunk(name, value) for name, value in (ema.shadow if ema else {}).items()}
    for key, value in optimizer_state(optimizer, shards.names).items():
        chunks[f"optimizer.{key}"] = shards.chunk(key.split("/", 1)[1], value)
    return chunks


@torch.no_grad()
def unpack(tensors: Tensors, shards: LocalShards, ema: EMA | None, optimizer: torch.optim.Optimizer) -> None:
    """Puts what `pack` gave back into the parameters, the averages and the optimizer, one tensor at a time. Raises InputError."""
    shares = ("model", "ema") if ema else ("model",)
    wanted = {f"{share}.{name}" for share in shares for name in shards.parameters}
    differing = wanted ^ {name for name in tensors if not name.startswith("optimizer.")}
    if differing:
        raise InputError(f"the checkpoint does not hold this run's trained parameters; differing: {', '.join(sorted(differing)[:5])}")
    shapes = {name for share in shares for name in shards.parameters if tensors[f"{share}.{name}"].shape != shards.shape(name)}
    if shapes:
        raise InputError(f"the checkpoint's parameters are of other shapes than this run's: {listed(sorted(shapes))}")
    for name, parameter in shards.parameters.items():
        parameter.copy_(shards.read(name, tensors[f"model.{name}"]))
        if ema:
            ema.shadow[name].copy_(shards.read(name, tensors[f"ema.{name}"]))
    learnt = {name.removeprefix("optimizer."): stored for name, stored in tensors.items() if name.startswith("optimizer.")}
    state = {key: shards.read(key.split("/", 1)[1], stored) for key, stored in learnt.items()}
    restore_optimizer_state(optimizer, state, shards.names)
