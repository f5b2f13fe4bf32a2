"""Pictures while training: the same whatever the number of processes, no trace in the network, a grid that stays small."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from faults import files_no_larger_than
from PIL import Image
from training.held_out import make_network, validation

from latentfm.config import ModelOptions, SampleOptions
from latentfm.data.sources import Sample
from latentfm.errors import InputError
from latentfm.pictures import read_settings
from latentfm.pipelines.text_to_image import LatentFMPipeline
from latentfm.training.models import load_models
from latentfm.training.records.sample_files import COLUMNS, ROWS, cells_of, steps, strip, thinned, unstrip, write_step
from latentfm.training.samples import SamplePictures

PROMPTS = ["a red apple", "a blue car", "the moon and seven stars"]
OPTIONS = SampleOptions(prompts=PROMPTS, steps=2, guidance=2.0, seed=5)


@pytest.fixture(scope="module")
def models(tiny_folder):
    return load_models(ModelOptions(pipeline=str(tiny_folder)))


def pictures_to(folder, models, options=OPTIONS, samples=()):
    return SamplePictures(options, models, samples, (32, 16), folder, torch.device("cpu"))


def plain(seed, size=(32, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)


def test_they_are_the_pipelines_pictures_and_say_how_they_were_drawn(tmp_path, models, tiny_folder):
    path = pictures_to(tmp_path / "samples", models).draw(models.network.train(), 40, Accelerator(cpu=True))
    assert path == tmp_path / "samples" / "step-00000040.png"
    assert read_settings(path) == {
        "training_step": 40, "prompts": PROMPTS, "seed": 5, "steps": 2, "guidance": 2.0, "width": 32, "height": 16,
    }  # fmt: skip
    pipe = LatentFMPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    cells = unstrip(cells_of(path).read_bytes(), 3)
    for index, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(5 + index)
        wanted = pipe(prompt, width=32, height=16, num_inference_steps=2, guidance_scale=2.0, generator=generator).images[0]
        with Image.open(path) as sheet:  # cells of 192 x 96 in two columns, each with a line of text
            place = (8 + index % 2 * 200, 8 + index // 2 * (sheet.height - 8) // 2)
            mine = sheet.crop((*place, place[0] + 192, place[1] + 96)).resize((32, 16), Image.Resampling.NEAREST)
        assert np.abs(pixels(mine) - pixels(wanted)).max() <= 1
        assert (pixels(cells[index]) == pixels(mine)).all()


def test_the_network_is_as_it_was_after_pictures_and_after_a_failure(tmp_path, models, monkeypatch):
    network = models.network.train()
    network.enable_gradient_checkpointing()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    drawing = pictures_to(tmp_path / "samples", models)
    drawing.draw(network, 0, Accelerator(cpu=True))

    def fails(*_, **__):
        raise RuntimeError("a kernel died")

    monkeypatch.setattr(type(models.vae), "decode", fails)
    with pytest.raises(RuntimeError, match="a kernel died"):
        drawing.draw(network, 1, Accelerator(cpu=True))
    assert all(module.training for module in network.modules()) and network.gradient_checkpointing
    assert torch.compiler.set_stance("default").prev.stance == "default"
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [path.name for path in steps(tmp_path / "samples")] == ["step-00000000.png"]
    network.disable_gradient_checkpointing()


def test_the_vae_is_not_autocast(tmp_path, models):
    seen = {}
    watched = {"network": models.network.proj_out, "VAE": models.vae.decoder.conv_in}
    hooks = [module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype})) for name, module in watched.items()]
    with torch.autocast("cpu", torch.bfloat16):
        pictures_to(tmp_path / "samples", models).draw(models.network, 0, Accelerator(cpu=True))
    for hook in hooks:
        hook.remove()
    assert seen == {"network": torch.bfloat16, "VAE": torch.float32}


def test_memory_that_runs_out_costs_the_pictures_not_the_training(tmp_path, models, monkeypatch, capsys):
    drawing = pictures_to(tmp_path / "samples", models)

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96 GiB\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(type(models.vae), "decode", out_of_memory)
        assert drawing.draw(models.network, 8, Accelerator(cpu=True)) is None
    said = capsys.readouterr().out
    assert "no pictures at step 8, the training goes on: CUDA out of memory. Tried to allocate 96 GiB. Take fewer" in said
    assert not (tmp_path / "samples").exists()
    assert drawing.draw(models.network, 9, Accelerator(cpu=True)).is_file()


def test_a_full_disk_leaves_no_half_picture(tmp_path):
    images = [plain(i) for i in range(3)]
    path = write_step(tmp_path, 1, images, PROMPTS, {"seed": 5})
    before = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}
    with files_no_larger_than(1000), pytest.raises(InputError, match="could not write .*step-00000002"):
        write_step(tmp_path, 2, images, PROMPTS, {"seed": 5})
    assert {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()} == before
    assert write_step(tmp_path, 1, images, PROMPTS, {"seed": 5}) == path
    assert path.read_bytes() == before[path]  # written again, as after a stop, to the byte


def test_without_prompts_the_first_captions_spread_over_the_dataset(tmp_path, models):
    samples = [Sample(Path(f"{i}.png"), (f"caption {i}", "another"), f"{i}.png") for i in range(20)]
    assert pictures_to(tmp_path, models, SampleOptions(), samples).prompts == [f"caption {i}" for i in range(0, 16, 2)]
    assert pictures_to(tmp_path, models, SampleOptions(), samples[:3]).prompts == ["caption 0", "caption 1", "caption 2"]


def test_encoders_in_bfloat16_do_not_coarsen_the_noise(tmp_path, tiny_folder):
    narrow = load_models(ModelOptions(pipeline=str(tiny_folder), text_encoders="bfloat16"))
    drawing = pictures_to(tmp_path, narrow)
    assert drawing.condition.embeds.dtype == drawing.negative.pooled.dtype == torch.float32


@pytest.mark.parametrize("count, kept", [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (5, [0, 2, 4]), (6, [0, 2, 4, 5]), (100, [0, 64, 99])])
def test_thinning_keeps_the_first_the_last_and_powers_of_two(count, kept):
    assert thinned(list(range(count)), 4) == kept


def test_thinned_steps_are_bounded_and_stay_while_the_run_grows():
    for count in range(1, 300):
        now = thinned(list(range(count)), ROWS)
        assert len(now) <= ROWS and now[0] == 0 and now[-1] == count - 1
        assert count < 3 or len(now) > ROWS // 2 or len(now) == count
        assert set(thinned(list(range(count + 1)), ROWS)) <= {*now, count}  # none comes back that was left out
    assert thinned([], 4) == []


def test_the_growing_grid_has_a_row_a_step_and_stays_small(tmp_path):
    write_step(tmp_path, 0, [plain(1), plain(2)], ["of other prompts", "two"], {})
    sizes = []
    for number in range(30):
        write_step(tmp_path, 10 * number, [plain(i + 3 * number) for i in range(3)], PROMPTS, {})
        with Image.open(tmp_path / "progress.png") as sheet:
            sizes.append(sheet.size)
    heights = [height for _, height in sizes]
    rows = [len(thinned(list(range(number + 1)), ROWS)) for number in range(30)]
    assert [(height - heights[0]) / (96 + 8) for height in heights] == [count - 1 for count in rows]
    last = unstrip(cells_of(tmp_path / "step-00000290.png").read_bytes(), 3)
    with Image.open(tmp_path / "progress.png") as sheet:
        width, height = sheet.size
        for column in range(3):  # the latest is the lowest row
            left = width - (3 - column) * 200
            corner = sheet.crop((left, height - 104, left + 192, height - 8)).resize((32, 16), Image.Resampling.NEAREST)
            assert (pixels(corner) == pixels(last[column])).all()


def test_many_and_large_prompts_are_bounded_in_the_small_pictures(tmp_path):
    images = [plain(0, (640, 320)) for _ in range(COLUMNS + 4)]
    path = write_step(tmp_path, 3, images, [f"prompt {i}" for i in range(COLUMNS + 4)], {})
    with Image.open(cells_of(path)) as sheet:
        assert sheet.size == (192 * COLUMNS, 96)


def test_strip_and_back():
    for side, close in ((24, 0), (192, 12)):  # lossy where pictures are larger
        images = [Image.new("RGB", (side, side), colour) for colour in ("red", "lime", "blue")]
        for mine, wanted in zip(unstrip(strip(images), 3), images, strict=True):
            assert mine.size == (side, side) and np.abs(pixels(mine) - pixels(wanted))[4:-4, 4:-4].max() <= close


PROGRAM = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from pathlib import Path
from accelerate import Accelerator
from accelerate.utils import gather_object
from latentfm.cli.terminal import left_at_once
from latentfm.config import ModelOptions
from latentfm.training.models import load_models
from training.held_out import Pictures, make_network, validation
from training.test_samples import pictures_to

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
out, models = Path({out!r}), load_models(ModelOptions(pipeline={folder!r}))
tiny = make_network()
network = models.network.train()
for how in ("whole", "split"):
    if how == "split":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh("cpu", (2,))
        for module in (*network.transformer_blocks, network, *tiny.transformer_blocks, tiny):
            fully_shard(module, mesh=mesh)
    path = pictures_to(out / how, models).draw(network, 7, accelerator)
    assert (path is not None) == accelerator.is_main_process
    results = gather_object([validation(batch_size=2).run(tiny, accelerator.process_index, 2, accelerator.reduce)])
    assert results[0] == results[1], results
    if accelerator.is_main_process:
        (out / f"{{how}}.json").write_text(json.dumps(results[0]))
try:
    validation(reader=Pictures(broken=(8,))).run(tiny, accelerator.process_index, 2, accelerator.reduce)
except Exception as error:
    assert "8.png" in str(error), error
else:
    raise AssertionError("no error")
accelerator.end_training()
with left_at_once():  # gloo's threads are still there: FSDP2's caches hold their group
    pass
"""


def test_two_processes_draw_the_same_pictures_and_validate_the_same(tmp_path, models, tiny_folder, environment):
    """Whole weights on both processes, and FSDP2's halves of them; errors are raised on both."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parents[1]), out=str(tmp_path), folder=str(tiny_folder)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    accelerator = Accelerator(cpu=True)
    path = pictures_to(tmp_path / "one", models).draw(models.network, 7, accelerator)
    alone = validation(batch_size=2).run(make_network(), 0, 1, lambda table: table)
    for how in ("whole", "split"):
        with Image.open(path) as mine, Image.open(tmp_path / how / path.name) as other:
            assert read_settings(path) == read_settings(tmp_path / how / path.name)
            assert np.abs(pixels(mine) - pixels(other)).max() <= 1
        result = json.loads((tmp_path / f"{how}.json").read_text())
        assert result["by_t"] == pytest.approx(alone["by_t"], rel=1e-5)
        assert result["validation_loss"] == pytest.approx(alone["validation_loss"], rel=1e-5)
