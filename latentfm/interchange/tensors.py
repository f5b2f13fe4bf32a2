"""Safetensors on disk as byte ranges: found, split, joined and written on piece by piece, so that no file is ever held in memory.

The format is told in models/stored.py, which reads the headers. Splitting or joining along the first dimension is choosing ranges.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from latentfm.errors import InputError
from latentfm.files import open_file
from latentfm.models.stored import read_header, weight_files
from latentfm.words import listed, shown

CHUNKS = "DCP_SHARDING_INFO"  # of the metadata of torch.distributed.checkpoint's files: where in each tensor the rows lie
CHUNK = 16 * 2**20  # bytes held at a time; a multiple of every item's size
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
            raise InputError(f"a tensor of shape {self.shape} in {shown(self.pieces[0][0])} does not divide into {parts}")
        rows = self.shape[0] // parts
        return [self.rows(i * rows, rows) for i in range(parts)]

    def rows(self, first: int, count: int) -> "Stored":
        """`count` rows, entries of the first dimension, from number `first` on."""
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, shape=(count, *self.shape[1:]), pieces=tuple(self.pieces_between(first * size, (first + count) * size)))

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
            with open_file(path) as file:
                file.seek(first)
                while first < end:
                    part = memoryview(buffer)[: min(CHUNK, end - first)]
                    filled = 0
                    while filled < len(part):
                        got = file.readinto(part[filled:])
                        if not got:
                            raise InputError(f"{shown(path)} ended while it was read; copy it again")
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
    """A tensor that lies in no file but is held in memory, on whatever device, to stand among those that do."""

    value: Tensor

    @classmethod
    def of(cls, value: Tensor) -> "Held":
        return cls(value.dtype, tuple(value.shape), (), value.detach())

    def blocks(self) -> Iterator[Tensor]:
        yield self.value.reshape(-1).cpu()


@dataclass(frozen=True)
class LazyTensor(Stored):
    """A tensor that `make` makes when it is written."""

    make: Callable[[], Tensor]

    def blocks(self) -> Iterator[Tensor]:
        yield self.make().detach().reshape(-1).cpu()


Tensors = dict[str, Stored]


def join(tensors: Sequence[Stored]) -> Stored:
    """The tensors as one, along the first dimension. Raises InputError when their dtypes or other dimensions differ."""
    first = tensors[0]
    if any(t.dtype != first.dtype or t.shape[1:] != first.shape[1:] for t in tensors):
        kinds = ", ".join(f"{NAMES[t.dtype]} {list(t.shape)}" for t in tensors)
        raise InputError(f"{shown(first.pieces[0][0])} has tensors of {kinds} where one naming joins them; give --dtype to make them alike")
    shape = (sum(t.shape[0] for t in tensors), *first.shape[1:])
    return replace(first, shape=shape, pieces=tuple(piece for t in tensors for piece in t.pieces))


def read_file(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of the safetensors file `path` and its metadata; only the header is read. Raises InputError as read_header."""
    found, metadata = read_header(path)
    return {name: Stored(DTYPES[e.dtype], e.shape, ((path, e.first, e.end),)) for name, e in found.items()}, metadata


def read_chunks(paths: Iterable[Path]) -> Tensors:
    """The tensors of several safetensors files; one whose rows torch.distributed.checkpoint wrote into several of them is whole again.

    Raises InputError as read_header, and where rows are missing.
    """
    chunks: dict[str, list[tuple[int, Stored]]] = {}
    for path in paths:
        tensors, metadata = read_file(path)
        offsets = json.loads(metadata.get(CHUNKS, "{}"))
        for name, stored in tensors.items():
            first = (offsets[name]["saved_offsets"] or [0])[0] if name in offsets else 0
            chunks.setdefault(name, []).append((first, stored))
    whole: Tensors = {}
    for name, found in chunks.items():
        found.sort(key=lambda chunk: chunk[0])
        firsts, parts = zip(*found)
        if list(firsts) != [0, *accumulate(part.shape[0] for part in parts[:-1])]:
            raise InputError(f"{shown(parts[0].pieces[0][0])} and the files beside it lack rows of {shown(name)}; copy them again")
        whole[name] = join(parts) if len(parts) > 1 else parts[0]
    return whole


def read_folder(folder: Path, variant: str | None = None) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a component's folder, from the files that weight_files chooses, and the first file's metadata.

    Raises InputError as it does, and for a tensor that the index names and no shard has.
    """
    paths, file_of = weight_files(folder, variant)
    read = {path.name: read_file(path) for path in paths}
    first, metadata = read[paths[0].name]
    if file_of is None:
        return first, metadata
    if lost := [name for name, shard in file_of.items() if name not in read[shard][0]]:
        raise InputError(f"{shown(folder)} lacks {listed(lost)}, which its index names; copy the folder again")
    return {name: read[shard][0][name] for name, shard in file_of.items()}, metadata


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


def write_file(
    path: Path, tensors: Tensors, metadata: dict[str, str], dtype: torch.dtype | None, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Writes `tensors` into the safetensors file `path`, floating-point ones in `dtype` (None: as they are), CHUNK by CHUNK.

    advance is called with the number of bytes written, as they are. Raises OSError when the disk refuses them.
    """
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    kinds = {name: target_dtype(stored, dtype) for name, stored in tensors.items()}
    order = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))  # the widest first, so that each is aligned
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


def write_shards(
    folder: Path, stem: str, tensors: Tensors, metadata: dict[str, str], dtype: torch.dtype | None, most: int,
    advance: Callable[[int], None] = lambda _: None,
) -> None:  # fmt: skip
    """Writes `tensors` into folder/STEM.safetensors, or, above `most` bytes, into shards with diffusers' index beside them."""
    shards = split(tensors, dtype, most)
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
