"""Products of an MM-DiT's blocks by oneDNN in sampling on a CPU.

linear_gelu   replaces gelu(linear(x)): the GELU is applied before the product is written. Both take half of the time in bfloat16 and six
              tenths in float32 (666 tokens of 256 numbers, one core with AMX).
laid_out      lays the weights out once, in the order that the kernels read, for the length of one sampling, where nn.Linear's product
              does so at every step: a sixth of the time less in float32, a quarter in bfloat16, more where the tokens are few. The copy
              goes with the sampling, so that no weight changed between two can be missed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentfm.models.kernels import transformed, untouched

ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
MOST = 2**30  # bytes of weights: of a larger network no copy is made
AS_IT_IS, THROUGH_GELU = ("none", [], ""), ("gelu", [], "tanh")


def takes(weight: Tensor, x: Tensor) -> bool:
    """Whether oneDNN may multiply x by this weight: no gradient, no tracer, no autocast; a plain tensor on the CPU, in x's dtype."""
    if ONEDNN is None or not torch.backends.mkldnn.enabled or torch.is_grad_enabled() or transformed() or not x.numel():
        return False
    own = type(weight) in (Tensor, nn.Parameter) and weight.is_contiguous() and weight.dtype == x.dtype
    if not own or not weight.device.type == x.device.type == "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product(x: Tensor, weight: Tensor, bias: Tensor | None, after: tuple) -> Tensor:
    return ONEDNN(x.reshape(-1, x.shape[-1]), weight, bias, *after).view(*x.shape[:-1], -1)


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU (tanh) of layer(x)."""
    forward = vars(layer).get("forward")
    if isinstance(forward, LaidOut) and not (layer._forward_hooks or layer._forward_pre_hooks):
        return forward(x, THROUGH_GELU)
    if untouched(layer) and takes(layer.weight, x):
        return product(x, layer.weight, layer.bias, THROUGH_GELU)
    return F.gelu(layer(x), approximate="tanh")


class LaidOut:
    """nn.Linear's forward with the weight in oneDNN's order, made when it is first asked for and again when the weight is another."""

    def __init__(self, layer: nn.Linear):
        self.layer, self.made_of, self.weight = layer, None, None

    def __call__(self, x: Tensor, after: tuple = AS_IT_IS) -> Tensor:
        """The layer's product of x [..., K], through GELU where it is asked for: [..., N]."""
        weight = self.layer.weight
        if not takes(weight, x):
            out = nn.Linear.forward(self.layer, x)
            return out if after is AS_IT_IS else F.gelu(out, approximate="tanh")
        seen = weight.data_ptr(), weight._version
        if self.made_of != seen:
            rows = x.numel() // x.shape[-1]
            self.weight, self.made_of = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows), seen
        return product(x, self.weight, self.layer.bias, after)


@contextmanager
def laid_out(network: nn.Module) -> Iterator[None]:
    """A context in which the plain linears of `network`'s blocks multiply by weights laid out once; one that is on a GPU, compiled or
    large is left as it is."""
    layers = linears(network)
    for layer in layers:
        layer.forward = LaidOut(layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def linears(network: nn.Module) -> list[nn.Linear]:
    """The layers whose weights are laid out: none where it does not help or something else multiplies."""
    blocks = getattr(network, "transformer_blocks", ())
    compiled = hasattr(network, "_orig_mod") or any(module._compiled_call_impl is not None for module in (network, *blocks))
    if ONEDNN is None or not torch.backends.mkldnn.enabled or compiled:
        return []
    modules = [module for block in blocks for module in block.modules()]
    if any(getattr(module, "fused_projections", False) for module in modules):
        return []
    layers = [module for module in modules if untouched(module) and module.weight.device.type == "cpu"]
    return layers if sum(layer.weight.nbytes for layer in layers) <= MOST else []
