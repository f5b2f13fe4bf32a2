"""Pictures from pictures: redrawn, drawn anew in a part, inverted and edited; seeds and their variations; previews; long prompts."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from drawn import quiet
from PIL import Image
from pipelines.peers import OTHER, PROMPT, half_mask, picture, run
from tiny import SENTENCES, tiny_pipeline
from torch.nn import functional as F

from latentfm import LatentFMImg2ImgPipeline, LatentFMInpaintPipeline, LatentFMPipeline, bundled_model
from latentfm.errors import InputError
from latentfm.models import vae as vae_room
from latentfm.models.preview import colours_of, latent_rgb
from latentfm.pipelines.starting import turned

LONG = " and ".join(SENTENCES)


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return quiet(LatentFMPipeline.from_pretrained(tiny_folder))


@pytest.fixture
def fresh(tiny_folder):
    return quiet(LatentFMPipeline.from_pretrained(tiny_folder))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def clean(pipe, image: Image.Image) -> torch.Tensor:
    """The latents of a picture, the posterior's mode."""
    return vae_room.encode(pipe.vae, pipe.image_processor.preprocess(image), sample=False)


class TestOneCallForAll:
    def test_image_and_strength_are_image_to_images(self, pipe):
        redraw = quiet(LatentFMImg2ImgPipeline.from_pipe(pipe))
        assert apart(run(pipe, image=picture(), strength=0.5), run(redraw, image=picture(), strength=0.5)) == 0.0
        assert apart(run(pipe, image=picture()), run(pipe, image=picture(), strength=0.6)) == 0.0  # stock's own

    def test_mask_is_inpaintings(self, pipe):
        fill = quiet(LatentFMInpaintPipeline.from_pipe(pipe))
        given = {"image": picture(), "mask_image": half_mask(), "strength": 0.8}
        assert apart(run(pipe, **given), run(fill, **given)) == 0.0

    def test_the_other_classes_take_ours_by_name(self, pipe):
        redraw = quiet(LatentFMImg2ImgPipeline.from_pipe(pipe))
        found = run(redraw, image=picture(), strength=0.5, solver="heun", guidance="apg", schedule="karras")
        assert apart(found, run(pipe, image=picture(), strength=0.5, solver="heun", guidance="apg", schedule="karras")) == 0.0
        assert apart(found, run(redraw, image=picture(), strength=0.5)) > 1e-3

    def test_the_other_classes_need_their_picture_and_mask(self, pipe):
        redraw, fill = (quiet(cls.from_pipe(pipe)) for cls in (LatentFMImg2ImgPipeline, LatentFMInpaintPipeline))
        for call, given, says in (
            (redraw, {}, "give image, the picture to begin from"), (fill, {}, "give image, "),
            (fill, {"image": picture()}, "give mask_image, white"),
        ):  # fmt: skip
            with pytest.raises(InputError, match=says):
                run(call, **given)

    def test_a_crop_needs_a_mask_that_it_can_be_cut_by(self, pipe):
        for mask, says in (
            (np.ones((32, 32), np.float32), "as pictures of PIL's"), (half_mask().resize((8, 8)), "does not fit image of"),
            (Image.new("L", picture().size), "black everywhere"),
        ):  # fmt: skip
            with pytest.raises(InputError, match=says):
                run(pipe, image=picture(), mask_image=mask, padding_mask_crop=4)

    def test_strength_leaves_steps_out(self, pipe):
        run(pipe, image=picture(), strength=0.25, num_inference_steps=8)
        assert pipe.num_timesteps == pipe.num_evaluations == 2
        run(pipe, image=picture(), strength=0.25, num_inference_steps=8, solver="midpoint")
        assert pipe.num_timesteps == 2 and pipe.num_evaluations == 4

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"image": 3}, "image 3 is no picture"), ({"image": "x.png"}, "image 'x.png' is no picture"),
            ({"image": torch.zeros(1, 5, 32, 32)}, r"image of shape \(1, 5, 32, 32\)"),
            ({"mask_image": half_mask()}, "mask_image needs image"),
            ({"image": picture(), "mask_image": 4}, "mask_image 4 is no picture"), ({"image": picture(), "strength": 1.5}, "strength 1.5"),
            ({"image": picture(), "strength": 0.0}, "less than one step"), ({"image": picture(), "strength": "x"}, "strength 'x'"),
            ({"image": [picture()] * 3, "prompt": [PROMPT, OTHER]}, "3 images for 2 pictures"),
            ({"image": picture(), "padding_mask_crop": 4}, "padding_mask_crop needs image and mask_image"),
            ({"seed": 1}, "generator or seed"), ({"seed": [1, 2], "generator": None}, "2 numbers in seed for 1 pictures"),
            ({"seed": "x", "generator": None}, "seed 'x'"), ({"seed": -1, "generator": None}, "seed -1"),
            ({"variation_seed": 1}, "need each other"), ({"variation_seed": 1, "variation_strength": 2}, "variation_strength 2"),
            ({"variation_strength": 0.5}, "need each other"), ({"long_prompts": "all"}, "no long_prompts 'all'; there are cut, chunks"),
            ({"sigmas": "x"}, "sigmas 'x' must be a list"), ({"sigmas": []}, "sigmas"), ({"sigmas": [1.0, None]}, "sigmas None"),
            ({"sigmas": [1.0], "schedule": "karras"}, "schedule 'karras' has times of its own"), ({"mu": "x"}, "mu 'x'"),
            ({"clip_skip": 5}, "clip_skip 5 leaves no layer"), ({"clip_skip": -1}, "clip_skip -1"),
            ({"skip_guidance_layers": 7}, "skip_guidance_layers must be a list"), ({"skip_guidance_layers": [9]}, "skip_guidance_layers 9"),
            ({"joint_attention_kwargs": 3}, "joint_attention_kwargs must be a dict"), ({"ip_adapter_image": picture()}, "load_ip_adapter"),
        ],
    )  # fmt: skip
    def test_bad_input_is_told(self, pipe, arguments, says):
        with pytest.raises(InputError, match=says):
            run(pipe, **arguments)


