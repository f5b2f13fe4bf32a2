"""Each spelling and each kind of adapter draws what the merged weights draw, and each spelling becomes each other and back, to the bit."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from latentfm import LatentFMPipeline
from latentfm.interchange import original
from latentfm.interchange.conversion import adapter_conversion
from latentfm.interchange.lora.files import open_adapter
from latentfm.interchange.lora.formats import FORMATS
from latentfm.interchange.tensors import read_folder

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np", "height": 32, "width": 32, "max_sequence_length": 16}
ROUNDING = 1e-5
DIFFUSERS = (
    "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v", "transformer_blocks.1.attn.add_k_proj",
    "transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.ff.net.0.proj", "transformer_blocks.0.ff_context.net.2",
    "transformer_blocks.0.norm1.linear", "transformer_blocks.1.norm1_context.linear", "norm_out.linear", "proj_out", "context_embedder",
    "time_text_embed.timestep_embedder.linear_1", "pos_embed.proj",
)  # fmt: skip
ORIGINAL = (
    "joint_blocks.0.x_block.attn.qkv", "joint_blocks.1.x_block.attn.qkv", "joint_blocks.0.context_block.attn.qkv",
    "joint_blocks.0.x_block.attn.proj", "joint_blocks.1.x_block.mlp.fc1", "joint_blocks.0.context_block.mlp.fc2",
    "joint_blocks.0.x_block.adaLN_modulation.1", "joint_blocks.0.context_block.adaLN_modulation.1",
    "joint_blocks.1.context_block.adaLN_modulation.1", "final_layer.adaLN_modulation.1", "final_layer.linear", "context_embedder",
    "t_embedder.mlp.0", "x_embedder.proj",
)  # fmt: skip
CLIP = ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.mlp.fc1")
T5 = ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.1.DenseReluDense.wi_0")
ENCODERS = {"text_encoder": CLIP, "text_encoder_2": CLIP, "text_encoder_3": T5}
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"}
NAMED = {"down": "lora_A.style.weight", "up": "lora_B.style.weight", "magnitude": "lora_magnitude_vector.style.weight"}
TE = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
COMFY = {f"text_encoder{n}": f"text_encoders.{name}.transformer." for n, name in (("", "clip_l"), ("_2", "clip_g"), ("_3", "t5xxl"))}
# prefixes by component, whether dots are underscores, the modules of the transformer, the endings, whether alpha is a tensor
SPELLINGS = {
    "diffusers": ({name: f"{name}." for name in ("transformer", *ENCODERS)}, False, DIFFUSERS, PEFT, False),
    "diffusers with kohya's endings": ({name: f"{name}." for name in ("transformer", *ENCODERS)}, False, DIFFUSERS, KOHYA, True),
    "kohya": ({"transformer": "lora_unet_", **TE}, True, ORIGINAL, KOHYA, True),
    "kohya with diffusers' modules": ({"transformer": "lora_unet_", **TE}, True, DIFFUSERS, KOHYA, True),
    "onetrainer": ({"transformer": "lora_transformer_", **TE}, True, DIFFUSERS, KOHYA, True),
    "lycoris": ({"transformer": "lycoris_"}, True, DIFFUSERS, KOHYA, True),
    "original": ({"transformer": "diffusion_model.", **COMFY}, False, ORIGINAL, PEFT | {"magnitude": "dora_scale"}, True),
    "original without alpha": ({"transformer": "diffusion_model."}, False, ORIGINAL, PEFT, False),
    "original with kohya's endings": ({"transformer": "model.diffusion_model.", **COMFY}, False, ORIGINAL, KOHYA, True),
    "diffusion_model with diffusers' modules": ({"transformer": "diffusion_model."}, False, DIFFUSERS, PEFT, False),
    "bare": ({"transformer": ""}, False, DIFFUSERS, PEFT | {"magnitude": "dora_scale"}, True),
    "bare original": ({"transformer": ""}, False, ORIGINAL, PEFT, False),
    "peft's in one file": ({"transformer": "base_model.model."}, False, DIFFUSERS, PEFT, False),
    "peft's with the adapter's name": ({"transformer": "base_model.model.transformer."}, False, DIFFUSERS, NAMED, False),
    "of a network that is wrapped": ({"transformer": "module._orig_mod."}, False, DIFFUSERS, NAMED, False),
    "diffusers' own converter to kohya": ({"transformer": "transformer_", **TE}, True, DIFFUSERS, KOHYA, True),
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    """Ours on the tiny folder; each test unloads what it loads."""
    pipe = LatentFMPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def unloaded(pipe):
    yield
    pipe.unload_lora_weights()


@pytest.fixture(scope="module")
def before(pipe) -> torch.Tensor:
    return picture(pipe)


def picture(pipe, **more) -> torch.Tensor:
    return torch.from_numpy(pipe("a red apple", generator=torch.Generator().manual_seed(0), **(SETTINGS | more)).images)


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.fixture(scope="module")
def weights(tiny_folder) -> dict[str, dict[str, torch.Tensor]]:
    """The weights by component; the transformer's in both namings."""
    stored, _ = read_folder(tiny_folder / "transformer")
    found = {name: load_file(tiny_folder / name / "model.safetensors") for name in ENCODERS}
    both = {"transformer": stored, "original": original.transformer_to_original(stored)}
    return found | {name: {key: value.load() for key, value in own.items()} for name, own in both.items()}


