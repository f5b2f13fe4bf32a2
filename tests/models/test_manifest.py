"""The manifest of a saved folder: what it notices at once and what when asked, that it is kept right, and the ways on."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentfm import LatentFMPipeline
from latentfm.errors import InputError
from latentfm.models import manifest
from latentfm.models.manifest import MANIFEST, Saved, check_manifest, files_of, hash_of, read_manifest, write_manifest

WEIGHTS = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def saved(tiny_folder, tmp_path_factory) -> Path:
    """The tiny pipeline as save_pretrained leaves it: read it only."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    LatentFMPipeline.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(saved, tmp_path / "model")


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def load(folder: Path, **more) -> LatentFMPipeline:
    return LatentFMPipeline.from_pretrained(folder, **more)


def test_it_names_every_file_with_its_size_and_hash(saved):
    found = read_manifest(saved)
    there = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert found.keys() == there - {MANIFEST}
    assert {"model_index.json", "latentfm.json", "null_condition.safetensors", WEIGHTS} <= found.keys()
    assert all(hash_of(saved / name) == entry and entry.size == (saved / name).stat().st_size for name, entry in found.items())
    check_manifest(saved, verify=True)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is GNU's")
def test_sha256sum_reads_it_too(model):
    command = ["sha256sum", "--check", "--strict", "--quiet", MANIFEST]
    assert subprocess.run(command, cwd=model).returncode == 0
    flip(model / WEIGHTS)
    assert subprocess.run(command, cwd=model, capture_output=True).returncode == 1


def test_every_byte_of_every_file_is_noticed_when_asked(model):
    for name in read_manifest(model):
        flip(model / name, len((model / name).read_bytes()) // 2)
        with pytest.raises(InputError, match=f"is not what was saved there: {name} has other bytes"):
            check_manifest(model, verify=True)
        flip(model / name, len((model / name).read_bytes()) // 2)
    check_manifest(model, verify=True)


def test_a_flip_in_weights_is_noticed_by_verify_and_one_in_a_configuration_always(model):
    flip(model / WEIGHTS)
    load(model)
    with pytest.raises(InputError, match=f"{WEIGHTS} has other bytes; copy it again, or if you changed it on purpose.*verify --renew"):
        load(model, verify=True)
    flip(model / WEIGHTS)
    config = model / "vae" / "config.json"
    config.write_text(config.read_text().replace("1.5", "1.6"))
    with pytest.raises(InputError, match=re.escape("vae/config.json has other bytes")):
        load(model)


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer/tokenizer.json", "scheduler/scheduler_config.json", "null_condition.safetensors"])
def test_what_is_missing_or_of_another_size_is_noticed_always(model, name):
    for change, says in ((lambda path: path.write_bytes(path.read_bytes() + b" "), "bytes"), (Path.unlink, "missing")):
        change(model / name)
        with pytest.raises(InputError, match=f"{name}.*{says}"):
            check_manifest(model)
        with pytest.raises(InputError):
            load(model)


def test_weights_replaced_on_purpose_get_the_way_on(model):
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file)
    with pytest.raises(InputError, match=f"transformer/{file.name} has .* bytes, .* were saved.*latentfm verify --renew"):
        load(model)
    write_manifest(model)
    load(model, verify=True)
    (model / MANIFEST).unlink()
    load(model)


def test_without_a_manifest_a_folder_loads_as_ever_and_cannot_be_verified(tiny_folder):
    assert read_manifest(tiny_folder) is None
    load(tiny_folder)
    with pytest.raises(InputError, match="has no latentfm_manifest.txt.*verify --renew"):
        load(tiny_folder, verify=True)


def test_what_is_not_loaded_need_not_be_there(model):
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(model / name)
    with pytest.raises(InputError, match="text_encoder_3"):
        load(model)
    assert load(model, verify=True, text_encoder_3=None, tokenizer_3=None).text_encoder_3 is None


def test_saving_again_in_place_keeps_it_right(model):
    pipe = load(model)
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    with torch.no_grad():
        pipe.transformer.proj_out.bias += 1.0
    pipe.save_pretrained(model)
    check_manifest(model, verify=True)
    assert not any(name.startswith("text_encoder_3/") for name in read_manifest(model))
    assert load(model, verify=True).text_encoder_3 is None


def test_a_null_condition_saved_into_a_folder_by_itself_is_in_its_manifest(model, tmp_path):
    pipe = load(model)
    pipe.null.parts(24)
    pipe.null.save(model)
    check_manifest(model, verify=True)
    (tmp_path / "alone").mkdir()
    pipe.null.save(tmp_path / "alone")
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["null_condition.safetensors"]


def test_what_a_person_puts_beside_a_model_is_none_of_it(model):
    (model / "README.md").write_text("mine")
    (model / "samples").mkdir()
    (model / "samples" / "1.png").write_bytes(b"x")
    (model / "vae" / ".hidden").touch()
    check_manifest(model, verify=True)
    before = read_manifest(model)
    write_manifest(model)
    assert read_manifest(model) == before


def test_a_file_added_among_those_that_are_read_is_noticed_when_asked(model):
    (model / "tokenizer" / "added_tokens.json").write_text("{}")
    check_manifest(model)
    with pytest.raises(InputError, match="tokenizer/added_tokens.json was not saved with it"):
        check_manifest(model, verify=True)


def test_hashes_that_are_known_are_not_made_again_unless_the_size_differs(model, monkeypatch):
    known = {name: entry._replace(sha256="0" * 64) for name, entry in read_manifest(model).items()}
    known["vae/config.json"] = Saved(1, "1" * 64)
    read = []
    monkeypatch.setattr(manifest, "hash_of", lambda path: read.append(path) or hash_of(path))
    write_manifest(model, known)
    assert read == [model / "vae" / "config.json"]
    assert read_manifest(model)[WEIGHTS].sha256 == "0" * 64


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff", b"# latentfm manifest 1", b"something else\n", b"TITLE\n# 5\n", b"TITLE\n# 5\nnothex  a\n", b"TITLE\n# x\nHASH  a\n",
        b"TITLE\n# 5\nHASH  ../a\n", b"TITLE\n# 5\nHASH  /etc/passwd\n", b"TITLE\n# 5\nHASH  a/b/c\n",
        b"TITLE\n# " + b"9" * 30 + b"\nHASH  a\n",
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_said_with_the_ways_on(model, content):
    title, digest = manifest.TITLE.encode(), b"0" * 64
    (model / MANIFEST).write_bytes(content.replace(b"TITLE", title).replace(b"HASH", digest))
    with pytest.raises(InputError, match=MANIFEST) as caught:
        load(model)
    assert "\n" not in str(caught.value)


def test_a_special_file_in_its_place_or_among_the_files_is_refused(model):
    (model / WEIGHTS).unlink()
    os.mkfifo(model / WEIGHTS)
    with pytest.raises(InputError, match="named pipe"):
        load(model)
    with pytest.raises(InputError, match=WEIGHTS):
        check_manifest(model)
    (model / MANIFEST).unlink()
    os.mkfifo(model / MANIFEST)
    with pytest.raises(InputError, match="named pipe"):
        check_manifest(model)


def test_the_files_of_a_lora_and_of_a_component(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "notes.txt").write_text("mine")
    assert files_of(tmp_path) == ["adapter_config.json", "adapter_model.safetensors"]
