"""Layers that do in fewer passes over memory what PyTorch's plain ones do in several, with the same parameters and results.

Linear runs on oneDNN on a CPU in float32 (PyTorch takes MKL there, which is about half as fast on AMD's processors as oneDNN
and equal on Intel's). modulated_norm is LayerNorm and adaLN modulation in one, and keeps for the backward pass only its input.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

EPS = 1e-6
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
# oneDNN's bfloat16 needs instructions that older processors lack
ONEDNN_DTYPES = (torch.float32, *([torch.bfloat16] if ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported() else []))
# without AVX-512 MKL's three products of a training step take four fifths of oneDNN's time, and its forward one as long
TRAINS_ON_ONEDNN = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
# Parameter for weights as they are; a subclass of Tensor (quantised, sharded) has ways of its own to be multiplied by
PLAIN = (Tensor, nn.Parameter)


def transformed() -> bool:
    """Whether the compiler, torch.func, forward-mode differentiation or a tracer looks on: PyTorch's own operations are all they know."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_mode_or_tracing()


def forward_mode_or_tracing() -> bool:
    """Whether dual numbers (torch.autograd.forward_ad) are in use or torch.jit is tracing."""
    return forward_ad._current_level >= 0 or torch.jit.is_tracing()


def fits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether x @ weight.T may go to oneDNN directly: plain contiguous tensors of one dtype on the CPU, torch.func not looking on."""
    return (
        ONEDNN is not None
        and x.device.type == "cpu" == weight.device.type
        and x.dtype == weight.dtype
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and weight.is_contiguous()
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and (torch.compiler.is_compiling() or (torch.backends.mkldnn.enabled and not forward_mode_or_tracing()))
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N], through GELU (tanh) if asked: one call of oneDNN."""
    if torch.compiler.is_compiling():  # whose own way with this operation takes only weights that are constants
        return opaque_product(x, weight, bias, gelu)
    return ONEDNN(x, weight, bias, "gelu" if gelu else "none", [], "tanh" if gelu else "")


@torch.library.custom_op("latentfm::product", mutates_args=(), device_types="cpu")
def opaque_product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """`product` as an operation the compiler calls and does not look into."""
    return ONEDNN(x, weight, bias, "gelu" if gelu else "none", [], "tanh" if gelu else "")


@opaque_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class OneDNNLinear(torch.autograd.Function):
    """x @ weight.T + bias, and its two gradients, each one oneDNN product. x [T, K], weight [N, K], bias [N] or None."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        # a function that can be differentiated once more where someone asks for that
        multiply = F.linear if torch.is_grad_enabled() else product
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            multiply(gradient, weight.t()) if to_x else None,
            multiply(gradient.t(), x.t()) if to_weight else None,
            gradient.sum(0) if to_bias else None,
        )


class Linear(nn.Linear):
    """nn.Linear, on oneDNN where that is the faster library."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N]."""
    if weight.dtype != torch.float32 or not fits_onednn(x, weight):
        return F.linear(x, weight, bias)
    training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
    if training and not TRAINS_ON_ONEDNN:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    # a view: the backward pass needs the weight of now, and layerwise casting gives the parameter other data after the call
    out = OneDNNLinear.apply(rows, weight.view_as(weight), bias) if training else product(rows, weight, bias)
    return out.view(*x.shape[:-1], -1)


def untouched(layer: nn.Module) -> bool:
    """Whether calling `layer` is Linear.forward and nothing else: no adapter around it, no hook, no offloading, no cast."""
    return type(layer) is Linear and "forward" not in vars(layer) and not (layer._forward_hooks or layer._forward_pre_hooks)


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU (tanh) of layer(x); in inference on a CPU the GELU is part of the product, before it is written out."""
    if untouched(layer) and not torch.is_grad_enabled() and x.dtype in ONEDNN_DTYPES and fits_onednn(x, layer.weight):
        rows = x.reshape(-1, x.shape[-1])
        return product(rows, layer.weight, layer.bias, gelu=True).view(*x.shape[:-1], -1)
    return F.gelu(layer(x), approximate="tanh")


def gradients_with_graph(
    out: Tensor, values: tuple[Tensor, ...], needed: tuple[bool, ...], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients by `values` for `gradient` of the plain formula's `out`, None where not needed, to be differentiated once more."""
    wanted = [value for value, need in zip(values, needed, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, gradient, create_graph=True) if wanted else ())
    return tuple(next(found) if need else None for need in needed)


