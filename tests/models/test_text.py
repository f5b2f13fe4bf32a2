"""Prompt embeddings against StableDiffusion3Pipeline.encode_prompt, the null condition, and per-encoder dropping."""

import logging
import os
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny import CLIP_WIDTHS, T5_WIDTH

from latentfm.errors import InputError
from latentfm.interchange.components import load_text_encoders
from latentfm.models.text import NULL_FILE, NullCondition, PromptEncoder, PromptParts, assemble, stack

JOINT, POOLED, CLIP_LENGTH = T5_WIDTH, sum(CLIP_WIDTHS), 16
PROMPTS = ["a red apple on a white plate", "", "two green trees", "A Zebra, ünïcode; and 42 dots..."]
LONG = "two green trees under a yellow sun and a cat sleeping on an old chair by the window and a small brown dog in the park"


@pytest.fixture(scope="module")
def stock(tiny_folder) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def encoder(tiny_folder) -> PromptEncoder:
    return load_text_encoders(tiny_folder, JOINT, POOLED)


def without(encoder: PromptEncoder, *absent: int) -> PromptEncoder:
    """The same encoder with some of its three encoders taken away."""
    keep = [None if i in absent else e for i, e in enumerate(encoder.encoders)]
    return PromptEncoder([t if e is not None else None for t, e in zip(encoder.tokenizers, keep)], keep, JOINT, POOLED)


def theirs(stock, prompt, prompt_2=None, prompt_3=None, length=64) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        embeds, _, pooled, _ = stock.encode_prompt(
            prompt, prompt_2, prompt_3, device="cpu", do_classifier_free_guidance=False, max_sequence_length=length
        )
    return embeds, pooled


