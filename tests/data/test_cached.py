"""What the cache's entries depend on and hold: keys that notice every change, and models that are read when something is missing."""

import os
import shutil

import numpy as np
import pytest
import torch
from data.cache.filling import read
from data.preparing import CPU, NO_DROPOUT, cached, damage, data_of, entry_of, fill, keys
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from latentfm.bounds import captions_at_once, images_at_once
from latentfm.config import DataOptions, ModelOptions
from latentfm.data import prepared
from latentfm.data.cache.store import Cache
from latentfm.data.sources import read_folder
from latentfm.interchange import components, frozen
from latentfm.models.tokenizers import load_tokenizer
from latentfm.training.models import load_models


def test_nothing_changed_is_a_hit(pictures, models):
    assert fill(cached(pictures, models)) == 5  # two pictures, three captions
    assert fill(cached(pictures, models)) == 0
    moved = pictures.parent / "moved" / "deeper"
    shutil.copytree(pictures, moved)
    (moved / "0.png").rename(moved / "renamed.png")
    (moved / "0.txt").rename(moved / "renamed.txt")
    again = data_of(read_folder(moved), models, DataOptions(folder=str(moved), cache=str(pictures.parent / "cache")), (8,))
    assert fill(again) == 0  # paths and names are no part of a key


def test_a_changed_byte_of_a_picture_is_a_miss_and_only_its_own(pictures, models):
    before = keys(cached(pictures, models))
    fill(cached(pictures, models))
    with (pictures / "0.png").open("ab") as file:
        file.write(b"\0")
    after = keys(cached(pictures, models))
    assert {name for name in before if before[name] != after[name]} == {("0.png", False)}
    assert fill(cached(pictures, models)) == 1


def test_two_pictures_of_one_stem_or_swapped_names_never_share(pictures, models):
    before = keys(cached(pictures, models))
    (pictures / "0.png").rename(pictures / "x.png")
    (pictures / "1.png").rename(pictures / "0.png")
    (pictures / "x.png").rename(pictures / "1.png")
    after = keys(cached(pictures, models))
    assert after[("0.png", False)] == before[("1.png", False)] != before[("0.png", False)]


@pytest.mark.parametrize("options", [{"size": 24}, {"size": (32, 24)}, {"size": (24, 32)}])
def test_another_transform_is_a_miss_for_pictures_alone(pictures, models, options):
    before, after = keys(cached(pictures, models)), keys(cached(pictures, models, **options))
    assert {name for name in before if before[name] != after[name]} == {("0.png", False), ("1.png", False)}


