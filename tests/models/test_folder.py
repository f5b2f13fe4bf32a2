"""The refusal of pickles."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentfm.errors import InputError
from latentfm.models.folder import refuse_pickle
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
