"""What diffusers expects of any pipeline of its own, asked of its SD3 pipelines and of ours alike."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from drawn import quiet
from pipelines.peers import OTHER, PROMPT, half_mask, picture

from latentfm import LatentFMImg2ImgPipeline, LatentFMInpaintPipeline, LatentFMPipeline

CLASSES = [StableDiffusion3Pipeline, LatentFMPipeline, StableDiffusion3Img2ImgPipeline, LatentFMImg2ImgPipeline, LatentFMInpaintPipeline]
TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
pytestmark = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def loaded(cls, folder, **given):
    return quiet(cls.from_pretrained(folder, **{"dtype": torch.float32, **given}))


@pytest.fixture
def pipe(cls, tiny_folder):
    return loaded(cls, tiny_folder)


def inputs(cls, **changes):
    """A call's arguments: pixels come back as arrays."""
    own = {"image": picture(), "strength": 0.8} if any(task in cls.__name__ for task in ("Img2Img", "Inpaint")) else {}
    own |= {"mask_image": half_mask()} if "Inpaint" in cls.__name__ else {}
    given = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np", "max_sequence_length": 16}
    return {**given, **own, "generator": torch.Generator().manual_seed(0), **changes}


def draw(pipe, **changes):
    found = pipe(**inputs(type(pipe), **changes)).images
    return found if torch.is_tensor(found) else torch.as_tensor(np.asarray(found))


def apart(a, b) -> float:
    assert a.shape == b.shape and a.isfinite().all()
    return float((a.float() - b.float()).abs().max())


def test_components_are_those_of_the_constructor(pipe):
    assert set(pipe.components) == set(inspect.signature(type(pipe).__init__).parameters) - {"self"}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_batches_have_their_size(pipe, count):
    assert len(draw(pipe, prompt=[PROMPT] * count)) == count


def test_a_picture_of_a_batch_is_the_picture_alone(pipe):
    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    images = {"image": [picture(), picture()]} if "image" in inputs(type(pipe)) else {}
    both = draw(pipe, prompt=[PROMPT, OTHER], generator=seeded(0, 1), **images)
    assert apart(both[:1], draw(pipe, generator=seeded(0))) < 1e-4


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("prompts", [1, 2])
def test_num_images_per_prompt(pipe, prompts, each):
    assert len(draw(pipe, prompt=[PROMPT] * prompts, num_images_per_prompt=each)) == prompts * each


def test_a_dict_and_a_tuple_say_the_same(pipe):
    found = pipe(**inputs(type(pipe)), return_dict=False)
    assert isinstance(found, tuple) and apart(torch.as_tensor(found[0]), draw(pipe)) == 0.0