class TestInpainting:
    @pytest.mark.parametrize("arguments", [{}, {"solver": "heun"}, {"solver": "euler_maruyama"}, {"strength": 0.4}])
    def test_what_is_masked_off_is_kept_to_the_bit(self, pipe, arguments):
        kept = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        found = run(pipe, image=kept, mask_image=half_mask(), **arguments)
        assert torch.equal(found[..., :4], kept[..., :4]) and apart(found[..., 4:], kept[..., 4:]) > 0.1

    def test_in_bfloat16_too(self, tiny_folder):
        pipe = quiet(LatentFMPipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16))
        kept = torch.randn(1, 4, 8, 8).bfloat16()
        assert torch.equal(run(pipe, image=kept, mask_image=half_mask())[..., :4], kept[..., :4])

    def test_the_part_around_the_mask_is_drawn_at_full_size_and_put_back(self, pipe):
        image, mask = picture(side=96), Image.new("L", (96, 96))
        mask.paste(255, (40, 40, 56, 56))
        found = run(pipe, image=image, mask_image=mask, padding_mask_crop=8, strength=0.9, output_type="pil")[0].numpy().astype(int)
        assert found.shape == (96, 96, 3)
        changed = np.abs(found - np.asarray(image, int)).max(axis=2) > 2
        assert changed[42:54, 42:54].any() and not changed[:32].any() and not changed[:, 64:].any()

    def test_a_network_that_reads_the_mask(self, tmp_path):
        """As diffusers has it: 33 channels, the latents', the mask's and those of the masked picture."""
        from diffusers import StableDiffusion3InpaintPipeline

        folder = tiny_pipeline(tmp_path / "inpaint", channels=16, read_channels=33)
        given = {"image": picture(), "mask_image": half_mask()}
        theirs, ours = (
            run(quiet(cls.from_pretrained(folder, dtype=torch.float32)), **given)
            for cls in (StableDiffusion3InpaintPipeline, LatentFMInpaintPipeline)
        )
        # theirs takes the VAE's shift out of the masked picture once more where it is given as latents; as a picture both are alike
        assert apart(theirs, ours) < 1e-5


