"""The kernels against PyTorch's plain formulas: linear(gelu(x)), layer_norm(x) * scale + shift."""


import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from latentfm.models import kernels
from latentfm.models.kernels import HeadNorm, gelu_linear, modulated_norm
from latentfm.models.onednn import LAID, ONEDNN, Linear, laid_out, laid_out_weights, linear_gelu, mkl_is_held_back


class Kernels(TorchDispatchMode):
    """Collects the names of the operations that run inside it."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False], ids=["as on an accelerator", "as on a CPU"])
def sparing(request, monkeypatch):
    """Both ways of training, here."""
    monkeypatch.setattr(kernels, "sparing", lambda x: request.param)
    return request.param


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(kernels, "sparing", lambda x: True)


def test_a_cpu_computes_nothing_a_second_time():
    assert kernels.sparing(torch.empty(1, device="meta")) and not kernels.sparing(torch.empty(1))


def layer_of(dtype: torch.dtype = torch.float32) -> Linear:
    """A linear 24 -> 40, the same each time."""
    torch.manual_seed(0)
    return Linear(24, 40).to(dtype)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_linear_and_norm_go_through_torch_func_and_forward_mode():
    ours = theirs = layer_of()
    x, direction, scale, shift = torch.randn(4, 1, 24), torch.randn(4, 1, 24), torch.randn(1, 1, 40), torch.randn(1, 1, 40)

    def mine(value: Tensor) -> Tensor:
        return modulated_norm(ours(value), scale, shift)

    def reference(value: Tensor) -> Tensor:
        return F.layer_norm(theirs(value), (40,), eps=1e-6) * scale + shift

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for one, other in zip(torch.func.jvp(mine, (x,), (direction,)), torch.func.jvp(reference, (x,), (direction,)), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            close(torch.func.vmap(mine)(x[:, None])[:, 0], reference(x))
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x, direction)
                tangents = [forward_ad.unpack_dual(function(dual)).tangent for function in (mine, reference)]
            torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-4)
    out, pull = torch.func.vjp(mine, x)
    close(out, reference(x))
    torch.testing.assert_close(pull(out)[0], torch.func.vjp(reference, x)[1](out)[0], rtol=1e-4, atol=1e-4)
    weights = dict(ours.named_parameters())
    per_sample = torch.func.vmap(torch.func.grad(lambda w, v: torch.func.functional_call(ours, w, (v,)).sum()), (None, 0))(weights, x)
    torch.testing.assert_close(per_sample["weight"], x.expand(4, 40, 24), rtol=1e-5, atol=1e-5)


def test_linear_and_norm_compile_in_one_graph():
    ours, theirs = layer_of(), layer_of()
    scale, shift = torch.randn(2, 1, 40), torch.randn(2, 1, 40)

    def mine(x: Tensor) -> Tensor:
        return torch.addcmul(shift, scale, modulated_norm(F.gelu(ours(x), approximate="tanh"), scale, shift))

    def reference(x: Tensor) -> Tensor:
        return shift + scale * (F.layer_norm(F.gelu(theirs(x), approximate="tanh"), (40,), eps=1e-6) * scale + shift)

    compiled, x = torch.compile(mine, fullgraph=True, backend="aot_eager"), torch.randn(2, 7, 24)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), reference(x), rtol=1e-4, atol=1e-4)
    found = []
    for function, layer in ((compiled, ours), (reference, theirs)):
        given = x.clone().requires_grad_()
        function(given).square().mean().backward()
        found.append([given.grad, layer.weight.grad, layer.bias.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def in_lora(layer: nn.Linear) -> nn.Module:
    """The layer with a random LoRA around it."""
    holder = nn.ModuleDict({"proj": layer})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False), holder)
    return holder["proj"]


def with_hook(layer: nn.Linear) -> nn.Linear:
    """The layer with a forward hook that doubles its output."""
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    return layer


def with_pre_hook(layer: nn.Linear) -> nn.Linear:
    """The layer with a hook that doubles its input."""
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return layer


def cast(layer: nn.Linear) -> nn.Linear:
    """The layer with frozen weights in eight bits, cast at each call."""
    apply_layerwise_casting(layer, torch.float8_e4m3fn, torch.float32)
    return layer.requires_grad_(False)


def plain(layer: nn.Linear) -> nn.Linear:
    return layer


@pytest.mark.parametrize(
    ("change", "dtype"),
    [(cast, torch.float32), *((c, t) for c in (plain, with_hook, with_pre_hook, in_lora) for t in (torch.float32, torch.bfloat16))],
)
def test_linear_gelu_is_gelu_of_whatever_the_layer_has_become(change, dtype):
    layer = change(layer_of(dtype))
    layer = layer if change is cast else layer.to(dtype)
    x = torch.randn(2, 7, 24).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-8}
    with torch.no_grad():
        expected = F.gelu(layer(x), approximate="tanh")
        with Kernels() as seen:
            found = linear_gelu(layer, x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, **tolerance)
    if change is plain:  # it was part of the product where that gains something
        fused = ONEDNN is not None and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
        assert ("aten.gelu.default" in seen.names) != fused
    elif change is not cast:
        assert (found - F.gelu(layer_of(dtype)(x), approximate="tanh")).abs().max() > 0.05
    given = x.clone().requires_grad_()
    linear_gelu(layer, given).float().square().sum().backward()
    other = x.clone().requires_grad_()
    F.gelu(layer(other), approximate="tanh").float().square().sum().backward()
    torch.testing.assert_close(given.grad, other.grad, **tolerance)


@pytest.mark.usefixtures("sparing")
@pytest.mark.parametrize(
    ("change", "dtype"),
    [(cast, torch.float32), *((c, t) for c in (plain, with_hook, with_pre_hook, in_lora) for t in (torch.float32, torch.bfloat16))],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_gelu_linear_is_whatever_the_layer_has_become_of_gelu(change, dtype, autocast):
    layer = change(layer_of(dtype))
    layer = layer if change is cast else layer.to(dtype)
    narrow = autocast or dtype == torch.bfloat16
    found = []
    for function in (gelu_linear, lambda layer, x: layer(F.gelu(x, approximate="tanh"))):
        torch.manual_seed(1)
        x = torch.randn(2, 7, 24).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = function(layer, x)
        layer.zero_grad()
        out.float().square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    for mine, reference in zip(*found, strict=True):
        assert mine.dtype == reference.dtype
        close = 2**-6 * reference.abs().max().item() if narrow else 1e-5
        torch.testing.assert_close(mine, reference, rtol=2**-6 if narrow else 1e-5, atol=close)
    with torch.no_grad():
        torch.testing.assert_close(gelu_linear(layer, x), layer(F.gelu(x, approximate="tanh")), rtol=0, atol=0)


@pytest.mark.usefixtures("sparing")
def test_gelu_linear_and_its_two_derivatives():
    layer = nn.Linear(5, 3).double()
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)

    def of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        holder = nn.Linear(5, 3).double()
        del holder.weight, holder.bias
        holder.weight, holder.bias = weight, bias
        return gelu_linear(holder, x)

    assert gradcheck(of, (x, layer.weight, layer.bias)) and gradgradcheck(of, (x, layer.weight, layer.bias))


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_gelu_linear_keeps_what_comes_in_and_not_what_gelu_makes_of_it():
    layer, x = layer_of(), torch.randn(2, 7, 24, requires_grad=True)
    hidden = x * 1.0

    def kept(function) -> int:
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda v: (saved.update({v.data_ptr(): v.nbytes}), v)[1], lambda v: v):
            function()
        return sum(size for place, size in saved.items() if place not in (layer.weight.data_ptr(), layer.bias.data_ptr()))

    assert kept(lambda: gelu_linear(layer, hidden)) == hidden.nbytes
    assert kept(lambda: layer(F.gelu(hidden, approximate="tanh"))) == 2 * hidden.nbytes
    layer.requires_grad_(False)
    assert kept(lambda: layer(hidden)) == 0  # a frozen weight's input is of no use


def plain_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """What modulated_norm computes, in three passes."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale + shift


