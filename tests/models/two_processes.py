"""What two processes compute together with an MMDiT, each beside what one computes alone; test_features.py reads the figures.

`together(folder)` starts them on the CPU (gloo, a file in `folder` to meet at) and returns what they found, by name.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import ContextParallelConfig
from models.twins import inputs, twins
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from latentfm.models.mmdit import MMDiT
from latentfm.models.routing import TokenRoute
from latentfm.models.schedule import Precomputed

FOUR_HEADS = {"num_attention_heads": 4, "caption_projection_dim": 64, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}


def together(folder: Path) -> dict[str, float | str]:
    """What the first of two processes found; raises what either raised."""
    mp.spawn(work, (str(folder),), nprocs=2)
    return json.loads((folder / "found.json").read_text())


def work(rank: int, folder: str) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    # diffusers asks for an accelerator, and takes one that PyTorch was built for though there is none
    torch.accelerator.device_count = lambda: 1
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cpu")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {**context_parallel(), **data_parallel(rank)}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


@torch.no_grad()
def context_parallel() -> dict[str, float | str]:
    """Tokens of one picture over two processes: differences from one process, or what was refused and how."""
    found: dict[str, float | str] = {}
    model = twins(**FOUR_HEADS)[0]
    given = inputs(model, "wide")  # 32 image tokens
    given["encoder_hidden_states"] = torch.cat([given["encoder_hidden_states"]] * 2, dim=1)  # 10 of text
    times = given["timestep"][:1]
    plain, skipping = model(**given).sample, model(**given, skip_layers=[0]).sample
    at_time = model(**given | {"timestep": times}).sample
    odd, odd_alone = inputs(model, "square"), model(**inputs(model, "square")).sample
    found["scale"] = plain.std().item()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    found["ulysses"] = difference(model(**given).sample, plain)
    found["skip_layers"] = difference(model(**given, skip_layers=[0]).sample, skipping)
    precomputed = Precomputed(times)
    for _ in range(2):
        found["precomputed"] = difference(model(**given | {"timestep": times}, precomputed=precomputed).sample, at_time)
    refused = {
        "nine text tokens": (odd, {}),
        "encoder_attention_mask": (given, {"encoder_attention_mask": torch.ones(3, 10)}),
        "token_route": (given, {"token_route": TokenRoute(torch.arange(4).expand(3, -1), 1, 1)}),
        "block_controlnet_hidden_states": (given, {"block_controlnet_hidden_states": [torch.zeros(3, 32, 64)]}),
    }
    for name, (arguments, extra) in refused.items():
        try:
            model(**arguments, **extra)
        except ValueError as error:
            found[name] = str(error)
    anything = twins(**FOUR_HEADS)[0]
    anything.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, ulysses_anything=True))
    found["ulysses_anything, nine text tokens"] = difference(anything(**odd).sample, odd_alone)
    three_heads = twins(qk_norm="rms_norm")[0]
    odd, odd_alone = inputs(three_heads), three_heads(**inputs(three_heads)).sample
    three_heads.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, ulysses_anything=True))
    found["ulysses_anything, three heads"] = difference(three_heads(**odd).sample, odd_alone)
    return found


def step(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each parameter after one step of SGD on the mean square of the output."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(**given).sample.square().mean().backward()
    optimizer.step()
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name.removeprefix("module."): value.detach() for name, value in whole.items()}


def data_parallel(rank: int) -> dict[str, float | str]:
    """Half of a batch to each process: how far the parameters after a step are from one process's, and how far those moved."""
    model, given = twins(**FOUR_HEADS)[0], inputs(twins(**FOUR_HEADS)[0])
    mine = {name: value[rank : rank + 1] for name, value in given.items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alone = step(model, given)
    found: dict[str, float | str] = {"step": max(difference(alone[name], before[name]) for name in alone)}

    def sharded(network: MMDiT) -> nn.Module:
        for block in network.transformer_blocks:
            fully_shard(block)
        return fully_shard(network)

    for name, wrap in {"DDP": DistributedDataParallel, "FSDP2": sharded}.items():
        network = wrap(twins(**FOUR_HEADS)[0])
        after = step(network, mine)
        found[name] = max(difference(after[key], alone[key]) for key in alone)
        with torch.no_grad():  # sampling between steps: what is sharded is not computed ahead
            times = given["timestep"][:1]
            sample = network(**given | {"timestep": times}, precomputed=Precomputed(times)).sample
            found[f"{name} sample"] = difference(sample, model(**given | {"timestep": times}).sample)
    return found
