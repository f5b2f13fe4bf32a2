"""When a run's frozen models are in memory: while something has to be encoded, and the VAE while pictures are drawn."""

from diffusers import AutoencoderKL
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from latentfm.interchange import components, frozen


def test_a_run_whose_cache_is_full_never_loads_a_text_encoder(tmp_path, run, start, monkeypatch):
    """It trains, validates, draws and saves as the run that filled the cache did."""
    more = [f"data.cache={tmp_path / 'cache'}", "validation.held_out=2", "sample.every=3"]
    whole = run(tmp_path / "first", *more)
    loaded = []
    load_component = frozen.load_component
    for kind in (AutoencoderKL, T5EncoderModel, CLIPTextModelWithProjection):
        monkeypatch.setattr(kind, "from_pretrained", None)
    monkeypatch.setattr(frozen, "load_text_encoders", None)
    monkeypatch.setattr(components, "load_part", lambda name, *rest, load=components.load_part: loaded.append(name) or load(name, *rest))
    monkeypatch.setattr(frozen, "load_component", lambda folder, name, *rest: loaded.append(name) or load_component(folder, name, *rest))
    trainer = start(tmp_path / "second", *more)
    assert loaded == ["transformer"]
    assert trainer.models._vae is None and trainer.models._encoder is None
    monkeypatch.undo()
    monkeypatch.setattr(frozen, "load_text_encoders", None)
    second = run(tmp_path / "third", *more)
    assert (second / "metrics.jsonl").read_text().count("\n") == 6
    for name in ("samples/step-00000006.png", "model/null_condition.safetensors", "model/transformer/diffusion_pytorch_model.safetensors"):
        assert (second / name).read_bytes() == (whole / name).read_bytes(), name


def test_the_vae_is_loaded_for_pictures_and_the_text_encoders_are_gone_after_the_cache_is_full(tmp_path, start):
    trainer = start(tmp_path / "out", f"data.cache={tmp_path / 'cache'}")
    models = trainer.models
    assert models._vae is None and models._encoder is None
    trainer.sample()
    assert models._vae is not None and models._vae.device.type == "cpu" and models._encoder is None