def assert_close(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """To the last bits: on some processors a product's depend on where in memory its numbers lie."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def same(a: PromptParts, b: PromptParts) -> bool:
    """Whether two PromptParts have the same parts, bit for bit."""
    (names_a, values_a), (names_b, values_b) = (zip(*parts.items()) for parts in (a, b))
    return names_a == names_b and all(map(torch.equal, values_a, values_b))


@pytest.mark.parametrize("length", [16, 64])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS, [LONG, "a cat"]], ids=["one", "several", "long"])
def test_encoding_is_diffusers(encoder, stock, prompts, length):
    condition = assemble(encoder.encode(prompts, length), JOINT, POOLED)
    embeds, pooled = theirs(stock, prompts, length=length)
    assert embeds.shape == (len(prompts), CLIP_LENGTH + length, JOINT) and pooled.shape == (len(prompts), POOLED)
    assert_close((condition.embeds, condition.pooled), (embeds, pooled))


def test_prompt_2_and_prompt_3_are_diffusers(encoder, stock):
    prompts = (["a red apple"], ["the moon"], ["an orange fish in a bowl"])
    condition = assemble(encoder.encode(prompts[0], 16, prompts[1], prompts[2]), JOINT, POOLED)
    embeds, pooled = theirs(stock, *prompts, length=16)
    assert_close((condition.embeds, condition.pooled), (embeds, pooled))
    plain = assemble(encoder.encode(prompts[0], 16), JOINT, POOLED)
    changed = (plain.embeds != condition.embeds)[0]
    assert not changed[:CLIP_LENGTH, : CLIP_WIDTHS[0]].any()
    assert changed[:CLIP_LENGTH, CLIP_WIDTHS[0] : POOLED].any() and changed[CLIP_LENGTH:].any()


@pytest.mark.parametrize("length", [16, 64])
def test_without_t5_is_diffusers(encoder, tiny_folder, length):
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_folder, text_encoder_3=None, tokenizer_3=None)
    condition = assemble(without(encoder, 2).encode(PROMPTS, length), JOINT, POOLED)
    embeds, pooled = theirs(stock, PROMPTS, length=length)
    assert_close((condition.embeds, condition.pooled), (embeds, pooled))
    assert not condition.embeds[:, CLIP_LENGTH:].any() and condition.embeds[:, :CLIP_LENGTH].any()


def test_from_folder_takes_what_the_folder_has(tiny_folder, tmp_path, encoder):
    for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
        shutil.copytree(tiny_folder / name, tmp_path / name)
    partial = load_text_encoders(tmp_path, JOINT, POOLED)
    assert partial.encoders[2] is None and partial.tokenizers[2] is None
    assert same(partial.encode(PROMPTS, 16), without(encoder, 2).encode(PROMPTS, 16))
    assert not any(e.training for e in partial.encoders[:2])
    (tmp_path / "text_encoder_2" / "model.safetensors").rename(tmp_path / "text_encoder_2" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle"):
        load_text_encoders(tmp_path, JOINT, POOLED)


def test_from_folder_dtype(tiny_folder):
    encoder = load_text_encoders(tiny_folder, JOINT, POOLED, dtype=torch.bfloat16)
    condition = assemble(encoder.encode(["a cat"], 16), JOINT, POOLED)
    assert condition.embeds.dtype == condition.pooled.dtype == torch.bfloat16


@pytest.mark.parametrize("absent", [0, 1])
def test_an_absent_clip_is_zeros_in_its_place(encoder, absent):
    full = assemble(encoder.encode(PROMPTS, 16), JOINT, POOLED)
    found = assemble(without(encoder, absent).encode(PROMPTS, 16), JOINT, POOLED)
    begin, end = ((0, CLIP_WIDTHS[0]), (CLIP_WIDTHS[0], POOLED))[absent]
    embeds, pooled = full.embeds.clone(), full.pooled.clone()
    assert embeds[:, :CLIP_LENGTH, begin:end].any() and pooled[:, begin:end].any()
    embeds[:, :CLIP_LENGTH, begin:end] = 0
    pooled[:, begin:end] = 0
    assert torch.equal(found.embeds, embeds) and torch.equal(found.pooled, pooled)


def test_t5_alone_has_a_pooled_vector_of_zeros(encoder):
    full = assemble(encoder.encode(PROMPTS, 16), JOINT, POOLED)
    found = assemble(without(encoder, 0, 1).encode(PROMPTS, 16), JOINT, POOLED)
    assert found.pooled.shape == full.pooled.shape and not found.pooled.any()
    assert torch.equal(found.embeds[:, -16:], full.embeds[:, CLIP_LENGTH:])


def test_no_encoder_at_all(encoder):
    condition = assemble(without(encoder, 0, 1, 2).encode(PROMPTS, 16), JOINT, POOLED)
    assert condition.embeds.shape == (4, 16, JOINT) and condition.pooled.shape == (4, POOLED)
    assert not condition.embeds.any() and not condition.pooled.any()
    with pytest.raises(ValueError, match="no text encoder"):
        assemble(PromptParts(), JOINT, POOLED)


def test_clips_wider_than_the_joint_width_are_cut_to_it_as_in_diffusers(encoder, stock):
    bare = StableDiffusion3Pipeline(**stock.components | {"text_encoder_3": None, "tokenizer_3": None})
    wide = bare.transformer.config.joint_attention_dim
    bare.transformer.register_to_config(joint_attention_dim=32)
    try:
        embeds, pooled = theirs(bare, ["a cat", ""], length=16)
    finally:
        bare.transformer.register_to_config(joint_attention_dim=wide)
    narrow = PromptEncoder([*encoder.tokenizers[:2], None], [*encoder.encoders[:2], None], 32, POOLED)
    condition = assemble(narrow.encode(["a cat", ""], 16), 32, POOLED)
    assert condition.embeds.shape == embeds.shape == (2, 32, 32)
    torch.testing.assert_close(condition.embeds, embeds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(condition.pooled, pooled, rtol=1e-5, atol=1e-6)


def test_truncation_is_logged_with_the_lost_text(encoder, caplog):
    with caplog.at_level(logging.WARNING, "latentfm.models.text"):
        encoder.encode(["a cat", LONG], 16)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3 and all(LONG[:70] in message and LONG not in message and len(message) < 260 for message in messages)
    assert all(any(name in message for message in messages) for name in ("text_encoder (CLIP)", "text_encoder_2", "text_encoder_3"))
    for index in range(3):
        ((text, lost),) = encoder.lost_text(index, ["a cat", LONG], 16)
        assert text == LONG and LONG.endswith(lost.strip()) and 0 < len(lost.strip()) < len(LONG)
        kept = encoder.tokenizers[index].decode(encoder.tokenize(index, [LONG], 16)[0], skip_special_tokens=True)
        assert (kept + lost).replace(" ", "") == LONG.replace(" ", "")
    assert "dog in the park" in messages[0]


def test_a_prompt_that_just_fits_is_not_reported(encoder, caplog):
    for index in range(3):
        tokenizer = encoder.tokenizers[index]
        whole = len(tokenizer(LONG, verbose=False).input_ids)
        assert encoder.lost_text(index, [LONG], whole) == [] and len(encoder.lost_text(index, [LONG], whole - 1)) == 1
    with caplog.at_level(logging.WARNING):
        encoder.encode(["", "two green trees", "a cat"], 16)
    assert caplog.records == []


def test_the_null_condition_is_what_stock_guides_against(encoder, stock):
    null = NullCondition(encoder)
    for length in (16, 64):
        assert same(null.parts(length), encoder.encode([""], length))
        with torch.no_grad():
            _, embeds, _, pooled = stock.encode_prompt("a cat", None, None, device="cpu", max_sequence_length=length)
        condition = assemble(null.parts(length), JOINT, POOLED)
        assert_close((condition.embeds, condition.pooled), (embeds, pooled))


@pytest.mark.parametrize("absent", [(), (2,), (0,)], ids=["all", "no t5", "no clip"])
def test_the_null_condition_round_trips(encoder, tmp_path, absent):
    null = NullCondition(without(encoder, *absent))
    made = {length: null.parts(length) for length in (16, 40, 64)}
    null.save(tmp_path)
    loaded = NullCondition.load(tmp_path)
    for length, parts in made.items():
        assert same(loaded.parts(length), parts)
    with pytest.raises(InputError, match=r"\[16, 40, 64\], not 256.*load the text encoders"):
        loaded.parts(256)
    assert same(NullCondition.load(tmp_path, encoder).parts(24), encoder.encode([""], 24))


def test_a_folder_without_a_null_condition_uses_the_encoders(encoder, tmp_path):
    assert not (tmp_path / NULL_FILE).exists()
    assert same(NullCondition.load(tmp_path, encoder).parts(16), encoder.encode([""], 16))
    with pytest.raises(InputError, match=r"not 16"):
        NullCondition.load(tmp_path).parts(16)
    with pytest.raises(InputError, match=r"not 16"):
        NullCondition.load(tmp_path, without(encoder, 0, 1, 2)).parts(16)


def test_a_saved_null_condition_comes_before_the_encoders(encoder, tmp_path):
    trained = NullCondition(encoder, {16: encoder.encode([""], 16).map(lambda value: value + 1)})
    trained.save(tmp_path)
    assert same(NullCondition.load(tmp_path, encoder).parts(16), trained.parts(16))


def test_drop_takes_each_encoders_rows_by_themselves(encoder):
    prompts = ["a red apple", "the moon", "a blue car", "two green trees"]
    parts, null = encoder.encode(prompts, 16), NullCondition(encoder).parts(16)
    marks = {"clip_1": [1, 0, 0, 1], "clip_2": [0, 1, 0, 1], "t5": [0, 0, 1, 1]}
    dropped = {name: torch.tensor(rows, dtype=torch.bool) for name, rows in marks.items()}
    left = parts.drop(dropped, null)
    owner = {"clip_1": "clip_1", "pooled_1": "clip_1", "clip_2": "clip_2", "pooled_2": "clip_2", "t5": "t5"}
    assert [name for name, _ in left.items()] == list(owner)
    for name, value in left.items():
        before, empty = getattr(parts, name), getattr(null, name)
        for row, mark in enumerate(marks[owner[name]]):
            assert torch.equal(value[row], empty[0] if mark else before[row])
            assert not torch.equal(before[row], empty[0])
    everything = {name: torch.ones(4, dtype=torch.bool) for name in marks}
    assert same(parts.drop(everything, null), stack([null] * 4))
    assert same(parts.drop({name: ~mark for name, mark in everything.items()}, null), parts)


def test_drop_keeps_the_dtype_and_absent_encoders_absent(encoder):
    few = without(encoder, 0)
    parts, null = few.encode(["a cat", "the sun"], 16).map(torch.Tensor.bfloat16), NullCondition(few).parts(16)
    left = parts.drop({name: torch.tensor([True, False]) for name in ("clip_1", "clip_2", "t5")}, null)
    assert left.clip_1 is None and left.pooled_1 is None and left.t5.dtype == torch.bfloat16
    assert torch.equal(left.t5[0], null.t5[0].bfloat16()) and torch.equal(left.t5[1], parts.t5[1])


def test_rows_do_not_depend_on_their_batch(encoder):
    together = encoder.encode(PROMPTS, 16)
    alone = stack([encoder.encode([prompt], 16) for prompt in PROMPTS])
    for (name, value), (_, other) in zip(together.items(), alone.items(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_a_print_is_of_all_that_an_encoders_answer_depends_on(encoder):
    import copy

    from latentfm.models.prints import encoder_print, totals

    ids = encoder.tokenize(0, [""], 16)
    module = copy.deepcopy(encoder.encoders[0])
    before = encoder_print(module, ids)
    assert encoder_print(encoder.encoders[0], ids) == before and len(before) == 32
    assert encoder_print(None, None) == "absent" and encoder_print(module, ids + 1) != before
    for name, value in module.named_parameters():
        kept, flat = value.data.clone(), value.data.view(-1)
        flat[-1] += 1e-3  # past autograd's version counter
        assert encoder_print(module, ids) != before, name
        flat.copy_(kept.view(-1).flip(0))
        assert encoder_print(module, ids) != before or len(set(kept.view(-1).tolist())) == 1, name
        flat.copy_(kept.view(-1))
    assert encoder_print(module, ids) == before
    assert encoder_print(copy.deepcopy(module).bfloat16(), ids) != before
    module.text_model.final_layer_norm.eps = 0.5
    assert encoder_print(module, ids) != before
    hook = encoder.encoders[1].register_forward_hook(lambda *given: None)
    try:
        assert encoder_print(encoder.encoders[1], ids) is None
    finally:
        hook.remove()
    assert encoder_print(copy.deepcopy(module).to("meta"), ids) is None
    for rows in (slice(None), slice(0, 2), slice(1, 2)):  # of which the signs alone change
        large = torch.randn(70_000).view(-1, 2)
        flipped = large.clone()
        flipped[1000:3000, rows].neg_()
        assert totals([flipped]) != totals([large]) == totals([flipped.index_copy_(0, torch.arange(35_000), large)])
    large = torch.randn(70_000)
    assert totals([large, large[:0], large[:3].to(torch.float16)]) == [*totals([large]), 0, *totals([large[:3].to(torch.float16)])]


def test_a_null_condition_changed_anywhere_is_refused_or_still_one(encoder, tmp_path):
    import random

    null, rng, refused = NullCondition(encoder), random.Random(0), 0
    null.parts(16)
    null.save(tmp_path)
    data = (tmp_path / NULL_FILE).read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    for _ in range(200):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            place, kind = rng.randrange(length if rng.random() < 0.8 else len(changed)), rng.randrange(3)
            if kind == 0:
                changed[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del changed[place : place + rng.randint(1, 9)]
            else:
                changed[place:place] = rng.choice([b'"', b"{", b"9", b"null", b"\xff", b"-1", b"[[["])
        (tmp_path / NULL_FILE).write_bytes(changed)
        try:
            parts = NullCondition.load(tmp_path, encoder).parts(16)
            assert [name for name, _ in parts.items()] == ["clip_1", "pooled_1", "clip_2", "pooled_2", "t5"]
            assert all(value.isfinite().all() for _, value in parts.items())
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100
    (tmp_path / NULL_FILE).unlink()
    os.mkfifo(tmp_path / NULL_FILE)
    with pytest.raises(InputError, match="is a named pipe"):
        NullCondition.load(tmp_path, encoder)


def test_encoders_without_a_tokenizer_are_refused_by_name(encoder):
    bare = PromptEncoder((encoder.tokenizers[0], None, encoder.tokenizers[2]), encoder.encoders, JOINT, POOLED)
    with pytest.raises(InputError, match=r"text_encoder_2 \(CLIP\) has no tokenizer; load its tokenizer too"):
        bare.encode(["a cat"], 16)


def test_the_null_condition_of_a_training_stands_by_itself(encoder, monkeypatch):
    kept = NullCondition(encoder).kept([16, 24])
    monkeypatch.setattr(PromptEncoder, "encode", lambda *given: pytest.fail("it was encoded"))
    assert kept.parts(16).t5.shape[1] == 16 and kept.parts(24).t5.shape[1] == 24 and kept.encoder is None
    with pytest.raises(InputError, match=r"\[16, 24\], not 8"):
        kept.parts(8)


def test_a_glance_at_an_encoder_that_is_as_before_reads_no_large_weights_again(encoder, monkeypatch):
    from latentfm.models import prints

    module = torch.nn.Sequential(torch.nn.Linear(300, 400), torch.nn.LayerNorm(400))
    module.config = encoder.encoders[0].config
    ids, full = torch.zeros(1, 4, dtype=torch.long), []
    monkeypatch.setattr(prints, "full_print", lambda tensors, whole=prints.full_print: full.append(tensors) or whole(tensors))

    def times_read(change) -> int:
        full.clear()
        before = prints.encoder_print(module, ids)
        full.clear()
        change(module)
        assert prints.encoder_print(module, ids) != before
        return len(full)

    def in_place(module):
        with torch.no_grad():
            module[0].weight[1, 1] += 1.0

    def past_autograd(module):  # as adapters are merged
        module[0].weight.data += torch.outer(torch.ones(400), torch.linspace(0.1, 0.2, 300))

    def another_tensor(module):
        module[0].weight.data = module[0].weight.data.clone().index_fill_(0, torch.tensor([3]), 1.0)

    def a_setting(module):
        module[1].eps = 0.1

    assert [times_read(change) for change in (in_place, past_autograd, another_tensor, a_setting)] == [1, 1, 1, 0]
    full.clear()
    assert prints.encoder_print(module, ids) == prints.encoder_print(module.train(), ids) != prints.encoder_print(module, ids + 1)
    assert not full
    with torch.inference_mode():  # whose tensors have no version
        kept = torch.nn.Sequential(torch.nn.Linear(300, 400), torch.nn.LayerNorm(400))
        kept.config = module.config
        before = prints.encoder_print(kept, ids)
        kept[0].weight[1, 1] += 1.0
    assert prints.encoder_print(kept, ids) != before
