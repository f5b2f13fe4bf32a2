"""Safetensors on disk as byte ranges: found, split, joined and written on piece by piece, so that no file is ever held in memory.

The format (safetensors, README "Format"): eight bytes, little-endian, the length of a JSON header; the header, by name the dtype,
the shape and the range of bytes after it; the bytes. Splitting or joining along the first dimension is choosing ranges.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from latentfm.errors import InputError
from latentfm.words import listed

CHUNK = 16 * 2**20  # bytes held at a time; a multiple of every item's size
LARGEST_HEADER = 100_000_000  # safetensors' own limit
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in files: its dtype, its shape, and the (file, first byte, end) of each piece of it, in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[tuple[Path, int, int], ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def chunk(self, parts: int) -> list["Stored"]:
        """`parts` equal tensors, one after the other along the first dimension. Raises InputError when it does not divide."""
        if not self.shape or self.shape[0] % parts:
            raise InputError(f"a tensor of shape {self.shape} in {self.pieces[0][0]} does not divide into {parts}")
        size = self.nbytes // parts
        shape = (self.shape[0] // parts, *self.shape[1:])
        return [replace(self, shape=shape, pieces=tuple(self.pieces_between(i * size, (i + 1) * size))) for i in range(parts)]

    def pieces_between(self, start: int, stop: int) -> Iterator[tuple[Path, int, int]]:
        """The pieces of the bytes `start` up to `stop` of this tensor."""
        before = 0
        for path, first, end in self.pieces:
            low, high = max(start - before, 0), min(stop - before, end - first)
            if low < high:
                yield path, first + low, first + high
            before += end - first

    def blocks(self) -> Iterator[Tensor]:
        """The elements in order, as flat tensors of at most CHUNK bytes; each is valid until the next is asked for.

        Raises InputError when a file ends before its header says so.
        """
        buffer = bytearray(min(CHUNK, max((end - first for _, first, end in self.pieces), default=0)))
        for path, first, end in self.pieces:
            with path.open("rb", buffering=0) as file:
                file.seek(first)
                while first < end:
                    part = memoryview(buffer)[: min(CHUNK, end - first)]
                    filled = 0
                    while filled < len(part):
                        got = file.readinto(part[filled:])
                        if not got:
                            raise InputError(f"{path} ended while it was read; copy it again")
                        filled += got
                    yield torch.frombuffer(part, dtype=self.dtype)
                    first += len(part)

    def load(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in memory, on the CPU, in `dtype` (its own unless given)."""
        tensor = torch.empty(self.shape, dtype=dtype or self.dtype)
        flat, at = tensor.view(-1), 0
        for block in self.blocks():
            flat[at : at + len(block)].copy_(block)
            at += len(block)
        return tensor


@dataclass(frozen=True)
class Held(Stored):
    """A tensor that lies in no file but is held in memory, to stand among those that do."""

    value: Tensor

    def blocks(self) -> Iterator[Tensor]:
        yield self.value.reshape(-1)


Tensors = dict[str, Stored]


def join(tensors: list[Stored]) -> Stored:
    """The tensors as one, along the first dimension. Raises InputError when their dtypes or other dimensions differ."""
    first = tensors[0]
    if any(t.dtype != first.dtype or t.shape[1:] != first.shape[1:] for t in tensors):
        kinds = ", ".join(f"{NAMES[t.dtype]} {list(t.shape)}" for t in tensors)
        raise InputError(f"{first.pieces[0][0]} has tensors of {kinds} where one naming joins them; give --dtype to make them alike")
    shape = (sum(t.shape[0] for t in tensors), *first.shape[1:])
    return replace(first, shape=shape, pieces=tuple(piece for t in tensors for piece in t.pieces))


