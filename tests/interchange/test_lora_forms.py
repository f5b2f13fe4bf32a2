"""LoRA files as trainers spell them: what leaves no doubt draws the same picture, what is something else is called by its name."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from latentfm import LatentFMPipeline
from latentfm.errors import InputError
from latentfm.interchange.lora.config import MOST_PATTERNS
from latentfm.interchange.lora.files import open_adapter
from latentfm.interchange.lora.modules import BLOCKS as BLOCKS_OF
from latentfm.interchange.lora.modules import OUTSIDE, with_dots
from latentfm.interchange.lora.names import MOST_TENSORS, own_names, parse
from latentfm.interchange.lora.writing import write_lora, write_peft
from latentfm.models.mmdit import MMDiT

BLOCKS = "transformer_blocks."
MODULES = (f"{BLOCKS}1.attn.to_q", f"{BLOCKS}0.attn.to_add_out", f"{BLOCKS}0.ff_context.net.0.proj", "proj_out")
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np", "height": 32, "width": 32, "max_sequence_length": 16}
ADAPTER_METADATA = "lora_adapter_metadata"
ROUNDING = 1e-5


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


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def picture(pipe) -> torch.Tensor:
    return torch.from_numpy(pipe("a red apple", generator=torch.Generator().manual_seed(0), **SETTINGS).images)


@pytest.fixture(scope="module")
def matrices(pipe) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By module the two matrices of a LoRA of rank 4."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for module in MODULES:
        out, into = pipe.transformer.get_submodule(module).weight.shape
        found[module] = torch.randn(4, into, generator=generator) * 0.5, torch.randn(out, 4, generator=generator) * 0.5
    return found


@pytest.fixture(scope="module")
def expected(tiny_folder, matrices, tmp_path_factory) -> torch.Tensor:
    """What stock draws with it, in its own spelling."""
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    stock.set_progress_bar_config(disable=True)
    file = tmp_path_factory.mktemp("stock") / "lora.safetensors"
    save_file(spelt(matrices, "transformer.{}", ("lora_A.weight", "lora_B.weight")), file)
    stock.load_lora_weights(file)
    return picture(stock)


def spelt(matrices, name: str, endings: tuple[str, str], flat: bool = False, alpha: float | None = None) -> dict[str, torch.Tensor]:
    found = {}
    for module, pair in matrices.items():
        module = name.format(module.replace(".", "_") if flat else module)
        found |= {f"{module}.{ending}": value.clone() for ending, value in zip(endings, pair, strict=True)}
        if alpha is not None:
            found[f"{module}.alpha"] = torch.tensor(alpha)
    return found


PEFT, KOHYA, OLD = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"), ("lora.down.weight", "lora.up.weight")
FORMS = {
    "none": ("{}", PEFT, False), "peft's": ("base_model.model.{}", PEFT, False), "diffusion_model": ("diffusion_model.{}", PEFT, False),
    "model.diffusion_model": ("model.diffusion_model.{}", KOHYA, False), "kohya's endings": ("transformer.{}", KOHYA, False),
    "no prefix, kohya's endings": ("{}", KOHYA, False), "old diffusers": ("transformer.{}", OLD, False),
    "lora_transformer_": ("lora_transformer_{}", KOHYA, True), "lora_unet_": ("lora_unet_{}", KOHYA, True),
    "lycoris_": ("lycoris_{}", KOHYA, True),
    "a state dict's": ("transformer.{}", ("lora_A.default.weight", "lora_B.default.weight"), False),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_spelling_that_leaves_no_doubt_is_the_same_lora(pipe, matrices, expected, tmp_path, form):
    before = picture(pipe)
    save_file(spelt(matrices, *FORMS[form]), tmp_path / "x.safetensors")
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    assert gap(picture(pipe), expected) < ROUNDING and gap(expected, before) > 100 * ROUNDING
    adapter = open_adapter(tmp_path / "x.safetensors")
    write_peft(tmp_path / "peft", adapter, None)
    write_lora(tmp_path / "back.safetensors", open_adapter(tmp_path / "peft"), "diffusers")
    for path in (tmp_path / "peft", tmp_path / "back.safetensors"):
        pipe.unload_lora_weights()
        pipe.load_lora_weights(path)
        assert gap(picture(pipe), expected) < ROUNDING, path


@pytest.mark.parametrize("form", ["kohya's endings", "lora_transformer_", "none"])
def test_an_alpha_beside_the_matrices_scales_them(pipe, matrices, expected, tmp_path, form):
    prefix, endings, flat = FORMS[form]
    save_file(spelt(matrices, prefix, endings, flat, alpha=4.0), tmp_path / "one.safetensors")  # alpha equal to the rank: 1
    pipe.load_lora_weights(tmp_path / "one.safetensors")
    assert gap(picture(pipe), expected) < ROUNDING
    pipe.unload_lora_weights()
    tensors = spelt({module: (down, up * 4) for module, (down, up) in matrices.items()}, prefix, endings, flat, alpha=1.0)
    save_file(tensors, tmp_path / "quarter.safetensors")
    pipe.load_lora_weights(tmp_path / "quarter.safetensors")
    assert gap(picture(pipe), expected) < ROUNDING
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 1
    pipe.unload_lora_weights()
    loaded = LatentFMPipeline.lora_state_dict(tensors)  # without metadata nothing says what alpha is: the matrices do
    pipe.load_lora_weights(loaded)
    assert gap(picture(pipe), expected) < ROUNDING


def test_ranks_and_alphas_of_each_module_are_kept(pipe, matrices, tmp_path):
    some = {module: (down[: i + 1].clone(), up[:, : i + 1].clone()) for i, (module, (down, up)) in enumerate(matrices.items())}
    tensors = spelt(some, "transformer.{}", KOHYA)
    tensors |= {f"transformer.{module}.alpha": torch.tensor(0.5 * (i + 1)) for i, module in enumerate(some)}
    save_file(tensors, tmp_path / "x.safetensors")
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    for i, (module, (down, up)) in enumerate(some.items()):
        layer = pipe.transformer.get_submodule(module)
        assert (layer.r["default_0"], layer.scaling["default_0"]) == (i + 1, 0.5)
        assert torch.equal(layer.lora_A["default_0"].weight, down) and torch.equal(layer.lora_B["default_0"].weight, up)


def test_every_linear_of_the_network_has_its_flat_name():
    network = MMDiT(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=48,
        caption_projection_dim=32, pooled_projection_dim=40, pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    names = [name for name, module in network.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    assert len(names) > 20 and [with_dots(name.replace(".", "_")) for name in names] == names
    assert with_dots("transformer_blocks_0_attn_to_x") is None and with_dots("input_blocks_4_1_proj_in") is None


def test_no_two_modules_have_one_flat_name():
    for owner, blocks in BLOCKS_OF.items():
        names = [block + "0." + name for block, own in blocks.items() for name in own] + list(OUTSIDE[owner])
        assert len({name.replace(".", "_") for name in names}) == len(names)
        assert [with_dots(name.replace(".", "_"), owner) for name in names] == names


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("transformer.joint_blocks.3.x_block.attn.qkv.1.lora_down.weight",
         ("transformer", "transformer_blocks.3.attn.to_k", "lora_A.weight")),
        ("lora_unet_joint_blocks_0_context_block_attn_qkv_2.alpha", ("transformer", "transformer_blocks.0.attn.add_v_proj", "alpha")),
        ("lora_unet_y_embedder_mlp_2.lora_up.weight", ("transformer", "y_embedder.mlp.2", "lora_B.weight")),
        ("joint_blocks.12.x_block.attn2.qkv.lokr_w1", ("transformer", "joint_blocks.12.x_block.attn2.qkv", "lokr_w1")),
        ("clip_g.text_model.encoder.layers.3.mlp.fc1.lora_A.weight",
         ("text_encoder_2", "text_model.encoder.layers.3.mlp.fc1", "lora_A.weight")),
        ("t5.encoder.block.0.layer.0.SelfAttention.o.lora_A.weight",
         ("text_encoder_3", "encoder.block.0.layer.0.SelfAttention.o", "lora_A.weight")),
        ("lora_te3_encoder_block_23_layer_1_DenseReluDense_wi_1.dora_scale",
         ("text_encoder_3", "encoder.block.23.layer.1.DenseReluDense.wi_1", "dora_scale")),
        ("joint_blocks.0.x_block.attn.qkv.3.lora_A.weight", None), ("lora_te1_encoder_block_0_layer_0_SelfAttention_o.alpha", None),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", None), ("transformer_blocks.0.attn.to_q.weight", None),
    ],
)  # fmt: skip
def test_whose_a_tensor_is(name, own):
    assert parse(name) == own


M = torch.zeros(2, 2)
Q = "transformer_blocks_0_attn_to_q"
OTHERS = {
    "OFT": ({f"lycoris_{Q}.oft_blocks": M}, "is an OFT adapter"), "BOFT": ({"transformer.proj_out.boft_R": M}, "is a BOFT adapter"),
    "GLoRA": ({f"lycoris_{Q}.a1.weight": M, f"lycoris_{Q}.b1.weight": M, f"lycoris_{Q}.lora_up.weight": M}, "is a GLoRA adapter"),
    "(IA)3": ({f"lycoris_{Q}.weight": M, f"lycoris_{Q}.on_input": M}, r"is an \(IA\)3 adapter"),
    "core": ({f"lycoris_{Q}.lora_mid.weight": M, f"lycoris_{Q}.lora_up.weight": M}, "LoCon with a core tensor"),
    "LoKr's core": ({f"lycoris_{Q}.lokr_w1": M, f"lycoris_{Q}.lokr_t2": M}, "LyCORIS adapter of convolutions"),
    "biases": ({f"lycoris_{Q}.diff": M, f"lycoris_{Q}.diff_b": M}, "an adapter that changes biases"),
    "words": ({f"lora_transformer_{Q}.lora_up.weight": M, "bundle_emb.x.t5_out": M}, "a LoRA with words of its own"),
    "magnitudes of inputs": (
        {f"lycoris_{Q}.lora_up.weight": torch.zeros(3, 1), f"lycoris_{Q}.lora_down.weight": torch.zeros(1, 2),
         f"lycoris_{Q}.dora_scale": torch.zeros(1, 2)}, r"magnitudes \(dora_scale\) of .* are \[1, 2\], not one for each of 3 outputs",
    ),
    "half a LoKr": ({f"lycoris_{Q}.lokr_w1": M, f"lycoris_{Q}.lokr_w2_a": M}, "no lokr_w2_b for transformer_blocks.0.attn.to_q"),
    "half a LoHa": ({f"lora_transformer_{Q}.hada_w1_a": M, f"lora_transformer_{Q}.hada_w1_b": M}, "no hada_w2_a and hada_w2_b for"),
    "two of LoKr": ({f"lycoris_{Q}.{name}": M for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2")}, "which no LoKr has together"),
    "two kinds": ({f"lycoris_{Q}.diff": M, f"lycoris_{Q}.lora_up.weight": M}, "is adapted twice, by a LoRA and a whole difference"),
    "no LoHa": ({f"lycoris_{Q}.hada_{w}_{end}": torch.zeros(2, 3) for w in ("w1", "w2") for end in "ab"}, "are no LoHa of a linear"),
    "no LoKr": ({f"lycoris_{Q}.lokr_w1": M, f"lycoris_{Q}.lokr_w2": torch.zeros(2, 2, 2, 2)}, "are no LoKr of a linear"),
    "a LoKr of nothing there is": (
        {f"lycoris_{Q}.lokr_w1": torch.zeros(500, 500), f"lycoris_{Q}.lokr_w2": torch.zeros(500, 500)}, "which no SD3 model has",
    ),
    "together more than there is": (
        {f"lycoris_{Q.replace('0', str(i))}.{name}": torch.zeros(64, 128).half() for i in range(420) for name in ("lokr_w1", "lokr_w2")},
        "matrices of .* numbers together",
    ),
    "a third that is none": (
        {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": torch.zeros(4, 1),
         "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": torch.zeros(1, 2)}, "4 rows does not divide into 3",
    ),
    "both namings": (
        {f"lora_unet_{name}.{end}": torch.zeros(shape) for name, rows in ((Q, 2), ("joint_blocks_0_x_block_attn_qkv", 6))
         for end, shape in (("lora_down.weight", (1, 2)), ("lora_up.weight", (rows, 1)))}, "adapts transformer_blocks.0.attn.to_q twice",
    ),
    "DoRA in part": (
        {f"lora_transformer_{name}.{end}": M for name in (Q, Q.replace("to_q", "to_k")) for end in ("lora_up.weight", "lora_down.weight")}
        | {f"lora_transformer_{Q}.dora_scale": torch.zeros(2, 1)}, "magnitudes, as a DoRA, and none for transformer_blocks.0.attn.to_k",
    ),
    "kohya's text encoder": ({"lora_te1_text_model_encoder_layers_0_mlp_fc3.lora_up.weight": M}, "modules that SD3's text_encoder has not"),
    "T5": ({"lora_te3_encoder_block_0_layer_0_x.lora_up.weight": M}, "modules that SD3's text_encoder_3 has not"),
    "SDXL": ({"lora_unet_down_blocks_1_attentions_0_proj_in.lora_up.weight": M}, "is a LoRA of a UNet"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_none_is_called_by_its_name(kind, tmp_path, pipe):
    tensors, says = OTHERS[kind]
    path = tmp_path / "x.safetensors"
    save_file({name: value.clone() for name, value in tensors.items()}, path)
    for read in (pipe.load_lora_weights, open_adapter):
        with pytest.raises(InputError, match=says) as caught:
            read(path)
        assert "x.safetensors" in str(caught.value) and "\n" not in str(caught.value) and "something else" not in str(caught.value)


NAME = "transformer.transformer_blocks.0.attn.to_q"
DAMAGED = {
    "no up": ({"lora_A.weight": (2, 32)}, "no lora_B.weight for"), "no down": ({"lora_B.weight": (32, 2)}, "no lora_A.weight for"),
    "magnitude alone": ({"lora_magnitude_vector": (32,), "alpha": ()}, "no lora_A.weight and lora_B.weight for"),
    "two ranks": ({"lora_A.weight": (2, 32), "lora_B.weight": (32, 3)}, "no pair of one rank"),
    "no matrix": ({"lora_A.weight": (2,), "lora_B.weight": (32, 2)}, "no pair of one rank"),
    "rank 0": ({"lora_A.weight": (0, 32), "lora_B.weight": (32, 0)}, "no pair of one rank"),
    "alphas": ({"lora_A.weight": (2, 32), "lora_B.weight": (32, 2), "alpha": (2,)}, "alpha of .* is no single number"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_half_pairs_and_shapes_that_do_not_go_together_are_said(kind, tmp_path, pipe):
    shapes, says = DAMAGED[kind]
    save_file({f"{NAME}.{ending}": torch.zeros(shape) for ending, shape in shapes.items()}, tmp_path / "x.safetensors")
    for read in (pipe.load_lora_weights, open_adapter):
        with pytest.raises(InputError, match=f"x.safetensors.*{says}"):
            read(tmp_path / "x.safetensors")


PAIR = {f"{NAME}.lora_A.weight": torch.ones(2, 32), f"{NAME}.lora_B.weight": torch.ones(32, 2)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({f"{NAME}.lora_A.weight": torch.full((2, 32), torch.nan)}, "is damaged: .*lora_A.weight is not finite"),
        ({f"{NAME}.alpha": torch.tensor(torch.inf)}, "alpha of .* is inf"),
        ({f"{NAME}.lora_A.weight": torch.ones(2, 32).int()}, "is of torch.int32"),
        ({f"{NAME}.lora_A.weight": torch.ones(2, 31)}, r"does not fit .*lora_A.weight is \[2, 31\], .* has 32 numbers in and 32 out"),
        ({f"{NAME}.lora_B.weight": torch.ones(31, 2)}, r"lora_B.weight is \[31, 2\]"),
        ({name.replace("blocks.0", "blocks.99"): value for name, value in PAIR.items()}, "transformer has no transformer_blocks.99.attn"),
        ({name.replace("to_q", "to_x"): value for name, value in PAIR.items()}, "transformer has no transformer_blocks.0.attn.to_x"),
        ({name.replace("attn.to_q", "attn"): value for name, value in PAIR.items()}, "is no linear"),
        ({f"{NAME}.lora_magnitude_vector": torch.ones(7)}, "does not fit this model"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_network_is_said_by_name(changes, says, tmp_path, pipe):
    before = picture(pipe)
    save_file({name: value.clone() for name, value in (PAIR | changes).items()}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=says) as caught:
        pipe.load_lora_weights(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)
    assert torch.equal(picture(pipe), before)


def test_one_tensor_under_two_spellings_is_refused(tmp_path):
    names = [f"{NAME}.lora_A.weight", f"{NAME}.lora_down.weight", f"{NAME}.lora_B.weight"]
    with pytest.raises(InputError, match="has transformer.transformer_blocks.0.attn.to_q.lora_A.weight twice"):
        own_names(Path("x"), names)


def test_a_file_of_very_many_tensors_is_no_lora(tmp_path):
    with pytest.raises(InputError, match=f"at most {MOST_TENSORS:,}"):
        own_names(Path("x"), (f"{NAME}.lora_A.{number}.weight" for number in range(MOST_TENSORS + 1)))


SAID = {"r": 2, "lora_alpha": 2}
HOSTILE = {
    "a rank of its own": ({"r": 10**9}, "says rank 1000000000 of transformer_blocks.0.attn.to_q, its matrices are of rank 2"),
    "a rank by pattern": ({"rank_pattern": {"to_q": 10**9}}, "says rank 1000000000"),
    "a pattern that takes for ever": ({"rank_pattern": {"(a+)+$": 2}}, r"rank_pattern says \(a\+\)\+\$"),
    "patterns without end": ({"alpha_pattern": {f"m{i}": 1 for i in range(MOST_PATTERNS + 1)}}, "no table of at most"),
    "a module to import": ({"megatron_config": {"x": 1}, "megatron_core": "evil_module", "auto_mapping": {"parent_library": "evil"}}, None),
    "targets everywhere": ({"target_modules": ["to_k", "to_v", "linear", "proj"], "modules_to_save": None}, None),
    "a target that takes for ever": ({"target_modules": "(.*)*(.*)*(.*)*x", "exclude_modules": "(.*)*(.*)*y"}, None),
    "replicated layers": ({"layer_replication": [[0, 10**6]]}, "sets layer_replication"),
    "saved modules": ({"modules_to_save": ["proj_out"]}, "sets modules_to_save"),
    "parameters": ({"target_parameters": ["x"]}, "sets target_parameters"),
    "a start in the base": ({"init_lora_weights": "pissa"}, 'began as "pissa", which changes the base'),
    "a start that changes nothing": ({"init_lora_weights": "gaussian"}, None), "biases": ({"bias": "all"}, "says bias all"),
    "types": ({"r": "2"}, 'says r "2"'), "true": ({"r": True}, "says r true"),
    "alpha": ({"lora_alpha": float("nan")}, "says lora_alpha NaN"), "flag": ({"use_rslora": 2}, "use_rslora 2"),
    "dora": ({"use_dora": True}, "says use_dora true, and its tensors say otherwise"), "list": ({"rank_pattern": [1]}, "no table"),
    "unknown": ({"use_something_new": {"a": 1}}, "sets use_something_new, which is not read here"),
    "unknown and off": ({"use_something_new": None, "another": False}, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("form", ["file", "folder"])
def test_metadata_is_believed_where_the_matrices_bear_it_out(kind, form, tmp_path, pipe, tiny_folder):
    said, says = HOSTILE[kind]
    said = SAID | said
    if form == "file":
        text = json.dumps({f"transformer.{key}": value for key, value in said.items()})
        path = tmp_path / "x.safetensors"
        save_file(PAIR, path, metadata={ADAPTER_METADATA: text})
    else:
        path = tmp_path
        (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"peft_type": "LORA"}))
        tensors = {name.replace("transformer.", "base_model.model.", 1): value for name, value in PAIR.items()}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    if says is None:
        pipe.load_lora_weights(path)
        config = pipe.transformer.peft_config["default_0"]
        assert (config.r, config.lora_alpha, config.target_modules) == (2, 2, {"transformer_blocks.0.attn.to_q"})
        assert (config.megatron_core, config.auto_mapping) == (LoraConfig().megatron_core, None)
        adapted = {name.split(".lora_")[0] for name, _ in pipe.transformer.named_parameters() if ".lora_" in name}
        assert adapted == {"transformer_blocks.0.attn.to_q"}
        return
    for read in (pipe.load_lora_weights, open_adapter):
        with pytest.raises(InputError, match=says) as caught:
            read(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["{", "[1]", '{"a":' * 10**5, "\x1b[2J", '{"transformer.r": 1e999}'])
def test_metadata_that_is_no_table_is_said(text, tmp_path, pipe):
    save_file(PAIR, tmp_path / "x.safetensors", metadata={ADAPTER_METADATA: text})
    with pytest.raises(InputError, match="x.safetensors") as caught:
        pipe.load_lora_weights(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_text_encoders_share_needs_that_encoder_and_fits_it(tmp_path, tiny_folder, pipe):
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = PAIR | {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(16, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    assert pipe.get_list_adapters() == {"transformer": ["default_0"], "text_encoder": ["default_0"]}
    bare = LatentFMPipeline.from_pretrained(tiny_folder, text_encoder=None, tokenizer=None)
    with pytest.raises(InputError, match="adapts text_encoder, which is not loaded"):
        bare.load_lora_weights(tmp_path / "x.safetensors")
    save_file(tensors | {f"{name}.lora_A.weight": torch.ones(2, 17)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight is \[2, 17\]"):
        LatentFMPipeline.from_pretrained(tiny_folder).load_lora_weights(tmp_path / "x.safetensors")


def test_which_file_of_a_folder_is_read(tmp_path, pipe):
    save_file(PAIR, tmp_path / "pytorch_lora_weights.safetensors")
    save_file({"z": torch.zeros(1)}, tmp_path / "another.safetensors")
    torch.save(PAIR, tmp_path / "pytorch_lora_weights.bin")
    pipe.load_lora_weights(tmp_path)
    pipe.unload_lora_weights()
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "mine.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="mine.safetensors")
    with pytest.raises(InputError, match="several files .another.safetensors, mine.safetensors.; give the one"):
        pipe.load_lora_weights(tmp_path)
    for name in ("another.safetensors", "mine.safetensors"):
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match="pytorch_lora_weights.bin is a pickle"):
        pipe.load_lora_weights(tmp_path)


@pytest.mark.parametrize("name", ["x.bin", "x.dat", "x", "x.safetensors"])
def test_a_pickle_is_refused_whatever_it_is_called(name, tmp_path, pipe):
    torch.save(PAIR, tmp_path / name)
    for source, more in ((tmp_path / name, {}), (tmp_path, {"weight_name": name})):
        with pytest.raises(InputError, match="is a pickle"):
            pipe.load_lora_weights(source, **more)
    with pytest.raises(InputError, match=re.escape(f"{name} is")):
        pipe.load_lora_weights("someone/a-lora", weight_name=name) if name != "x.safetensors" else open_adapter(tmp_path / name)


def test_special_files_are_refused(tmp_path, pipe):
    os.mkfifo(tmp_path / "pytorch_lora_weights.safetensors")
    for source in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        with pytest.raises(InputError, match="is a named pipe"):
            pipe.load_lora_weights(source)


def test_a_saved_folder_is_verified_when_asked(tmp_path, pipe, tiny_folder):
    network = MMDiT.from_pretrained(tiny_folder, subfolder="transformer")
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    StableDiffusion3Pipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(network))
    with pytest.raises(InputError, match="has no latentfm_manifest.txt"):
        pipe.load_lora_weights(tmp_path / "lora", verify=True)
    for rank in (2, 3):  # in place
        network.delete_adapters("default")
        network.add_adapter(LoraConfig(r=rank, target_modules=["to_q"]))
        LatentFMPipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(network))
        pipe.load_lora_weights(tmp_path / "lora", verify=True)
        pipe.unload_lora_weights()
    write_peft(tmp_path / "peft", open_adapter(tmp_path / "lora"), None)
    pipe.load_lora_weights(tmp_path / "peft", verify=True)
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: value + 1 for name, value in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="adapter_model.safetensors has other bytes"):
        pipe.load_lora_weights(tmp_path / "peft", adapter_name="again", verify=True)
