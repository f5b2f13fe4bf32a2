"""Which files weights are read from, judged by what would be opened, and headers that are believed only within bounds."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentfm.errors import InputError
from latentfm.models import stored
from latentfm.models.stored import names_in, read_header, stored_numbers, variants_in, weight_files

SOME = {"x": torch.zeros(2, 3)}


def index(folder: Path, files: dict, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def names(folder: Path, variant: str | None = None) -> list[str]:
    return [path.name for path in weight_files(folder, variant).paths]


def test_the_file_that_libraries_name_is_read_and_others_are_left_alone(tmp_path):
    for name in ("pytorch_lora_weights", "diffusion_pytorch_model", "diffusion_pytorch_model.fp16", "another"):
        save_file(SOME, tmp_path / f"{name}.safetensors")
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"x")
    assert names(tmp_path) == ["diffusion_pytorch_model.safetensors"]
    assert names(tmp_path, "fp16") == ["diffusion_pytorch_model.fp16.safetensors"]
    assert names(tmp_path, "bf16") == ["diffusion_pytorch_model.safetensors"]  # what has no such variant has its plain file
    assert stored_numbers(tmp_path) == 6


def test_shards_are_those_of_the_index_and_of_a_variants_own(tmp_path):
    for name in ("model-00001-of-00002", "model-00002-of-00002", "model.fp16-00001-of-00001", "stray"):
        save_file(SOME, tmp_path / f"{name}.safetensors")
    index(tmp_path, {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"})
    index(tmp_path, {"x": "model.fp16-00001-of-00001.safetensors"}, "model.safetensors.index.fp16.json")
    assert names(tmp_path) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert names(tmp_path, "fp16") == ["model.fp16-00001-of-00001.safetensors"]


def test_between_a_file_and_shards_each_librarys_own_choice_is_made(tmp_path):
    for stem in ("diffusion_pytorch_model", "model"):
        folder = tmp_path / stem
        folder.mkdir()
        save_file(SOME, folder / f"{stem}.safetensors")
        save_file(SOME, folder / "one.safetensors")
        index(folder, {"x": "one.safetensors"}, f"{stem}.safetensors.index.json")
    assert names(tmp_path / "diffusion_pytorch_model") == ["one.safetensors"]
    assert names(tmp_path / "model") == ["model.safetensors"]
    (tmp_path / "diffusion_pytorch_model" / "one.safetensors").unlink()  # an index left over, whose shards are gone
    assert names(tmp_path / "diffusion_pytorch_model") == ["diffusion_pytorch_model.safetensors"]


def test_each_component_is_read_by_its_own_librarys_name(tmp_path):
    for part, own in (("transformer", "diffusion_pytorch_model"), ("text_encoder_3", "model"), ("text_encoder", "model")):
        (tmp_path / part).mkdir()
        for stem in ("diffusion_pytorch_model", "model"):
            save_file(SOME, tmp_path / part / f"{stem}.safetensors")
        assert names(tmp_path / part) == [f"{own}.safetensors"]


def test_what_a_desktop_leaves_beside_weights_is_no_weights(tmp_path):
    save_file(SOME, tmp_path / "model.fp16.safetensors")
    (tmp_path / "._model.fp16.safetensors").write_bytes(b"Mac OS X")
    (tmp_path / "._model.safetensors.index.json").write_bytes(b"Mac OS X")
    assert names(tmp_path) == ["model.fp16.safetensors"]


def test_of_several_variants_and_no_plain_weights_one_is_to_be_named(tmp_path):
    for variant in ("fp16", "bf16"):
        save_file(SOME, tmp_path / f"diffusion_pytorch_model.{variant}.safetensors")
    index(tmp_path, {"x": "diffusion_pytorch_model.fp16.safetensors"}, "diffusion_pytorch_model.safetensors.index.int8.json")
    assert variants_in(tmp_path) == ["bf16", "fp16", "int8"]
    (tmp_path / "diffusion_pytorch_model.safetensors.index.int8.json").unlink()
    with pytest.raises(InputError, match="has weights of the variants bf16, fp16 alone: say which, as in variant='bf16'"):
        weight_files(tmp_path)
    assert names(tmp_path, "fp16") == ["diffusion_pytorch_model.fp16.safetensors"]


@pytest.mark.parametrize(
    ("shard", "says"),
    [
        ("e.bin", "e.bin is a pickle.*save_file"), ("e.PT", "is a pickle"), ("e.ckpt", "is a pickle"), ("../other.safetensors", "outside"),
        ("/etc/passwd", "outside"), ("sub/x.safetensors", "outside"), ("..", "no safetensors file"), ("e.npz", "no safetensors file"),
        ("", "no safetensors file"), ("a\0.safetensors", r"outside its folder, a\\x00"),
        ("gone.safetensors", "lacks gone.safetensors, 1 of 1 shard"),
    ],
)  # fmt: skip
def test_an_index_that_names_something_else_than_safetensors_beside_it_is_refused(tmp_path, shard, says):
    save_file(SOME, tmp_path / "beside.safetensors")
    save_file(SOME, tmp_path.parent / "other.safetensors")
    torch.save(SOME, tmp_path / "e.bin")
    index(tmp_path, {"x": shard})
    with pytest.raises(InputError, match=says):
        weight_files(tmp_path)


@pytest.mark.parametrize("value", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"x": 5}}, {"weight_map": {"x": None}}])
def test_an_index_of_another_form_is_damaged(tmp_path, value):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="damaged"):
        weight_files(tmp_path)


def test_only_pickles_are_refused_with_the_way_out(tmp_path):
    torch.save(SOME, tmp_path / "pytorch_model.bin")
    index(tmp_path, {"x": "pytorch_model.bin"}, "pytorch_model.bin.index.json")
    with pytest.raises(InputError, match="pytorch_model.bin is a pickle"):
        weight_files(tmp_path)


def test_a_pickle_under_the_name_of_safetensors_is_one(tmp_path):
    torch.save(SOME, tmp_path / "real.bin")
    (tmp_path / "model.safetensors").symlink_to("real.bin")
    (path,) = weight_files(tmp_path).paths
    with pytest.raises(InputError, match="model.safetensors is a pickle under another name"):
        read_header(path)


def test_a_link_to_safetensors_is_read_as_a_hubs_cache_has_them(tmp_path):
    save_file(SOME, tmp_path / "0a1b2c")
    (tmp_path / "model.safetensors").symlink_to("0a1b2c")
    assert read_header(tmp_path / "model.safetensors").tensors["x"].shape == (2, 3)


def header(path: Path, entry: object, data: bytes = b"") -> Path:
    text = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict:
    return {"x\x1b[2J": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (b'{"a":' * 9000, "nested too deeply"), (b'{"a": ' + b"9" * 5000 + b"}", "header cannot be read"), (b"[1]", "does not begin"),
        (tensor(shape=[10**9] * 40, offsets=[0, 4]), "claims more"), (tensor(shape=[2**63]), "claims more"),
        (tensor(shape=[0] * 100, offsets=[0, 0]), "claims more"), (tensor(offsets=[0, 2**70]), "claims more"),
        (tensor(shape=[10**9], offsets=[0, 4 * 10**9]), "cut short: 3,999,999,996 bytes of"),
        (tensor(shape=[1.0]), "something else than sizes"),
        (tensor(shape=[True]), "something else than sizes"), (tensor(shape="1"), "something else"), (tensor(offsets=[0]), "something else"),
        (tensor(dtype=["F32"]), "dtype"), (tensor(dtype="F4"), "dtype F4"), ({"x": 5}, "not described"),
        ({"__metadata__": {"k": 5}}, "metadata that is no text"), ({"__metadata__": [1]}, "header cannot be read"),
    ],
)  # fmt: skip
def test_a_header_is_believed_within_bounds_only(tmp_path, entry, says):
    with pytest.raises(InputError, match=says) as caught:
        read_header(header(tmp_path / "x.safetensors", entry, b"\0" * 4))
    assert "x.safetensors" in str(caught.value) and "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_header_larger_than_any_is_not_read(tmp_path):
    path = header(tmp_path / "x.safetensors", b"{" + b" " * 2**24 + b"}")
    with pytest.raises(InputError, match="a header of 16,777,218 bytes"):
        read_header(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_special_files_are_refused_at_once(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": Path.mkdir}[kind](path)
    done = threading.Event()

    def read():
        with pytest.raises(InputError, match=f"is a .*{kind}"):
            read_header(weight_files(tmp_path).paths[0])
        done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(10)


def test_a_folder_of_very_many_files_is_none_of_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "MOST_FILES", 3)
    for number in range(3):
        (tmp_path / str(number)).touch()
    assert names_in(tmp_path) == ["0", "1", "2"]
    (tmp_path / "3").touch()
    with pytest.raises(InputError, match="more than the 3 files"):
        names_in(tmp_path)
