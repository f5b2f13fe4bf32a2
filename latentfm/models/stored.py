"""Which files hold a component's weights, and what their headers say, told before anything is opened by a library. Needs no torch.

Pickles are refused by what would be opened: the chosen file's name and its first bytes, whatever else lies beside it. The format of
safetensors (its README, "Format"): eight bytes, little-endian, the length of a JSON header; the header, by name the dtype, the shape and
the range of bytes after it; the bytes.
"""

import json
import math
import os
import re
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from latentfm.errors import InputError
from latentfm.files import JSON_BYTES, TooLarge, open_file, read_json, reading
from latentfm.words import count, listed, shown

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
DIFFUSERS = "diffusion_pytorch_model"
STEMS = (DIFFUSERS, "model")  # as diffusers and transformers name a component's weights
VARIANT = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.([^.]+)\.safetensors|\.safetensors\.index\.([^.]+)\.json)")
MOST_FILES = 10_000  # in one folder of a model
MOST_DIMENSIONS = 16
MOST_NUMBERS = 2**62  # of a tensor; a file of as many bytes does not exist
ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


class Entry(NamedTuple):
    """What a header says of a tensor: its dtype as safetensors writes it, its shape, and its first byte and its end in the file."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    end: int


class Header(NamedTuple):
    """The tensors of a safetensors file by name, and its metadata."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """What the safetensors file `path` says of itself.

    Raises InputError for a file that is none, is cut short (saying by how much), or whose header is not to be trusted.
    """
    try:
        with open_file(path) as file:
            return header_of(path, file)
    except OSError as error:
        raise InputError(f"{shown(path)} cannot be read: {error.strerror}") from error


def header_of(path: Path, file: BinaryIO) -> Header:
    """As read_header, of a file that is open."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    text = file.read(length if length <= JSON_BYTES else 1)
    if len(start) < 8 or text[:1] != b"{":
        raise other_format(path, start)
    if 8 + length > size:
        raise cut_short(path, 8 + length - size, "even of its header")
    if length > JSON_BYTES:
        raise TooLarge(f"{shown(path)} has a header of {length:,} bytes, the most that is read is {JSON_BYTES:,}; it is damaged")
    with reading(path, "its header cannot be read: it is no safetensors file, or a damaged one; copy it again"):
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is no text")
        found = {name: described(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for first, last in sorted((entry.first, entry.end) for entry in found.values()):
        if first != end:
            raise InputError(f"{shown(path)} is damaged: its header leaves a gap or an overlap at byte {first}; copy it again")
        end = last
    if size < end:
        raise cut_short(path, end - size, f"of {end:,}")
    if size > end:
        raise InputError(f"{shown(path)} is damaged: {size - end:,} bytes follow what its header describes; copy it again")
    return Header(found, metadata)


def described(path: Path, name: str, entry: Any, base: int) -> Entry:
    """The tensor that a header's `entry` describes, the data beginning at byte `base`."""
    if not isinstance(entry, dict):
        raise ValueError(f"{shown(name, 80)} is not described")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise InputError(
            f"{shown(name, 80)} in {shown(path)} is of dtype {shown(dtype, 20)}, which is not read here; there are {', '.join(ITEMSIZE)}"
        )
    if not (whole_numbers(shape) and whole_numbers(offsets) and len(offsets) == 2):
        raise InputError(f"{shown(path)} is damaged: its header describes {shown(name, 80)} by something else than sizes; copy it again")
    first, last = offsets
    if len(shape) > MOST_DIMENSIONS or any(side > MOST_NUMBERS for side in (*shape, last)):
        raise InputError(f"{shown(path)} is damaged: its header claims more of {shown(name, 80)} than any file holds; copy it again")
    if last - first != math.prod(shape) * ITEMSIZE[dtype]:
        raise InputError(f"{shown(path)} is damaged: {last - first} bytes for {shown(name, 80)}, {dtype} {shape}; copy it again")
    return Entry(dtype, tuple(shape), base + first, base + last)


def whole_numbers(values: Any) -> bool:
    """Whether `values` is a list of whole numbers from 0 on."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def other_format(path: Path, start: bytes) -> InputError:
    """What to say of a file that begins with the eight bytes `start` and no header after them."""
    path = shown(path)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return InputError(
            f"{path} is a pickle under another name, which can run code when opened; only safetensors are loaded: convert it "
            "once in a place you trust (torch.load(..., weights_only=True), then safetensors.torch.save_file)"
        )
    if start == b"version ":
        return InputError(f"{path} is a Git LFS pointer, not the weights themselves; fetch them with: git lfs pull")
    if start[:4] == b"GGUF":
        return InputError(f"{path} is a GGUF file, quantized for another program; use the model's safetensors")
    if len(start) < 8:
        return InputError(f"{path} is no safetensors file: it is {count(len(start), 'byte')} long")
    return InputError(f"{path} is no safetensors file, or a damaged one: it does not begin with a header; copy it again")


def cut_short(path: Path, missing: int, of: str) -> InputError:
    return InputError(f"{shown(path)} is cut short: {missing:,} bytes {of} are missing; its copy is not complete, copy it again")


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle by its name."""
    return path.suffix.lower() in PICKLES


def pickle_refused(path: Path) -> InputError:
    """What to say of a pickle, with the command that converts it."""
    name = shown(path)
    return InputError(
        f"{name} is a pickle, which can run code when opened; only safetensors are loaded. Convert it once in a "
        'place you trust: python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{name}', weights_only=True), '{shown(path.with_suffix('.safetensors'))}')\""
    )


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted. Raises InputError when it cannot be read or has more than MOST_FILES."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in islice(entries, MOST_FILES + 1)]
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(folder)} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(names) > MOST_FILES:
        raise InputError(f"{shown(folder)} has more than the {MOST_FILES:,} files that a model's folder may have; is it one?")
    return sorted(names)


