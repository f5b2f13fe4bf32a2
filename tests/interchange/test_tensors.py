"""Safetensors as byte ranges: the same tensors as safetensors reads, damaged files refused by what is wrong, memory bounded."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import latentfm
from latentfm.errors import InputError
from latentfm.interchange import tensors as room
from latentfm.interchange.tensors import CHUNK, DTYPES, join, read_chunks, read_file, read_folder, write_file, write_shards

ROOT = Path(latentfm.__file__).resolve().parent.parent


def example() -> dict[str, torch.Tensor]:
    """A tensor of each dtype, an empty one, a scalar, and one larger than what is held at a time when CHUNK is small."""
    torch.manual_seed(0)
    found = {f"a.{name}": torch.randint(0, 2, (6, 5)).to(dtype) for name, dtype in DTYPES.items()}
    return found | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "large": torch.randn(40, 30, dtype=torch.float64)}


@pytest.fixture
def file(tmp_path):
    save_file(example(), tmp_path / "example.safetensors", metadata={"who": "me"})
    return tmp_path / "example.safetensors"


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(room, "CHUNK", 64)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_reading_is_what_was_saved(file, small_chunks):
    stored, metadata = read_file(file)
    assert metadata == {"who": "me"} and stored.keys() == example().keys()
    for name, value in example().items():
        assert equal(stored[name].load(), value), name
        assert stored[name].nbytes == value.nbytes
    assert equal(stored["large"].load(torch.bfloat16), example()["large"].bfloat16())


def test_splitting_and_joining_are_torchs(file, small_chunks):
    stored, value = read_file(file)[0], example()["large"]
    parts = stored["large"].chunk(4)
    assert all(equal(part.load(), expected) for part, expected in zip(parts, value.chunk(4), strict=True))
    swapped = join(parts[::-1])
    assert equal(swapped.load(), torch.cat(value.chunk(4)[::-1]))
    halves = swapped.chunk(2)  # each of two pieces
    assert equal(halves[0].load(), torch.cat(value.chunk(4)[::-1]).chunk(2)[0])
    assert equal(swapped.chunk(8)[3].load(), torch.cat(value.chunk(4)[::-1]).chunk(8)[3])  # within a piece
    with pytest.raises(InputError, match="does not divide into 7"):
        stored["large"].chunk(7)
    with pytest.raises(InputError, match="F32.*F16"):
        join([stored["a.F32"], stored["a.F16"]])


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_writing_is_read_by_safetensors(file, tmp_path, dtype, small_chunks):
    counted = []
    write_file(tmp_path / "copy.safetensors", read_file(file)[0], {"k": "v"}, dtype, counted.append)
    found = load_file(tmp_path / "copy.safetensors")
    for name, value in example().items():
        expected = value
        if value.is_floating_point():
            expected = value.to(dtype or (torch.bfloat16 if value.itemsize == 1 else value.dtype))
        assert equal(found[name], expected), name
    assert sum(counted) == sum(value.nbytes for value in found.values())
    with safe_open(tmp_path / "copy.safetensors", "pt") as opened:
        assert opened.metadata() == {"k": "v"}


def test_shards_have_diffusers_index_and_are_read_back(file, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    stored = read_file(file)[0]
    write_shards(folder, "model", stored, {"format": "pt"}, None, 1000, lambda _: None)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1 and set(index["weight_map"].values()) == {path.name for path in files}
    again, metadata = read_folder(folder)
    assert metadata == {"format": "pt"} and again.keys() == stored.keys()
    expected = {name: value.bfloat16() if value.itemsize == 1 and value.is_floating_point() else value for name, value in example().items()}
    assert all(equal(again[name].load(), value) for name, value in expected.items())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    for path in files:
        assert path.stat().st_size < 2000 or len(load_file(path)) == 1
    files[0].unlink()
    with pytest.raises(InputError, match=rf"lacks {files[0].name}, 1 of {len(files)} shards"):
        read_folder(folder)


def test_the_files_without_a_variant_come_first(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "model.fp16.safetensors")
    assert read_folder(tmp_path)[0]["x"].load() == 0
    (tmp_path / "model.safetensors").unlink()
    assert read_folder(tmp_path)[0]["x"].load() == 1
    save_file({"x": torch.ones(1)}, tmp_path / "other.fp16.safetensors")
    with pytest.raises(InputError, match="several weights"):
        read_folder(tmp_path)


def test_a_file_cut_short_says_by_how_much(file):
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    file.write_bytes(whole[:-1234])
    with pytest.raises(InputError, match=re.escape(str(file)) + r" is cut short: 1,234 bytes of [\d,]+ are missing"):
        read_file(file)
    file.write_bytes(whole[: 8 + length - 10])
    with pytest.raises(InputError, match="cut short: 10 bytes even of its header"):
        read_file(file)
    file.write_bytes(whole + b"abc")
    with pytest.raises(InputError, match="3 bytes follow"):
        read_file(file)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "0 bytes long"), (b"abc", "3 bytes long"), (b"PK\x03\x04" + b"x" * 50, "pickle"), (b"\x80\x02}q\x00.........", "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer"), (b"GGUF\x03\x00\x00\x00" + b"x" * 30, "GGUF"),
        (b"<!DOCTYPE html><html>", "no safetensors file"), ((5).to_bytes(8, "little") + b"hello", "does not begin with a header"),
        ((2).to_bytes(8, "little") + b"{a", "header cannot be read"), ((9).to_bytes(8, "little") + b'{"a": []}', "header cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_refused(tmp_path, content, says):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_file(path)


@pytest.mark.parametrize("length", [0x80, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, length):
    text = b'{"__metadata__":{"k":"' + b"v" * (length - 26) + b'"}} '
    assert len(text) == length
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + text)
    assert read_file(tmp_path / "x.safetensors")[0] == {}


def with_header(path: Path, header: dict, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "header, says",
    [
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "8 bytes for a"),
        ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}, "dtype F4"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "gap or an overlap"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "gap"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}, "damaged"),
        ({"a": {"dtype": "F32"}}, "header cannot be read"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, says):
    with pytest.raises(InputError, match=says):
        read_file(with_header(tmp_path / "x.safetensors", header, b"\0" * 8))


def test_a_file_that_shrinks_while_it_is_read_is_said(file):
    stored = read_file(file)[0]["large"]
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match="ended while it was read"):
        stored.load()


MEASURE = """
import sys
from pathlib import Path
import torch
from latentfm.interchange.weights import load_transformer, open_weights
from latentfm.interchange.writers import write_component, write_single

