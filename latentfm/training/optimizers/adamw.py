"""AdamW for bfloat16 weights, and the bound on a gradient."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from latentfm.bounds import OPTIMIZER_CHUNK
from latentfm.randomness import generator

CPU_CHUNK = 1 << 20  # elements whose float32 copies exist at one time on a CPU, which its cache holds; on a GPU OPTIMIZER_CHUNK


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) for bfloat16 parameters, every step computed in float32.

    A bfloat16 weight has 8 significant bits: rounded to the nearest, an update below 1/512 of the weight is lost. Here the float32
    result is either kept in full (master_weights: the parameter is its rounding, 4 bytes more a weight) or rounded up or down at
    random so that its mean is exact (stochastic rounding, Gupta et al. 2015). The random bits are a function of `seed`, the count of
    steps and the place among the parameters, so a resumed run is the same to the bit, and so are processes with devices of one kind.

    Moments are float32, or bfloat16 with stochastic rounding where `moments` says so. A step goes chunk by chunk (CPU_CHUNK or
    OPTIMIZER_CHUNK elements) and needs beside the state 14 bytes an element of a chunk: 4 with masters, 22 with bfloat16 moments. float32
    parameters are stepped in place, as by torch's fused AdamW. Masters are taken from the parameters as they are here: make the
    optimizer before casting a float32 network. Raises ValueError for a parameter that is not contiguous or neither float32 nor bfloat16.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        master_weights: bool = False,
        moments: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments, self.seed = moments, seed
        for parameter in self.parameters():
            if not parameter.is_contiguous() or parameter.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"AdamW needs contiguous float32 or bfloat16 parameters, got {parameter.dtype}, {parameter.stride()}")
            if master_weights:
                self.state[parameter]["master"] = parameter.detach().to(torch.float32, copy=True)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves every parameter that has a gradient; returns what `closure` did, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, (group, pieces) in enumerate(self.chunks()):
            step = int(self.state[pieces[0][0]]["step"])
            source = generator(self.seed, "rounding", step, number, device=pieces[0][0].device)
            self.move(group, step, pieces, source)
        return loss

    def chunks(self) -> Iterator[tuple[dict[str, Any], list[tuple[nn.Parameter, slice]]]]:
        """(group, [(parameter, range of its elements)]) of those with a gradient, in a fixed order; each at most a chunk's elements.

        Counts the step of each parameter as it comes by; those of a chunk have the same count, dtype and device.
        """
        for group in self.param_groups:
            pieces, room, kind = [], 0, None
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                own, start = self.count(parameter), 0
                while start < parameter.numel():
                    if own != kind or not room:
                        if pieces:
                            yield group, pieces
                        pieces, room, kind = [], CPU_CHUNK if parameter.device.type == "cpu" else OPTIMIZER_CHUNK, own
                    stop = min(parameter.numel(), start + room)
                    pieces.append((parameter, slice(start, stop)))
                    room, start = room - (stop - start), stop
            if pieces:
                yield group, pieces

    def count(self, parameter: nn.Parameter) -> tuple[int, torch.dtype, torch.device]:
        """Counts a step of `parameter`, its state made at the first; returns what the parameters of a chunk share."""
        state = self.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment not in state:
                state[moment] = torch.zeros_like(parameter, dtype=self.moments)
        state["step"] = int(state.get("step", 0)) + 1  # from a checkpoint it comes as a tensor
        return state["step"], parameter.dtype, parameter.device

    def move(self, group: dict[str, Any], step: int, pieces: list[tuple[nn.Parameter, slice]], generator: torch.Generator) -> None:
        """One step of the elements of `pieces`, by torch's fused AdamW on float32 copies of what is not float32."""

        def of(tensor: Callable[[nn.Parameter], Tensor]) -> list[Tensor]:
            return [tensor(parameter).reshape(-1)[part] for parameter, part in pieces]

        weights, gradients = of(lambda p: p.detach()), of(lambda p: p.grad)
        masters = of(lambda p: self.state[p]["master"]) if "master" in self.state[pieces[0][0]] else weights
        stored = [masters, of(lambda p: self.state[p]["exp_avg"]), of(lambda p: self.state[p]["exp_avg_sq"])]
        wide = [widened(tensors) for tensors in stored]
        (first, _), (second, _), (third, _) = wide
        torch._fused_adamw_(
            first, widened(gradients)[0], second, third, [], [torch.full((), float(step), device=weights[0].device)] * len(weights),
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"],
            amsgrad=False, maximize=False,
        )  # fmt: skip
        for narrow, (copies, room) in zip(stored, wide, strict=True):
            if room is not None:
                round_stochastically_(room, generator)
                torch._foreach_copy_(narrow, copies)
        if masters is not weights:
            torch._foreach_copy_(weights, masters)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps its dtype: torch casts the state to that of the parameters."""
        super().load_state_dict(state_dict | {"state": {}})
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        for place, parameter in zip(places, self.parameters(), strict=True):
            for key, value in state_dict["state"].get(place, {}).items():
                self.state[parameter][key] = value.to(parameter.device) if isinstance(value, Tensor) else value


def widened(tensors: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """(float32 copies, the one new tensor they lie in); where they are float32 already, (`tensors` themselves, None)."""
    if all(tensor.dtype == torch.float32 for tensor in tensors):
        return tensors, None
    sizes = [tensor.numel() for tensor in tensors]
    room = torch.empty(sum(sizes), dtype=torch.float32, device=tensors[0].device)
    copies = list(room.split(sizes))
    torch._foreach_copy_(copies, tensors)
    return copies, room


def round_stochastically_(x: Tensor, generator: torch.Generator) -> Tensor:
    """x [N] float32, changed in place to bfloat16 numbers: up with probability (x - below) / (above - below), otherwise down.

    The mean over draws is exactly x; a number that bfloat16 holds stays (-0 as 0); what is not finite becomes NaN. 16 random bits a number
    are drawn from `generator`, on x's device: added to the 16 bits that bfloat16 lacks, they carry as often as these ask for.
    """
    lost = x - x  # 0, but NaN where x is not finite: a NaN's bits would carry into its sign
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)  # the bits of four numbers in each: fewer draws
    draws = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()]
    x.view(torch.int32).add_(1 << 15).add_(draws).bitwise_and_(-1 << 16)
    return x.add_(lost)


def masters_of(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """The float32 master weights of `optimizer` by name, none where it keeps none; `names` maps id(parameter) to its name."""
    return {names[id(parameter)]: state["master"] for parameter, state in optimizer.state.items() if "master" in state}


@torch.no_grad()
def clip_gradient(
    parameters: Iterable[nn.Parameter], max_norm: float, over_shards: Callable[[Tensor], Tensor] = lambda squares: squares
) -> Tensor:
    """The 2-norm of the whole gradient, a float32 scalar; a gradient longer than `max_norm` is scaled down to it.

    Where the parameters are shards (`distributed.shards`), over_shards sums the squares of all of them. torch.nn.utils.clip_grad_norm_
    keeps the norm in the gradient's own dtype: three digits of it in bfloat16.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
    norm = over_shards(squares).sqrt()
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(squares.device))  # offloaded they are on the CPU
    return norm
