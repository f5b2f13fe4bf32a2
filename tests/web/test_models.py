"""The models and LoRAs of the page: by name alone; a LoRA in part, taken off again to the bit."""

import shutil
from functools import partialmethod

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentfm.errors import InputError
from latentfm.models.compiled import FOLDER
from latentfm.models.manifest import MANIFEST
from latentfm.models.mmdit import MMDiT
from latentfm.web.models import BUNDLED, Models, free_name


@pytest.fixture
def loras(tiny_folder, tmp_path):
    """A folder with a LoRA of the tiny model, `style`, and what is none."""
    from peft import LoraConfig

    from latentfm import LatentFMPipeline

    pipe = LatentFMPipeline.from_pretrained(tiny_folder)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    from peft.utils import get_peft_model_state_dict

    folder = tmp_path / "loras"
    pipe.save_lora_weights(folder / "style", transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("x")
    return folder


def drawn(models, lora=None, strength=1.0):
    pipe, common = models.ready(models.names()[0], lora, strength)
    image = pipe("a cat", num_inference_steps=2, guidance_scale=1, generator=torch.Generator().manual_seed(0), output_type="pt").images
    return image, common


def test_a_lora_is_taken_in_part_and_off_again_to_the_bit(tiny_folder, loras):
    models = Models([tiny_folder], loras, "cpu", "float32")
    assert list(models.lora_paths()) == ["style"]
    plain, common = drawn(models)
    whole, said = drawn(models, "style")
    half, half_said = drawn(models, "style", 0.5)
    none, _ = drawn(models, "style", 0.0)
    again, _ = drawn(models)
    assert torch.equal(plain, again) and torch.allclose(none, plain, atol=1e-6)
    assert not torch.allclose(whole, plain, atol=1e-3) and not torch.allclose(whole, half, atol=1e-3)
    assert said == common | {"lora": [str(loras / "style")]} and half_said["lora_strength"] == [0.5]
    assert models.lora_of(str(loras / "style")) == "style" and models.lora_of("/elsewhere") is None


def test_a_lora_that_is_a_file_and_one_in_a_folder_of_its_name_are_both_there(tiny_folder, loras):
    (file,) = (loras / "style").glob("*.safetensors")
    shutil.copy(file, loras / "style.safetensors")
    models = Models([tiny_folder], loras, "cpu", "float32")
    assert models.lora_paths() == {"style": loras / "style", "style 2": loras / "style.safetensors"}
    assert torch.equal(drawn(models, "style")[0], drawn(models, "style 2")[0])


def test_a_compiled_model_takes_a_lora_and_gives_it_back(tiny_folder, loras, monkeypatch):
    monkeypatch.setenv(FOLDER, "")  # so that what the network sets is taken back
    monkeypatch.setattr(MMDiT, "compile_repeated_blocks", partialmethod(MMDiT.compile_repeated_blocks, backend="aot_eager"))
    plain, compiled = Models([tiny_folder], loras, "cpu", "float32"), Models([tiny_folder], loras, "cpu", "float32", compiled=True)
    for lora, strength in ((None, 1.0), ("style", 1.0), ("style", 0.5), (None, 1.0)):
        expected, common = drawn(plain, lora, strength)
        found, said = drawn(compiled, lora, strength)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert said == common | {"compile": True}
    torch.compiler.reset()


def test_what_was_trained_on_meanwhile_is_loaded_anew(tiny_folder, loras, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "mine")
    models = Models([folder], loras, "cpu", "float32")
    plain, before = drawn(models)[0], drawn(models, "style")[0]
    pipe = models.pipe
    assert torch.equal(drawn(models, "style")[0], before) and models.pipe is pipe
    (file,) = (loras / "style").glob("*.safetensors")
    (file.parent / MANIFEST).unlink(missing_ok=True)
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    assert not torch.allclose(drawn(models, "style")[0], before, atol=1e-3) and models.pipe is pipe
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    (folder / MANIFEST).unlink(missing_ok=True)
    save_file({name: value * 1.5 for name, value in load_file(file).items()}, file, {"format": "pt"})
    assert not torch.allclose(drawn(models)[0], plain, atol=1e-3) and models.pipe is not pipe


def test_the_command_line_draws_the_same_with_so_much_of_it(tiny_folder, loras):
    from latentfm.drawing import add_adapters, load

    fused = load(tiny_folder, "float32")
    add_adapters(fused, [loras / "style"], [0.5])
    there = fused("a cat", num_inference_steps=2, guidance_scale=1, generator=torch.Generator().manual_seed(0), output_type="pt").images
    here, _ = drawn(Models([tiny_folder], loras, "cpu", "float32"), "style", 0.5)
    assert torch.allclose(there, here, atol=1e-5)


def test_names_are_looked_up_and_nothing_else(tiny_folder, loras):
    models = Models([tiny_folder, tiny_folder], loras, "cpu", "float32")
    assert models.names() == [tiny_folder.name, f"{tiny_folder.name} 2", BUNDLED]
    for model, lora in (("/etc", None), (str(tiny_folder), None), (BUNDLED, "../loras/style"), (BUNDLED, str(loras / "style"))):
        with pytest.raises(InputError, match="no (model|LoRA)"):
            models.check(model, lora)
    assert models.name_of("bundled") == BUNDLED and models.name_of(str(tiny_folder)) == tiny_folder.name and models.name_of("/x") is None


def test_a_folder_called_model_has_its_runs_name(tmp_path):
    assert free_name(tmp_path / "runs" / "mine" / "model", {}) == "mine"
    assert free_name(tmp_path / BUNDLED, {}) == f"{BUNDLED} 2"


def test_what_cannot_be_loaded_is_told_without_its_path(tmp_path):
    broken = tmp_path / "secret" / "broken"
    broken.mkdir(parents=True)
    (broken / "model_index.json").write_text("{}")
    with pytest.raises(InputError) as refused:
        Models([broken], None, "cpu", "float32").ready("broken", None, 1.0)
    assert "secret" not in str(refused.value)
