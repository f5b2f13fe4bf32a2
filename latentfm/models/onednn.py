"""Products of an MM-DiT's blocks by oneDNN on a CPU: in sampling, and in float32 training where PyTorch's own are slow.

Linear     nn.Linear, whose product can go through GELU (tanh) before it is written: both take half of the time in bfloat16 and six tenths
           in float32 (666 tokens of 256 numbers, one core with AMX).
laid_out   lays the weights out once, in the order that the kernels read, for the length of one sampling, where nn.Linear's product does so
           at every step: a sixth of the time less in float32, a quarter in bfloat16, more where the tokens are few. The copies go with the
           sampling, so that no weight changed between two can be missed.
ALWAYS     says whether float32 is multiplied by oneDNN in training too: on an AMD processor with AVX-512. MKL, which multiplies for
           PyTorch, has AVX2 for those, and takes twice as long forward and backward (256 to 6,144 numbers wide, Zen 5; on an Intel it is
           the faster one).

Compiled blocks call the same products, as the operation latentfm::linear; what is between them is the compiler's.
"""

import platform
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.library import Library, register_autograd, register_fake
from torch.nn import functional as F

ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
BFLOAT16 = ONEDNN is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported()
MOST = 2**30  # bytes of weights: of a larger network no copy is made
LEAST = 12  # evaluations of the network for which laying out is worth its time, that of about ten
AS_IT_IS, THROUGH_GELU = ("none", [], ""), ("gelu", [], "tanh")


def transformed() -> bool:
    """Whether the compiler, torch.func, forward-mode differentiation or a tracer looks on: PyTorch's own operations are all they know."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0 or torch.jit.is_tracing()
    )  # fmt: skip


class Linear(nn.Linear):
    """nn.Linear with the products of this file: x [..., K] -> [..., N], through GELU (tanh) where `gelu` asks for it."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        weight = self.weight
        if type(weight) not in (Tensor, nn.Parameter) or weight.device.type != "cpu":
            return plain(x, weight, self.bias, gelu)
        known = not transformed() or (torch.compiler.is_compiling() and not torch.compiler.is_exporting())
        if not known or torch.is_autocast_enabled("cpu"):
            return plain(x, weight, self.bias, gelu)
        if torch.is_grad_enabled():
            if not (ALWAYS and x.dtype == torch.float32 and takes(weight, x)):
                return plain(x, weight, self.bias, gelu)
            found = torch.ops.latentfm.linear(x, weight, self.bias, False)
            return F.gelu(found, approximate="tanh") if gelu else found
        if torch.compiler.is_compiling():
            return torch.ops.latentfm.linear(x, weight, self.bias, gelu)
        return product(x, weight, self.bias, gelu)


def processor() -> str:
    """The processor's name, as Linux tells it, or else Python."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def mkl_is_held_back() -> bool:
    """Whether this is an AMD processor with AVX-512: by its name and not by a measurement, so that a resumed run multiplies as before."""
    return "AMD" in processor() and torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkl.is_available()


ALWAYS = mkl_is_held_back()  # whether float32 is multiplied by oneDNN in every case, with gradients too


def untouched(layer: nn.Module) -> bool:
    """Whether calling `layer` is the forward of a linear and nothing else: no adapter around it, no hook, no offloading, no cast."""
    plain_class = type(layer) in (Linear, nn.Linear)
    return plain_class and "forward" not in vars(layer) and not (layer._forward_hooks or layer._forward_pre_hooks)


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU (tanh) of layer(x)."""
    return layer(x, gelu=True) if type(layer) is Linear and untouched(layer) else F.gelu(layer(x), approximate="tanh")


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    found = F.linear(x, weight, bias)
    return F.gelu(found, approximate="tanh") if gelu else found


