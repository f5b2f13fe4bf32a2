"""Text without its padding, schedules computed ahead, tokens that go round blocks, blocks recomputed: each against a plain computation."""

import copy

import pytest
import torch
from diffusers import SD3Transformer2DModel
from models.twins import VARIANTS, difference, inputs, twins
from torch import Tensor, nn
from torch.nn import functional as F

from latentfm.models import schedule
from latentfm.models.mmdit import MMDiT
from latentfm.models.packing import pack
from latentfm.models.routing import TokenRoute
from latentfm.models.schedule import Precomputed

HOLES = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1]]).bool()
MASKS = {
    "holes": HOLES,
    "different lengths": torch.arange(9)[None] < torch.tensor([[2], [9]]),
    "one token": torch.arange(9)[None] == torch.tensor([[8], [0]]),
}
DUAL = VARIANTS["sd3.5-medium"]  # dual attention in two of the three blocks; the last block only reads the text


class MaskedKeys:
    """A processor for diffusers' attention: every token is computed, and nobody looks at the text tokens left out by `mask` [B, L]."""

    def __init__(self, mask: Tensor):
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        def heads(x: Tensor, layers: tuple[nn.Module, nn.Module | None]) -> Tensor:
            x = layers[0](x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return x if layers[1] is None else layers[1](x)

        parts = [heads(hidden_states, pair) for pair in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None))]
        keep, image = None, hidden_states.shape[1]
        if encoder_hidden_states is not None:
            added = ((attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k), (attn.add_v_proj, None))
            parts = [torch.cat([part, heads(encoder_hidden_states, pair)], dim=2) for part, pair in zip(parts, added, strict=True)]
            keep = F.pad(self.mask, (image, 0), value=True)[:, None, None]
        out = F.scaled_dot_product_attention(*parts, attn_mask=keep).transpose(1, 2).flatten(2)
        of_image = attn.to_out[0](out[:, :image])
        if encoder_hidden_states is None:
            return of_image
        return of_image, out[:, image:] if attn.context_pre_only else attn.to_add_out(out[:, image:])


def same_results(ours: dict[str, Tensor], theirs: dict[str, Tensor | None]) -> None:
    """Ours equal theirs, name by name; a gradient that diffusers has not, of what nothing reads, is zero here."""
    assert ours.keys() == theirs.keys()
    for name, reference in theirs.items():
        reference = torch.zeros_like(ours[name]) if reference is None else reference
        torch.testing.assert_close(ours[name], reference, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("variant", ["sd3", "sd3.5-medium", "dual everywhere"])
@pytest.mark.parametrize("mask", MASKS)
def test_masked_text_is_padded_text_that_nobody_looks_at(mask, variant):
    ours, theirs = twins(**VARIANTS[variant])
    mask, results = MASKS[mask], []
    theirs.set_attn_processor(MaskedKeys(mask))
    for model, extra in ((ours, {"encoder_attention_mask": mask}), (theirs, {})):
        given = inputs(model)
        text = given["encoder_hidden_states"].requires_grad_()
        out = model(**given, **extra).sample
        out.square().mean().backward()
        results.append({"out": out.detach(), "text": text.grad} | {name: p.grad for name, p in model.named_parameters()})
    same_results(*results)
    of_text = results[0]["text"]
    assert of_text[~mask].abs().max() == 0 < of_text[mask].abs().max()
    assert difference(ours, lambda **k: ours(**k, encoder_attention_mask=mask), **inputs(ours)) > 1e-3


def test_masked_text_in_bf16():
    ours, theirs = twins(**DUAL)
    theirs.set_attn_processor(MaskedKeys(HOLES))
    with torch.no_grad():
        exact = theirs(**inputs(theirs)).sample
        given = inputs(ours, dtype=torch.bfloat16)
        mine = ours.bfloat16()(**given, encoder_attention_mask=HOLES).sample
        reference = theirs.bfloat16()(**given).sample
    errors = [(x.float() - exact).square().mean().sqrt().item() for x in (mine, reference)]
    assert 0 < errors[0] <= 1.15 * errors[1] < 0.03 * exact.std()


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32], ids=str)
def test_a_mask_of_all_tokens_is_no_mask(kind):
    ours, _ = twins(**DUAL)
    mask = torch.ones(2, 9, dtype=kind)
    assert difference(ours, lambda **k: ours(**k, encoder_attention_mask=mask), **inputs(ours)) <= 2e-6


def test_a_pictures_result_does_not_depend_on_the_lengths_beside_it():
    model = twins(**DUAL)[0]
    given = inputs(model)
    mask = torch.ones(2, 9, dtype=torch.bool)
    with torch.no_grad():
        results = []
        for length in (1, 4, 9):
            mask[1] = torch.arange(9) < length
            results.append(model(**given, encoder_attention_mask=mask).sample)
        alone = model(**{name: value[:1] for name, value in given.items()}, encoder_attention_mask=mask[:1]).sample
    for result in results:
        torch.testing.assert_close(result[:1], alone, rtol=1e-5, atol=2e-6)
    assert (results[0][1] - results[2][1]).abs().max() > 1e-3