def test_flips_have_their_own_entries_of_the_mirrored_picture(pictures, models):
    data = cached(pictures, models, flip=True)
    assert len(set(keys(data).values())) == 2 * 2 + 3
    assert fill(data) == 7
    sample = data.inventory.dataset.samples[0]
    plain, flipped = (read(data.cache, data.image_key(sample, flip))["moments"] for flip in (False, True))
    with Image.open(pictures / "0.png") as picture:
        picture.crop((0, 4, 32, 36)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(pictures / "0.png")
    mirrored = cached(pictures, models)
    fill(mirrored)
    torch.testing.assert_close(read(mirrored.cache, mirrored.image_key(sample, False))["moments"], flipped)
    assert (plain - flipped).abs().max() > 0.1


def test_as_many_together_as_a_gpu_takes_are_encoded_the_same(pictures, models, monkeypatch):
    few = cached(pictures, models, flip=True)
    assert fill(few) == 7
    monkeypatch.setattr("latentfm.data.cached.images_at_once", lambda pixels, cpu: images_at_once(pixels, cpu=False))
    monkeypatch.setattr("latentfm.data.cached.captions_at_once", lambda length, cpu: captions_at_once(length, cpu=False))
    many = cached(pictures, models, flip=True)
    many.cache = Cache(pictures.parent / "another")
    assert {job.kind: job.at_once for job in many.jobs()} == {"prompts": 256, "moments": 128, "masks": 8}
    assert fill(many) == 7
    for key in keys(few).values():
        entries = read(few.cache, key), read(many.cache, key)
        assert entries[0].keys() == entries[1].keys()
        for name in entries[0]:
            torch.testing.assert_close(entries[1][name].float(), entries[0][name].float(), rtol=2**-6, atol=1e-3)


def test_how_many_are_encoded_together():
    assert [images_at_once(side**2, cpu=True) for side in (32, 128, 1024)] == [8, 8, 8]
    assert [images_at_once(side**2, cpu=False) for side in (32, 128, 256, 384, 512, 1024)] == [128, 128, 32, 8, 8, 8]
    assert [captions_at_once(length, cpu=True) for length in (24, 512)] == [32, 32]
    assert [captions_at_once(length, cpu=False) for length in (24, 77, 256, 512)] == [256, 64, 32, 32]


def test_another_caption_or_length_is_a_miss_of_its_own(pictures, models):
    before = keys(cached(pictures, models))
    (pictures / "1.txt").write_text("a blue car\ntwo cars ")  # white space at the end is removed by the reader
    assert keys(cached(pictures, models)) == before
    (pictures / "1.txt").write_text("a blue car\nTwo cars")
    after = keys(cached(pictures, models))
    assert set(before) ^ set(after) == {("two cars", 8), ("Two cars", 8)}
    assert after[("Two cars", 8)] not in before.values()
    longer = keys(cached(pictures, models, lengths=(8, 9)))
    assert longer[("a blue car", 9)] != longer[("a blue car", 8)] == before[("a blue car", 8)]


def altered(folder, copy, name, change):
    """The models of a copy of a pipeline folder, one of whose components' tensors `change` has changed."""
    shutil.copytree(folder, copy)
    (file,) = (copy / name).glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return load_models(ModelOptions(pipeline=str(copy)), weights=False)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_another_weight_of_an_encoder_is_a_miss_for_captions_alone(pictures, models, tiny_folder, tmp_path, which):
    before, name = keys(cached(pictures, models)), ("text_encoder", "text_encoder_2", "text_encoder_3")[which]
    assert keys(cached(pictures, altered(tiny_folder, tmp_path / "same", name, lambda tensors: None))) == before

    def change(tensors):
        value = tensors[max(tensors)].view(-1)
        value[0] = torch.nextafter(value[0], torch.tensor(9.0))  # the last bit of one weight

    after = keys(cached(pictures, altered(tiny_folder, tmp_path / "other", name, change)))
    assert {name for name in before if before[name] == after[name]} == {("0.png", False), ("1.png", False)}


def test_another_vae_is_a_miss_for_pictures_alone(pictures, models, tiny_folder, tmp_path):
    before = keys(cached(pictures, models))

    def change(tensors):
        tensors["encoder.conv_in.bias"][0] += 1e-6

    after = keys(cached(pictures, altered(tiny_folder, tmp_path / "other", "vae", change)))
    assert {name for name in before if before[name] != after[name]} == {("0.png", False), ("1.png", False)}


@pytest.mark.parametrize("change", ["vocabulary", "padding", "length", "absent"])
def test_another_tokenizer_is_a_miss_for_captions_alone(pictures, models, tiny_folder, tmp_path, monkeypatch, change):
    before = keys(cached(pictures, models))
    shutil.copytree(tiny_folder, tmp_path / "other")
    tokenizer = load_tokenizer(tmp_path / "other" / "tokenizer_2")
    if change == "vocabulary":
        tokenizer.add_tokens(["apple-like"])
    elif change == "padding":
        tokenizer.pad_token = "a"
    elif change == "length":
        tokenizer.model_max_length = 15
    found = None if change == "absent" else tokenizer
    monkeypatch.setattr(frozen, "load_tokenizer", lambda path: found if path.name == "tokenizer_2" else load_tokenizer(path))
    after = keys(cached(pictures, load_models(ModelOptions(pipeline=str(tmp_path / "other")), weights=False)))
    assert {name for name in before if before[name] == after[name]} == {("0.png", False), ("1.png", False)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_entries_are_what_the_encoders_give(pictures, models, dtype):
    data = cached(pictures, models, lengths=(8, 5), cache_dtype=dtype)
    fill(data)
    for sample in data.inventory.dataset.samples:
        with Image.open(sample.path) as picture:
            pixels = torch.from_numpy(np.array(picture.crop((0, 4, 32, 36)))).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            posterior = models.vae.encode(pixels).latent_dist
        moments = entry_of(data, data.image_key(sample, False))["moments"]
        assert moments.dtype == getattr(torch, dtype)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 2**-8, "atol": 1e-4}
        torch.testing.assert_close(moments[None].float(), torch.cat([posterior.mean, posterior.logvar], dim=1), **tolerance)
        for caption in sample.captions:
            for length in (8, 5):
                parts = models.encoder.encode([caption], length)
                got = entry_of(data, data.caption_key(caption, length))
                assert got.keys() == {name for name, _ in parts.items()}
                for name, value in parts.items():
                    torch.testing.assert_close(got[name].float(), value[0], rtol=1e-2, atol=1e-3)  # kept in bfloat16
                    assert got[name].dtype == torch.bfloat16


def test_the_dtype_of_the_cache_is_part_of_a_pictures_key_alone(pictures, models):
    before, after = keys(cached(pictures, models)), keys(cached(pictures, models, cache_dtype="float32"))
    assert {name for name in before if before[name] != after[name]} == {("0.png", False), ("1.png", False)}


def test_a_damaged_entry_of_a_dataset_is_repaired_by_the_next_run_to_the_bit(pictures, models, caplog):
    data = cached(pictures, models)
    assert fill(data) == 5
    image, text = data.image_key(data.inventory.dataset.samples[1], False), data.caption_key("two cars", 8)
    before = {key: entry_of(data, key) for key in (image, text)}
    for key in (image, text):
        damage(data.cache.folder, key)
    again = cached(pictures, models)
    assert fill(again) == 2 and image in caplog.text and text in caplog.text
    for key, tensors in before.items():  # made with other neighbours in its batch, and the same
        assert all(torch.equal(value, tensors[name]) for name, value in entry_of(again, key).items())
    assert {p.name for p in pictures.iterdir()} == {"0.png", "0.txt", "1.png", "1.txt"}  # the user's files are not touched


def test_an_old_cache_is_told_of_once_and_left(pictures, models, caplog):
    folder = pictures.parent / "cache" / "ab"
    folder.mkdir(parents=True)
    (folder / f"{'ab' * 32}.safetensors").write_bytes(b"old")
    fill(cached(pictures, models))
    assert caplog.text.count("earlier version") == 1 and "rm -r" in caplog.text and len(list(folder.iterdir())) == 1


# The models


def test_a_cache_is_filled_without_the_networks_weights(pictures, models, tiny_folder):
    light = load_models(ModelOptions(pipeline=str(tiny_folder)), weights=False)
    assert {parameter.device.type for parameter in light.network.parameters()} == {"meta"}
    assert {k: v for k, v in models.network.config.items() if k != "_name_or_path"} == dict(light.network.config)
    assert keys(cached(pictures, light)) == keys(cached(pictures, models))
    fill(cached(pictures, light))
    assert fill(cached(pictures, models)) == 0


def test_a_new_networks_widths_are_known_without_its_weights(tiny_folder, monkeypatch):
    from latentfm.models import presets

    monkeypatch.setitem(presets.PRESETS, "atom", presets.size(2, 1, sample_size=8, pos_embed_max_size=8))
    whole, light = (load_models(ModelOptions(pipeline=str(tiny_folder), preset="atom"), weights=weights) for weights in (True, False))
    assert light.network.pos_embed.proj.weight.is_meta and dict(light.network.config) == dict(whole.network.config)
    assert light.encoder.joint_dim == whole.encoder.joint_dim == 48


def test_text_encoders_load_in_the_precision_asked_for(pictures, models, tiny_folder):
    half = load_models(ModelOptions(pipeline=str(tiny_folder), text_encoders="bfloat16"))
    assert {p.dtype for encoder in half.encoder.encoders for p in encoder.parameters()} == {torch.bfloat16}
    assert next(half.vae.parameters()).dtype == torch.float32
    before, after = keys(cached(pictures, models)), keys(cached(pictures, half))
    assert {name for name in before if before[name] == after[name]} == {("0.png", False), ("1.png", False)}
    data = cached(pictures, half)
    assert fill(data) == 5
    exact = models.encoder.encode(["two cars"], 8)
    for name, value in entry_of(data, data.caption_key("two cars", 8)).items():
        torch.testing.assert_close(value.float(), getattr(exact, name)[0], rtol=0.1, atol=0.05)


def test_a_full_cache_loads_neither_encoders_nor_vae(pictures, tiny_folder, monkeypatch):
    """Nor does anything else of theirs: what they are is told by files that did not change, what they said is kept."""

    def conditions(data):
        return dict(data.encode(["a red apple", "x"], 8).items()), data.null([8, 12], CPU)

    def light():
        return cached(pictures, load_models(ModelOptions(pipeline=str(tiny_folder)), weights=False))

    first = light()
    fill(first)
    prompts, null = conditions(first)
    assert first.models._vae is not None and first.models._encoder is not None
    first.release()
    assert first.models._vae is None and first.models._encoder is None and "null" not in first.models.__dict__
    for module, name in ((frozen, "load_component"), (frozen, "load_text_encoders"), (frozen, "open_component"), (frozen, "load_tokenizer"),
                         (components, "load_part"), (AutoencoderKL, "from_pretrained"), (T5EncoderModel, "from_pretrained"),
                         (CLIPTextModelWithProjection, "from_pretrained"), (prepared, "load_tokenizers")):  # fmt: skip
        monkeypatch.setattr(module, name, None)  # calling it is a TypeError
    again = light()
    assert fill(again) == 0 and again.identity() == first.identity()
    assert again.reader(0, NO_DROPOUT)[[(0, 1, 0)], 8].moments.shape == (1, 8, 8, 8)
    found, kept = conditions(again)
    assert all(torch.equal(value, prompts[name]) for name, value in found.items())
    assert kept.prints == null.prints and [len(kept.parts(length).t5[0]) for length in (8, 12)] == [8, 12]
    assert all(torch.equal(value, getattr(null.parts(12), name)) for name, value in kept.parts(12).items())
    (pictures / "0.txt").write_text("another caption")
    with pytest.raises(TypeError):
        fill(light())


def test_conditions_are_what_the_encoders_give_unrounded(pictures, models):
    data = cached(pictures, models)
    fill(data)
    for name, value in models.encoder.encode(["a red apple", "two cars"], 8).items():
        torch.testing.assert_close(getattr(data.encode(["a red apple", "two cars"], 8), name), value, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, getattr(data.null([8], CPU).parts(8), name)) for name, value in models.encoder.encode([""], 8).items())


def test_a_full_cache_that_cannot_be_written_serves_new_prompts_too(pictures, models, monkeypatch):
    data = cached(pictures, models)
    fill(data)
    before = {path: path.stat().st_mtime_ns for path in data.cache.folder.rglob("*")}
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert data.encode(["x", "y", "x"], 8).t5.shape[:2] == (3, 8)
    assert {path: path.stat().st_mtime_ns for path in data.cache.folder.rglob("*")} == before