class Maker:
    """Random adapters of linears [out, in]: (their tensors by part, what they make of the weight)."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int, size: float = 0.4) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) * size

    def lora(self, weight, alpha=None, rank=3):
        down, up = self.random(rank, *weight.shape[1:]), self.random(weight.shape[0], rank)
        change = torch.einsum("or,r...->o...", up, down) * (1.0 if alpha is None else alpha / rank)
        if weight.ndim == 4:  # a convolution
            up = up[:, :, None, None]
        return {"down": down, "up": up} | ({} if alpha is None else {"alpha": torch.tensor(alpha)}), weight + change

    def dora(self, weight, alpha=2.0):
        parts, adapted = self.lora(weight, alpha)
        magnitude = weight.norm(dim=1, keepdim=True) * (1 + self.random(len(weight), 1, size=0.2))
        return parts | {"magnitude": magnitude}, magnitude * adapted / adapted.norm(dim=1, keepdim=True)

    def loha(self, weight, alpha=1.5, rank=2):
        (out, into), names = weight.shape, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        a1, b1, a2, b2 = (self.random(*shape, size=0.5) for shape in ((out, rank), (rank, into)) * 2)
        return dict(zip(names, (a1, b1, a2, b2))) | {"alpha": torch.tensor(alpha)}, weight + (a1 @ b1) * (a2 @ b2) * alpha / rank

    def loha_of_full_rank(self, weight):
        return self.loha(weight, rank=8)

    def lokr(self, weight, first=True, second=True, factor=4, rank=2, alpha=1.0):
        """first, second: whether the factor is whole; else it is a product of `rank`."""
        (out, into), parts, factors = weight.shape, {"alpha": torch.tensor(alpha)}, []
        sizes = math.gcd(out, factor), math.gcd(into, factor)
        for name, is_whole, shape in (("w1", first, sizes), ("w2", second, (out // sizes[0], into // sizes[1]))):
            if is_whole:
                made = {f"lokr_{name}": self.random(*shape)}
                factors += made.values()
            else:
                made = {f"lokr_{name}_a": self.random(shape[0], rank), f"lokr_{name}_b": self.random(rank, shape[1])}
                factors.append(made[f"lokr_{name}_a"] @ made[f"lokr_{name}_b"])
            parts |= made
        return parts, weight + torch.kron(*factors) * (1.0 if first and second else alpha / rank)

    def lokr_first_whole(self, weight):
        return self.lokr(weight, second=False)

    def lokr_second_whole(self, weight):
        return self.lokr(weight, first=False)

    def lokr_of_products(self, weight):
        return self.lokr(weight, False, False)

    def lokr_dora(self, weight):
        parts, adapted = self.lokr(weight)
        magnitude = weight.norm(dim=1, keepdim=True) * 1.1
        return parts | {"dora_scale": magnitude}, magnitude * adapted / adapted.norm(dim=1, keepdim=True)

    def difference(self, weight):
        change = self.random(*weight.shape, size=0.1)
        return {"diff": change}, weight + change


def adapter(weights, spelling: str, kind: str = "lora", seed: int = 0, **more) -> tuple[dict, dict]:
    """(A LoRA file's tensors in this spelling, the adapted weights by component) of a random adapter."""
    prefixes, flat, modules, endings, with_alpha = SPELLINGS[spelling]
    maker, tensors, adapted = Maker(seed), {}, {}
    own = "original" if modules is ORIGINAL else "transformer"
    for component, names in {"transformer": modules, **ENCODERS}.items():
        if component not in prefixes:
            continue
        key = own if component == "transformer" else component
        for module in names:
            if kind != "lora" and weights[key][f"{module}.weight"].ndim == 4:  # others than LoRA are of linears
                continue
            more = {"alpha": 2.0} if kind == "lora" and with_alpha else {}
            parts, weight = getattr(maker, kind)(weights[key][f"{module}.weight"], **more)
            adapted.setdefault(key, {})[f"{module}.weight"] = weight
            spelt = prefixes[component] + (module.replace(".", "_") if flat else module)
            for part, value in parts.items():
                if part == "magnitude" and endings[part] != "dora_scale":
                    value = value.flatten()
                tensors[f"{spelt}.{endings.get(part, part)}"] = value
    return tensors, adapted


def merged(tiny_folder, weights, adapted) -> StableDiffusion3Pipeline:
    """Stock's pipeline with the adapted weights; the original's by diffusers' own conversion."""
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    stock.set_progress_bar_config(disable=True)
    for name, own in adapted.items():
        state = weights[name] | own
        state = convert_sd3_transformer_checkpoint_to_diffusers(dict(state)) if name == "original" else state
        network = getattr(stock, "transformer" if name == "original" else name)
        lost = network.load_state_dict(state, strict=False)
        assert not lost.unexpected_keys and all("position" in key or "embed_tokens" in key for key in lost.missing_keys), lost
    return stock


KINDS = (
    "dora", "loha", "loha_of_full_rank", "lokr", "lokr_first_whole", "lokr_second_whole", "lokr_of_products", "lokr_dora", "difference",
)  # fmt: skip
CASES = [
    *((spelling, "lora") for spelling in SPELLINGS), ("diffusers", "dora"),
    *((spelling, kind) for kind in KINDS for spelling in ("lycoris", "kohya", "original")),
]  # fmt: skip


@pytest.mark.parametrize(("spelling", "kind"), CASES, ids=[f"{spelling}, {kind}" for spelling, kind in CASES])
def test_it_draws_what_the_merged_weights_draw(spelling, kind, tiny_folder, weights, pipe, before, tmp_path):
    tensors, adapted = adapter(weights, spelling, kind)
    expected = picture(merged(tiny_folder, weights, adapted))
    save_file(tensors, tmp_path / "x.safetensors")
    pipe.load_lora_weights(tmp_path / "x.safetensors", adapter_name="mine")
    found = picture(pipe)
    print(f"\n{spelling}, {kind}: {gap(found, expected):.1e} (it changes {gap(expected, before):.2f})", end="")
    assert gap(found, expected) < ROUNDING < 1000 * ROUNDING < gap(expected, before)
    if "dora" not in kind:  # whose magnitudes stand in for the weights' own at any scale
        pipe.set_adapters("mine", 0.0)
        assert gap(picture(pipe), before) < ROUNDING
        pipe.set_adapters("mine", 1.0)
    pipe.disable_lora()
    assert gap(picture(pipe), before) < ROUNDING
    pipe.enable_lora()
    pipe.fuse_lora()
    assert gap(picture(pipe), expected) < ROUNDING
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert gap(picture(pipe), before) < ROUNDING


def convert(source: Path, target: Path, naming: str | None = None) -> Path:
    """`target`, converted from `source` as the command does it."""
    plan = adapter_conversion(source, target, False, naming, None, False)
    plan.write(target, lambda count: None)
    return target


def described(path: Path) -> dict:
    """All that a LoRA file or folder holds of an adapter: its tensors, bit for bit, and its effective scales."""
    adapter = open_adapter(path)
    tensors = {f"{owner}.{name}": value.load() for owner, own in adapter.tensors.items() for name, value in own.items()}
    return tensors | {"configs": adapter.configs}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value, name


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations([*FORMATS, "peft"], 2)))
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_each_spelling_becomes_each_other_and_back_to_the_bit(one, other, kind, weights, tmp_path):
    tensors, _ = adapter(weights, "diffusers" if one == "peft" else one, kind)
    if {"lycoris", "bare", "peft"} & {one, other}:
        tensors = {name: value for name, value in tensors.items() if not name.startswith(("text_encoder", "lora_te"))}
    if one in ("diffusers", "peft"):
        tensors = {name: value for name, value in tensors.items() if not name.endswith("alpha")}
    if kind == "dora":  # an original query, key and value have three magnitudes or none
        tensors = {name: value for name, value in tensors.items() if not re.search(r"attn[._](to_[qv]|add_k)", name)}
    save_file(tensors, tmp_path / "first.safetensors")
    first = tmp_path / "first.safetensors"
    if one == "peft":
        first = convert(first, tmp_path / "first")
    second = convert(first, tmp_path / ("second" if other == "peft" else "second.safetensors"), None if other == "peft" else other)
    third = convert(second, tmp_path / ("third" if one == "peft" else "third.safetensors"), None if one == "peft" else one)
    files = [path / "adapter_model.safetensors" if path.is_dir() else path for path in (first, third)]
    assert_same(load_file(files[1]), load_file(files[0]))
    assert_same(described(third), described(first))
    assert open_adapter(second).spelling == other