def read_file(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of the safetensors file `path` and its metadata; only the header is read.

    Raises InputError for a file that is none, is cut short (saying by how much), or whose header is not to be trusted.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(length if length <= LARGEST_HEADER else 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if text[:1] != b"{":
        raise other_format(path, start)
    if len(text) < length:
        raise cut_short(path, 8 + length - size, "even of its header")
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        found = {name: described(path, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no safetensors file, or a damaged one: its header cannot be read ({error})") from error
    ends = sorted((piece[1], piece[2]) for stored in found.values() for piece in stored.pieces)
    end = 8 + length
    for first, last in ends:
        if first != end:
            raise InputError(f"{path} is damaged: its header leaves a gap or an overlap at byte {first}; copy it again")
        end = last
    if size < end:
        raise cut_short(path, end - size, f"of {end:,}")
    if size > end:
        raise InputError(f"{path} is damaged: {size - end:,} bytes follow what its header describes; copy it again")
    return found, metadata


def described(path: Path, name: str, entry: dict, base: int) -> Stored:
    """The tensor that a header's `entry` describes, the data beginning at byte `base`."""
    if entry["dtype"] not in DTYPES:
        raise InputError(f"{name} in {path} is of dtype {entry['dtype']}, which is not read here; there are {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(side) for side in entry["shape"])
    first, last = entry["data_offsets"]
    if last - first != math.prod(shape) * dtype.itemsize or first < 0 or min(shape, default=0) < 0:
        raise InputError(f"{path} is damaged: {last - first} bytes for {name}, {entry['dtype']} {list(shape)}; copy it again")
    return Stored(dtype, shape, ((path, base + first, base + last),))


def other_format(path: Path, start: bytes) -> InputError:
    """What to say of a file that begins with the eight bytes `start` and no header after them."""
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
        return InputError(f"{path} is no safetensors file: it is {len(start)} bytes long")
    return InputError(f"{path} is no safetensors file, or a damaged one: it does not begin with a header")


def cut_short(path: Path, missing: int, of: str) -> InputError:
    return InputError(f"{path} is cut short: {missing:,} bytes {of} are missing; download or copy it again")


def read_folder(folder: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a component's folder, one file or shards with their index, and the first file's metadata.

    Where there are variants (model.fp16.safetensors), the one without is read; a lone variant is read too. Raises
    InputError naming a shard that is missing.
    """
    indices = sorted(folder.glob("*.safetensors.index*.json"), key=lambda path: (len(path.name), path.name))
    files = sorted(folder.glob("*.safetensors"), key=lambda path: (path.name.count("."), path.name))
    if indices and not (files and files[0].name.count(".") == 1 and "-of-" not in files[0].name):
        try:
            shard_of = json.loads(indices[0].read_text("utf-8"))["weight_map"]
            shards = {shard: folder / Path(shard).name for shard in sorted(set(shard_of.values()))}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{indices[0]} is damaged ({error}); copy the folder again") from error
        if lost := [path.name for path in shards.values() if not path.is_file()]:
            raise InputError(f"{folder} lacks {', '.join(lost)}, {len(lost)} of {len(shards)} shards; its copy is not complete")
        read = {shard: read_file(path) for shard, path in shards.items()}
        if lost := [name for name, shard in shard_of.items() if name not in read[shard][0]]:
            raise InputError(f"{folder} lacks {listed(lost)}, which its index names; copy the folder again")
        return {name: read[shard][0][name] for name, shard in shard_of.items()}, next(iter(read.values()))[1]
    if not files:
        raise InputError(f"{folder} has no safetensors weights; its copy is not complete")
    if len(files) > 1 and files[1].name.count(".") == files[0].name.count("."):
        raise InputError(f"{folder} has several weights ({', '.join(file.name for file in files)}) and no index; keep one")
    return read_file(files[0])


def target_dtype(stored: Stored, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype `stored` is written in when `dtype` (None: its own) is asked for.

    Whole numbers stay what they are. float8 becomes bfloat16 unless asked otherwise, which holds it exactly: nothing here
    computes in float8.
    """
    if not stored.dtype.is_floating_point:
        return stored.dtype
    return dtype or (torch.bfloat16 if stored.dtype.itemsize == 1 else stored.dtype)


def written_bytes(tensors: Tensors, dtype: torch.dtype | None) -> int:
    return sum(stored.numel * target_dtype(stored, dtype).itemsize for stored in tensors.values())


def in_order(tensors: Tensors, dtype: torch.dtype | None) -> list[str]:
    """The names in the order in which `write_file` writes them: the widest first, so that each is aligned."""
    return sorted(tensors, key=lambda name: (-target_dtype(tensors[name], dtype).itemsize, name))


def write_file(
    path: Path, tensors: Tensors, metadata: dict[str, str], dtype: torch.dtype | None, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Writes `tensors` into the safetensors file `path`, floating-point ones in `dtype` (None: as they are), CHUNK by CHUNK.

    advance is called with the number of bytes written, as they are. Raises OSError when the disk refuses them.
    """
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    kinds = {name: target_dtype(stored, dtype) for name, stored in tensors.items()}
    order = in_order(tensors, dtype)
    for name in order:
        size = tensors[name].numel * kinds[name].itemsize
        header[name] = {"dtype": NAMES[kinds[name]], "shape": tensors[name].shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for block in tensors[name].blocks():
                data = block.to(kinds[name]).view(torch.uint8).numpy()
                file.write(data)
                advance(len(data))
        file.flush()
        os.fsync(file.fileno())


def split(tensors: Tensors, dtype: torch.dtype | None, most: int) -> list[Tensors]:
    """The tensors in the order given, in lists of at most `most` bytes or of one tensor: the files of a sharded component."""
    shards: list[Tensors] = [{}]
    filled = 0
    for name, stored in tensors.items():
        size = written_bytes({name: stored}, dtype)
        if shards[-1] and filled + size > most:
            shards.append({})
            filled = 0
        shards[-1][name] = stored
        filled += size
    return shards


def write_split(
    folder: Path, stem: str, shards: list[Tensors], metadata: dict[str, str], dtype: torch.dtype | None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:  # fmt: skip
    """Writes what `split` gave into folder/STEM.safetensors, or, where it is more than one, into shards with diffusers' index."""
    if len(shards) == 1:
        return write_file(folder / f"{stem}.safetensors", shards[0], metadata, dtype, advance)
    shard_of = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard, metadata, dtype, advance)
        shard_of |= dict.fromkeys(shard, file)
    total = sum(written_bytes(shard, dtype) for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def write_shards(
    folder: Path, stem: str, tensors: Tensors, metadata: dict[str, str], dtype: torch.dtype | None, most: int,
    advance: Callable[[int], None],
) -> None:  # fmt: skip
    """Writes `tensors` into folder/STEM.safetensors, or, above `most` bytes, into shards with diffusers' index beside them."""
    write_split(folder, stem, split(tensors, dtype, most), metadata, dtype, advance)
