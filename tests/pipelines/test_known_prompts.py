"""A prompt that was read before is not read again, unless anything that its answer depends on has changed."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from latentfm import LatentFMPipeline
from latentfm.pipelines import known_prompts


@pytest.fixture
def pipe(tiny_folder) -> LatentFMPipeline:
    return LatentFMPipeline.from_pretrained(tiny_folder)


@pytest.fixture
def read(pipe):
    """A function that has the pipeline encode prompts, and tells how often each of its encoders was asked."""

    def asked(*args, **kwargs) -> tuple[list[torch.Tensor], list[int]]:
        counts = [0, 0, 0]
        encoders = (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
        forwards = [type(encoder).forward for encoder in encoders]
        with pytest.MonkeyPatch.context() as patch:
            for kind in {type(encoder) for encoder in encoders}:

                def counting(self, *args, forward=kind.forward, **kwargs):
                    counts[next(i for i, encoder in enumerate(encoders) if encoder is self)] += 1
                    return forward(self, *args, **kwargs)

                patch.setattr(kind, "forward", counting)
            found = [value for value in pipe.encode_prompt(*args, **kwargs) if value is not None]
        assert forwards == [type(encoder).forward for encoder in encoders]
        return found, counts

    return asked


def fresh(pipe, *args, **kwargs) -> list[torch.Tensor]:
    """What the pipeline makes of prompts that it does not know yet."""
    pipe.known_prompts = known_prompts.KnownPrompts()
    return [value for value in pipe.encode_prompt(*args, **kwargs) if value is not None]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_prompt_is_read_once(read):
    first, asked = read(["a cat", "a dog"], negative_prompt="blue")
    assert asked == [2, 2, 2]
    again, asked = read(["a cat", "a dog"], negative_prompt="blue", num_images_per_prompt=2)
    assert asked == [0, 0, 0]
    assert same([value.repeat_interleave(2, dim=0) for value in first], again)
    for value in again:
        value.zero_()  # the caller's own
    assert same(read(["a cat", "a dog"], negative_prompt="blue")[0], first)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a cut"}, {"prompt_2": "a dog"}, {"prompt_3": "a dog"}, {"clip_skip": 1}, {"max_sequence_length": 20},
        {"prompt": ["a cat", "a cat"]},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_prompt_is_read(pipe, read, change):
    given = {"prompt": "a cat", "do_classifier_free_guidance": False}
    read(**given)
    found, asked = read(**given | change)
    assert asked == [1, 1, 1]
    assert same(found, fresh(pipe, **given | change))


@torch.no_grad()
def changed_weights(pipe):
    pipe.text_encoder_3.shared.weight.mul_(1.5)


def changed_unseen_by_autograd(pipe):
    pipe.text_encoder.text_model.embeddings.position_embedding.weight.data.add_(1.0)


def changed_tokenizer(pipe):
    folder = pipe.config._name_or_path
    pipe.tokenizer = pipe.tokenizer_2 = type(pipe.tokenizer).from_pretrained(folder, subfolder="tokenizer", model_max_length=9)


def without_t5(pipe):
    pipe.text_encoder_3 = None


def with_a_hook(pipe):
    pipe.text_encoder.register_forward_hook(lambda module, args, out: None)


def with_an_adapter(pipe):
    inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]), pipe.text_encoder)
    pipe.text_encoder.peft_config = {"default": None}


def in_bfloat16(pipe):
    pipe.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [changed_weights, changed_unseen_by_autograd, changed_tokenizer, without_t5, with_a_hook, with_an_adapter, in_bfloat16],
)
def test_other_encoders_read_again(pipe, change):
    given = {"prompt": "a cat with a very long tail and a hat", "do_classifier_free_guidance": False}
    before = fresh(pipe, **given)
    change(pipe)
    found = [value for value in pipe.encode_prompt(**given) if value is not None]
    assert same(found, fresh(pipe, **given))
    assert same(found, before) == (change is with_a_hook)


def test_autocast_reads_again(pipe):
    given = {"prompt": "a cat", "do_classifier_free_guidance": False}
    before = fresh(pipe, **given)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = pipe.encode_prompt(**given)[0]
    assert not torch.equal(narrow.float(), before[0]) and same([v for v in pipe.encode_prompt(**given) if v is not None], before)


def test_what_is_kept_is_bounded(pipe, read, monkeypatch):
    read("a cat", do_classifier_free_guidance=False)
    one = known_prompts.size_of(next(iter(pipe.known_prompts.answers.values())))
    monkeypatch.setattr(known_prompts, "MOST_BYTES", 2 * one)
    for prompt in ("a dog", "a cat", "a bird"):  # the cat is asked for again, so that the dog is the oldest
        read(prompt, do_classifier_free_guidance=False)
    assert len(pipe.known_prompts.answers) == 2
    assert [sum(read(prompt, do_classifier_free_guidance=False)[1]) for prompt in ("a cat", "a bird", "a dog")] == [0, 0, 3]
    monkeypatch.setattr(known_prompts, "MOST_BYTES", one - 1)
    read("a fox", do_classifier_free_guidance=False)
    assert sum(read("a fox", do_classifier_free_guidance=False)[1]) == 3
