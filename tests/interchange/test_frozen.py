"""The frozen models of a folder: what they are by their files, and when they are in memory."""

from types import SimpleNamespace

import pytest
import torch

from latentfm.config import ModelOptions
from latentfm.interchange.frozen import FrozenModels, fingerprint, tokenizer_fingerprint
from latentfm.training.models import load_models

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tiny_folder):
    return load_models(ModelOptions(pipeline=str(tiny_folder)), weights=False)


def test_using_a_tokenizer_does_not_change_its_fingerprint(models):
    for tokenizer in models.encoder.tokenizers:
        before = tokenizer_fingerprint(tokenizer)
        tokenizer(["a red apple"], padding="max_length", max_length=5, truncation=True)
        assert tokenizer_fingerprint(tokenizer) == before
    assert len({tokenizer_fingerprint(t) for t in models.encoder.tokenizers}) == 3
    assert tokenizer_fingerprint(None) == models.fingerprint("no_such_component", torch.float32) == "absent"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fingerprint_of_files_is_that_of_the_loaded_model(tiny_folder, dtype):
    models = FrozenModels(tiny_folder, dtype, 48, 40)
    modules = [models.vae, *models.encoder.encoders]
    loaded = [fingerprint(module, sorted(module.state_dict().items())) for module in modules]
    assert [models.vae_fingerprint(), *models.text_fingerprints()[:3]] == loaded and len(set(loaded)) == 4


def test_a_fingerprint_sees_configuration_names_types_and_scalars():
    def of(config, **tensors):
        return fingerprint(SimpleNamespace(config=config), tensors.items())

    made = [
        of({"a": 1}, x=torch.zeros(2)), of({"a": 2}, x=torch.zeros(2)), of({"a": 1}, y=torch.zeros(2)),
        of({"a": 1}, x=torch.zeros(2, dtype=torch.int32)), of({"a": 1}, x=torch.tensor(0.0)), of({"a": 1}, x=torch.tensor(1.0)),
    ]  # fmt: skip
    assert len(set(made)) == 6
    assert of({"a": 1, "_name_or_path": "here"}, x=torch.zeros(2)) == made[0]


def test_the_vae_comes_to_a_device_and_goes_back(tiny_folder):
    models = load_models(ModelOptions(pipeline=str(tiny_folder)), weights=False)
    models.vae.to("meta")
    with pytest.raises(NotImplementedError), models.vae_on(CPU):  # a meta tensor has nothing to bring: the move was tried
        pass
    models = load_models(ModelOptions(pipeline=str(tiny_folder)), weights=False)
    with pytest.raises(RuntimeError, match="while"), models.vae_on(CPU):
        assert models.vae.device == CPU
        raise RuntimeError("while")
    assert models.vae.device == CPU
