"""Pictures on a GPU: those of the CPU, without a wait in the loop, with parts of the model elsewhere, from the command line."""

import pytest
import torch

from latentfm import LatentFMPipeline
from latentfm.cli.checks import chosen_dtype
from latentfm.cli.main import app
from latentfm.pictures import read_settings

STEPS = 6


def draw(pipe: LatentFMPipeline, **options) -> torch.Tensor:
    """The latents of two pictures by six guided steps, on the CPU."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    options = {"num_inference_steps": STEPS, "guidance_scale": 3, "generator": generators, "output_type": "latent"} | options
    return pipe(["a red apple", "a blue car"], **options).images.cpu()


def test_the_pictures_are_those_of_the_cpu(device, tiny_folder):
    expected = draw(LatentFMPipeline.from_pretrained(tiny_folder))
    pipe = LatentFMPipeline.from_pretrained(tiny_folder).to(device)
    torch.testing.assert_close(draw(pipe), expected, rtol=1e-2, atol=1e-2)
    pixels = draw(pipe, output_type="pt")
    assert pixels.shape == (2, 3, 32, 32) and pixels.min() >= 0 and pixels.max() <= 1


@pytest.mark.parametrize("guidance", [1, 3])
def test_the_loop_never_waits_for_the_device(device, tiny_folder, waits, guidance):
    pipe = LatentFMPipeline.from_pretrained(tiny_folder).to(device)
    draw(pipe, guidance_scale=guidance)  # whatever happens once has happened
    watched, found = [], []

    def after_step(pipe, step, timestep, tensors):
        if step == 0:
            watched.append(waits(found, but=("tolist",)))  # of the times, which are the host's
            watched[0].__enter__()
        if step == STEPS - 1:
            watched[0].__exit__(None, None, None)
        return {}

    draw(pipe, guidance_scale=guidance, callback_on_step_end=after_step)
    assert watched and found == []


def test_a_generator_of_the_device_works_and_repeats_itself(device, tiny_folder):
    pipe = LatentFMPipeline.from_pretrained(tiny_folder).to(device)
    first, again, other = (draw(pipe, generator=torch.Generator(device).manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_draws_about_the_same(device, tiny_folder, dtype):
    pipe, expected = LatentFMPipeline.from_pretrained(tiny_folder, torch_dtype=dtype).to(device), None
    noise = torch.randn(2, 4, 8, 8)
    expected = draw(LatentFMPipeline.from_pretrained(tiny_folder), latents=noise)
    found = draw(pipe, latents=noise)
    assert torch.isfinite(found).all() and (found - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "block_level", "leaf_level", "stream"])
def test_offloading_moves_the_network_and_changes_no_picture(device, tiny_folder, how):
    if how == "enable_sequential_cpu_offload" and device.type == "cpu":
        pytest.skip("Accelerate keeps weights on no device between calls and does not bring them back to a CPU")
    plain = draw(LatentFMPipeline.from_pretrained(tiny_folder).to(device))
    pipe = LatentFMPipeline.from_pretrained(tiny_folder)
    if how.startswith("enable"):
        getattr(pipe, how)(device=device)
    else:
        parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module) and part is not pipe.transformer]
        for part in parts:
            part.to(device)
        streamed = how == "stream" and device.type == "cuda"
        kind = "leaf_level" if how == "stream" else how
        pipe.transformer.enable_group_offload(device, torch.device("cpu"), offload_type=kind, num_blocks_per_group=1, use_stream=streamed)
    torch.testing.assert_close(draw(pipe), plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(draw(pipe), plain, rtol=1e-3, atol=1e-3)  # and is in place for the next
    blocks = [parameter.device.type for block in pipe.transformer.transformer_blocks for parameter in block.parameters()]
    assert set(blocks) <= {"cpu", "meta"}


def test_compiled_blocks_draw_the_same(device, tiny_folder):
    pipe = LatentFMPipeline.from_pretrained(tiny_folder).to(device)
    plain = draw(pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(draw(pipe), plain, rtol=1e-2, atol=1e-2)


def test_the_command_line_draws_on_the_device(device, tiny_folder, tmp_path, capsys):
    arguments = ["generate", "a red apple", "--seed", "5", "--steps", "2", "--model", str(tiny_folder), "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as left:
        app([*arguments, "--device", device.type])
    assert left.value.code == 0
    settings = read_settings(next(tmp_path.glob("5-*.png")))
    assert settings["device"].startswith(device.type) and settings["dtype"] == chosen_dtype("auto", device)