class GELULinear(torch.autograd.Function):
    """GELU(x) @ weight.T + bias, keeping x and not GELU(x), which is computed again in the backward pass. x [T, K], weight [N, K]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.multiply = product if TRAINS_ON_ONEDNN and weight.dtype == torch.float32 and fits_onednn(x, weight) else F.linear
        return ctx.multiply(F.gelu(x, approximate="tanh"), weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        by_x = by_weight = None
        by_bias = gradient.sum(0) if to_bias else None
        if torch.is_grad_enabled():
            return *gradients_with_graph(F.linear(F.gelu(x, approximate="tanh"), weight), (x, weight), (to_x, to_weight), gradient), by_bias
        gradient = gradient.contiguous()
        if to_weight:
            by_weight = ctx.multiply(gradient.t(), F.gelu(x, approximate="tanh").t())
        if to_x:
            by_x = torch.ops.aten.gelu_backward(ctx.multiply(gradient, weight.t()), x, approximate="tanh")
        return by_x, by_weight, by_bias


def gelu_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(GELU(x)), GELU's tanh form; in training a plain layer keeps x alone for the backward pass, a fifth less than both."""
    if not (torch.is_grad_enabled() and untouched(layer) and layer.weight.requires_grad) or transformed():
        return layer(F.gelu(x, approximate="tanh"))
    weight, bias = layer.weight, layer.bias
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    # a view, as in `linear`
    return GELULinear.apply(x.reshape(-1, x.shape[-1]), weight.view_as(weight), bias).view(*x.shape[:-1], -1)


class ModulatedNorm(torch.autograd.Function):
    """LayerNorm(x) * scale + shift, keeping x and two numbers a token; the normalised x is made again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        normed, mean, inverse_std = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)
        ctx.save_for_backward(x, mean, inverse_std, scale)
        ctx.shift_shape = shift.shape
        out = torch.addcmul(shift, normed, scale)
        device = x.device.type  # autocast normalises in float32 on a GPU: one cast here, not one in each linear that reads this
        return out.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse_std, scale = ctx.saved_tensors
        to_x, to_scale, to_shift = ctx.needs_input_grad
        by_x = by_scale = None
        by_shift = gradient.sum_to_size(ctx.shift_shape) if to_shift else None
        if torch.is_grad_enabled():
            scaled = F.layer_norm(x, x.shape[-1:], eps=EPS) * scale
            return *gradients_with_graph(scaled, (x, scale), (to_x, to_scale), gradient), by_shift
        if to_scale:
            normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
            by_scale = (gradient * normed).sum_to_size(scale.shape)
        if to_x:
            arguments = ((gradient * scale).to(x.dtype), x, x.shape[-1:], mean, inverse_std, None, None, [True, False, False])
            by_x = torch.ops.aten.native_layer_norm_backward(*arguments)[0]
        return by_x, by_scale, by_shift


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm(x) * scale + shift: x [B, N, D], scale and shift [B, 1, D] or [1, N, D]; no norm parameters, eps 1e-6.

    `scale` is adaLN's 1 + scale already (DiT, Peebles and Xie 2023, section 3.2).
    """
    if transformed():
        return F.layer_norm(x, x.shape[-1:], eps=EPS) * scale + shift
    if torch.is_grad_enabled():
        return ModulatedNorm.apply(x, scale, shift)
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
    if normed.dtype != shift.dtype:  # autocast normalises in float32
        return torch.addcmul(shift, normed, scale)
    return torch.addcmul(shift, normed, scale, out=normed)


def gated_sum(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update in one pass; x and update [B, N, D], gate [B, 1, D] or [1, N, D]."""
    return torch.addcmul(x, gate, update)
