"""What a pipeline does with LoRAs once they are read: weights by block, hot swaps, T5, mixtures of kinds, and all or nothing."""

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from latentfm import LatentFMPipeline
from latentfm.errors import InputError
from latentfm.interchange.lora.files import open_adapter
from latentfm.interchange.lora.fit import weights_by_module
from latentfm.interchange.lora.writing import write_lora

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np", "height": 32, "width": 32, "max_sequence_length": 16}
ROUNDING = 1e-5
MODULES = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_v", "transformer_blocks.1.ff.net.0.proj", "proj_out")
FILE = "pytorch_lora_weights.safetensors"


def loaded(cls, folder):
    pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def ours(tiny_folder):
    return loaded(LatentFMPipeline, tiny_folder)


@pytest.fixture
def stock(tiny_folder):
    return loaded(StableDiffusion3Pipeline, tiny_folder)


def picture(pipe, **more) -> torch.Tensor:
    return torch.from_numpy(pipe("a red apple", generator=torch.Generator().manual_seed(0), **(SETTINGS | more)).images)


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def lora(network, modules=MODULES, seed=0, rank=3, owner="transformer", size=0.4) -> dict[str, torch.Tensor]:
    """A random LoRA of these modules in diffusers' spelling."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for module in modules:
        out, into = network.get_submodule(module).weight.shape
        for ending, shape in (("A", (rank, into)), ("B", (out, rank))):
            tensors[f"{owner}.{module}.lora_{ending}.weight"] = torch.randn(shape, generator=generator) * size
    return tensors


def scaled(tensors: dict[str, torch.Tensor], weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """The LoRA with each change multiplied by the weight of the first name that is in its module's."""
    found = {}
    for name, value in tensors.items():
        weight = next((weight for part, weight in weights.items() if part in name), 1.0)
        found[name] = value * weight if "lora_B" in name else value
    return found


def test_weights_by_block_are_stocks_where_stock_has_them(ours, stock):
    tensors = lora(ours.transformer, MODULES[:3])
    pictures = []
    for pipe in (ours, stock):
        pipe.load_lora_weights(dict(tensors), adapter_name="a")
        pipe.load_lora_weights(lora(ours.transformer, MODULES[:2], seed=1), adapter_name="b")
        found = []
        for weights in (
            {"transformer": {"transformer_blocks.0": 0.2, "transformer_blocks.1": -0.5}},
            [{"transformer": {"attn": 0.3}}, 0.5],
            [{"transformer": 0.7}, {"transformer": {"to_q": 0.0}}],
            [0.4, None],
            {"transformer": 2.0},
        ):
            pipe.set_adapters(["a", "b"], weights)
            found.append(picture(pipe))
        pictures.append(found)
    for here, there in zip(*pictures, strict=True):
        assert gap(here, there) < ROUNDING
    assert min(gap(one, other) for one, other in zip(pictures[0], pictures[0][1:])) > 100 * ROUNDING


def test_weights_by_block_reach_modules_outside_of_blocks_and_text_encoders(ours, tiny_folder):
    linear = "text_model.encoder.layers.1.mlp.fc1"
    tensors = lora(ours.transformer) | lora(ours.text_encoder, [linear], owner="text_encoder")
    weights = {"transformer": {"blocks.1": 0.25, "proj_out": -1.5}, "text_encoder": {"layers.1": 0.5}}
    ours.load_lora_weights(dict(tensors), adapter_name="a")
    ours.set_adapters("a", weights)
    other = loaded(LatentFMPipeline, tiny_folder)
    other.load_lora_weights(scaled(tensors, {"blocks.1": 0.25, "proj_out": -1.5, "layers.1": 0.5}))
    assert gap(picture(ours), picture(other)) < ROUNDING
    assert weights == {"transformer": {"blocks.1": 0.25, "proj_out": -1.5}, "text_encoder": {"layers.1": 0.5}}  # the user's own


