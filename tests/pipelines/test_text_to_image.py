"""LatentFMPipeline beside stock diffusers on the same weights: the same pictures, the same folders, plainer errors."""

import inspect
import json
import math
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.callbacks import SD3CFGCutoffCallback
from drawn import gap, quiet
from safetensors.torch import load_file, save_file

from latentfm.errors import InputError
from latentfm.models.manifest import write_manifest
from latentfm.models.mmdit import MMDiT
from latentfm.pipelines.image_to_image import LatentFMImg2ImgPipeline, LatentFMInpaintPipeline
from latentfm.pipelines.text_to_image import LatentFMPipeline
from latentfm.sampling import Sampler

PROMPT, OTHER = "a red apple on a white plate", "a photo of a small brown dog in the park"
BASE = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 5.0, "max_sequence_length": 16}
# Largest difference of the latents (|x| up to about 4; 1.4e-6 was measured) between two ways of adding up the same float32 numbers.
ROUNDING = 2e-5
PIXEL = 1e-4  # of [0, 1]: a fortieth of one of the 255 levels
PEERS = [
    (StableDiffusion3Pipeline, LatentFMPipeline), (StableDiffusion3Img2ImgPipeline, LatentFMImg2ImgPipeline),
    (StableDiffusion3InpaintPipeline, LatentFMInpaintPipeline),
]  # fmt: skip
NO_ENCODERS = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"))
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture(scope="module")
def stock(tiny_folder: Path) -> StableDiffusion3Pipeline:
    return quiet(StableDiffusion3Pipeline.from_pretrained(tiny_folder, dtype=torch.float32))


@pytest.fixture(scope="module")
def ours(tiny_folder: Path) -> LatentFMPipeline:
    return quiet(LatentFMPipeline.from_pretrained(tiny_folder))


@pytest.fixture
def fresh(tiny_folder: Path) -> LatentFMPipeline:
    """A pipeline that the test may change."""
    return quiet(LatentFMPipeline.from_pretrained(tiny_folder))


