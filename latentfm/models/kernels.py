"""What does in fewer passes over memory, or keeps less of it, what PyTorch's plain layers do; the same parameters and results.

modulated_norm   replaces layer_norm(x) * scale + shift. Training on an accelerator keeps x and two numbers a token instead of x and the
                 normalised x: a tenth of what a block keeps; sampling reads and writes the tokens twice instead of three times.
gelu_linear      replaces linear(gelu(x)). Training on an accelerator keeps x and not gelu(x) besides: a fifth of what a block keeps.
Unread           gradients of zero for parameters that no result depends on.

Training on a CPU, where memory is seldom the limit and computing a second time costs up to 6 % of a step, takes the plain formulas.
Under torch.compile, torch.func, forward-mode differentiation and tracing they are used too: those know them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentfm.models.onednn import transformed, untouched

EPS = 1e-6


def sparing(x: Tensor) -> bool:
    """Whether training keeps as little as it can for the backward pass of x, and computes the rest again."""
    return x.device.type != "cpu"


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
        return F.linear(F.gelu(x, approximate="tanh"), weight, bias)

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
            by_weight = F.linear(gradient.t(), F.gelu(x, approximate="tanh").t())
        if to_x:
            by_x = torch.ops.aten.gelu_backward(F.linear(gradient, weight.t()), x, approximate="tanh")
        return by_x, by_weight, by_bias


def gelu_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(GELU(x)), GELU's tanh form; where training is `sparing`, a plain layer keeps x alone for the backward pass."""
    if not (torch.is_grad_enabled() and sparing(x) and untouched(layer) and layer.weight.requires_grad) or transformed():
        return layer(F.gelu(x, approximate="tanh"))
    weight, bias = layer.weight, layer.bias
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    # a view: the backward pass needs the weight of now, and layerwise casting gives the parameter other data after the call
    return GELULinear.apply(x.reshape(-1, x.shape[-1]), weight.view_as(weight), bias).view(*x.shape[:-1], -1)


def for_linears(x: Tensor) -> Tensor:
    """x in autocast's precision where that is on: one cast of what was normalised in float32, not one in each linear that reads it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class ModulatedNorm(torch.autograd.Function):
    """LayerNorm(x) * scale + shift, keeping x and two numbers a token; the normalised x is made again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        normed, mean, inverse_std = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)
        ctx.save_for_backward(x, mean, inverse_std, scale)
        ctx.shift_shape = shift.shape
        return for_linears(torch.addcmul(shift, normed, scale))

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
    if torch.is_grad_enabled() and sparing(x):
        return ModulatedNorm.apply(x, scale, shift)
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
    if torch.is_grad_enabled():
        return for_linears(torch.addcmul(shift, normed, scale))
    if normed.dtype != shift.dtype:  # autocast normalises in float32
        return torch.addcmul(shift, normed, scale)
    return torch.addcmul(shift, normed, scale, out=normed)


class HeadNorm(nn.RMSNorm):
    """RMSNorm in its input's dtype: torch's fused kernel refuses bf16 activations with float32 weights, as under autocast.

    Sampling on a CPU works in float32 in one buffer: as exact, in six tenths of the time of torch's, which makes a tensor at each step.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.is_grad_enabled() or transformed():
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(self.eps).rsqrt_()
        normed = wide * inverse if wide is x else wide.mul_(inverse)
        return normed.mul_(self.weight).to(x.dtype)


class Unread(torch.autograd.Function):
    """x, with gradients of zero for parameters that no result depends on: data-parallel training waits for a gradient of each."""

    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def unread(x: Tensor, *modules: nn.Module) -> Tensor:
    """x, with gradients of zero for the parameters of `modules`, which nothing reads."""
    if not torch.is_grad_enabled() or (transformed() and not torch.compiler.is_compiling()):  # torch.func gives zeros by itself
        return x
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    return Unread.apply(x, *parameters)
