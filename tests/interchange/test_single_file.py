"""from_single_file beside stock diffusers': its keywords, with its picture, or refused by name."""


import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from drawn import NO_T5, draw, gap, stock_of

from latentfm import LatentFMPipeline
from latentfm.errors import InputError
from latentfm.interchange.weights import open_weights
from latentfm.interchange.writers import write_single

ROUNDING = 1e-5


@pytest.fixture(scope="module")
def single(tiny_folder, tmp_path_factory):
    """The tiny folder's weights as a single file in SD3's naming, as other programs write it: it says nothing of itself."""
    from safetensors.torch import load_file, save_file

    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    write_single(path, open_weights(tiny_folder), "original", None)
    save_file(load_file(path), path)
    return path


def file_pair(single, folder, **more):
    """The single file in stock diffusers and here, by the same keywords; without T5, of which stock's has no weights in transformers 5."""
    given = {"config": str(folder), "local_files_only": True, "torch_dtype": torch.float32, **NO_T5, **more}
    return [kind.from_single_file(str(single), **given) for kind in (StableDiffusion3Pipeline, LatentFMPipeline)]


def vae_of(folder):
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(0.3)
    return vae


@pytest.mark.parametrize(
    "more",
    [
        {}, {"disable_mmap": True}, {"force_download": False, "token": None, "revision": "main"}, {"vae": vae_of},
        {"scheduler": lambda folder: FlowMatchEulerDiscreteScheduler(shift=5.0)},
        {"text_encoder_2": lambda folder: stock_of(folder).text_encoder_2}, {"transformer": lambda folder: stock_of(folder).transformer},
        {"text_encoder_3": lambda folder: stock_of(folder).text_encoder_3, "tokenizer_3": lambda folder: stock_of(folder).tokenizer_3},
        {"torch_dtype": torch.float64},
    ],
    ids=lambda more: ",".join(more),
)  # fmt: skip
def test_a_single_file_takes_stock_diffusers_keywords(single, tiny_folder, more):
    given = {name: value(tiny_folder) if callable(value) else value for name, value in more.items()}
    stock, ours = file_pair(single, tiny_folder, **given)
    assert gap(draw(stock, output_type="pt"), draw(ours, output_type="pt")) < ROUNDING
    assert ours.text_encoder_3 is given.get("text_encoder_3")
    for name, part in given.items():
        assert not isinstance(part, torch.nn.Module) or getattr(ours, name) is part
    assert ours.transformer.dtype == stock.transformer.dtype


def test_a_configuration_needs_no_weights(single, model):
    for path in model.glob("*/*.safetensors"):
        path.unlink()
    stock, ours = file_pair(single, model)
    assert gap(draw(stock), draw(ours)) < ROUNDING
    assert ours.transformer.config.sample_size == stock.transformer.config.sample_size == 8  # which leaves no trace in weights


def test_what_neither_file_nor_configuration_has_is_said(single, model, tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    for path in model.glob("*/*.safetensors"):
        path.unlink()
    tensors = load_file(single)
    save_file({key: value for key, value in tensors.items() if "t5xxl" not in key}, tmp_path / "no_t5.safetensors")
    assert LatentFMPipeline.from_single_file(tmp_path / "no_t5.safetensors", config=model).text_encoder_3 is None
    assert "T5 is left out, zeros stand for it: neither the file nor" in caplog.text
    save_file({key: value for key, value in tensors.items() if "first_stage" not in key}, tmp_path / "no_vae.safetensors")
    with pytest.raises(InputError, match="no_vae.safetensors has no vae; give a pipeline folder .*model has no weights of it"):
        LatentFMPipeline.from_single_file(tmp_path / "no_vae.safetensors", config=model)
    assert LatentFMPipeline.from_single_file(tmp_path / "no_vae.safetensors", config=model, vae=None).vae is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"original_config": "sd3.yaml"}, "does not serve original_config='sd3.yaml': what it says is read from the weights"),
        ({"original_config_file": "sd3.yaml"}, "does not serve original_config_file='sd3.yaml'"),
        ({"quantization_config": 5}, "does not serve quantization_config=5: .*make a folder of it"),
        ({"use_safetensors": False}, "does not serve use_safetensors=False"),
        ({"sample_sise": 5}, r"has no keyword sample_sise \(did you mean 'sample_size'\?\)"),
        ({"config": "nowhere/at/all"}, "no such model folder: nowhere/at/all"),
        ({"config": "a", "pipeline": "b"}, "give one of the two"),
        ({"config": 5}, "config is given by its path, not by 5"),
        ({"pipeline": ["a"]}, r"pipeline is given by its path, not by \['a'\]"),
        ({"sample_size": 0}, "sample_size 0 is no side of latents"),
        ({"sample_size": "128"}, "sample_size '128' is no side of latents"),
    ],
    ids=str,
)
def test_what_a_single_file_cannot_be_loaded_by_is_refused_by_name(single, given, says):
    with pytest.raises(InputError, match=says):
        LatentFMPipeline.from_single_file(single, **given)


def test_a_link_to_the_hub_is_fetched_unless_it_is_a_pickle(tiny_folder, tmp_path, picture, monkeypatch):
    import huggingface_hub

    single, asked = tmp_path / "ours.safetensors", {}
    write_single(single, open_weights(tiny_folder), "original", None)

    def fetch(repository, name, **more):
        asked.update(more, repository=repository, name=name)
        return str(single)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    link = "https://huggingface.co/some/model/blob/v2/sub/sd3.safetensors"
    assert gap(draw(LatentFMPipeline.from_single_file(link, pipeline=tiny_folder, token="t", cache_dir=None)), picture) < ROUNDING
    assert asked == {"repository": "some/model", "name": "sub/sd3.safetensors", "revision": "v2", "token": "t"}
    for name in ("sd3.ckpt", "sd3.bin"):
        with pytest.raises(InputError, match=f"{name} is a pickle"):
            LatentFMPipeline.from_single_file(f"https://huggingface.co/some/model/blob/main/{name}")