def test_what_is_masked_out_is_not_computed():
    model, rows = twins(**DUAL)[0], []
    for block in model.transformer_blocks[:-1]:
        block.ff_context.net[2].register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:2].numel()))
    with torch.no_grad():
        model(**inputs(model), encoder_attention_mask=HOLES)
    assert rows == [HOLES.sum()] * 2


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 8), r"encoder_attention_mask of shape \(2, 8\) should be \(2, 9\)"),
        (torch.ones(9), r"\(9,\) should be \(2, 9\)"),
        (torch.tensor([[1] * 9, [0] * 9]), "sample 1 without a text token"),
    ],
)
def test_masks_that_cannot_be(mask, message):
    model = twins()[0]
    with pytest.raises(ValueError, match=message):
        model(**inputs(model), encoder_attention_mask=mask)


def test_packing_lays_the_tokens_of_a_sample_behind_those_of_the_one_before():
    text = torch.arange(18.0).view(2, 9, 1)
    packed, packing = pack(text, HOLES)
    assert packed.flatten().tolist() == [0, 1, 3, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17]
    assert packing.lengths == [5, 8] and packing.samples.tolist() == [0] * 5 + [1] * 8
    (of_token,) = packing.per_token((torch.tensor([[[5.0]], [[7.0]]]),))
    assert of_token.flatten().tolist() == [5.0] * 5 + [7.0] * 8


TIMES = torch.tensor([1000.0, 750.25, 500.0, 0.5])


def run_schedule(model: MMDiT, given: dict[str, Tensor], ahead: bool, **extra) -> list[Tensor]:
    """The model's outputs at TIMES; with `ahead`, what depends on prompts and times is computed at the first."""
    precomputed, found = Precomputed(TIMES) if ahead else None, []
    with torch.no_grad():
        for time in TIMES:
            batch = given["hidden_states"].shape[0]
            found.append(model(**given | {"timestep": time.expand(batch)}, precomputed=precomputed, **extra).sample)
    return found