def test_a_blocks_number_counts_whole():
    blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"to_q": torch.nn.Linear(2, 2)}) for _ in range(12))
    adapted = get_peft_model(torch.nn.ModuleDict({"blocks": blocks}), LoraConfig(r=1, target_modules=["to_q"])).base_model.model
    found = weights_by_module(adapted, "transformer", {"blocks.1": 0.5, "blocks.2": 0.25})
    others = {f"blocks.{number}.to_q": 1.0 for number in range(12)}
    assert found == others | {"blocks.1.to_q": 0.5, "blocks.2.to_q": 0.25}


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"transformer": {"transformer_blocks.9": 1.0}}, "no module of the transformer in 'transformer_blocks.9'"),
        ({"transformer": {"": 1.0}}, "no module of the transformer in ''"),
        ({"transformer": {"attn": "much"}}, "adapter_weights 'much' is not a number"), ("1", "adapter_weights '1' is not a number"),
        ([float("nan")], "adapter_weights nan is not a number"),
    ],
)  # fmt: skip
def test_weights_that_mean_nothing_are_said(ours, weights, says):
    ours.load_lora_weights(lora(ours.transformer), adapter_name="a")
    with pytest.raises(InputError, match=says):
        ours.set_adapters("a", weights)


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_a_hot_swap_is_the_other_lora(ours, tiny_folder, tmp_path, naming):
    """Of other ranks and alphas too, once the pipeline is told of the largest rank."""
    files = []
    for seed, rank in ((0, 3), (1, 5)):
        tensors = lora(ours.transformer, seed=seed, rank=rank) | {f"transformer.{m}.alpha": torch.tensor(2.0 + seed) for m in MODULES}
        save_file(tensors, tmp_path / f"{seed}.safetensors")
        files.append(tmp_path / f"{naming}-{seed}.safetensors")
        write_lora(files[-1], open_adapter(tmp_path / f"{seed}.safetensors"), naming)
    expected = loaded(LatentFMPipeline, tiny_folder)
    expected.load_lora_weights(files[1])
    ours.enable_lora_hotswap(target_rank=8)
    ours.load_lora_weights(files[0], adapter_name="mine")
    before = picture(ours)
    ours.load_lora_weights(files[1], adapter_name="mine", hotswap=True)
    assert ours.get_list_adapters() == {"transformer": ["mine"]}
    assert gap(picture(ours), picture(expected)) < ROUNDING < 100 * ROUNDING < gap(picture(ours), before)
    with pytest.raises(InputError, match="hotswap=True is for a LoRA that is loaded, adapter_name 'other'; there are: mine"):
        ours.load_lora_weights(files[1], adapter_name="other", hotswap=True)


def test_a_lora_of_t5_loads_weighs_fuses_and_unloads(ours, tiny_folder, tmp_path):
    before, linear = picture(ours), "encoder.block.1.layer.1.DenseReluDense.wo"
    tensors = lora(ours.text_encoder_3, [linear], owner="text_encoder_3")
    ours.load_lora_weights(dict(tensors), adapter_name="t5")
    assert ours.get_list_adapters() == {"text_encoder_3": ["t5"]}
    other = loaded(LatentFMPipeline, tiny_folder)
    with torch.no_grad():
        down, up = tensors.values()
        other.text_encoder_3.get_submodule(linear).weight += up @ down
    expected = picture(other, negative_prompt="")
    assert gap(picture(ours, negative_prompt=""), expected) < ROUNDING < 10 * ROUNDING < gap(expected, before)
    ours.set_adapters("t5", 0.0)
    assert gap(picture(ours, negative_prompt=""), picture(loaded(LatentFMPipeline, tiny_folder), negative_prompt="")) < ROUNDING
    ours.set_adapters("t5", {"text_encoder_3": 1.0})
    ours.fuse_lora()
    ours.unload_lora_weights()
    assert gap(picture(ours, negative_prompt=""), expected) < ROUNDING and ours.get_list_adapters() == {}


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_joint_attention_kwargs_scale_it_as_in_stock(ours, stock, scale):
    tensors = lora(ours.transformer) | lora(ours.text_encoder, ["text_model.encoder.layers.0.self_attn.q_proj"], owner="text_encoder")
    pictures = []
    for pipe in (ours, stock):
        pipe.load_lora_weights(dict(tensors))
        pictures.append(picture(pipe, joint_attention_kwargs={"scale": scale}))
    assert gap(*pictures) < ROUNDING