def takes(weight: Tensor, x: Tensor) -> bool:
    """Whether oneDNN may multiply x by this weight: both on the CPU and of one dtype that it knows, and no autocast."""
    dense = weight.is_contiguous() or weight.t().is_contiguous()
    if ONEDNN is None or not torch.backends.mkldnn.enabled or not x.numel() or not dense:
        return False
    if not x.device.type == weight.device.type == "cpu" or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    return BFLOAT16 if x.dtype == torch.bfloat16 else x.dtype == torch.float32


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False, parts: Sequence[Tensor] = ()) -> Tensor:
    """`plain` without gradients, by oneDNN where that is faster: on a CPU, with a weight that is laid out, with the GELU, or where ALWAYS.

    parts: the weights that `weight` is a view of, where those are several.
    """
    laid = LAID.get(weight.data_ptr()) if LAID else None
    if (laid is None and not gelu and not (ALWAYS and x.dtype == torch.float32)) or not takes(weight, x):
        return plain(x, weight, bias, gelu)
    rows = x.reshape(-1, x.shape[-1])
    kept = weight if laid is None else laid.out(weight, len(rows), parts or (weight,))
    return ONEDNN(rows, kept, bias, *(THROUGH_GELU if gelu else AS_IT_IS)).view(*x.shape[:-1], -1)


LIBRARY = Library("latentfm", "FRAGMENT")
LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias, bool gelu) -> Tensor")
LIBRARY.impl("linear", product, "CPU")


@register_fake("latentfm::linear", lib=LIBRARY)
def shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What the gradients that are wanted need: no x of a frozen weight, no weight of an x without gradient."""
    (x, weight, *_), (of_x, of_weight, *_) = inputs, ctx.needs_input_grad
    ctx.save_for_backward(x if of_weight else None, weight if of_x else None)


def gradients_of_linear(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Of x [..., K], weight [N, K] and bias [N], by the same operation; of the product alone, not through GELU."""
    (x, weight), (of_x, of_weight, of_bias, _) = ctx.saved_tensors, ctx.needs_input_grad
    rows, multiply = gradient.reshape(-1, gradient.shape[-1]), torch.ops.latentfm.linear
    return (
        # layerwise casting has put the weight back into eight bits by now
        multiply(gradient, weight.to(gradient.dtype).t(), None, False) if of_x else None,
        multiply(rows.t(), x.reshape(-1, x.shape[-1]).t(), None, False) if of_weight else None,
        rows.sum(dim=0) if of_bias else None,
        None,
    )


register_autograd("latentfm::linear", gradients_of_linear, setup_context=keep, lib=LIBRARY)


class Laid:
    """A weight in oneDNN's order, made when it is first asked for and again when the weight is another.

    The weight it was made of is held, so that no other can come to lie at its address meanwhile. samplings: how many are under way.
    """

    def __init__(self) -> None:
        self.samplings, self.made_of, self.version, self.weight = 0, None, None, None

    def out(self, weight: Tensor, rows: int, parts: Sequence[Tensor]) -> Tensor:
        version = weight.shape, *(0 if part.is_inference() else part._version for part in parts)
        if self.version != version:
            self.made_of, self.version = weight.detach(), version
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.made_of, rows)
        return self.weight


LAID: dict[int, Laid] = {}  # by the address of the weight
CHANGING = threading.Lock()


@contextmanager
def laid_out(network: nn.Module, evaluations: int = LEAST) -> Iterator[None]:
    """A context in which the linears of `network`'s blocks multiply by weights laid out once; a large network is left as it is.

    evaluations: how many are expected; of few it would be slower.
    """
    addresses = {weight.data_ptr() for weight in laid_out_weights(network)} if evaluations >= LEAST else set()
    with CHANGING:
        for address in addresses:
            LAID.setdefault(address, Laid()).samplings += 1
    try:
        yield
    finally:
        with CHANGING:
            for address in addresses:
                LAID[address].samplings -= 1
                if not LAID[address].samplings:
                    del LAID[address]


def laid_out_weights(network: nn.Module) -> list[Tensor]:
    """The weights that are laid out: none where it does not help or something else multiplies."""
    modules = [module for block in getattr(network, "transformer_blocks", ()) for module in block.modules()]
    if ONEDNN is None or not torch.backends.mkldnn.enabled:
        return []
    weights = [module.weight for module in modules if type(module) is Linear and untouched(module) and module.weight.device.type == "cpu"]
    weights = [weight for weight in weights if type(weight) in (Tensor, nn.Parameter)]
    return weights if sum(weight.nbytes for weight in weights) <= MOST else []
