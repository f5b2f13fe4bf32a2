"""What a pipeline's components are, and say of themselves, counts at every call: encoders, schedulers, modes, the folder's own words."""

import copy
import json
import os
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from drawn import quiet
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from latentfm.errors import InputError
from latentfm.interchange.components import load_scheduler, scheduler_from
from latentfm.models.manifest import MANIFEST
from latentfm.models.mmdit import MMDiT
from latentfm.pipelines.text_to_image import LatentFMPipeline

ROUNDING = 2e-5
CALL = {"prompt": "a red apple", "num_inference_steps": 4, "guidance_scale": 5.0, "max_sequence_length": 16, "output_type": "latent"}


@pytest.fixture(scope="module")
def loaded(saved):
    return [kind.from_pretrained(saved, torch_dtype=torch.float32) for kind in (StableDiffusion3Pipeline, LatentFMPipeline)]


@pytest.fixture
def both(loaded):
    """The folder in stock diffusers and here, each to be changed."""
    return [quiet(copy.deepcopy(pipe)) for pipe in loaded]


def draw(pipe, **changes):
    return pipe(**{**CALL, "generator": torch.Generator().manual_seed(0), **changes}).images


def gap(a, b):
    return float((a.float() - b.float()).abs().max())


def assert_changed_alike(both, change):
    """What `change` does to a pipeline moves its picture, here as in stock diffusers."""
    before = draw(both[1])
    for pipe in both:
        change(pipe)
    after = draw(both[1])
    assert gap(draw(both[0]), after) < ROUNDING < 50 * ROUNDING < gap(before, after)


def without_t5(pipe):
    pipe.text_encoder_3 = pipe.tokenizer_3 = None


def edited(pipe):
    with torch.no_grad():
        pipe.text_encoder_2.text_model.encoder.layers[0].mlp.fc2.weight.mul_(-50)


def edited_past_autograd(pipe):
    """One number, of which no version counter is told."""
    pipe.text_encoder.text_model.final_layer_norm.bias.data[3] += 30


def another(pipe):
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    edited_past_autograd(pipe)


def another_tokenizer(pipe):
    """Whose padding is another token: stock's second tokenizer in the place of the first."""
    pipe.tokenizer = pipe.tokenizer_2


def lora(pipe):
    torch.manual_seed(1)
    pipe.text_encoder_3.add_adapter(LoraConfig(r=4, lora_alpha=32, target_modules=["q", "v"], init_lora_weights=False))


def hooked(pipe):
    pipe.text_encoder_3.encoder.final_layer_norm.register_forward_hook(lambda module, given, answer: answer * 1.5)


CHANGES = [without_t5, edited, edited_past_autograd, another, another_tokenizer, lora, hooked]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_guidance_moves_away_from_what_the_loaded_encoders_make_of_no_prompt(both, change):
    assert_changed_alike(both, change)


def test_components_given_to_from_pretrained_count_too(both, saved, tmp_path):
    """Also where the folder is of an earlier version, whose null condition does not say which encoders made it."""
    edited_past_autograd(both[0])
    old = shutil.copytree(saved, tmp_path / "old")
    save_file(load_file(saved / "null_condition.safetensors"), old / "null_condition.safetensors")
    (old / MANIFEST).unlink()
    for folder in (saved, old):
        pipe = quiet(LatentFMPipeline.from_pretrained(folder, text_encoder=both[0].text_encoder))
        assert gap(draw(pipe), draw(both[0])) < ROUNDING < 50 * ROUNDING < gap(draw(pipe), draw(both[1]))


def test_what_matches_is_read_and_not_made(both, monkeypatch):
    monkeypatch.setattr("latentfm.models.text.PromptEncoder.encode", lambda *given: pytest.fail("it was encoded"))
    assert both[1].null.parts(16).t5.shape == (1, 16, 48)
    edited(both[1])
    with pytest.raises(pytest.fail.Exception):
        both[1].null.parts(16)


def test_what_is_saved_belongs_to_what_is_saved_with_it(both, tmp_path):
    edited(both[1])
    both[1].save_pretrained(tmp_path / "again")
    again = quiet(LatentFMPipeline.from_pretrained(tmp_path / "again"))
    found = load_file(tmp_path / "again" / "null_condition.safetensors")
    for name, value in both[1].prompt_encoder.encode([""], 16).items():
        assert gap(found[f"16.{name}"], value) < 1e-6
    assert gap(draw(again), draw(both[1])) < ROUNDING


