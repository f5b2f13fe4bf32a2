"""MMDiT against diffusers' SD3Transformer2DModel on the same weights, and its own promises."""

import copy
import json

import pytest
import torch
from diffusers import AutoModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.embeddings import get_timestep_embedding as diffusers_timestep_features
from models.twins import SHAPES, TINY, VARIANTS, difference, inputs, twins
from peft import LoraConfig

from latentfm.errors import InputError
from latentfm.models.block import Block
from latentfm.models.embeddings import position_table, timestep_features
from latentfm.models.mmdit import MMDiT
from latentfm.models.presets import PRESETS

FULL = {
    "sd3-medium": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    "sd3.5-medium": {
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
        "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)),
    },
    "sd3.5-large": {
        "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_diffusers(variant, shape):
    ours, theirs = twins(**VARIANTS[variant])
    assert difference(ours, theirs, **inputs(ours, shape)) <= 1e-5


def derivatives(model, latents: torch.Tensor, direction: torch.Tensor, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """By torch.func: the output's derivative along `direction`, its pullback of `direction`, and its sum's by each parameter."""

    def output(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (x,), given).sample

    weights = dict(sorted(model.named_parameters()))
    _, tangent = torch.func.jvp(lambda x: output(x, weights), (latents,), (direction,))
    _, pull = torch.func.vjp(lambda x: output(x, weights), latents)
    by_weight = torch.func.grad(lambda w: output(latents, w).sum())(weights)
    return [tangent, *pull(direction), *by_weight.values()]


def test_torch_func_goes_through_it():
    given, direction = inputs(twins()[0]), torch.randn(2, 4, 8, 8)
    latents = given.pop("hidden_states")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the kernel with derivatives forwards
        found = [derivatives(model, latents, direction, given) for model in twins(**VARIANTS["sd3.5-medium"])]
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=2e-5)


def gradients(model, given: dict[str, torch.Tensor], **extra) -> dict[str, torch.Tensor | None]:
    """The gradients of the mean square of the model's output, by parameters' and inputs' names."""
    given = {name: value.clone().requires_grad_() for name, value in given.items()}
    model.zero_grad()
    model(**given, **extra).sample.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()} | {name: value.grad for name, value in given.items()}


@pytest.mark.parametrize(
    ("shape", "extra"), [("wide", ""), ("tall", ""), ("wide", "skip_layers"), ("square", "block_controlnet_hidden_states")]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_diffusers(variant, shape, extra):
    ours, theirs = twins(**VARIANTS[variant])
    given, found = inputs(ours, shape), []
    for model in (ours, theirs):
        residuals = list(torch.randn(2, *ours.pos_embed(given["hidden_states"]).shape, generator=torch.Generator().manual_seed(2)))
        for value in residuals:
            value.requires_grad_()
        values = {"skip_layers": [0], "block_controlnet_hidden_states": residuals}
        gradient = gradients(model, given, **({extra: values[extra]} if extra else {}))
        found.append(gradient | {f"residual {i}": value.grad for i, value in enumerate(residuals)})
    mine, reference = found
    assert mine.keys() == reference.keys()
    largest = max(value.abs().max() for value in reference.values() if value is not None)
    moved = [name for name, value in reference.items() if value is not None and value.abs().max() > 1e-4 * largest]
    assert len(moved) > (0.8 if not extra else 0.3) * len(reference)
    for name, value in reference.items():
        if value is None:  # a skipped path: both must leave it out
            assert mine[name] is None, name
        else:
            off = (mine[name] - value).abs().max() / largest
            assert off < 2e-6, f"{name}: {off}"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_controlnet_residuals_are_diffusers(count):
    ours, theirs = twins(num_layers=4, **VARIANTS["sd3.5-large"])
    given = inputs(ours)
    residuals = list(torch.randn(count, 2, 16, 48))
    assert difference(ours, theirs, **given, block_controlnet_hidden_states=residuals) <= 1e-5
    assert difference(ours, lambda **k: theirs(**k, block_controlnet_hidden_states=residuals), **given) > 1e-2


@pytest.mark.parametrize("skipped", [[0], [1, 2], [2], [0, 1, 2]])
def test_skip_layers_are_diffusers(skipped):
    ours, theirs = twins(**VARIANTS["sd3.5-medium"])
    given = inputs(ours)
    assert difference(ours, theirs, **given, skip_layers=skipped) <= 1e-5
    assert difference(ours, lambda **k: theirs(**k, skip_layers=skipped), **given) > 1e-2


@pytest.mark.parametrize("variant", ["sd3", "sd3.5-medium", "patch 4"])
def test_bf16_is_diffusers_within_rounding(variant):
    ours, theirs = twins(**VARIANTS[variant])
    with torch.no_grad():
        exact = theirs(**inputs(theirs)).sample
        given = inputs(ours, dtype=torch.bfloat16)
        mine = ours.bfloat16()(**given).sample
        reference = theirs.bfloat16()(**given).sample
    assert mine.dtype == torch.bfloat16
    ours_off, theirs_off = ((x.float() - exact).square().mean().sqrt().item() for x in (mine, reference))
    assert ours_off <= 1.1 * theirs_off  # as far from the float32 answer as diffusers is, no further
    assert theirs_off < 0.03 * exact.std()
    assert (mine - reference).abs().max() <= 4 * 2**-8 * exact.abs().max()


@pytest.mark.parametrize("variant", ["sd3", "sd3.5-large", "sd3.5-medium"])
def test_bf16_gradients_are_as_exact_as_diffusers(variant):
    ours, theirs = (model.bfloat16() for model in twins(**VARIANTS[variant]))
    given = inputs(ours, "wide", torch.bfloat16)
    exact = gradients(copy.deepcopy(theirs).double(), {name: value.double() for name, value in given.items()})
    errors, parts = [], {name: 0.0 for name in ("attn", "ff", "norm1", "embed")}
    for model in (ours, theirs):
        found, sums = gradients(model, given), dict.fromkeys(["all", *parts], 0.0)
        for name, value in exact.items():
            if value is not None and found[name] is not None:
                off = (found[name].double() - value).square().sum().item() / max(value.square().sum().item(), 1e-12)
                for part in sums:
                    sums[part] += off if part == "all" or part in name else 0.0
        errors.append(sums)
    for part, mine in errors[0].items():
        assert 0 < mine**0.5 <= 1.15 * errors[1][part] ** 0.5, part


@pytest.mark.parametrize("variant", ["sd3", "sd3.5-medium"])
def test_autocast_is_diffusers_within_rounding_and_warns_of_nothing(variant, recwarn):
    ours, theirs = twins(**VARIANTS[variant])
    given = inputs(ours)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mine = ours(**given).sample
    finally:
        torch.set_warn_always(always)
    assert [str(w.message) for w in recwarn] == []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        reference = theirs(**given).sample
    with torch.no_grad():
        exact = theirs(**given).sample
    ours_off, theirs_off = ((x.float() - exact).square().mean().sqrt().item() for x in (mine, reference))
    assert 0 < ours_off <= 1.15 * theirs_off < 0.03 * exact.std()


def test_a_lora_of_diffusers_applies(tmp_path):
    ours, theirs = twins(**VARIANTS["sd3.5-medium"])
    given, plain = inputs(ours), difference(ours, theirs, **inputs(ours))
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj", "ff.net.2"]
    theirs.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    theirs.save_lora_adapter(tmp_path)
    assert plain <= 1e-5 and difference(ours, theirs, **given) > 1e-2
    ours.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert difference(ours, theirs, **given) <= 1e-5


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_the_scale_of_a_lora_is_diffusers(scale):
    ours, theirs = twins(**VARIANTS["sd3.5-medium"])
    given, bare = inputs(ours), copy.deepcopy(theirs)
    for model in (ours, theirs):
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "add_v_proj", "ff.net.0.proj"], init_lora_weights=False))
    ours.load_state_dict(theirs.state_dict())
    found = difference(ours, theirs, **given, joint_attention_kwargs={"scale": scale})
    assert found <= 2e-5
    off = difference(lambda **k: ours(**k, joint_attention_kwargs={"scale": scale}), bare, **given)
    assert off <= 2e-5 if scale == 0 else off > 1e-2
    assert difference(ours, theirs, **given) <= 2e-5  # the scale does not stay