@pytest.fixture(scope="module")
def half(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline saved by stock diffusers in float16, every component of it."""
    folder = tmp_path_factory.mktemp("half") / "pipeline"
    StableDiffusion3Pipeline.from_pretrained(tiny_folder, dtype=torch.float32).to(torch.float16).save_pretrained(folder)
    return folder


def run(pipe, seeds: int | list[int] = 0, **changes):
    """What `pipe` makes of BASE with `changes`; `seeds` makes one generator, or one for each picture."""
    make = torch.Generator
    generator = make().manual_seed(seeds) if isinstance(seeds, int) else [make().manual_seed(seed) for seed in seeds]
    return pipe(**{"generator": generator, "output_type": "latent", **BASE, **changes}).images


def assert_same(stock, ours, pictures: int = 1, **changes) -> torch.Tensor:
    """Asserts that both give the same latents and pictures; returns the latents."""
    latents = run(ours, **changes)
    assert latents.shape[0] == pictures
    assert gap(run(stock, **changes), latents) < ROUNDING
    theirs, mine = (np.stack(run(pipe, output_type="np", **changes)) for pipe in (stock, ours))
    assert theirs.shape == mine.shape and mine.shape[0] == pictures
    assert np.abs(theirs - mine).max() < PIXEL
    assert mine.std() > 0.02  # not one flat colour
    return latents


@torch.no_grad()
def embeddings(pipe: StableDiffusion3Pipeline, prompt: str | list[str], length: int = 16) -> dict[str, torch.Tensor]:
    embeds, _, pooled, _ = pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


CASES = {
    "guidance 1": {"guidance_scale": 1.0},
    "guidance 0.5 is none": {"guidance_scale": 0.5},
    "guidance 1.5": {"guidance_scale": 1.5},
    "one step": {"num_inference_steps": 1},
    "28 steps": {"num_inference_steps": 28},
    "negative prompt": {"negative_prompt": OTHER},
    "negative prompts apart": {"negative_prompt": OTHER, "negative_prompt_2": "the moon", "negative_prompt_3": "a blue car"},
    "negative prompt 3 alone": {"negative_prompt_3": "a blue car"},
    "prompts apart": {"prompt_2": OTHER, "prompt_3": "two green trees"},
    "not square": {"height": 24, "width": 48},
    "64 T5 tokens": {"max_sequence_length": 64},
    "empty prompt": {"prompt": ""},
    "seed": {"seeds": 7},
    "latents given": {"latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))},
    "two prompts, twice": {"prompt": [PROMPT, OTHER], "num_images_per_prompt": 2, "pictures": 4},
    "two prompts, their negatives": {"prompt": [PROMPT, OTHER], "negative_prompt": ["the moon", ""], "pictures": 2},
    "two prompts, one negative": {"prompt": [PROMPT, OTHER], "negative_prompt": "the moon", "pictures": 2},
    "generators": {"prompt": [PROMPT, OTHER], "num_images_per_prompt": 2, "seeds": [3, 1, 4, 1], "pictures": 4},
}  # fmt: skip


class TestLikeStock:
    def test_base(self, stock, ours):
        assert_same(stock, ours)

    @pytest.mark.parametrize("name", CASES)
    def test_case(self, stock, ours, name):
        latents = assert_same(stock, ours, **CASES[name])
        assert gap(latents, run(ours)) > 100 * ROUNDING  # the option did something

    def test_pil_pictures_differ_by_one_level_at_most(self, stock, ours):
        theirs, mine = (np.asarray(run(pipe, output_type="pil")[0], dtype=int) for pipe in (stock, ours))
        assert theirs.shape == (32, 32, 3) and np.abs(theirs - mine).max() <= 1

    def test_prompt_embeds(self, stock, ours):
        given = embeddings(stock, OTHER)
        latents = assert_same(stock, ours, prompt=None, **given)
        assert gap(latents, run(ours, prompt=OTHER)) < ROUNDING

    def test_negative_prompt_embeds(self, stock, ours):
        given = {f"negative_{name}": value for name, value in embeddings(stock, OTHER).items()}
        latents = assert_same(stock, ours, **given)
        assert gap(latents, run(ours, negative_prompt=OTHER)) < ROUNDING

    @pytest.mark.parametrize(
        "config",
        [
            {"shift": 3.0},
            {"shift": 0.3, "shift_terminal": 0.1},
            {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64, "base_shift": 0.5, "max_shift": 1.15},
            {"use_dynamic_shifting": True, "time_shift_type": "linear"},
            {"use_karras_sigmas": True, "shift": 3.0},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("size", [32, 64])
    def test_scheduler(self, stock, ours, monkeypatch, config, size):
        before = run(ours, height=size, width=size)
        for pipe in (stock, ours):
            monkeypatch.setattr(pipe, "scheduler", FlowMatchEulerDiscreteScheduler(**config))
        latents = assert_same(stock, ours, height=size, width=size)
        assert gap(latents, before) > 100 * ROUNDING

    def test_a_shift_set_on_the_scheduler_itself(self, stock, ours, monkeypatch):
        before = run(ours)
        for pipe in (stock, ours):
            monkeypatch.setattr(pipe, "scheduler", FlowMatchEulerDiscreteScheduler())
            pipe.scheduler.set_shift(3.0)
        assert gap(assert_same(stock, ours), before) > 100 * ROUNDING

    def test_without_t5(self, ours, tiny_folder):
        absent = {"text_encoder_3": None, "tokenizer_3": None}
        pipes = [quiet(c.from_pretrained(tiny_folder, **absent)) for c in (StableDiffusion3Pipeline, LatentFMPipeline)]
        assert gap(assert_same(*pipes), run(ours)) > 100 * ROUNDING

    def test_from_the_components_of_a_stock_pipeline(self, stock):
        assert_same(stock, quiet(LatentFMPipeline(**stock.components)))

    @pytest.mark.parametrize(("theirs", "mine"), PEERS, ids=lambda cls: cls.__name__)
    def test_call_takes_the_stock_arguments_in_the_stock_order(self, theirs, mine):
        theirs, mine = (dict(inspect.signature(cls.__call__).parameters) for cls in (theirs, mine))
        assert list(mine)[: len(theirs)] == list(theirs)
        ours_alone = {"max_sequence_length": (256, None), "callback_on_step_end_tensor_inputs": (["latents"], ("latents",))}
        for name, parameter in theirs.items():
            assert (parameter.default, mine[name].default) == ours_alone.get(name, (parameter.default, parameter.default)), name
            assert parameter.kind == mine[name].kind

    def test_what_the_call_takes_beside_stocks(self):
        mine, theirs = (inspect.signature(cls.__call__).parameters for cls in (LatentFMPipeline, StableDiffusion3Pipeline))
        pictures = {"image", "strength", "mask_image", "masked_image_latents", "padding_mask_crop"}
        seeds = {"seed", "variation_seed", "variation_strength", "long_prompts"}
        assert set(mine) - set(theirs) == {field.name for field in fields(Sampler)[2:]} | {"reference"} | pictures | seeds

    @pytest.mark.parametrize(("theirs", "mine"), PEERS, ids=lambda cls: cls.__name__)
    def test_every_public_name_of_stock_is_there(self, theirs, mine, stock, ours):
        pipes = [cls.from_pipe(stock) for cls in (theirs, mine)]
        names = [{name for name in dir(pipe) if not name.startswith("_")} for pipe in pipes]
        assert names[0] - names[1] <= {"unet_name", "mask_processor"}
        for name in ("tokenizer_max_length", "default_sample_size", "patch_size", "vae_scale_factor", "model_cpu_offload_seq", "dtype"):
            if hasattr(pipes[0], name):
                assert getattr(pipes[1], name) == getattr(pipes[0], name)
        for name in ("encode_prompt", "prepare_latents", "check_inputs", "encode_image", "prepare_ip_adapter_image_embeds"):
            asked, known = (list(inspect.signature(getattr(cls, name)).parameters) for cls in (theirs, mine))
            assert known[: len(asked)] == asked, name

    def test_return_dict(self, ours):
        generator = torch.Generator().manual_seed(0)
        images = ours(**BASE, output_type="latent", return_dict=False, generator=generator)
        assert isinstance(images, tuple) and gap(images[0], run(ours)) == 0.0

    @pytest.mark.parametrize("kind", ["np", "pt", "pil"])
    def test_output_types(self, stock, ours, kind):
        theirs, mine = run(stock, output_type=kind), run(ours, output_type=kind)
        assert type(theirs) is type(mine) and type(theirs[0]) is type(mine[0])


class TestCallbacks:
    """A step callback means what it means in stock diffusers."""

    def both(self, stock, ours, make, **changes) -> torch.Tensor:
        theirs = run(stock, callback_on_step_end=make(), **changes)
        mine = run(ours, callback_on_step_end=make(), **changes)
        assert gap(theirs, mine) < ROUNDING
        return mine

    def test_what_a_callback_is_given(self, stock, ours):
        seen: dict[str, list] = {"stock": [], "ours": []}
        for name, pipe in (("stock", stock), ("ours", ours)):

            def note(p, i, t, tensors, pipe=pipe, name=name):
                assert p is pipe
                seen[name].append((i, float(t), {k: v.clone() for k, v in tensors.items()}))
                return tensors

            run(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=stock._callback_tensor_inputs)
        assert len(seen["stock"]) == len(seen["ours"]) == 4
        for (i, t, theirs), (j, s, mine) in zip(seen["stock"], seen["ours"], strict=True):
            assert i == j and s == pytest.approx(t, abs=1e-3)
            assert theirs.keys() == mine.keys() == set(stock._callback_tensor_inputs)
            for key in theirs:  # the embeddings are [negative, positive], as the network reads them
                assert gap(theirs[key], mine[key]) < ROUNDING

    def test_latents_are_replaced(self, stock, ours):
        changed = self.both(stock, ours, lambda: lambda p, i, t, given: {"latents": given["latents"] * (2.0 if i == 1 else 1.0)})
        assert gap(changed, run(ours)) > 0.1

    @pytest.mark.parametrize("guidance", [5.0, 1.0])
    def test_embeddings_are_replaced_for_the_steps_that_follow(self, stock, ours, guidance):
        def make():
            def swap(p, i, t, given):
                scale = -2.0 if i == 1 else 1.0  # steps 2 and 3 read the changed ones; each is changed from what it is then
                return {name: value * scale for name, value in given.items()}

            return swap

        names = ["prompt_embeds", "pooled_prompt_embeds"]
        changed = self.both(stock, ours, make, guidance_scale=guidance, callback_on_step_end_tensor_inputs=names)
        assert gap(changed, run(ours, guidance_scale=guidance)) > 100 * ROUNDING

    def test_what_is_guided_against_is_replaced(self, ours):
        def other(p, i, t, given):
            return {name: -2.0 * value if i == 1 else value for name, value in given.items()}

        names = ["negative_prompt_embeds", "negative_pooled_prompt_embeds"]
        changed = run(ours, callback_on_step_end=other, callback_on_step_end_tensor_inputs=names)
        assert gap(changed, run(ours)) > 100 * ROUNDING
        both = run(ours, callback_on_step_end=lambda p, i, t, given: {"prompt_embeds": torch.cat([-2.0 * given["negative_prompt_embeds"],
            given["prompt_embeds"][1:]]), "pooled_prompt_embeds": torch.cat([-2.0 * given["negative_pooled_prompt_embeds"],
            given["pooled_prompt_embeds"][1:]])} if i == 1 else {}, callback_on_step_end_tensor_inputs=[*names, "prompt_embeds",
            "pooled_prompt_embeds"])  # fmt: skip
        assert gap(changed, both) == 0.0

    def test_a_callback_that_returns_nothing_changes_nothing(self, ours):
        assert gap(run(ours, callback_on_step_end=lambda *given: None), run(ours)) == 0.0

    def test_guidance_ends_midway(self, stock, ours):
        ended = self.both(stock, ours, lambda: SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1))
        assert gap(ended, run(ours)) > 100 * ROUNDING
        assert gap(run(ours), run(stock)) < ROUNDING  # the next call is guided again

    def test_interrupt_keeps_the_latents_and_asks_no_more_of_the_network(self, stock, ours):
        calls = []
        hook = ours.transformer.register_forward_pre_hook(lambda *given: calls.append(1))

        def make():
            def stop(p, i, t, given):
                p._interrupt = i == 1
                return {"latents": given["latents"] + 1.0} if i < 2 else {"latents": given["latents"] * math.nan}

            return stop

        try:
            stopped = self.both(stock, ours, make)
        finally:
            hook.remove()
        assert len(calls) == 2
        assert gap(stopped, run(ours)) > 0.1
        assert gap(run(ours), run(stock)) < ROUNDING  # the next call runs to its end


class TestEachPictureByItself:
    def test_a_batch_of_four_equals_four_singles(self, ours):
        prompts, seeds = [PROMPT, OTHER, "", "two green trees"], [5, 6, 7, 8]
        together = run(ours, seeds, prompt=prompts)
        alone = [run(ours, [seed], prompt=prompt) for prompt, seed in zip(prompts, seeds, strict=True)]
        assert gap(together, torch.cat(alone)) < ROUNDING
        assert min(gap(alone[i], alone[j]) for i in range(4) for j in range(i)) > 0.1

    def test_the_same_seed_twice_is_the_same_picture(self, ours):
        assert gap(run(ours), run(ours)) == 0.0


class TestNullCondition:
    def test_empty_negative_prompt_equals_none(self, ours):
        assert gap(run(ours, negative_prompt=""), run(ours)) == 0.0
        assert gap(run(ours, negative_prompt=[""]), run(ours)) < ROUNDING

    def test_the_saved_one_is_the_encoding_of_the_empty_prompt(self, stock, ours, saved):
        tensors = load_file(saved / "null_condition.safetensors")
        parts = dict(ours.prompt_encoder.encode([""], 16).items())
        assert {f"16.{name}" for name in parts} == tensors.keys() and len(parts) == 5
        for name, value in parts.items():
            assert gap(tensors[f"16.{name}"], value) < 1e-6
        given = embeddings(stock, "")
        condition = quiet(LatentFMPipeline.from_pretrained(saved)).negative_condition(1, 16, [None] * 3)
        assert gap(condition.embeds, given["prompt_embeds"]) < 1e-6 and gap(condition.pooled, given["pooled_prompt_embeds"]) < 1e-6

    def test_the_saved_one_is_what_guidance_reads(self, saved, ours, tmp_path):
        folder = shutil.copytree(saved, tmp_path / "copy")
        tensors = load_file(folder / "null_condition.safetensors")
        save_file({name: value + 1.0 for name, value in tensors.items()}, folder / "null_condition.safetensors")
        write_manifest(folder)
        moved = quiet(LatentFMPipeline.from_pretrained(folder))
        assert gap(run(moved), run(ours)) > 100 * ROUNDING
        assert gap(run(moved, guidance_scale=1.0), run(ours, guidance_scale=1.0)) == 0.0

    def test_without_encoders_prompt_embeds_and_the_saved_one_suffice(self, stock, ours, saved, tmp_path):
        bare = quiet(LatentFMPipeline.from_pretrained(saved, **NO_ENCODERS))
        assert bare.max_sequence_length == 16 and bare.text_encoder is None
        given = embeddings(stock, PROMPT)
        without = {**BASE, "prompt": None, "max_sequence_length": None}
        assert gap(run(bare, **without, **given), run(ours)) < ROUNDING
        bare.save_pretrained(tmp_path / "bare")
        again = quiet(LatentFMPipeline.from_pretrained(tmp_path / "bare"))
        assert again.text_encoder is None and not (tmp_path / "bare" / "text_encoder").exists()
        assert gap(run(again, **without, **given), run(ours)) < ROUNDING
        with pytest.raises(InputError, match="no text encoder"):
            run(again)
        with pytest.raises(InputError, match=r"saved for T5 lengths \[16\], not 48"):
            run(again, **{**without, "max_sequence_length": 48}, **embeddings(stock, PROMPT, 48))


class TestFolders:
    def test_the_files_name_stock_classes(self, saved, tiny_folder):
        index, theirs = (json.loads((folder / "model_index.json").read_text()) for folder in (saved, tiny_folder))
        assert index["_class_name"] == "StableDiffusion3Pipeline"
        assert {k: v for k, v in index.items() if k[0] != "_"} == {k: v for k, v in theirs.items() if k[0] != "_"}
        assert json.loads((saved / "transformer" / "config.json").read_text())["_class_name"] == "SD3Transformer2DModel"
        assert not any("latentfm" in file.read_text() for file in saved.rglob("*.json"))

    def test_the_weights_are_safetensors_only(self, saved):
        files = {file.relative_to(saved).as_posix() for file in saved.rglob("*") if file.is_file()}
        weights = {file for file in files if not file.endswith((".json", ".txt", ".jinja", ".model"))}
        assert weights and all(file.endswith(".safetensors") for file in weights)
        assert {file.split("/")[0] for file in weights} == {"transformer", "vae", *ENCODERS, "null_condition.safetensors"}

    @pytest.mark.parametrize("loader", [StableDiffusion3Pipeline, DiffusionPipeline])
    def test_stock_diffusers_loads_it_and_gives_the_same_picture(self, ours, saved, loader):
        pipe = quiet(loader.from_pretrained(saved))
        assert type(pipe) is StableDiffusion3Pipeline and type(pipe.transformer).__name__ == "SD3Transformer2DModel"
        assert_same(pipe, ours)

    def test_it_loads_where_latentfm_is_not_installed(self, ours, saved, tmp_path):
        program = f"""
import sys
sys.modules["latentfm"] = None  # what importing it finds where it is not installed
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained({str(saved)!r})
assert type(pipe).__name__ == "StableDiffusion3Pipeline", type(pipe)
torch.save(pipe(**{BASE!r}, output_type="latent", generator=torch.Generator().manual_seed(0)).images, "latents.pt")
"""
        done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert gap(torch.load(tmp_path / "latents.pt"), run(ours)) < ROUNDING

    def test_round_trip(self, ours, saved, tmp_path):
        once = quiet(LatentFMPipeline.from_pretrained(saved))
        assert isinstance(once.transformer, MMDiT) and once.info["max_sequence_length"] == 16
        assert gap(run(once), run(ours)) < 1e-6
        once.save_pretrained(tmp_path / "again")
        first_files, second_files = ({f.relative_to(d): f for f in d.rglob("*") if f.is_file()} for d in (saved, tmp_path / "again"))
        assert first_files.keys() == second_files.keys()
        for name, file in first_files.items():
            if name.suffix != ".json":
                assert second_files[name].read_bytes() == file.read_bytes(), name
                continue
            first, second = (json.loads(path.read_text()) for path in (file, second_files[name]))
            assert {k: v for k, v in first.items() if k != "_name_or_path"} == {k: v for k, v in second.items() if k != "_name_or_path"}

    def test_the_t5_length_is_the_folders_or_256(self, ours, saved):
        assert ours.max_sequence_length == 256
        pipe = quiet(LatentFMPipeline.from_pretrained(saved))
        assert gap(run(pipe, max_sequence_length=None), run(pipe, max_sequence_length=16)) == 0.0
        assert gap(run(pipe, max_sequence_length=None), run(pipe, max_sequence_length=20)) > 1e-3

    def test_a_vae_without_shift_factor(self, stock, tiny_folder, tmp_path, monkeypatch):
        folder = shutil.copytree(tiny_folder, tmp_path / "plain")
        config = json.loads((folder / "vae" / "config.json").read_text())
        shift = config.pop("shift_factor")
        (folder / "vae" / "config.json").write_text(json.dumps(config))
        pipe = quiet(LatentFMPipeline.from_pretrained(folder))
        assert pipe.vae.config.shift_factor is None
        mine = run(pipe, output_type="pt")
        assert gap(mine, run(stock, output_type="pt")) > PIXEL
        try:
            stock.vae.register_to_config(shift_factor=0.0)
            assert gap(mine, run(stock, output_type="pt")) < PIXEL
        finally:
            stock.vae.register_to_config(shift_factor=shift)

    def test_components_given_replace_the_folders(self, tiny_folder, ours):
        network = MMDiT.from_pretrained(tiny_folder, subfolder="transformer")
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe = LatentFMPipeline.from_pretrained(tiny_folder, transformer=network, scheduler=scheduler)
        assert pipe.transformer is network and pipe.scheduler is scheduler
        assert pipe.components.keys() == ours.components.keys()

    def test_saving_without_encoders_and_null_condition(self, fresh, tmp_path):
        for name in NO_ENCODERS:
            setattr(fresh, name, None)
        fresh.save_pretrained(tmp_path / "bare")
        assert load_file(tmp_path / "bare" / "null_condition.safetensors") == {}


class TestDtypes:
    @pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
    def test_bf16_runs_and_the_state_inside_is_float32(self, ours, tiny_folder, name):
        pipe = quiet(LatentFMPipeline.from_pretrained(tiny_folder, **{name: torch.bfloat16}))
        for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            assert getattr(pipe, part).dtype == torch.bfloat16, part
        inputs, states, inside = [], [], []
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda output, t, x, **given: inside.append((output.dtype, x.dtype)) or step(output, t, x, **given)
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, given: inputs.append({k: v.dtype for k, v in given.items() if torch.is_tensor(v)}), with_kwargs=True
        )
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        latents = run(pipe, latents=noise, callback_on_step_end=lambda p, i, t, given: states.append(given["latents"].dtype))
        assert inside == [(torch.float32, torch.float32)] * 4
        assert states == [torch.bfloat16] * 4 and latents.dtype == torch.bfloat16  # so that the caller's own vae.decode takes them
        pipe.vae.decode(latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)
        half = {"hidden_states", "encoder_hidden_states", "pooled_projections"}
        assert all(seen == dict.fromkeys(half, torch.bfloat16) | {"timestep": torch.float32} for seen in inputs) and len(inputs) == 4
        assert 0 < gap(latents, run(ours, latents=noise)) < 0.2
        picture = run(pipe, output_type="pt", latents=noise)
        assert gap(picture, run(ours, output_type="pt", latents=noise)) < 0.1

    def test_a_float16_folder_is_float32_here_unless_asked(self, half):
        pipe = LatentFMPipeline.from_pretrained(half)
        for part in ("transformer", "vae", *ENCODERS):
            assert {p.dtype for p in getattr(pipe, part).parameters()} == {torch.float32}, part
        given = LatentFMPipeline.from_pretrained(half, torch_dtype=torch.float16)
        assert given.transformer.dtype == given.text_encoder.dtype == given.vae.dtype == torch.float16

    def test_a_float16_folder_of_ours_runs_in_stock_diffusers_without_a_dtype(self, half, tmp_path):
        """Saved by stock diffusers it does not: transformers 5 takes float16 from the encoders' config.json."""
        pipe = LatentFMPipeline.from_pretrained(half, torch_dtype=torch.float16)
        pipe.save_pretrained(tmp_path / "half")
        for file in (tmp_path / "half").glob("*/*.safetensors"):
            kinds = {value.dtype for value in load_file(file).values()}
            assert torch.float16 in kinds, file
        stock = quiet(StableDiffusion3Pipeline.from_pretrained(tmp_path / "half"))
        for part in ("transformer", "vae", *ENCODERS):
            assert {p.dtype for p in getattr(stock, part).parameters()} == {torch.float32}, part
        assert_same(stock, quiet(LatentFMPipeline.from_pretrained(tmp_path / "half")))

    def test_dtype_for_each_component(self, tiny_folder):
        pipe = LatentFMPipeline.from_pretrained(tiny_folder, dtype={"transformer": torch.bfloat16, "default": torch.float32})
        assert pipe.transformer.dtype == torch.bfloat16 and pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32


class TestDevices:
    def test_to_cpu(self, fresh, ours):
        assert fresh.to("cpu") is fresh and gap(run(fresh), run(ours)) < ROUNDING

    def test_model_offload_hooks(self, fresh, ours):
        fresh.enable_model_cpu_offload(device="cpu")
        assert gap(run(fresh), run(ours)) < ROUNDING
        assert gap(run(fresh), run(ours)) < ROUNDING  # the hooks are back in place


ONLY_EMBEDS = {"prompt": None, "prompt_embeds": torch.zeros(1, 32, 48), "pooled_prompt_embeds": torch.zeros(1, 40)}


def one_line(caught: pytest.ExceptionInfo) -> str:
    message = str(caught.value)
    assert message and "\n" not in message
    return message


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"num_inference_steps": 0}, "num_inference_steps 0"),
            ({"num_inference_steps": 2.5}, r"num_inference_steps 2\.5"),
            ({"num_images_per_prompt": 0}, "num_images_per_prompt 0"),
            ({"guidance_scale": math.nan}, "guidance_scale nan"),
            ({"guidance_scale": math.inf}, "guidance_scale inf"),
            ({"height": 30}, "height 30 .* nearest are 24 and 32"),
            ({"width": 33}, "width 33 .* nearest are 32 and 40"),
            ({"width": 4}, "width 4 .* multiple of 8"),
            ({"height": -8}, "height -8"),
            ({"height": 72}, "height 72 .* 64 or less"),
            ({"width": 70}, "width 70 .* 64 or less"),
            ({"prompt": None}, "give prompt or prompt_embeds"),
            ({"prompt": []}, "give prompt or prompt_embeds"),
            ({"prompt_embeds": torch.zeros(1, 32, 48)}, "give prompt or prompt_embeds"),
            ({"prompt": None, "prompt_2": "x", "prompt_embeds": torch.zeros(1, 32, 48)}, "give prompt or prompt_embeds"),
            ({"prompt": None, "prompt_embeds": torch.zeros(1, 32, 48)}, "needs pooled_prompt_embeds"),
            ({"negative_prompt": "x", "negative_prompt_embeds": torch.zeros(1, 32, 48)}, "give negative_prompt or"),
            ({"negative_prompt_embeds": torch.zeros(1, 32, 48)}, "needs negative_pooled_prompt_embeds"),
            (
                {"negative_prompt_embeds": torch.zeros(1, 30, 48), "negative_pooled_prompt_embeds": torch.zeros(1, 40)},
                r"\(1, 32, 48\).*\(1, 30, 48\)",
            ),
            ({"seeds": [1, 2]}, "2 generators for 1 pictures"),
            ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
            ({"prompt_2": ["a", "b"]}, "2 texts .* 1 prompts"),
            ({"negative_prompt": "x", "negative_prompt_3": ["a", "b"]}, "2 texts .* 1 prompts"),
            ({"latents": torch.zeros(1, 4, 8, 7)}, r"\(1, 4, 8, 7\).*\(1, 4, 8, 8\)"),
            ({"output_type": "jpeg"}, "output_type 'jpeg'"),
            ({"callback_on_step_end_tensor_inputs": ["noise"]}, "'noise'"),
            ({"callback_on_step_end_tensor_inputs": "latents"}, "tensor_inputs must be a list of names, not 'latents'"),
            ({"callback_on_step_end_tensor_inputs": None}, "must be a list of names, not None"),
            ({"callback_on_step_end": 3}, "callback_on_step_end must be a function, not 3"),
            ({"callback_on_step_end": lambda *given: [1]}, r"callback_on_step_end must return a dict .* not \[1\]"),
            ({"callback_on_step_end": lambda *given: torch.ones(2)}, "must return a dict of tensors or nothing, not a tensor"),
            ({"callback_on_step_end": lambda *given: {"latent": torch.ones(2)}}, "callback_on_step_end returns: 'latent' do not"),
            ({"callback_on_step_end": lambda *given: {"latents": None}}, "returns None for latents"),
            ({"callback_on_step_end": lambda *given: {"latents": torch.ones(1, 4, 2, 2)}}, "latents of callback_on_step_end .*4, 8, 8"),
            ({"callback_on_step_end": lambda *given: {"prompt_embeds": torch.ones(2, 32, 3)}}, "prompt_embeds of callback_on_step_end"),
            ({"callback_on_step_end": lambda *given: {"denoised": torch.ones(1, 4, 8, 8)}}, "another denoised"),
            ({"strength": 0.5}, "strength 0.5 needs image, or latents"),
            ({"seed": 2**64, "generator": None}, "seed 18446744073709551616 is more than 9,223,372,036,854,775,807"),
            ({"latents": torch.full((1, 4, 8, 8), float("nan"))}, "latents has numbers in it that are not finite"),
            ({**ONLY_EMBEDS, "prompt_embeds": torch.full((1, 32, 48), float("inf"))}, "prompt_embeds has numbers .* not finite"),
            ({"image": np.full((32, 32, 3), np.nan, np.float32)}, "image has numbers in it that are not finite"),
            ({"ip_adapter_image_embeds": torch.zeros(2, 4, 8)}, "ip_adapter_image_embeds needs an IP-Adapter"),
            ({"guidance": "autoguidance", "reference": torch.nn.Identity}, "reference must be a network"),
            ({"prompt": 5}, "prompt must be a text or a list of texts, not 5"),
            ({"prompt": b"x"}, r"prompt must be .* not b'x' \(bytes\)"),
            ({"prompt": {"a": 1}}, r"prompt must be a text or a list of texts, not \{'a': 1\}"),
            ({"prompt": ["a", None]}, "prompt must hold texts alone, not None"),
            ({"prompt": "\ud800"}, "prompt '.ud800' is no valid Unicode"),
            ({"prompt_2": 4}, "prompt_2 must be"),
            ({"prompt_3": ["a", 4]}, "prompt_3 must hold"),
            ({"negative_prompt": 3, "guidance_scale": 1.0}, "negative_prompt must be"),
            ({"negative_prompt_2": [None]}, "negative_prompt_2 must hold"),
            ({"generator": 42}, "generator must be .* not 42; for example torch.Generator"),
            ({"generator": [torch.Generator(), 3]}, "generator must be"),
            ({"generator": []}, "generator must be"),
            ({"guidance_scale": "3"}, "guidance_scale '3' is not a number"),
            ({"guidance_scale": True}, "guidance_scale True"),
            ({"guidance_scale": 10**400}, "guidance_scale 1000.* is not a number"),
            ({"guidance_scale": torch.ones(2)}, r"guidance_scale a tensor of shape \(2,\)"),
            ({"height": "64"}, "height '64' must be a whole number"),
            ({"height": 0}, "height 0 is too small"),
            ({"width": [32]}, r"width \[32\] \(list\) must be"),
            ({"num_inference_steps": True}, "num_inference_steps True"),
            ({"num_inference_steps": 10**9}, "num_inference_steps 1000000000 is more than 10,000"),
            ({"num_inference_steps": np.float32("nan")}, "num_inference_steps nan"),
            ({"num_images_per_prompt": None}, "num_images_per_prompt None"),
            ({"max_sequence_length": 0}, "max_sequence_length 0"),
            ({"max_sequence_length": 10**9}, "max_sequence_length 1000000000 is more than"),
            ({"max_sequence_length": "16"}, "max_sequence_length '16'"),
            ({"latents": [[1.0]]}, r"latents \[\[1.0\]\] \(list\)"),
            ({"latents": torch.zeros(1, 4, 8, 8, dtype=torch.int64)}, "latents .* floating-point"),
            ({"output_type": ["pil"]}, r"output_type \['pil'\]"),
            ({**ONLY_EMBEDS, "prompt_embeds": torch.zeros(2, 32, 48)}, "of 2 prompts, .* of 1"),
            ({**ONLY_EMBEDS, "prompt_embeds": torch.zeros(1, 32, 47)}, r"\(any, any, 48\)"),
            ({**ONLY_EMBEDS, "pooled_prompt_embeds": torch.zeros(1, 41)}, r"\(any, 40\)"),
            ({**ONLY_EMBEDS, "prompt_embeds": "x"}, "prompt_embeds must be .* not 'x'"),
            ({"pooled_prompt_embeds": torch.zeros(1, 40)}, "pooled_prompt_embeds needs prompt_embeds"),
            ({"negative_pooled_prompt_embeds": torch.zeros(1, 40)}, "negative_pooled_prompt_embeds needs negative_prompt_embeds"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_arguments(self, ours, changes, says):
        with pytest.raises(InputError, match=says) as caught:
            run(ours, **changes)
        one_line(caught)

    def test_whole_numbers_of_every_library_and_sliders_are_numbers(self, ours):
        expected = run(ours, num_images_per_prompt=2, height=24)
        for kind in (np.int64, np.float32, float, torch.tensor, lambda value: torch.tensor(float(value))):
            given = {"num_inference_steps": kind(4), "height": kind(24), "num_images_per_prompt": kind(2), "max_sequence_length": kind(16)}
            assert gap(run(ours, **given, guidance_scale=kind(5)), expected) == 0.0

    def test_prompt_embeds_of_another_length_than_the_null_condition(self, stock, ours):
        with pytest.raises(InputError, match="max_sequence_length, here 16") as caught:
            run(ours, prompt=None, **embeddings(stock, PROMPT, 24))
        one_line(caught)

    @pytest.mark.parametrize("make", ["absolute", "dotted", "deep"])
    def test_no_such_folder(self, tmp_path, make):
        missing = {"absolute": tmp_path / "nothing", "dotted": Path("./nothing"), "deep": Path("no/such/folder")}[make]
        with pytest.raises(InputError, match="no such model folder") as caught:
            LatentFMPipeline.from_pretrained(missing)
        assert str(missing) in one_line(caught)

    def test_two_words_that_are_no_folder_are_asked_of_the_hub_dots_and_all(self, monkeypatch):
        asked = []

        def download(name, **kwargs):
            asked.append((name, kwargs))
            raise OSError("cannot reach the hub\nat all")

        monkeypatch.setattr(LatentFMPipeline, "download", download)
        with pytest.raises(InputError, match=r"no such model folder: stabilityai/stable-diffusion-3.5-medium.*cannot reach") as caught:
            LatentFMPipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium", revision="main", text_encoder_3=None)
        one_line(caught)
        expected = {"revision": "main", "text_encoder_3": None, "use_safetensors": True}
        assert asked == [("stabilityai/stable-diffusion-3.5-medium", expected)]

    def test_a_folder_that_is_no_pipeline(self, tmp_path, tiny_folder):
        with pytest.raises(InputError, match=r"model_index\.json") as caught:
            LatentFMPipeline.from_pretrained(tiny_folder / "transformer")
        one_line(caught)
        (tmp_path / "model_index.json").write_text("{")
        with pytest.raises(InputError, match="damaged") as caught:
            LatentFMPipeline.from_pretrained(tmp_path)
        one_line(caught)

    @pytest.mark.parametrize("name", ["model.ckpt", "weights/model.ckpt"])
    def test_a_pickle_in_place_of_a_folder(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        Path(name).parent.mkdir(exist_ok=True)
        torch.save({}, name)
        with pytest.raises(InputError, match=r"is a pickle.*save_file") as caught:
            LatentFMPipeline.from_pretrained(name)
        one_line(caught)

    @pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_3"])
    def test_pickled_weights_are_refused_with_the_conversion(self, tiny_folder, tmp_path, part):
        folder = shutil.copytree(tiny_folder, tmp_path / "pickled")
        (weights,) = (folder / part).glob("*.safetensors")
        pickle = weights.with_suffix(".bin")
        torch.save(load_file(weights), pickle)
        weights.unlink()
        with pytest.raises(InputError, match=r"is a pickle.*save_file\(torch\.load\(.*weights_only=True") as caught:
            LatentFMPipeline.from_pretrained(folder)
        assert str(pickle) in one_line(caught)

    def test_no_transformer_weights(self, tiny_folder, tmp_path):
        folder = shutil.copytree(tiny_folder, tmp_path / "part")
        for file in (folder / "transformer").glob("*.safetensors"):
            file.unlink()
        with pytest.raises(InputError, match="no safetensors weights") as caught:
            LatentFMPipeline.from_pretrained(folder)
        one_line(caught)
        shutil.rmtree(folder / "transformer")
        with pytest.raises(InputError, match=r"no transformer/config\.json") as caught:
            LatentFMPipeline.from_pretrained(folder)
        one_line(caught)


def test_prompt_warnings_name_the_encoder_and_the_words_lost(ours):
    long = " ".join([PROMPT] * 3)
    assert ours.prompt_warnings([PROMPT], 64) == []
    first, second, third = ours.prompt_warnings(["a red apple", long], 16)
    assert "16 tokens the first CLIP" in first and "16 tokens the second CLIP" in second and "16 tokens T5" in third
    assert all("white plate" in line.split("it loses")[1] for line in (first, second, third))


def damage(folder: Path, how: str) -> None:
    """Spoils the transformer of the pipeline `folder` in one way."""
    weights, config = folder / "transformer" / "diffusion_pytorch_model.safetensors", folder / "transformer" / "config.json"
    settings = json.loads(config.read_text())
    if how == "cut short":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "other width":
        config.write_text(json.dumps(settings | {"joint_attention_dim": 64}))
    elif how == "a block too many":
        config.write_text(json.dumps(settings | {"num_layers": 3}))
    else:
        flux = {"single_transformer_blocks.0.norm.weight": torch.zeros(2), "transformer_blocks.0.norm1.weight": torch.zeros(2)}
        save_file(flux, weights)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut short", "cut short: 1,000 bytes"), ("other width", r"context_embedder.weight \[32, 48\] where \[32, 64\]"),
        ("a block too many", "lacks .* tensors: .*transformer_blocks"), ("a Flux model", "looks like a Flux transformer"),
    ],
)  # fmt: skip
def test_a_transformer_that_cannot_be_right_is_refused_before_it_is_loaded(how, message, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    damage(folder, how)
    with pytest.raises(InputError, match=message):
        LatentFMPipeline.from_pretrained(folder)