class TestInversion:
    @pytest.mark.parametrize(("solver", "most"), [("midpoint", 1e-2), ("heun", 1e-2), ("rk4", 1e-4)])
    def test_there_and_back(self, pipe, solver, most):
        given = {"prompt": PROMPT, "max_sequence_length": 16, "solver": solver, "num_inference_steps": 28, "guidance_scale": 1.0}
        noise = pipe.invert(picture(), **given)
        assert noise.dtype == torch.float32 and apart(noise, clean(pipe, picture())) > 0.1
        found = run(pipe, latents=noise, **given)
        assert apart(found, clean(pipe, picture())) < most

    def test_psnr_of_the_redrawn_picture_is_the_vaes(self, pipe):
        given = {"prompt": PROMPT, "max_sequence_length": 16, "num_inference_steps": 28, "guidance_scale": 1.0, "solver": "midpoint"}
        found = run(pipe, latents=pipe.invert(picture(), **given), output_type="pt", **given)
        by_vae = (vae_room.decode(pipe.vae, clean(pipe, picture())) / 2 + 0.5).clamp(0, 1)
        psnr = -10 * torch.log10((found - by_vae).square().mean())
        assert psnr > 35

    def test_half_way_and_another_prompt(self, pipe):
        given = {"max_sequence_length": 16, "num_inference_steps": 12, "strength": 0.5, "solver": "rk4"}
        state = pipe.invert(picture(), PROMPT, **given)
        back = run(pipe, latents=state, guidance_scale=1.0, **given)
        assert apart(back, clean(pipe, picture())) < 1e-3
        edited = run(pipe, latents=state, **given | {"prompt": OTHER, "guidance_scale": 4.0})
        assert apart(edited, back) > 1e-2

    def test_a_solver_that_cannot_go_back_is_refused(self, pipe):
        with pytest.raises(InputError, match="'euler_maruyama' cannot go back"):
            pipe.invert(picture(), PROMPT, solver="euler_maruyama")


