"""open_clip's text towers and vocabulary as transformers'."""

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from latentfm.errors import InputError
from latentfm.interchange.open_clip import clip_tokenizer, open_clip_text_to_transformers

VOCABULARY, LENGTH = 60, 12


def open_clip_model(quick_gelu: bool = False, embed_dim: int = 24, **text) -> CLIP:
    """A tiny open_clip CLIP with every text parameter random, biases and norms too."""
    torch.manual_seed(0)
    settings = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 32, "heads": 4, "layers": 3} | text
    model = CLIP(
        embed_dim=embed_dim, vision_cfg=CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=8, image_size=16),
        text_cfg=CLIPTextCfg(**settings), quick_gelu=quick_gelu,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("visual."):
                centre = 1.0 if name.split(".")[-2:][0] in ("ln_1", "ln_2", "ln_final") and name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    return model.eval()


def prompts(pad: int) -> torch.Tensor:
    """Token ids [4, LENGTH]: start (58), words, end (59), then `pad`; the last row has no padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((4, LENGTH), pad)
    for row, words in enumerate((1, 4, 7, LENGTH - 2)):
        ids[row, 0], ids[row, words + 1] = VOCABULARY - 2, VOCABULARY - 1
        ids[row, 1 : words + 1] = torch.randint(1, VOCABULARY - 2, (words,), generator=generator)
    return ids


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("pad", [0, VOCABULARY - 1])
def test_open_clip_text_tower_is_the_transformers_one(quick_gelu, pad):
    model = open_clip_model(quick_gelu)
    tower = open_clip_text_to_transformers(model)
    assert tower.config.hidden_act == ("quick_gelu" if quick_gelu else "gelu") and not tower.training
    states = []
    for block in model.transformer.resblocks:
        block.register_forward_hook(lambda _, __, out: states.append(out))
    ids = prompts(pad)
    with torch.no_grad():
        theirs = model.encode_text(ids)
        ours = tower(ids, output_hidden_states=True)
    assert theirs.shape == (4, 24) and theirs.std() > 0.1
    torch.testing.assert_close(ours.text_embeds, theirs, rtol=0, atol=1e-5)
    assert len(ours.hidden_states) == len(states) + 1 == 4
    for index, state in enumerate(states):
        torch.testing.assert_close(ours.hidden_states[index + 1], state, rtol=0, atol=1e-5)
    assert (ours.hidden_states[-2] - ours.hidden_states[-1]).abs().max() > 0.1


def test_the_two_activations_are_told_apart():
    ids = prompts(0)
    with torch.no_grad():
        plain, quick = (open_clip_text_to_transformers(open_clip_model(q))(ids).text_embeds for q in (False, True))
    assert (plain - quick).abs().max() > 1e-3


def test_the_converted_tower_is_a_copy_and_survives_saving(tmp_path):
    from transformers import CLIPTextModelWithProjection

    model = open_clip_model()
    tower = open_clip_text_to_transformers(model)
    with torch.no_grad():
        before = tower(prompts(0)).text_embeds
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(tower(prompts(0)).text_embeds, before)
        tower.save_pretrained(tmp_path)
        assert torch.equal(CLIPTextModelWithProjection.from_pretrained(tmp_path)(prompts(0)).text_embeds, before)


@pytest.mark.parametrize(
    "unlike",
    [
        {"no_causal_mask": True}, {"pool_type": "first"}, {"proj_bias": True}, {"proj_type": "none", "width": 24},
        {"ls_init_value": 0.1}, {"qk_norm": True}, {"act_kwargs": {"approximate": "tanh"}},
    ],
)  # fmt: skip
def test_a_tower_without_a_transformers_twin_is_refused(unlike):
    with pytest.raises(InputError, match=r"open_clip text tower"):
        open_clip_text_to_transformers(open_clip_model(**unlike))


EXCLAMATION = 256  # "!" at the end of a word; to SD3's second tokenizer, which pads with "!", it is padding wherever it stands
TEXTS = [
    "", "a photo of a cat", "A red apple, NOTO style!", "don't, it's they'll we've I'm you'd", "x" * 300, "one  two\tthree\nfour",
    "naïve café Ångström", "猫の写真 и кошка", "3.14159 + 2^10 = 1,027", "an emoji 🍕 and 👩‍🚀",
    "snake_case, CamelCase; (brackets) [and] {so} on…",
    "the quick brown fox jumps over the lazy dog " * 12,
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_clips_tokenizers_are_open_clips(text):
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()(text)[0].tolist()
    end = theirs.index(49407) + 1
    for pad_token, pad in (("<|endoftext|>", 49407), ("!", 0)):
        tokenizer = clip_tokenizer(pad_token)
        assert (tokenizer.model_max_length, tokenizer.pad_token_id, len(tokenizer)) == (77, pad, 49408)
        ours = tokenizer(text, padding="max_length", truncation=True).input_ids
        words = theirs[:end] if pad else [0 if word == EXCLAMATION else word for word in theirs[:end]]
        assert ours[:end] == words and ours[end:] == [pad] * (77 - end)


def test_a_saved_clip_tokenizer_loads_the_same(tmp_path):
    from transformers import CLIPTokenizer

    clip_tokenizer("!", 20).save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert (again.pad_token_id, again.model_max_length) == (0, 20)
    assert again("a cat", padding="max_length").input_ids == [49406, 320, 2368, 49407] + [0] * 16