def norm_inputs(rows: tuple[int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x [2, 5, 12], scale and shift [*rows, 12], all wanting gradients."""
    torch.manual_seed(0)
    made = (3 * torch.randn(2, 5, 12) + 1, 1 + 0.5 * torch.randn(*rows, 12), torch.randn(*rows, 12))
    return tuple(value.to(dtype).requires_grad_() for value in made)


@pytest.mark.usefixtures("sparing")
@pytest.mark.parametrize("rows", [(2, 1), (1, 5), (1, 1)])
def test_modulated_norm_and_its_two_derivatives(rows):
    given = norm_inputs(rows)
    torch.testing.assert_close(modulated_norm(*given), plain_norm(*given), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(modulated_norm(*given), plain_norm(*given), rtol=1e-12, atol=1e-12)
    assert gradcheck(modulated_norm, given)
    assert gradgradcheck(modulated_norm, given)


@pytest.mark.usefixtures("sparing")
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_modulated_norm_gives_the_gradients_that_are_asked_for(wanted):
    given = [value.detach().requires_grad_(bool(w)) for value, w in zip(norm_inputs((2, 1)), wanted, strict=True)]
    asked = [value for value in given if value.requires_grad]
    for create_graph in (False, True):
        found = [torch.autograd.grad(f(*given).sin().sum(), asked, create_graph=create_graph) for f in (modulated_norm, plain_norm)]
        for mine, reference in zip(*found, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


def test_modulated_norm_leaves_its_input_alone():
    x, scale, shift = (value.detach() for value in norm_inputs((2, 1), torch.float32))
    kept = [value.clone() for value in (x, scale, shift)]
    with torch.no_grad():
        modulated_norm(x, scale, shift)
    assert all(torch.equal(*both) for both in zip((x, scale, shift), kept, strict=True))


@pytest.mark.usefixtures("sparing")
@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("modulation", [torch.float32, torch.bfloat16], ids=str)
def test_modulated_norm_under_autocast(modulation, with_grad):
    """The stream x is float32 there, or bfloat16 after a linear; scale and shift come from a linear, in bfloat16."""
    x, scale, shift = norm_inputs((2, 1), torch.float32)
    for stream in (x, x.bfloat16()):
        with torch.set_grad_enabled(with_grad), torch.autocast("cpu", torch.bfloat16):
            mine = modulated_norm(stream, scale.to(modulation), shift.to(modulation))
            reference = plain_norm(stream, scale.to(modulation), shift.to(modulation))
        assert mine.dtype == (torch.bfloat16 if with_grad else reference.dtype)  # cast once here, not in each linear that reads it
        mine = mine.to(reference.dtype)
        torch.testing.assert_close(mine, reference, rtol=2**-6, atol=2**-6)
        if with_grad:
            found = [torch.autograd.grad(out.float().square().sum(), (x, scale, shift), retain_graph=True) for out in (mine, reference)]
            for one, other in zip(*found, strict=True):
                assert one.dtype == other.dtype
                torch.testing.assert_close(one, other, rtol=2**-5, atol=2**-5 * other.abs().max().item())


@pytest.mark.usefixtures("sparing")
def test_modulated_norm_in_bf16_is_no_less_exact_than_the_plain_formula():
    torch.manual_seed(0)
    given = [v.bfloat16() for v in (2 * torch.randn(4, 64, 96) + 1, 1 + 0.3 * torch.randn(4, 1, 96), torch.randn(4, 1, 96))]
    weight = torch.randn(4, 64, 96).bfloat16()

    def results(function, dtype: torch.dtype) -> list[Tensor]:
        values = [value.to(dtype).requires_grad_() for value in given]
        out = function(*values)
        return [out, *torch.autograd.grad((out * weight.to(dtype)).sum(), values)]

    exact = results(plain_norm, torch.float64)
    errors = [
        [(value.double() - true).square().mean().sqrt().item() for value, true in zip(found, exact, strict=True)]
        for found in (results(modulated_norm, torch.bfloat16), results(plain_norm, torch.bfloat16))
    ]
    for mine, reference in zip(*errors, strict=True):
        assert 0 < mine <= 1.02 * reference


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_modulated_norm_keeps_its_input_only():
    x, scale, shift = norm_inputs((2, 1), torch.float32)

    def kept(function) -> list[Tensor]:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda value: (saved.append(value), value)[1], lambda value: value):
            function(x, scale, shift)
        return [value for value in saved if value.shape == x.shape]

    mine = kept(modulated_norm)
    assert [value.data_ptr() for value in mine] == [x.data_ptr()]  # x is there anyway: nothing more is held for the backward pass
    assert {value.data_ptr() for value in kept(plain_norm)} > {x.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_head_norm_in_sampling_is_as_exact_as_torchs(dtype, size):
    norm = HeadNorm(64, eps=1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        x = (size * torch.randn(2, 33, 4, 64)).to(dtype)
        before = x.clone()
        exact = F.rms_norm(x.double(), (64,), norm.weight.double(), norm.eps)
        theirs, found = F.rms_norm(x, (64,), norm.weight, norm.eps), norm(x)
    assert found.dtype == dtype and torch.equal(x, before)
    assert (found.double() - exact).abs().mean() <= 1.2 * (theirs.double() - exact).abs().mean() + 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [with_hook, with_pre_hook, in_lora, cast, plain])
def test_laid_out_weights_give_the_same_products_and_leave_nothing_behind(change, dtype):
    network = nn.Module()
    network.transformer_blocks = nn.ModuleList([nn.ModuleList([layer_of(dtype), layer_of(dtype).to(dtype)])])
    changed, other = network.transformer_blocks[0]
    network.transformer_blocks[0][0] = changed = change(changed) if change is cast else change(changed).to(dtype)
    x = torch.randn(2, 7, 24).to(torch.float32 if change is cast else dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if x.dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-8}
    for layer in (changed, other.to(x.dtype)):
        with torch.no_grad():
            expected = layer(x)
            through_gelu = F.gelu(expected, approximate="tanh")
            with laid_out(network), Kernels() as seen:
                for _ in range(2):
                    torch.testing.assert_close(layer(x), expected, **tolerance)
                torch.testing.assert_close(linear_gelu(layer, x), through_gelu, **tolerance)
                if layer is other:
                    layer.weight.mul_(2)  # a weight that changes is laid out anew
                    torch.testing.assert_close(layer(x) - layer.bias, 2 * (expected - layer.bias), **(tolerance | {"atol": 2**-6}))
        if layer is other and ONEDNN is not None and (x.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            assert sum("_reorder_linear_weight" in name for name in seen.names) == 2
        assert not LAID


@pytest.fixture
def held_back(monkeypatch):
    """As on a processor on which float32 trains by oneDNN."""
    monkeypatch.setattr("latentfm.models.onednn.ALWAYS", True)
    if ONEDNN is None:
        pytest.skip("PyTorch without oneDNN")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (7, 24), (2, 7, 24)])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.usefixtures("held_back")
def test_float32_trains_by_onednn_with_pytorchs_gradients_of_first_and_second_order(shape, gelu, bias):
    layer, x = Linear(24, 40, bias=bias), torch.randn(shape, requires_grad=True)
    direction = torch.randn(*shape[:-1], 40)

    def derivatives(found: Tensor) -> list[Tensor]:
        inputs = [x, *layer.parameters()]
        first = torch.autograd.grad((found * direction).sum() + found.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), inputs)
        return [found, *first, *second]

    with Kernels() as seen:
        mine = derivatives(layer(x, gelu=gelu))
    assert sum("latentfm.linear" in name for name in seen.names) >= 3
    plainly = F.linear(x, layer.weight, layer.bias)
    for found, expected in zip(mine, derivatives(F.gelu(plainly, approximate="tanh") if gelu else plainly), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("trains", ["input", "weight", "both", "none"])
@pytest.mark.usefixtures("held_back")
def test_what_trains_by_onednn_keeps_what_pytorch_keeps(trains):
    layer, x = Linear(24, 40).requires_grad_(trains in ("weight", "both")), torch.randn(5, 24, requires_grad=trains in ("input", "both"))

    def kept(call) -> set[int]:
        saved = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda value: (saved.add(value.data_ptr()), value)[1], lambda value: value):
            call()
        return saved

    assert kept(lambda: layer(x)) == kept(lambda: F.linear(x, layer.weight, layer.bias))


@pytest.mark.usefixtures("held_back")
def test_only_float32_outside_autocast_and_transforms_trains_by_onednn():
    layer, x = Linear(24, 40), torch.randn(7, 24)
    with Kernels() as seen:
        layer.double()(x.double())
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        torch.func.grad(lambda given: layer(given).sum())(x)
    assert not any("latentfm.linear" in name for name in seen.names)


def test_which_processors_hold_mkl_back(monkeypatch):
    for name, instructions, expected in (
        ("AMD Ryzen 9 9950X", "AVX512", True), ("AMD Ryzen 7 5800X", "AVX2", False), ("Intel(R) Xeon(R) Platinum", "AVX512", False)
    ):  # fmt: skip
        monkeypatch.setattr("latentfm.models.onednn.processor", lambda name=name: name)
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda instructions=instructions: instructions)
        assert mkl_is_held_back() == (expected and torch.backends.mkl.is_available())


def test_a_gradient_passes_through_laid_out_layers():
    network = nn.Module()
    network.transformer_blocks = nn.ModuleList([nn.ModuleList([layer_of(torch.float32)])])
    layer, x = network.transformer_blocks[0][0], torch.randn(3, 24)
    with laid_out(network):
        layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand_as(layer.weight))


def test_a_large_network_is_not_laid_out(monkeypatch):
    network = nn.Module()
    network.transformer_blocks = nn.ModuleList([nn.ModuleList([layer_of(torch.float32)])])
    assert bool(laid_out_weights(network)) == (ONEDNN is not None)
    monkeypatch.setattr("latentfm.models.onednn.MOST", 1)
    assert not laid_out_weights(network)


def test_for_few_evaluations_nothing_is_laid_out():
    network = nn.Module()
    network.transformer_blocks = nn.ModuleList([nn.ModuleList([layer_of(torch.float32)])])
    with laid_out(network, 4):
        assert not LAID
    with laid_out(network, 28):
        assert bool(LAID) == (ONEDNN is not None)


def test_one_sampling_within_another_keeps_what_is_laid_out():
    network = nn.Module()
    network.transformer_blocks = nn.ModuleList([nn.ModuleList([layer_of(torch.float32)])])
    layer, x = network.transformer_blocks[0][0], torch.randn(3, 24)
    with torch.inference_mode(), laid_out(network):
        with laid_out(network):
            expected = layer(x)
        assert (len(LAID) == 1) == (ONEDNN is not None)
        assert torch.equal(layer(x), expected)
    assert not LAID


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [with_hook, in_lora, plain])
def test_compiled_blocks_multiply_by_weights_that_are_laid_out(change, dtype):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = change(layer_of(dtype)), Linear(40, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(linear_gelu(self.first, x))

    network = nn.Module()
    network.transformer_blocks = nn.ModuleList([Two().to(dtype)])
    block, x = network.transformer_blocks[0], torch.randn(2, 7, 24).to(dtype)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    block.compile(backend=counter, fullgraph=True)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}
    for rows in (x, x[:, :3]):
        expected = block.forward(rows)
        with torch.no_grad(), laid_out(network):
            torch.testing.assert_close(block(rows), expected.detach(), **tolerance)
            used = sum(laid.weight is not None for laid in LAID.values())
        if ONEDNN is not None and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            assert used == (1 if change is with_hook else 2)
    given = x.clone().requires_grad_()
    torch.testing.assert_close(block(given), block.forward(x), **tolerance)  # gradients ask for the plain products
    torch.compiler.reset()