class TestSeeds:
    def test_each_picture_has_its_own(self, pipe):
        both = run(pipe, generator=None, seed=[5, 9], num_images_per_prompt=2)
        for row, seed in enumerate((5, 9)):
            assert apart(both[row : row + 1], run(pipe, generator=None, seed=seed)) < 1e-5
        assert apart(run(pipe, generator=None, seed=5, num_images_per_prompt=2)[1:], run(pipe, generator=None, seed=6)) < 1e-5

    def test_a_seed_is_the_generator_of_that_seed(self, pipe):
        assert apart(run(pipe, generator=None, seed=3), run(pipe, 3)) == 0.0

    def test_a_variation_lies_between(self, pipe):
        first, other = run(pipe, generator=None, seed=1), run(pipe, generator=None, seed=2)
        seen = [run(pipe, generator=None, seed=1, variation_seed=2, variation_strength=share) for share in (1e-6, 0.2, 1.0)]
        assert apart(seen[0], first) < 1e-3 and apart(seen[2], other) < 1e-3
        assert apart(seen[1], first) < apart(seen[1], other)

    def test_noise_that_is_turned_is_still_noise(self):
        a, b = (torch.randn(2, 16, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
        for share in (0.0, 0.3, 0.5, 1.0):
            assert turned(a, b, share).std().item() == pytest.approx(1.0, abs=0.01)
        assert apart(turned(a, a, 0.5), a) < 1e-5


class TestPreview:
    def test_it_is_nearly_what_a_real_vae_makes(self):
        vae = AutoencoderKL.from_pretrained(bundled_model() / "vae", torch_dtype=torch.float32)
        pictures = torch.cat([VaeImageProcessor().preprocess(picture(seed, 64)) for seed in range(4)])
        latents = vae_room.encode(vae, pictures, sample=False)
        small = F.adaptive_avg_pool2d(pictures, latents.shape[-2:])
        found, mean = colours_of(latents, latent_rgb(vae)), small.mean(dim=(2, 3), keepdim=True)
        assert (found - small).square().mean() < 0.1 * (mean - small).square().mean()

    def test_at_each_step(self, fresh):
        seen = []

        def look(pipe, step, timestep, tensors):
            seen.append((tensors["denoised"].clone(), pipe.preview(tensors["denoised"])[0].size))
            return {}

        found = run(fresh, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["denoised"])
        assert [size for _, size in seen] == [(32, 32)] * 4
        assert apart(seen[-1][0], found) < 1e-5  # the last estimate is the picture
        assert apart(seen[0][0], found) > 1e-3

    def test_steps_that_stand_still_have_one_too(self, fresh):
        seen = []

        def look(pipe, step, timestep, tensors):
            seen.append((tensors["latents"].clone(), tensors["denoised"].clone()))
            return {}

        run(fresh, zero_init=2, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["latents", "denoised"])
        assert len(seen) == 4 and all(torch.equal(*pair) for pair in seen[:2]) and apart(*seen[2]) > 1e-3

    def test_it_is_saved_with_the_vae_and_stays_with_it(self, fresh, tmp_path, tiny_folder):
        fitted = latent_rgb(fresh.vae)
        fresh.save_pretrained(tmp_path / "saved")
        loaded = LatentFMPipeline.from_pretrained(tmp_path / "saved")
        assert torch.equal(loaded.vae.latent_rgb, fitted) and "latent_rgb" not in loaded.info
        other = LatentFMPipeline.from_pretrained(tiny_folder).vae
        assert getattr(LatentFMPipeline.from_pretrained(tmp_path / "saved", vae=other).vae, "latent_rgb", None) is None


class TestLongPrompts:
    def test_a_short_prompt_is_read_as_always(self, pipe):
        assert apart(run(pipe, prompt="the moon", long_prompts="chunks"), run(pipe, prompt="the moon")) == 0.0

    def test_the_last_words_count(self, pipe):
        cut = [run(pipe, prompt=LONG + end) for end in ("", " a purple hat")]
        chunked = [run(pipe, prompt=LONG + end, long_prompts="chunks") for end in ("", " a purple hat")]
        assert apart(*cut) == 0.0 and apart(*chunked) > 1e-3

    def test_pieces_are_the_texts_own_tokens(self, pipe):
        encoder = pipe.prompt_encoder
        rows = encoder.pieces(0, [LONG, "the moon"], 12)
        assert rows.shape == (24, 16)
        tokenizer = pipe.tokenizer
        words = [i for i in rows[:12].flatten().tolist() if i not in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
        assert words == tokenizer(LONG, add_special_tokens=False).input_ids
        assert torch.equal(rows[12], encoder.tokenize(0, ["the moon"], 16)[0])

    def test_pooled_is_the_first_chunks(self, pipe):
        parts = pipe.prompt_encoder.encode([LONG], 16, chunks=9)
        assert parts.clip_1.shape[1] == 9 * 16 and parts.t5.shape[1] == 9 * 16
        assert apart(parts.pooled_1, pipe.prompt_encoder.encode([LONG], 16).pooled_1) < 1e-5


def test_with_a_picture_and_without_vae_latents_do(pipe):
    bare = quiet(LatentFMPipeline.from_pipe(pipe, vae=None))
    bare_latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert bare.vae_scale_factor == 8  # SD3's, where no VAE says otherwise
    found = run(bare, image=bare_latents, height=64, width=64)
    assert found.shape == (1, 4, 8, 8)
    with pytest.raises(InputError, match="no vae is loaded to encode the image"):
        run(bare, image=picture(side=64), height=64, width=64)
    with pytest.raises(InputError, match=r'no vae is loaded to decode; load one, or ask for output_type="latent"'):
        run(bare, output_type="pil")
    with pytest.raises(InputError, match="no transformer is loaded to draw with"):
        run(quiet(LatentFMPipeline.from_pipe(pipe, transformer=None)))