def test_a_null_condition_of_ones_own_is_guided_against(both):
    from latentfm import NullCondition

    before, parts = draw(both[1]), both[1].null.parts(16)
    both[1].null = NullCondition(by_length={16: parts.map(lambda value: value + 1)})
    assert gap(draw(both[1]), before) > 50 * ROUNDING
    assert gap(draw(both[1], guidance_scale=1.0), draw(both[0], guidance_scale=1.0)) < ROUNDING


@pytest.mark.parametrize("part", ["transformer", "text_encoder_3"])
def test_no_dropout_is_drawn_and_the_modes_come_back(both, part):
    for pipe in both:
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=32, target_modules=["to_q", "q"], init_lora_weights=False, lora_dropout=0.5)
        getattr(pipe, part).add_adapter(config)
        getattr(pipe, part).eval()
    expected = draw(both[0])
    network = getattr(both[1], part).train()
    modes = {name: module.training for name, module in network.named_modules()}
    assert gap(draw(both[1]), expected) < ROUNDING and any(modes.values())
    assert {name: module.training for name, module in network.named_modules()} == modes


def test_what_the_folder_says_goes_with_the_components(both, saved):
    ours = both[1]
    moved = quiet(LatentFMPipeline(**ours.components))
    assert moved.max_sequence_length == 16 and moved.null.by_length.keys() == {16}
    given = {"max_sequence_length": None}
    assert gap(draw(moved, **given), draw(ours, **given)) == 0.0
    assert gap(draw(ours, **given), draw(ours, max_sequence_length=24)) > 50 * ROUNDING
    bare = {name: None for name in ours.components if name.startswith(("text_encoder", "tokenizer"))}
    encoded, _, pooled, _ = both[0].encode_prompt("a red apple", None, None, max_sequence_length=16)
    embeds = {"prompt_embeds": encoded, "pooled_prompt_embeds": pooled}
    no_texts = quiet(LatentFMPipeline(**ours.components | bare))
    assert gap(draw(no_texts, prompt=None, **embeds, **given), draw(ours)) < ROUNDING
    apart = MMDiT.from_pretrained(saved, subfolder="transformer")
    assert gap(draw(quiet(LatentFMPipeline(**ours.components | {"transformer": apart})), **given), draw(ours)) < ROUNDING
    assert quiet(LatentFMPipeline(**both[0].components)).max_sequence_length == 256  # stock diffusers' own


SCHEDULERS = [
    {"shift": 3.0}, {"shift": 0.2}, {"shift": 2.0, "shift_terminal": 0.2}, {"use_exponential_sigmas": True}, {"use_karras_sigmas": True},
    {"use_beta_sigmas": True}, {"use_dynamic_shifting": True, "base_shift": 0.2, "max_shift": 3.0, "max_image_seq_len": 64},
    {"use_dynamic_shifting": True, "base_image_seq_len": 4}, {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    {"num_train_timesteps": 1000, "shift": 1.5}, {"invert_sigmas": True},
]  # fmt: skip


@pytest.mark.parametrize("config", SCHEDULERS, ids=str)
def test_every_word_of_a_schedulers_configuration_counts(both, config):
    def change(pipe):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(**config)

    assert_changed_alike(both, change)


def test_what_is_set_on_a_scheduler_after_it_was_made_counts(both):
    def change(pipe):
        pipe.scheduler.set_shift(4.0)
        pipe.scheduler.sigma_min = 0.2

    assert_changed_alike(both, change)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=0.0), FlowMatchEulerDiscreteScheduler(shift=float("nan")),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=256),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=None),
        DDIMScheduler(), EulerDiscreteScheduler(), UniPCMultistepScheduler(use_flow_sigmas=True),  # which are told noise, not velocity
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_scheduler_that_cannot_be_followed_is_refused(both, scheduler):
    both[1].scheduler = scheduler
    with pytest.raises(InputError, match="cannot be followed for 4 steps") as caught:
        draw(both[1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(num_train_timesteps=500), "counts time to 500 .*the network to 1000"),
        (FlowMatchHeunDiscreteScheduler(), "no way from noise to a picture"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_times_that_a_solver_of_ours_cannot_follow_are_refused(both, scheduler, message):
    both[1].scheduler = scheduler
    with pytest.raises(InputError, match=message) as caught:
        draw(both[1], solver="midpoint")
    assert "give a schedule" in str(caught.value)


def test_a_folder_with_another_scheduler_is_drawn_with_that(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "heun")
    text = (folder / "model_index.json").read_text()
    (folder / "model_index.json").write_text(text.replace("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"))
    (folder / MANIFEST).unlink()
    config = json.loads((saved / "scheduler" / "scheduler_config.json").read_text())
    assert isinstance(load_scheduler(folder), FlowMatchHeunDiscreteScheduler) and load_scheduler(saved).config.shift == config["shift"]
    assert isinstance(LatentFMPipeline.from_pretrained(folder).scheduler, FlowMatchHeunDiscreteScheduler)
    with pytest.raises(InputError, match="heun has a FlowMatchHeunDiscreteScheduler, which steps in another way"):
        scheduler_from(config | {"_class_name": "FlowMatchHeunDiscreteScheduler"}, folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"shift": "x"}))
    (folder / "model_index.json").write_text((saved / "model_index.json").read_text())
    with pytest.raises(InputError, match=r"heun/scheduler/scheduler_config.json says shift \"x\", which is no finite number"):
        load_scheduler(folder)