def test_its_own_dropout_is_off_while_drawing(ours, stock, tmp_path):
    ours.transformer.add_adapter(LoraConfig(r=2, lora_dropout=0.5, target_modules=["to_q", "to_v"], init_lora_weights=False), "drawn with")
    assert any(isinstance(module, torch.nn.Dropout) and module.training and module.p for module in ours.transformer.modules())
    first = picture(ours)
    assert torch.equal(first, picture(ours))
    LatentFMPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(ours.transformer, adapter_name="drawn with"),
        transformer_lora_adapter_metadata=ours.transformer.peft_config["drawn with"].to_dict(),
    )  # fmt: skip
    for pipe in (ours, stock):
        pipe.unload_lora_weights()
        pipe.load_lora_weights(tmp_path, adapter_name="loaded")
        assert pipe.transformer.peft_config["loaded"].lora_dropout == 0.5
    assert not any(module.training for module in ours.transformer.modules())
    stock.transformer.eval()  # where the dropout is left on
    for pipe in (ours, stock):
        assert gap(picture(pipe), first) < ROUNDING


@torch.no_grad()
def randomise(network: torch.nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if any(part in name for part in ("hada_", "lokr_", "lora_")):
            parameter.normal_(std=0.5)


PEFTS = {
    "LoHa": LoHaConfig(r=2, alpha=3, init_weights=False, target_modules=["to_q", "proj_out"], rank_pattern={"proj_out": 1}),
    "LoHa, alphas": LoHaConfig(r=3, alpha=1, init_weights=False, target_modules=["to_k", "linear"], alpha_pattern={"to_k": 5}),
    "LoKr": LoKrConfig(r=2, alpha=3, init_weights=False, target_modules=["to_q", "net.0.proj"]),
    "LoKr, both": LoKrConfig(r=1, alpha=3, init_weights=False, target_modules=["to_q", "linear"], decompose_both=True, decompose_factor=4),
    "LoKr, whole": LoKrConfig(r=64, alpha=32, init_weights=False, target_modules=["to_q", "to_add_out"], decompose_factor=8),
}


@pytest.mark.parametrize("kind", PEFTS)
def test_pefts_own_loha_and_lokr_folders_load(kind, ours, stock, tiny_folder, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = get_peft_model(SD3Transformer2DModel.from_pretrained(tiny_folder, subfolder="transformer"), PEFTS[kind])
        randomise(model)
    model.save_pretrained(tmp_path)
    before = picture(ours)
    stock.transformer = model.merge_and_unload()
    ours.load_lora_weights(tmp_path)
    assert gap(picture(ours), picture(stock)) < ROUNDING < 100 * ROUNDING < gap(picture(ours), before)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, says in (
        ({"alpha": None}, "does not say r and alpha"),
        ({"r": "2"}, 'says r "2"'),
        ({"new": 1}, "sets new, which is not read"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=says):
            open_adapter(tmp_path)


@pytest.mark.parametrize("kind", [LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "proj_out"]), PEFTS["LoKr"]], ids=["LoRA", "LoKr"])
def test_what_a_network_of_diffusers_saves_of_its_adapter_loads(kind, ours, stock, tmp_path):
    stock.transformer.add_adapter(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        randomise(stock.transformer)
    stock.transformer.save_lora_adapter(tmp_path)
    before = picture(ours)
    ours.load_lora_weights(tmp_path)
    assert gap(picture(ours), picture(stock)) < ROUNDING < 100 * ROUNDING < gap(picture(ours), before)


def test_kinds_mix_with_weights_of_their_own(ours, tiny_folder, tmp_path):
    """A LoKr with whole factors of several sizes, as trainers make them, beside a LoRA."""
    generator, tensors, changes = torch.Generator().manual_seed(0), {}, {}
    for module, factor in (
        ("transformer_blocks.0.attn.to_q", 16),
        ("transformer_blocks.1.ff.net.0.proj", 8),
        ("transformer_blocks.1.ff.net.2", 4),
    ):
        out, into = ours.transformer.get_submodule(module).weight.shape
        w1, w2 = (torch.randn(shape, generator=generator) * 0.3 for shape in ((factor, factor), (out // factor, into // factor)))
        tensors |= {f"lycoris_{module.replace('.', '_')}.{name}": value for name, value in {"lokr_w1": w1, "lokr_w2": w2}.items()}
        tensors[f"lycoris_{module.replace('.', '_')}.alpha"] = torch.tensor(10_000.0)  # which nothing multiplies whole factors with
        changes[module] = torch.kron(w1, w2)
    other = lora(ours.transformer, seed=2)
    ours.load_lora_weights(tensors, adapter_name="lokr")
    ours.load_lora_weights(dict(other), adapter_name="lora")
    ours.set_adapters(["lokr", "lora"], [0.6, -0.3])
    expected = loaded(LatentFMPipeline, tiny_folder)
    with torch.no_grad():
        for module, change in changes.items():
            expected.transformer.get_submodule(module).weight += 0.6 * change
        for module in MODULES:
            down, up = (other[f"transformer.{module}.lora_{end}.weight"] for end in "AB")
            expected.transformer.get_submodule(module).weight -= 0.3 * up @ down
    assert gap(picture(ours), picture(expected)) < ROUNDING
    ours.set_lora_device(["lokr", "lora"], "cpu")
    ours.fuse_lora(adapter_names=["lokr", "lora"])
    ours.unload_lora_weights()
    assert gap(picture(ours), picture(expected)) < ROUNDING


def test_a_whole_lokr_in_half_precision_keeps_its_bits(ours):
    w1, w2 = (torch.randn(shape).to(torch.bfloat16) for shape in ((4, 4), (8, 8)))
    name = "transformer_blocks.0.attn.to_q"
    found = LatentFMPipeline.lora_state_dict({f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2})
    down, up = (found[f"transformer.{name}.lora_{end}.weight"] for end in "AB")
    assert down.dtype == up.dtype == torch.bfloat16
    assert torch.equal(up.double() @ down.double(), torch.kron(w1.double(), w2.double()))


def test_a_lora_loads_into_all_that_it_adapts_or_into_nothing(ours, monkeypatch):
    before = picture(ours)
    linear = "text_model.encoder.layers.0.mlp.fc1"
    tensors = lora(ours.transformer) | lora(ours.text_encoder, [linear], owner="text_encoder")
    with pytest.raises(InputError, match="text_encoder has no text_model.encoder.layers.7"):
        ours.load_lora_weights({name.replace("layers.0", "layers.7"): value for name, value in tensors.items()})
    assert ours.get_list_adapters() == {}

    def refuse(*args, **kwargs):
        raise RuntimeError("no room")

    monkeypatch.setattr(LatentFMPipeline, "load_lora_into_text_encoder", refuse)
    with pytest.raises(RuntimeError, match="no room"):
        ours.load_lora_weights(tensors)
    assert not any("lora_" in name for name, _ in ours.transformer.named_parameters())
    assert torch.equal(picture(ours), before)


def test_each_lora_gets_a_name_of_its_own(ours):
    for number, modules in enumerate((MODULES[:1], MODULES[1:2], MODULES[2:])):
        ours.load_lora_weights(lora(ours.transformer, modules))
        assert ours.get_list_adapters()["transformer"][-1] == f"default_{number}"
    with pytest.raises(InputError, match="adapter_name 'default_1' is in use; give another name, or hotswap=True"):
        ours.load_lora_weights(lora(ours.transformer), adapter_name="default_1")
    for name in ("a.b", 5):
        with pytest.raises(InputError, match="adapter_name .* must be a text without a dot"):
            ours.load_lora_weights(lora(ours.transformer), adapter_name=name)
    with pytest.raises(InputError, match=r"no option 'adaptor_name' for loading a LoRA"):
        ours.load_lora_weights(lora(ours.transformer), adaptor_name="x")


def test_a_dora_of_the_hub_keeps_its_magnitudes(ours, tmp_path, monkeypatch):
    tensors = {name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value for name, value in lora(ours.transformer).items()}
    tensors |= {f"transformer.{m}.dora_scale": ours.transformer.get_submodule(m).weight.norm(dim=1, keepdim=True) * 1.5 for m in MODULES}
    save_file(tensors, tmp_path / "x.safetensors")
    asked = []

    def file_of(name, **kwargs):
        asked.append((name, kwargs["weights_name"], kwargs["revision"]))
        return str(tmp_path / "x.safetensors")

    monkeypatch.setattr("diffusers.loaders.lora_base._get_model_file", file_of)
    ours.load_lora_weights("someone/a-lora", weight_name="x.safetensors", revision="main")
    assert asked == [("someone/a-lora", "x.safetensors", "main")]
    found = picture(ours)
    ours.unload_lora_weights()
    ours.load_lora_weights(tmp_path / "x.safetensors")
    assert torch.equal(picture(ours), found)
    assert ours.transformer.peft_config["default_0"].use_dora


def test_a_pipeline_without_the_component_says_so(ours, tiny_folder):
    bare = LatentFMPipeline.from_pretrained(tiny_folder, transformer=None)
    with pytest.raises(InputError, match="the LoRA adapts transformer, which is not loaded"):
        bare.load_lora_weights(lora(ours.transformer))


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_is_not_saved_with_a_lora_on_it(ours, tmp_path, fused):
    ours.load_lora_weights(lora(ours.transformer))
    if fused:
        ours.fuse_lora()
    with pytest.raises(InputError, match=r"a LoRA is on transformer: pipe.unload_lora_weights\(\) takes it off"):
        ours.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    expected = picture(ours) if fused else None
    ours.unload_lora_weights()
    ours.save_pretrained(tmp_path / "model")
    again = LatentFMPipeline.from_pretrained(tmp_path / "model")
    assert torch.equal(picture(again), picture(ours)) and (expected is None or torch.allclose(picture(again), expected, atol=1e-4))


def test_an_alpha_may_be_an_integer(ours):
    tensors = lora(ours.transformer)
    modules = {name.rsplit(".lora_", 1)[0] for name in tensors}
    own = {name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value for name, value in tensors.items()}
    found = [
        LatentFMPipeline.lora_state_dict(own | {f"{module}.alpha": torch.tensor(2, dtype=kind) for module in modules})
        for kind in (torch.int64, torch.float32)
    ]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    with pytest.raises(InputError, match="which is no number to multiply with"):
        LatentFMPipeline.lora_state_dict(own | {f"{min(modules)}.alpha": torch.tensor(True)})


@pytest.mark.parametrize("between", ["", ".processor"])
def test_the_names_of_the_oldest_diffusers_are_read_as_stock_reads_them(ours, stock, between):
    tensors = lora(ours.transformer, MODULES[:2])
    for new, old in (("lora_A", "down"), ("lora_B", "up")):
        tensors = {name.replace(f".attn.to_q.{new}", f".attn{between}.to_q_lora.{old}"): value for name, value in tensors.items()}
        tensors = {name.replace(f".attn.to_v.{new}", f".attn{between}.to_v_lora.{old}"): value for name, value in tensors.items()}
    before = picture(ours)
    for pipe in (ours, stock):
        pipe.load_lora_weights(dict(tensors))
    assert gap(picture(ours), picture(stock)) < ROUNDING < gap(picture(ours), before)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "not by None"),
        (["a.safetensors"], "dict of tensors, not by"),
        ({1: torch.zeros(1)}, "1 is no name of a tensor"),
        ({"transformer.proj_out.lora_A.weight": "x"}, "'transformer.proj_out.lora_A.weight' is no name of a tensor"),
    ],
)
def test_what_no_lora_is_given_by_is_said(given, says, ours):
    with pytest.raises(InputError, match=says):
        ours.load_lora_weights(given)


def test_a_lora_that_is_not_there_is_not_fused_in_silence(ours):
    ours.load_lora_weights(lora(ours.transformer), adapter_name="style")
    with pytest.raises(InputError, match="no LoRA 'stile' is loaded to be fused; there are: style"):
        ours.fuse_lora(adapter_names=["stile"])
    with pytest.raises(InputError, match="lora_scale nan is not a number"):
        ours.fuse_lora(lora_scale=float("nan"))
    with pytest.raises(InputError, match=r"names no LoRA; disable_lora\(\)"):
        ours.set_adapters([])
