"""Pipeline folders: the refusal of pickles, what an index and configurations may say, and stock names."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentfm.errors import InputError
from latentfm.models.folder import check_folder, read_config, read_index, read_info, refuse_pickle, write_stock_names
from latentfm.models.presets import PRESETS
from latentfm.models.stored import PICKLES


@pytest.mark.parametrize("suffix", [*PICKLES, ".CKPT"])
def test_a_pickle_file_is_refused_with_the_way_out(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    with pytest.raises(InputError, match=re.escape(str(path))) as refused:
        refuse_pickle(path)
    assert "safetensors" in str(refused.value) and "Convert it" in str(refused.value)


def test_the_way_out_works(tmp_path):
    path = tmp_path / "model.bin"
    torch.save({"weight": torch.arange(3.0)}, path)
    with pytest.raises(InputError) as refused:
        refuse_pickle(path)
    exec(str(refused.value).split('-c "')[1].rstrip('"'), {})
    assert load_file(tmp_path / "model.safetensors")["weight"].tolist() == [0, 1, 2]
    refuse_pickle(tmp_path / "model.safetensors")


def test_folders(tmp_path):
    (tmp_path / "unet").mkdir()
    refuse_pickle(tmp_path)  # nothing in it: not for this function to say
    pickle = tmp_path / "unet" / "diffusion_pytorch_model.bin"
    pickle.write_bytes(b"")
    with pytest.raises(InputError, match=re.escape(str(pickle))):
        refuse_pickle(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    refuse_pickle(tmp_path)


def test_safetensors_and_absent_paths_pass():
    refuse_pickle(Path("/nowhere/model.safetensors"))
    refuse_pickle(Path("/nowhere/folder"))


INDEX = {"_class_name": "StableDiffusion3Pipeline", "vae": ["diffusers", "AutoencoderKL"], "image_encoder": [None, None], "flag": True}


def test_an_index_names_the_components_that_there_are(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    assert read_index(tmp_path) == {"vae": ("diffusers", "AutoencoderKL")}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("/", ["a", "b"], "component /, which is no name"), ("..", ["a", "b"], r"component \.\., which"),
        ("a/b", ["a", "b"], "no name of a folder"), ("a\0", ["a", "b"], r"a\\x00, which is no name"),
        ("\x1b[2J", ["a", "b"], r"\\x1b\[2J, which"), ("x" * 10**5, ["a", "b"], "no name"),
        ("vae", ["os", "system"], "library os; only classes of diffusers and transformers"), ("vae", ["diffusers.evil", "X"], "library"),
        ("vae", ["pipeline", "AutoencoderKL"], "library pipeline"), ("vae", ["diffusers", 5], "not as a library and a class"),
        ("vae", ["diffusers"], "not as"), ("vae", [None, "X"], "not as"), ("vae", [["a"], "X"], "not as"),
        ("vae", ["diffusers", "a.b"], "not as"),
    ],
)  # fmt: skip
def test_an_index_that_names_anything_else_is_refused_in_one_line(tmp_path, name, value, says):
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX | {name: value}))
    with pytest.raises(InputError, match=says) as caught:
        check_folder(tmp_path, transformer=False)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 10**9), ("num_layers", 513), ("num_layers", "24"), ("num_layers", 2.0), ("num_layers", True), ("num_layers", 0),
        ("num_hidden_layers", 10**9), ("layers_per_block", 10**6), ("vocab_size", 10**12), ("pos_embed_max_size", -1), ("patch_size", [2]),
        ("block_out_channels", [4] * 17), ("block_out_channels", 5), ("block_out_channels", [4, "8"]), ("down_block_types", ["x"] * 99),
        ("dual_attention_layers", list(range(10**4))), ("dual_attention_layers", "0"), ("scaling_factor", 0), ("scaling_factor", None),
        ("scaling_factor", float("nan")), ("shift_factor", "1"), ("shift", float("inf")), ("num_train_timesteps", 10**9),
    ],
)  # fmt: skip
def test_a_configuration_asks_for_no_more_than_any_model_has(tmp_path, key, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value}))
    with pytest.raises(InputError, match=f"config.json says {key} ") as caught:
        read_config(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_what_published_models_say_is_within_bounds(tmp_path):
    path = tmp_path / "config.json"
    for preset in PRESETS.values():
        path.write_text(json.dumps(preset))
        assert read_config(path) == json.loads(json.dumps(preset))
    t5 = {"num_layers": 24, "vocab_size": 32128, "d_ff": 10240, "num_decoder_layers": 24, "layer_norm_epsilon": 1e-6, "shift_factor": None}
    path.write_text(json.dumps(t5))
    assert read_config(path) == t5


@pytest.mark.parametrize("length", [0, -5, 10**9, 4097, "16", 16.0, None, True, [16]])
def test_a_t5_length_out_of_bounds_is_refused(tmp_path, length):
    (tmp_path / "latentfm.json").write_text(json.dumps({"max_sequence_length": length}))
    with pytest.raises(InputError, match="latentfm.json says max_sequence_length"):
        read_info(tmp_path)


def test_stock_names_are_written_into_the_components_alone(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["latentfm.models.mmdit", "MMDiT"]}))
    for name in ("transformer", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"_name_or_path": "/home/me"}')
    write_stock_names(tmp_path)
    assert json.loads((tmp_path / "transformer" / "config.json").read_text()) == {"_class_name": "SD3Transformer2DModel"}
    assert (tmp_path / "other" / "config.json").read_text() == '{"_name_or_path": "/home/me"}'  # a person's own