def test_save_and_load(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert apart(draw(loaded(type(pipe), tmp_path)), draw(pipe)) < 1e-4


def test_optional_components_stay_absent(pipe, tmp_path):
    for name in ("image_encoder", "feature_extractor"):
        assert getattr(pipe, name) is None
    pipe.save_pretrained(tmp_path)
    again = loaded(type(pipe), tmp_path)
    assert again.image_encoder is None and again.feature_extractor is None
    assert apart(draw(again), draw(pipe)) < 1e-4


def test_save_and_load_in_bfloat16(cls, tiny_folder, tmp_path):
    pipe = loaded(cls, tiny_folder, dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    again = loaded(cls, tmp_path, dtype=torch.bfloat16)
    assert {part.dtype for part in (again.transformer, again.vae, again.text_encoder)} == {torch.bfloat16}
    assert apart(draw(again), draw(pipe)) < 1e-2


def test_to_a_dtype(pipe):
    pipe.to(dtype=torch.bfloat16)
    assert pipe.dtype == pipe.transformer.dtype == torch.bfloat16
    assert draw(pipe, output_type="latent").dtype == torch.bfloat16


def test_guidance_is_off_at_one(pipe):
    guided = draw(pipe)
    assert pipe.do_classifier_free_guidance
    assert apart(draw(pipe, guidance_scale=1.0), guided) > 1e-4 and not pipe.do_classifier_free_guidance


def test_callbacks_are_given_what_they_ask_for_and_change_it(pipe):
    names = [name for name in pipe._callback_tensor_inputs if "negative" not in name]
    steps = []

    def all_of_them(pipe, i, t, tensors):
        assert set(tensors) == set(names)
        steps.append(i)
        if i == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    found = draw(pipe, output_type="latent", callback_on_step_end=all_of_them, callback_on_step_end_tensor_inputs=names)
    assert found.abs().sum() == 0 and steps == list(range(pipe.num_timesteps))


def test_guidance_may_change_at_each_step(pipe):
    def stronger(pipe, i, t, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    changed = draw(pipe, callback_on_step_end=stronger, callback_on_step_end_tensor_inputs=["latents"])
    assert pipe.guidance_scale == 5.0 + pipe.num_timesteps and apart(changed, draw(pipe)) > 1e-5


def test_attention_slicing_changes_nothing(pipe):
    before = draw(pipe)
    pipe.enable_attention_slicing(slice_size=1)
    assert apart(draw(pipe), before) < 1e-4


def test_vae_slicing_and_tiling(pipe):
    before = draw(pipe, prompt=[PROMPT, OTHER])
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    assert apart(draw(pipe, prompt=[PROMPT, OTHER]), before) < 1e-4


def test_model_offload(pipe):
    before = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert apart(draw(pipe), before) < 1e-4
    assert apart(draw(pipe), before) < 1e-4


@pytest.mark.parametrize("kind", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}])
def test_group_offload(pipe, kind):
    before, here = draw(pipe), torch.device("cpu")
    pipe.enable_group_offload(onload_device=here, offload_device=here, **kind)
    assert apart(draw(pipe), before) < 1e-4


def test_fused_projections(pipe, cls, request):
    if "LatentFM" not in cls.__name__:
        request.applymarker(pytest.mark.xfail(reason="diffusers' fused processor leaves the query's and key's norms out", strict=True))
    before = draw(pipe)
    pipe.transformer.fuse_qkv_projections()
    fused = draw(pipe)
    pipe.transformer.unfuse_qkv_projections()
    assert apart(fused, before) < 1e-4 and apart(draw(pipe), before) < 1e-4


def test_layerwise_casting(pipe):
    before = draw(pipe)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert 0 < apart(draw(pipe), before) < 0.5


def test_encoding_apart_from_drawing(cls, tiny_folder, pipe):
    encoder = cls.from_pretrained(tiny_folder, transformer=None, vae=None, dtype=torch.float32)
    embeds, negative, pooled, negative_pooled = encoder.encode_prompt(PROMPT, None, None, max_sequence_length=16)
    drawer = loaded(cls, tiny_folder, **dict.fromkeys(TEXT))
    found = draw(
        drawer, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative, pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled,
    )  # fmt: skip
    assert apart(found, draw(pipe)) < 1e-4


@pytest.mark.parametrize("other", CLASSES[:4], ids=lambda cls: cls.__name__)
def test_from_pipe_and_back(pipe, other):
    before = draw(pipe)
    back = quiet(type(pipe).from_pipe(other.from_pipe(pipe)))
    for name, part in pipe.components.items():
        assert part is getattr(back, name)
    assert apart(draw(back), before) < 1e-4


def test_a_variant_that_is_not_there(cls, tiny_folder):
    with pytest.raises((ValueError, OSError), match="fp16"):
        cls.from_pretrained(tiny_folder, variant="fp16")


def test_variants(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert any("fp16" in file.name for file in tmp_path.rglob("*.safetensors"))
    assert apart(draw(loaded(type(pipe), tmp_path, variant="fp16")), draw(pipe)) < 1e-4


def test_dtypes_by_component(cls, tiny_folder):
    pipe = cls.from_pretrained(tiny_folder, torch_dtype={"transformer": torch.bfloat16, "default": torch.float32})
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.text_encoder.dtype == pipe.vae.dtype == torch.float32


def test_the_scheduler_is_made_anew_from_its_configuration(pipe):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=3.0)
    assert draw(pipe).isfinite().all() and pipe.scheduler.config.shift == 3.0