@pytest.mark.parametrize("variant", ["sd3", "sd3.5-medium"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extra", ["", "skip_layers", "block_controlnet_hidden_states", "encoder_attention_mask"])
def test_a_schedule_computed_ahead_changes_nothing(extra, dtype, variant):
    model = twins(**VARIANTS[variant])[0].to(dtype)
    residuals = list(torch.randn(2, 2, 16, 48, dtype=dtype))
    values = {"skip_layers": [0, 2], "block_controlnet_hidden_states": residuals, "encoder_attention_mask": HOLES}
    extra = {extra: values[extra]} if extra else {}
    given = inputs(model, dtype=dtype)
    plain, ahead = run_schedule(model, given, False, **extra), run_schedule(model, given, True, **extra)
    for one, other in zip(plain, ahead, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(other, one, rtol=1e-6, atol=4e-6)  # rounding: products of more rows add up in another order
        else:
            assert (other.float() - one.float()).abs().max() <= 2**-6 * one.float().abs().max()
    assert (ahead[0] - ahead[3]).abs().max() > 1e-2


def test_a_schedule_computed_ahead_reads_conditioning_and_modulations_once():
    model, calls = twins(**DUAL)[0], []
    parts = [model.time_text_embed.timestep_embedder, model.context_embedder, model.norm_out.linear]
    for part in [*parts, *(block.norm1.linear for block in model.transformer_blocks)]:
        part.register_forward_hook(lambda *_: calls.append(1))
    run_schedule(model, inputs(model), True)
    assert len(calls) == 6
    run_schedule(model, inputs(model), False)
    assert len(calls) == 6 + 4 * 6


@pytest.mark.parametrize(("rows", "products"), [(1, 4), (4, 2), (6, 2), (8, 1)])
def test_a_schedule_is_computed_ahead_in_stretches_that_bound_the_memory(rows, products, monkeypatch):
    model, calls = twins(**DUAL)[0], []
    given = inputs(model)
    whole = run_schedule(model, given, True)
    monkeypatch.setattr(schedule, "ROWS", rows)
    model.norm_out.linear.register_forward_hook(lambda *_: calls.append(1))
    for one, other in zip(run_schedule(model, given, True), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)
    assert len(calls) == products


def test_computed_ahead_with_guidance_it_is_of_the_prompts_it_was_made_with():
    model = twins(**DUAL)[0]
    given, other = inputs(model), inputs(model)
    other["encoder_hidden_states"] = other["encoder_hidden_states"].flip(0)
    other["pooled_projections"] = other["pooled_projections"].flip(0)
    both = {name: torch.cat([value, value]) for name, value in given.items()}
    both["encoder_hidden_states"] = torch.cat([other["encoder_hidden_states"], given["encoder_hidden_states"]])
    both["pooled_projections"] = torch.cat([other["pooled_projections"], given["pooled_projections"]])
    guided = run_schedule(model, both, True)
    for half, alone in ((slice(0, 2), other), (slice(2, 4), given)):
        for one, whole in zip(run_schedule(model, alone, False), guided, strict=True):
            torch.testing.assert_close(whole[half], one, rtol=1e-5, atol=2e-6)
    old = Precomputed(TIMES)
    with torch.no_grad():
        first = model(**given | {"timestep": TIMES[:1].expand(2)}, precomputed=old).sample
        kept = model(**other | {"timestep": TIMES[:1].expand(2)}, precomputed=old).sample
        new = model(**other | {"timestep": TIMES[:1].expand(2)}, precomputed=Precomputed(TIMES)).sample
    assert torch.equal(first, kept) and (new - kept).abs().max() > 1e-3
    torch.testing.assert_close(new, guided[0][:2], rtol=1e-5, atol=2e-6)
    with torch.no_grad():  # half of the batch, as FasterCache leaves it: computed from the arguments
        half = model(**{name: value[:1] for name, value in given.items()}, precomputed=old).sample
        torch.testing.assert_close(half, model(**given).sample[:1], rtol=1e-5, atol=2e-6)


def test_nothing_is_computed_ahead_in_training_or_of_weights_that_are_elsewhere():
    model = twins(**DUAL)[0]
    precomputed = Precomputed(TIMES)
    model(**inputs(model), precomputed=precomputed).sample.sum().backward()
    assert precomputed.text is None and model.context_embedder.weight.grad is not None
    with torch.no_grad():
        cpu, meta = torch.device("cpu"), torch.device("meta")
        assert precomputed.place(model, TIMES[2:3], 2, cpu) == 2
        assert precomputed.place(model, TIMES[2:3], 2, meta) is None
        assert precomputed.place(model, TIMES[2:3].to("meta"), 2, cpu) is None  # of a device, which the host would have to wait for
        model.transformer_blocks[1].norm1.to("meta")
        assert precomputed.place(model, TIMES[2:3], 2, cpu) is None


def test_a_time_that_is_not_of_the_schedule_or_another_for_each_picture_is_computed_as_ever():
    model = twins(**DUAL)[0]
    precomputed, given = Precomputed(TIMES), inputs(model)
    with torch.no_grad():
        for times in (torch.tensor([600.0, 600.0]), torch.tensor([750.25, 500.0]), TIMES[3:].expand(2), TIMES[:1].expand(2)):
            found = model(**given | {"timestep": times}, precomputed=precomputed).sample
            torch.testing.assert_close(found, model(**given | {"timestep": times}).sample, rtol=1e-5, atol=2e-6)
    assert len(precomputed.out) == 4


def choose(kept: int, tokens: int = 16) -> Tensor:
    """`kept` of `tokens` image tokens for each of two samples, in no order."""
    generator = torch.Generator().manual_seed(5)
    return torch.stack([torch.randperm(tokens, generator=generator)[:kept] for _ in range(2)])


def routed(model: SD3Transformer2DModel, route: TokenRoute) -> None:
    """Has diffusers' network take the route, by hooks on the blocks where the tokens part and meet again."""
    index, held = route.kept[..., None].expand(-1, -1, 48), {}

    def part(module, args, kwargs):
        held["all"] = kwargs["hidden_states"]
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].gather(1, index)}

    def meet(module, args, kwargs, output):
        text, image = output
        return text, held["all"].scatter(1, index, image)

    model.transformer_blocks[route.first].register_forward_pre_hook(part, with_kwargs=True)
    model.transformer_blocks[route.last].register_forward_hook(meet, with_kwargs=True)


@pytest.mark.parametrize("stretch", [(0, 3), (1, 2), (2, 2), (0, 0), (3, 3)])
def test_routed_tokens_are_a_network_of_these_tokens_for_a_stretch(stretch):
    ours, theirs = twins(num_layers=4, **DUAL)
    route, results = TokenRoute(choose(6), *stretch), []
    routed(theirs, route)
    for model, extra in ((ours, {"token_route": route}), (theirs, {})):
        given = inputs(model)
        image = given["hidden_states"].requires_grad_()
        out = model(**given, **extra).sample
        out.square().mean().backward()
        results.append({"out": out.detach(), "image": image.grad} | {name: p.grad for name, p in model.named_parameters()})
    same_results(*results)
    assert difference(ours, lambda **k: ours(**k, token_route=route), **inputs(ours)) > 1e-3


def test_a_route_that_keeps_all_tokens_is_no_route():
    model = twins(num_layers=4, **DUAL)[0]
    route = TokenRoute(torch.arange(16).expand(2, -1), 1, 2)
    assert difference(model, lambda **k: model(**k, token_route=route), **inputs(model)) == 0


def test_tokens_off_the_route_stay_as_they_were():
    model, seen, route = twins(num_layers=4, **DUAL)[0], [], TokenRoute(choose(6), 1, 2)
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs(model), token_route=route)
    assert [image.shape[1] for image in seen] == [16, 6, 6, 16]
    with torch.no_grad():
        given = inputs(model)
        vector = F.silu(model.time_text_embed(given["timestep"], given["pooled_projections"]))
        parted, _ = model.transformer_blocks[0](seen[0], model.context_embedder(given["encoder_hidden_states"]), vector)
    off = torch.ones(2, 16, dtype=torch.bool).scatter(1, route.kept, False)
    assert torch.equal(seen[3][off], parted[off])
    assert (seen[3][~off] - parted[~off]).abs().amax(dim=-1).min() > 1e-3