def test_stock_pipeline_draws_the_same_picture_with_it(tiny_folder):
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    stock.set_progress_bar_config(disable=True)
    pictures = []
    for transformer in (stock.transformer, MMDiT.from_pretrained(tiny_folder / "transformer")):
        stock.transformer = transformer
        generator = torch.Generator().manual_seed(0)
        drawn = stock(
            "a red apple", height=32, width=32, num_inference_steps=3, max_sequence_length=16, generator=generator, output_type="pt"
        )
        pictures.append(drawn.images)
    assert pictures[0].std() > 0.05
    torch.testing.assert_close(pictures[0], pictures[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FULL)
def test_full_size_state_dicts_are_diffusers(name):
    config = {"sample_size": 128, "patch_size": 2, "joint_attention_dim": 4096, "pooled_projection_dim": 2048} | FULL[name]
    with torch.device("meta"):
        ours, theirs = MMDiT(**config), SD3Transformer2DModel(**config)
    shapes = [{key: tuple(value.shape) for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert {k for k, _ in ours.named_parameters()} == {k for k, _ in theirs.named_parameters()}


@pytest.mark.parametrize("name", FULL)
def test_presets_of_published_models_are_these_models(name):
    with torch.device("meta"):
        ours, theirs = MMDiT(**PRESETS[name]), SD3Transformer2DModel(**FULL[name])
    assert {k: v for k, v in ours.config.items() if k[0] != "_"} == {k: v for k, v in theirs.config.items() if k[0] != "_"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_strict_load_both_ways(variant):
    ours, _ = twins(**VARIANTS[variant])
    fresh = SD3Transformer2DModel(**(TINY | VARIANTS[variant]))
    assert fresh.load_state_dict(ours.state_dict(), strict=True).missing_keys == []
    assert difference(ours, fresh, **inputs(ours)) <= 1e-5


@pytest.mark.parametrize("variant", ["sd3", "sd3.5-medium"])
def test_saved_folders_load_in_each_other(variant, tmp_path):
    ours, theirs = twins(**VARIANTS[variant])
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    given = inputs(ours)
    loaded, status = MMDiT.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert type(loaded) is MMDiT and not any(status[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert difference(loaded, ours, **given) == 0
    back, status = SD3Transformer2DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(status[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert difference(back, theirs, **given) == 0
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    assert [{k: v for k, v in c.items() if k != "_name_or_path"} for c in configs[:1]] == [configs[1]]
    assert type(AutoModel.from_pretrained(str(tmp_path / "ours"))) is SD3Transformer2DModel


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    ours, _ = twins(**VARIANTS["sd3.5-medium"])
    plain, checkpointed = ours.train(), copy.deepcopy(ours).train()
    checkpointed.enable_gradient_checkpointing()
    results = []
    for model in (plain, checkpointed):
        calls = []
        for block in model.transformer_blocks:
            assert isinstance(block, Block)
            block.attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        output = model(**inputs(model)).sample
        forward_calls = len(calls)
        output.square().mean().backward()
        results.append((output, {n: p.grad for n, p in model.named_parameters()}, forward_calls, len(calls)))
    (out_a, grads_a, *calls_a), (out_b, grads_b, *calls_b) = results
    assert calls_a == [3, 3] and calls_b == [3, 6]
    assert torch.equal(out_a, out_b)
    assert grads_a["proj_out.weight"].abs().max() > 0
    for name in grads_a:
        torch.testing.assert_close(grads_a[name], grads_b[name], rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(checkpointed(**inputs(checkpointed)).sample, out_a, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    with torch.device("meta"):
        model = MMDiT.from_preset(name)
    assert {k: v for k, v in model.config.items() if k in PRESETS[name]} == PRESETS[name]
    millions = {
        "emoji": 13.9, "small": 65, "base": 255, "depth15": 496, "large": 904, "depth21": 1360, "sd3-medium": 2030, "sd3.5-medium": 2240,
        "depth30": 3960, "sd3.5-large": 8060,
    }[name]  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)


def test_from_preset_takes_changes_and_suggests_the_nearest_name():
    model = MMDiT.from_preset("emoji", num_layers=2, pos_embed_max_size=8)
    assert len(model.transformer_blocks) == 2 and model.pos_embed.pos_embed.shape[1] == 64
    assert PRESETS["emoji"]["num_layers"] == 6
    with pytest.raises(InputError, match=r"no preset 'sd3-mediun' \(did you mean 'sd3-medium'\?\).*emoji"):
        MMDiT.from_preset("sd3-mediun")
    with pytest.raises(TypeError, match="num_layer"):
        MMDiT.from_preset("emoji", num_layer=2)


def test_initialize_starts_at_zero_and_is_not_stuck_there():
    torch.manual_seed(0)
    model = MMDiT(**(TINY | VARIANTS["sd3.5-medium"]))
    before = model.pos_embed.proj.weight.clone()
    model.initialize()
    assert not torch.equal(model.pos_embed.proj.weight, before)  # Xavier reached the convolution through its flattened view
    bound, weight = (6 / (16 + 48)) ** 0.5, model.pos_embed.proj.weight.detach()
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    image, text = torch.randn(2, 16, 48), torch.randn(2, 9, 48)
    for block in model.transformer_blocks:  # adaLN-Zero: every block starts as the identity
        after, text_after = block(image, text, torch.randn(2, 48))
        assert torch.equal(after, image) and (text_after is None or torch.equal(text_after, text))
    given = inputs(model)
    assert torch.equal(model(**given).sample, torch.zeros_like(given["hidden_states"]))
    target = torch.randn_like(given["hidden_states"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(4):
        loss = (model(**given).sample - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    unavoidable = ("to_k.bias", "add_k_proj.bias")  # a bias common to all keys of one softmax; exact only up to rounding
    last = len(model.transformer_blocks) - 1
    unread = (f"{last}.attn.add_q_proj.weight", f"{last}.attn.add_q_proj.bias", f"{last}.attn.norm_added_q.weight")
    assert [n for n in idle if not n.endswith(unavoidable + unread)] == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_states", (2, 5, 8, 8), r"\(2, 5, 8, 8\).*4"),
        ("hidden_states", (4, 8, 8), r"\(4, 8, 8\)"),
        ("hidden_states", (2, 4, 7, 8), r"7 x 8.*patches of 2"),
        ("hidden_states", (2, 4, 8, 26), r"4 x 13 patches.*12 x 12"),
        ("hidden_states", (2, 4, 26, 8), r"13 x 4 patches.*12 x 12"),
        ("hidden_states", (2, 4, 8, 7), r"8 x 7.*patches of 2"),
        ("encoder_hidden_states", (2, 9, 41), r"41.*40"),
        ("encoder_hidden_states", (3, 9, 40), r"\(3, 9, 40\).*2"),
        ("encoder_hidden_states", (9, 40), r"\(9, 40\)"),
        ("pooled_projections", (2, 25), r"25.*24"),
        ("pooled_projections", (3, 24), r"\(3, 24\).*2"),
        ("pooled_projections", (2, 1, 24), r"\(2, 1, 24\).*\[2, 24\]"),
        ("timestep", (3,), r"\(3,\).*2"),
        ("timestep", (2, 1), r"\(2, 1\).*\[2\]"),
        ("timestep", (), r"\(\).*2"),
    ],
)
def test_wrong_shapes_are_named(name, value, message):
    model = MMDiT(**TINY)
    with pytest.raises(ValueError, match=message):
        model(**(inputs(model) | {name: torch.zeros(value)}))


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"caption_projection_dim 40.*3 \* 16 = 48"):
        MMDiT(**(TINY | {"caption_projection_dim": 40}))
    with pytest.raises(ValueError, match="layer_norm"):
        MMDiT(**(TINY | {"qk_norm": "layer_norm"}))
    with pytest.raises(ValueError, match="ip_adapter"):
        MMDiT(**TINY)(**inputs(MMDiT(**TINY)), joint_attention_kwargs={"ip_adapter_image_embeds": 0})


def test_return_dict():
    model, _ = twins()
    given = inputs(model)
    (sample,) = model(**given, return_dict=False)
    assert torch.equal(sample, model(**given).sample)


@pytest.mark.parametrize(("dim", "grid", "base"), [(48, 12, 4), (64, 192, 64), (1536, 24, 16), (256, 7, 3)])
def test_position_table_is_diffusers(dim, grid, base):
    theirs = get_2d_sincos_pos_embed(dim, grid, base_size=base, output_type="pt").float()[None]
    torch.testing.assert_close(position_table(dim, grid, base), theirs, rtol=0, atol=1e-7)


def test_position_table_wants_a_multiple_of_four():
    with pytest.raises(ValueError, match="18"):
        position_table(18, 4, 4)


def test_timestep_features_are_diffusers_and_tell_near_times_apart():
    times = torch.tensor([0.0, 0.01, 500.0, 500.25, 999.9, 1000.0])
    theirs = diffusers_timestep_features(times, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_features(times), theirs, rtol=0, atol=1e-6)
    near = timestep_features(torch.tensor([500.0, 500.25]))
    assert (near[0] - near[1]).abs().max() > 0.1