def test_what_is_written_follows_the_umask(both, tmp_path):
    before = os.umask(0o027)
    try:
        both[1].save_pretrained(tmp_path / "saved")
        both[1].transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
        both[1].save_lora_weights(tmp_path / "lora", transformer_lora_layers=get_peft_model_state_dict(both[1].transformer))
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 10 and {file.stat().st_mode & 0o777 for file in files} == {0o640}


def test_a_vae_that_makes_no_numbers_makes_no_picture(both):
    with torch.no_grad():
        both[1].vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="the VAE decodes to numbers that are not finite in float32: its weights are damaged"):
        draw(both[1], output_type="pil")
    assert draw(both[1]).isfinite().all()


def test_components_of_another_model_are_said(both):
    sizes = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    other = AutoencoderTiny(latent_channels=8, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), **sizes)
    for parts, says in (
        ({"vae": other}, "the vae's latents have 8 channels, the transformer's 4: it cannot decode here"),
        ({"text_encoder": both[1].text_encoder_2, "tokenizer": both[1].tokenizer_2}, "answers of the CLIPs are 48 wide, .* reads 40"),
    ):
        with pytest.raises(InputError, match=says):
            draw(quiet(LatentFMPipeline(**both[1].components | parts)), output_type="pt")
    with pytest.raises(InputError, match="text_encoder_3=.* is no text_encoder_3"):
        LatentFMPipeline.from_pipe(both[1], text_encoder_3=both[1].text_encoder)


def test_what_methods_beside_the_call_are_given_is_checked(both, tmp_path):
    pipe, taken = both[1], tmp_path / "file"
    taken.write_text("")
    for call, says in (
        (lambda: LatentFMPipeline.from_pipe("a/folder"), "not 'a/folder'; from_pretrained loads a folder's"),
        (lambda: LatentFMPipeline.from_pipe(pipe, dtype="half-ish"), "dtype 'half-ish' is none"),
        (lambda: LatentFMPipeline.from_pipe(pipe, dtype={"vae": torch.bfloat16}), "one dtype for all components"),
        (lambda: pipe.preview(torch.zeros(1, 16, 8, 8)), r"\(any, 4, any, any\) can be seen, not a tensor of shape \(1, 16, 8, 8\)"),
        (lambda: pipe.save_pretrained(taken), f"save_directory {taken}: {taken} is a file, not a folder"),
        (lambda: pipe.save_pretrained(None), "save_directory None is no path"),
        (lambda: pipe.save_pretrained(tmp_path / "new", variant="a/b"), "variant 'a/b' is no part of a file's name"),
    ):
        with pytest.raises(InputError, match=says):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert LatentFMPipeline.from_pipe(pipe, dtype="bfloat16").dtype is torch.bfloat16
