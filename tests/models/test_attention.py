"""Attention backends, and query, key and value in one product."""

import copy
import importlib.util
import warnings
from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_dispatch import attention_backend as diffusers_attention_backend
from diffusers.models.attention_processor import JointAttnProcessor2_0
from models.twins import VARIANTS, difference, inputs, twins
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from latentfm.bounds import SHORT_ATTENTION
from latentfm.errors import InputError
from latentfm.models.attention import Attention
from latentfm.models.backends import ENVIRONMENT, Backend, attend, attention_backend, available_backends
from latentfm.models.fused_qkv import side_by_side
from latentfm.models.mmdit import MMDiT

CPU = torch.device("cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # flex_attention would rather be compiled
    HERE = available_backends(CPU, torch.float32, 16)
LORA = {"r": 2, "target_modules": ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"], "init_lora_weights": False}


@pytest.fixture(autouse=True)
def no_choice_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """diffusers' set_attention_backend chooses for every model there is: put back what was."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def kernels(model: MMDiT) -> set[str]:
    """Which of PyTorch's attention kernels a forward call of the model runs: "flash", "math", or none of them."""
    names = {
        "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
        "aten::_scaled_dot_product_attention_math": "math",
    }
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        model(**inputs(model))
    return {names[event.key] for event in seen.key_averages() if event.key in names}


def test_what_runs_on_a_cpu():
    assert {"auto", "native", "flash", "math"} <= set(HERE) == set(available_backends(CPU, torch.bfloat16, 16))
    assert not {"cudnn", "efficient"} & set(HERE)


def attention_and_gradients(dtype: torch.dtype, keys: int, name: str, autocast: bool = False) -> list[Tensor]:
    """[output, gradients by query, key and value] in float64 of attention in `dtype`, of the same bfloat16 numbers each time."""
    torch.manual_seed(0)
    given = [torch.randn(2, tokens, 3, 32).bfloat16().to(dtype).requires_grad_() for tokens in (12, keys, keys)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attend(*given, attention_backend(name))
    assert out.dtype == dtype
    return [out.double(), *(gradient.double() for gradient in torch.autograd.grad(out.sin().sum(), given))]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_short_attention_trains_in_float32_on_a_cpu(autocast, compiled):
    """Closer to the exact results than PyTorch's kernel in bfloat16, called by its name, is."""
    exact = attention_and_gradients(torch.float64, 40, "auto")
    named = attention_and_gradients(torch.bfloat16, 40, "native", autocast)
    function = torch.compile(attention_and_gradients, backend="eager") if compiled else attention_and_gradients
    own = function(torch.bfloat16, 40, "auto", autocast)
    for truth, there, here in zip(exact, named, own, strict=True):
        assert 0 < (here - truth).norm() < (there - truth).norm() < 0.01 * truth.norm()


def test_long_attention_and_sampling_stay_in_bfloat16():
    def widened(grad: bool, keys: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        query, key = (torch.randn(1, tokens, 1, 8, dtype=dtype) for tokens in (600, keys))
        with torch.set_grad_enabled(grad), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            attend(query, key, key, None)
        return any(event.key == "aten::to" for event in seen.key_averages())

    assert widened(True, SHORT_ATTENTION) and not widened(True, SHORT_ATTENTION + 1)
    assert not widened(False, SHORT_ATTENTION) and not widened(True, 8, torch.float32)


@pytest.mark.parametrize("variant", ["sd3", "sd3.5-medium"])
@pytest.mark.parametrize("name", HERE)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_backends_agree_with_math(name, variant):
    ours, theirs = twins(**VARIANTS[variant])
    ours.set_attention(name)
    if name == "flex":  # PyTorch's on a CPU is for inference
        with pytest.raises(InputError, match="flex.*backward"):
            ours(**inputs(ours))
    else:
        found = []
        for backend in ("math", name):
            ours.set_attention(backend)
            ours.zero_grad()
            ours(**inputs(ours)).sample.square().mean().backward()
            found.append([p.grad.clone() for p in ours.parameters()])
        for reference, mine in zip(*found, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
    assert difference(ours, theirs, **inputs(ours)) <= 1e-5
    with torch.no_grad():
        exact = ours(**inputs(ours)).sample
        half = ours.bfloat16()(**inputs(ours, dtype=torch.bfloat16)).sample
    assert 0 < (half.float() - exact).square().mean().sqrt() < 0.03 * exact.std()


def test_an_unknown_backend_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"no attention backend 'flesh' \(did you mean 'flash'\?\).*auto, native"):
        twins()[0].set_attention("flesh")
    with pytest.raises(InputError, match=r"did you mean 'xformers'"):
        attention_backend("xformer")


def test_a_backend_that_is_not_installed_says_what_to_install():
    missing = {"xformers": "xformers", "sage": "sageattention", "flash_varlen": "flash-attn"}
    for name, package in missing.items():
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            with pytest.raises(InputError, match=rf"attention backend '{name}' is not installed.*install `{package}"):
                attention_backend(name)


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_a_backend_of_another_device_says_so_and_what_to_use(name):
    model = twins()[0]
    model.set_attention(name)
    with pytest.raises(InputError, match=rf"{name}.*cannot compute \(2, 25, 3, 16\) torch.float32 on cpu.*Use 'auto'"), torch.no_grad():
        model(**inputs(model))


def test_choices_in_order_of_precedence(monkeypatch):
    """The network's own, then LATENTFM_ATTENTION, then diffusers' default; each seen by the kernel that runs."""
    model = twins()[0]
    assert kernels(model) == {"flash"}  # PyTorch's own choice
    with diffusers_attention_backend("_native_math"):
        assert kernels(model) == {"math"}
        monkeypatch.setenv(ENVIRONMENT, "flash")
        assert kernels(model) == {"flash"}
        model.set_attention("math")
        assert kernels(model) == {"math"}
    assert kernels(model) == {"math"}
    monkeypatch.setenv(ENVIRONMENT, "math")
    model.set_attention("flash")
    assert kernels(model) == {"flash"}
    model.set_attention("auto")
    assert kernels(model) == {"math"}
    monkeypatch.setenv(ENVIRONMENT, "auto")
    assert kernels(model) == {"flash"}
    monkeypatch.setenv(ENVIRONMENT, "maths")
    with pytest.raises(InputError, match="maths.*did you mean 'math'"):
        kernels(model)


def test_the_backend_of_diffusers_own_calls():
    model = twins()[0]
    before = _AttentionBackendRegistry._active_backend
    model.set_attention_backend("_native_math")
    assert kernels(model) == {"math"}
    _AttentionBackendRegistry.set_active_backend(before)
    assert kernels(model) == {"math"}
    model.reset_attention_backend()
    assert kernels(model) == {"flash"}
    with pytest.raises(ValueError, match="_native_math"):
        model.set_attention_backend("maths")
    assert kernels(model) == {"flash"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="xformers may run here")
def test_xformers_by_diffusers_old_name_says_what_is_missing():
    model = twins()[0]
    with pytest.raises((ModuleNotFoundError, ValueError), match=r"xformers"):
        model.enable_xformers_memory_efficient_attention()
    assert kernels(model) == {"flash"}


@torch.no_grad()
def test_a_processor_of_diffusers_computes_the_attention():
    class Scaled(JointAttnProcessor2_0):
        def __call__(self, *given, **named):
            image, text = super().__call__(*given, **named)
            return 1.5 * image, text

    ours, theirs = twins()
    given = inputs(ours)
    before = ours(**given).sample
    for network in (ours, theirs):
        network.set_attn_processor(Scaled())
    assert (ours(**given).sample - theirs(**given).sample).abs().max() < 2e-5
    assert (ours(**given).sample - before).abs().max() > 1e-3
    ours.set_attn_processor(JointAttnProcessor2_0())
    assert torch.equal(ours(**given).sample, before) and all(type(p) is Backend for p in ours.attn_processors.values())
    with pytest.raises(ValueError, match="takes a processor of diffusers', got int"):
        ours.set_attn_processor(3)


def test_the_environment_is_read_by_compiled_blocks_too(monkeypatch):
    model = twins()[0]
    monkeypatch.setenv(ENVIRONMENT, "math")
    with torch.no_grad():
        expected = model(**inputs(model)).sample
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert kernels(model) <= {"math"}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs(model)).sample, expected, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


class Products:
    """Counts the products an attention computes of its projections: how many, and how wide."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("latentfm.models.onednn.ALWAYS", False)  # as on most processors: PyTorch multiplies
        self.widths: list[int] = []
        plain = F.linear

        def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            self.widths.append(weight.shape[0])
            return plain(x, weight, bias)

        monkeypatch.setattr(F, "linear", counted)

    def of(self, model: nn.Module, *arguments: Tensor) -> list[int]:
        self.widths.clear()
        with torch.no_grad():
            model(*arguments)
        return self.widths


def memory(model: nn.Module) -> int:
    """Bytes of all the parameters' storages, each counted once."""
    return sum({s.data_ptr(): s.nbytes() for s in (p.untyped_storage() for p in model.parameters())}.values())


def fused(model: nn.Module) -> list[bool]:
    """For each triple of projections, whether they lie side by side in one piece of memory."""
    modules = [module for module in model.modules() if isinstance(module, Attention)]
    return [
        side_by_side([getattr(getattr(module, name), kind) for name in names]) is not None
        for module in modules for names in module.projections() for kind in ("weight", "bias")
    ]  # fmt: skip


def test_fused_projections_are_one_product_and_no_second_copy(monkeypatch):
    attention, products = Attention(48, 3, 16, "rms_norm", joint=True), Products(monkeypatch)
    image, text = torch.randn(2, 16, 48), torch.randn(2, 9, 48)
    assert products.of(attention, image, text) == [48] * 8
    with torch.no_grad():
        expected = attention(image, text)
    before = memory(attention)
    parameters = dict(attention.named_parameters())
    attention.fuse_projections()
    assert memory(attention) == before and all(fused(attention))
    assert {name: id(p) for name, p in attention.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert products.of(attention, image, text) == [144, 144, 48, 48]
    with torch.no_grad():
        found = attention(image, text)
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
    last = Attention(48, 3, 16, None, joint=True, context_pre_only=True)
    last.fuse_projections()
    assert products.of(last, image, text) == [144, 96, 48]  # the text's queries are not made


@pytest.mark.parametrize("variant", ["sd3", "sd3.5-medium"])
def test_a_fused_model_is_the_same_model(variant, tmp_path):
    ours, theirs = twins(**VARIANTS[variant])
    plain, given = copy.deepcopy(ours.state_dict()), inputs(ours)
    ours.fuse_qkv_projections()
    assert difference(ours, theirs, **given) <= 1e-5 and all(fused(ours))
    state = ours.state_dict()
    assert state.keys() == plain.keys() and all(torch.equal(state[name], plain[name]) for name in plain)
    for size in ("10GB", "100KB"):
        ours.save_pretrained(tmp_path / size, max_shard_size=size)
        assert difference(ours, SD3Transformer2DModel.from_pretrained(tmp_path / size), **given) <= 1e-5
    assert len(list((tmp_path / "100KB").glob("*.safetensors"))) > 2
    Accelerator(cpu=True).save_model(ours, tmp_path / "accelerate")
    assert load_file(tmp_path / "accelerate" / "model.safetensors").keys() == plain.keys()
    assert difference(copy.deepcopy(ours), theirs, **given) <= 1e-5
    ours.unfuse_qkv_projections()
    assert difference(ours, theirs, **given) <= 1e-5 and not any(fused(ours))


def test_training_a_fused_model_is_training(monkeypatch):
    ours, theirs = twins(**VARIANTS["sd3.5-medium"])
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    ours.fuse_qkv_projections()  # after the optimizer was made, as a sampler between steps would
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        model(**inputs(model)).sample.square().mean().backward()
        optimizer.step()
    assert all(fused(ours)) and difference(ours, theirs, **inputs(ours)) <= 1e-5
    assert difference(ours, twins(**VARIANTS["sd3.5-medium"])[1], **inputs(ours)) > 1e-3


def test_moves_keep_a_fused_model_fused_and_right():
    ours, theirs = twins(**VARIANTS["sd3.5-medium"])
    ours.fuse_qkv_projections()
    places = [p.data_ptr() for p in ours.parameters()]
    ours.to("cpu").float()
    assert [p.data_ptr() for p in ours.parameters()] == places  # nothing to do, nothing copied
    ours.to(torch.bfloat16)
    assert all(fused(ours)) and {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    ours.to(torch.float32).to("meta")
    ours.to_empty(device="cpu")
    assert all(fused(ours))
    ours.load_state_dict(theirs.state_dict())
    assert all(fused(ours)) and difference(ours, theirs, **inputs(ours)) <= 1e-5


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_into_a_fused_model_are_the_ones_it_uses(assign):
    ours, _ = twins()
    other, theirs = twins(seed=1)
    ours.fuse_qkv_projections()
    ours.load_state_dict(other.state_dict(), assign=assign)
    assert difference(ours, theirs, **inputs(ours)) <= 1e-5


def test_neighbours_in_memory_that_are_not_one_tensor_are_not_taken_for_one():
    """A caching allocator lays tensors of their own next to each other."""
    whole = torch.randn(6, 4)
    apart = [torch.from_numpy(part.numpy()) for part in whole.chunk(3)]
    assert apart[1].data_ptr() == apart[0].data_ptr() + apart[0].nbytes
    assert side_by_side(apart) is None
    assert torch.equal(side_by_side(list(whole.chunk(3))), whole)


def test_a_lora_is_seen_by_a_fused_model():
    ours, theirs = twins(**VARIANTS["sd3.5-medium"])
    given, bare = inputs(ours), copy.deepcopy(theirs)
    ours.fuse_qkv_projections()
    for model in (ours, theirs):
        model.add_adapter(LoraConfig(**LORA))
    ours.load_state_dict(theirs.state_dict())
    assert difference(ours, theirs, **given) <= 1e-5 and difference(ours, bare, **given) > 1e-2
    with pytest.raises(ValueError, match="adapter"):
        ours.fuse_qkv_projections()
    for model in (ours, theirs):
        model.fuse_lora()
    assert difference(ours, theirs, **given) <= 1e-5 and difference(ours, bare, **given) > 1e-2
    kept = copy.deepcopy(ours)
    kept.unload_lora()  # what the adapter learned stays, and the layers are plain again
    assert difference(kept, theirs, **given) <= 1e-5
    kept.fuse_qkv_projections()
    assert all(fused(kept)) and difference(kept, theirs, **given) <= 1e-5
    ours.unfuse_lora()
    ours.unload_lora()
    assert difference(ours, bare, **given) <= 1e-5


class Wrapped(Tensor):
    """A weight with no memory of its own, as quantised ones are: it holds a plain tensor, which every operation is done with."""

    @staticmethod
    def __new__(cls, plain: Tensor):
        return Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype)

    def __init__(self, plain: Tensor):
        self.plain = plain

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        out = function(*(arg.plain if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))
        return cls(out) if function is torch.ops.aten.detach.default else out


def test_weights_that_are_no_plain_tensors_are_not_fused():
    model = twins()[0]
    model.fuse_qkv_projections()
    with torch.no_grad():
        plain = model(**inputs(model)).sample
    for block in model.transformer_blocks:
        block.attn.to_k.weight = nn.Parameter(Wrapped(block.attn.to_k.weight.detach().clone()))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs(model)).sample, plain, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="quantised"):
        model.fuse_qkv_projections()


def test_a_hook_on_a_fused_projection_is_called():
    model = twins()[0]
    with torch.no_grad():
        plain = model(**inputs(model)).sample
    model.fuse_qkv_projections()
    handle = model.transformer_blocks[1].attn.to_k.register_forward_hook(lambda module, args, out: 2 * out)
    with torch.no_grad():
        hooked = model(**inputs(model)).sample
        assert (hooked - plain).abs().max() > 1e-3
        handle.remove()
        torch.testing.assert_close(model(**inputs(model)).sample, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["sd3", "sd3.5-large"])
def test_the_last_blocks_text_queries_are_not_computed_and_have_gradients_of_zero(variant):
    model = twins(**VARIANTS[variant])[0]
    attention, calls = model.transformer_blocks[-1].attn, []
    for name, module in attention.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(**inputs(model)).sample.square().mean().backward()
    assert sorted(calls) == ["add_k_proj", "add_v_proj", "to_k", "to_out.0", "to_q", "to_v"]
    unread = [p for part in (attention.add_q_proj, attention.norm_added_q) for p in part.parameters()]
    assert len(unread) == 2 + (variant != "sd3") and all(torch.equal(p.grad, torch.zeros_like(p)) for p in unread)
    assert all(p.grad is not None for p in model.parameters())


def test_unread_parameters_that_are_frozen_or_adapted():
    model = twins()[0].requires_grad_(False)
    model.add_adapter(LoraConfig(**LORA))
    model(**inputs(model)).sample.square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    model.requires_grad_(False)
    given = inputs(model)
    given["hidden_states"].requires_grad_()
    model(**given).sample.sum().backward()
    assert given["hidden_states"].grad.abs().max() > 0