def test_a_route_with_recomputed_blocks_and_skipped_ones():
    model = twins(num_layers=4, **DUAL)[0]
    route, found = TokenRoute(choose(6), 1, 2), []
    for fraction in (0, 1, 0.5):
        again = copy.deepcopy(model)
        again.set_gradient_checkpointing(fraction)
        again(**inputs(model), token_route=route, skip_layers=[1]).sample.square().mean().backward()
        found.append([p.grad for p in again.parameters() if p.grad is not None])
    for other in found[1:]:
        assert all(torch.equal(*both) for both in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (TokenRoute(choose(6), 2, 1), "from block 2 to 1 does not fit 3 blocks"),
        (TokenRoute(choose(6), 0, 3), "from block 0 to 3 does not fit 3 blocks"),
        (TokenRoute(choose(6), -1, 1), "from block -1 to 1"),
        (TokenRoute(choose(6)[:1], 0, 1), r"\(1, 6\) should be \[2, 1 to 16\]"),
        (TokenRoute(choose(6)[0], 0, 1), r"\(6,\) should be"),
        (TokenRoute(choose(17, 17), 0, 1), r"\(2, 17\) should be"),
        (TokenRoute(choose(0), 0, 1), r"\(2, 0\) should be"),
    ],
)
def test_routes_that_cannot_be(route, message):
    model = twins()[0]
    with pytest.raises(ValueError, match=message):
        model(**inputs(model), token_route=route)


def test_a_route_and_controlnet_residuals_do_not_go_together():
    model = twins()[0]
    with pytest.raises(ValueError, match="do not go together"):
        model(**inputs(model), token_route=TokenRoute(choose(6), 0, 1), block_controlnet_hidden_states=[torch.zeros(2, 16, 48)])


@pytest.mark.parametrize(("blocks", "fraction"), [(3, 1 / 3), (3, 2 / 3), (8, 0.5), (8, 0.25), (24, 0.7), (38, 0.1), (38, 1), (8, 0)])
def test_the_recomputed_blocks_are_the_share_asked_for_and_evenly_spread(blocks, fraction):
    model = MMDiT(**SMALL | {"num_layers": blocks})
    model.set_gradient_checkpointing(fraction)
    assert model.is_gradient_checkpointing == (fraction > 0)
    chosen = [model.checkpointed(index) for index in range(blocks)]
    for count in range(1, blocks + 1):  # of the first blocks, however many, this share
        assert abs(sum(chosen[:count]) - fraction * count) < 1
    model.set_gradient_checkpointing(0)
    assert not any(model.checkpointed(index) for index in range(blocks))


SMALL = {
    "sample_size": 4, "in_channels": 2, "out_channels": 2, "attention_head_dim": 4, "num_attention_heads": 1, "joint_attention_dim": 4,
    "caption_projection_dim": 4, "pooled_projection_dim": 4, "pos_embed_max_size": 2,
}  # fmt: skip


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_share_of_blocks_is_from_0_to_1(fraction):
    with pytest.raises(ValueError, match=f"from 0 to 1, got {fraction}"):
        MMDiT(**SMALL).set_gradient_checkpointing(fraction)


@pytest.mark.parametrize("extra", [{}, {"encoder_attention_mask": HOLES}])
@pytest.mark.parametrize("fraction", [1 / 3, 2 / 3, 1])
def test_recomputed_blocks_give_the_same_gradients(fraction, extra):
    model = twins(**DUAL)[0]
    again, calls = copy.deepcopy(model), []
    again.set_gradient_checkpointing(fraction)
    for block in again.transformer_blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for network in (model, again):
        network(**inputs(model), **extra).sample.square().mean().backward()
    assert len(calls) == 3 + round(3 * fraction)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), again.parameters(), strict=True))