def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024

def raised(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = peak()
    work()
    return peak() - before

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
nothing = lambda _: None

def convert(dtype):
    one, again = out / f"{dtype}.safetensors", out / str(dtype)
    write_single(one, open_weights(folder), "original", dtype)
    weights = open_weights(one)
    write_component(again, "transformer", weights.parts["transformer"], {}, dtype, 10**8, nothing)

print(raised(lambda: convert(None)), raised(lambda: convert(torch.bfloat16)))
print(raised(lambda: load_transformer(out / "None.safetensors", torch.float16)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of resident memory is read from /proc")
def test_converting_holds_a_fraction_of_the_file_in_memory_and_loading_one_copy(tmp_path):
    """Peak resident set (VmHWM) of a process of its own, reset just before the work: mapped pages would count, none are made."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=4, num_attention_heads=16, attention_head_dim=64,
        caption_projection_dim=1024, joint_attention_dim=64, pooled_projection_dim=32, pos_embed_max_size=8,
    ).half()  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert size > 150e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "model", tmp_path], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    copying, casting, loading = map(int, done.stdout.split())
    print(f"file {size / 1e6:.0f} MB; peak raised by {copying / 1e6:.0f} copying, {casting / 1e6:.0f} casting, {loading / 1e6:.0f} loading")
    assert copying < 4 * CHUNK and casting < 6 * CHUNK and max(copying, casting) < size / 2
    assert size * 0.75 < loading < size + 4 * CHUNK  # what the process had freed before is used again


def test_rows_written_into_several_files_are_one_tensor(tmp_path):
    """As torch.distributed.checkpoint writes them: where a file's rows begin is in its metadata; a tensor that each has is in one."""
    whole, step = torch.randn(5, 3), torch.tensor(7.0)
    for number, (first, rows) in enumerate([(2, whole[2:5]), (0, whole[:2])]):
        offsets = {"a": {"saved_offsets": [first, 0]}} | ({"step": {"saved_offsets": []}} if number else {})
        save_file({"a": rows.contiguous()} | ({"step": step} if number else {}), tmp_path / f"{number}.safetensors",
                  {"DCP_SHARDING_INFO": json.dumps(offsets)})  # fmt: skip
    files = sorted(tmp_path.glob("*.safetensors"))
    found = read_chunks(files)
    assert found.keys() == {"a", "step"} and torch.equal(found["a"].load(), whole) and torch.equal(found["step"].load(), step)
    for first in range(6):
        for count in range(6 - first):
            assert torch.equal(found["a"].rows(first, count).load(), whole[first : first + count])
    with pytest.raises(InputError, match="lack rows of a"):
        read_chunks(files[:1])