def own_files(component: Path) -> list[str]:
    """The names of the files in a component's folder that go with it where it is copied: no hidden ones, no pickles, no folders."""
    return [name for name in names_in(component) if name[0] != "." and not is_pickle(component / name) and not (component / name).is_dir()]


class WeightFiles(NamedTuple):
    """The files that hold a component's weights, and, where these are shards, which tensor lies in which, by the index."""

    paths: tuple[Path, ...]
    file_of: dict[str, str] | None


def variants_in(folder: Path) -> list[str]:
    """The variants, as "fp16", that a component's weights are there in beside or instead of the plain ones, sorted."""
    found = (VARIANT.fullmatch(name) for name in names_in(folder))
    return sorted({match[1] or match[2] for match in found if match})


def weight_files(folder: Path, variant: str | None = None) -> WeightFiles:
    """The safetensors that a component's folder is read from: one file, or shards with their index.

    `variant` ("fp16") is taken where it is there. Otherwise the file as diffusers or transformers name it, or its index, then a lone
    variant or a lone file of another name. Where there is both, whole, diffusers' library reads the index, transformers' the file, and so
    it is here. Raises InputError for a pickle where weights would be opened, a shard that is missing or lies elsewhere, several files of
    which none is meant, and for none at all.
    """
    names = [name for name in names_in(folder) if name[0] != "."]
    files = [name for name in names if name.endswith(".safetensors")]
    indices = [name for name in names if ".safetensors.index." in name and name.endswith(".json")]
    stems = STEMS[::-1] if folder.name.startswith(("text_encoder", "image_encoder")) else STEMS  # the library's own first
    for middle in ("", *([f".{variant}"] if variant is not None else []))[::-1]:
        for stem in stems:
            own = [name for name in (f"{stem}{middle}.safetensors", f"{stem}.safetensors.index{middle}.json") if name in names]
            if len(own) == 2 and stem == DIFFUSERS and whole(folder, own[1]):
                own.reverse()
            if own:
                return one_of(folder, own[0])
    if indices:
        return one_of(folder, min(indices, key=lambda name: (len(name), name)))
    if not files:
        if pickles := [name for name in names if is_pickle(Path(name))]:
            raise pickle_refused(folder / pickles[0])
        raise InputError(f"{shown(folder)} has no safetensors weights; its copy is not complete")
    files.sort(key=lambda name: (name.count("."), name))
    if len(files) > 1 and files[1].count(".") == files[0].count("."):
        if len(kinds := variants_in(folder)) > 1:
            raise InputError(f"{shown(folder)} has weights of the variants {listed(kinds)} alone: say which, as in variant='{kinds[0]}'")
        raise InputError(f"{shown(folder)} has several weights ({listed(files)}) and no index; keep one")
    return one_of(folder, files[0])


def whole(folder: Path, index: str) -> bool:
    """Whether all the shards of an index are there."""
    try:
        one_of(folder, index)
    except InputError:
        return False
    return True


def one_of(folder: Path, name: str) -> WeightFiles:
    """The weights that a file of them, or an index of shards, stands for."""
    if name.endswith(".safetensors"):
        return WeightFiles((folder / name,), None)
    index = folder / name
    found = read_json(index, way_out="copy the folder again")
    file_of = found.get("weight_map")
    if not isinstance(file_of, dict) or not file_of or not all(isinstance(shard, str) for shard in file_of.values()):
        raise InputError(f"{shown(index)} is damaged (it has no weight_map from tensors to files); copy the folder again")
    shards = sorted(set(file_of.values()))
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise InputError(f"{shown(index)} names a file outside its folder, {shown(shard, 200)}; copy the folder again")
        if is_pickle(Path(shard)):
            raise pickle_refused(folder / shard)
        if not shard.endswith(".safetensors"):
            raise InputError(f"{shown(index)} names {shown(shard, 200)}, which is no safetensors file; only these are loaded")
    if lost := [shard for shard in shards if not (folder / shard).is_file()]:
        raise InputError(f"{shown(folder)} lacks {listed(lost)}, {len(lost)} of {count(len(shards), 'shard')}; its copy is not complete")
    return WeightFiles(tuple(folder / shard for shard in shards), file_of)


def stored_numbers(folder: Path) -> int:
    """How many numbers a component's weights have, by their headers."""
    return sum(math.prod(entry.shape) for path in weight_files(folder).paths for entry in read_header(path).tensors.values())
