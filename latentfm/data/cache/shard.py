"""One file of the cache: a shard of entries that any safetensors reader opens, with a table of its own to find them by.

Each tensor is "<key>/<name>", the key in hexadecimal; the tensors of an entry are of one dtype and lie together. The first tensor,
"table" (uint8), holds MAGIC, the number of entries, the length of their layouts, a CRC-32 of what follows; then the layouts (JSON: dtype,
names and shapes) and a ROW an entry. So a hundred thousand entries are found without reading a header of as many names, and each is
checked by itself: its CRC-32 covers its layout, its key and its bytes.
"""

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from latentfm.errors import InputError
from latentfm.files import SpecialFile, open_file, read_bytes, reason, whole_or_nothing

MAGIC = b"latentfm cache 1"
PRELUDE = struct.Struct("<16sQQQ")  # MAGIC, entries, bytes of layouts, CRC-32
ROW = np.dtype([("key", "S32"), ("crc", "<u4"), ("layout", "<u4"), ("offset", "<u8"), ("length", "<u8")])
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8, "I64": torch.int64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ENTRY_BYTES = 2**30  # the most that an entry may have: a picture of 4096 pixels a side has a hundredth
TABLE_BYTES = 2**28  # the most that a shard's table may have: four million entries
LOST_BYTES = 2**26


class Damaged(Exception):
    """A shard or an entry that is not what was written: the reason."""


@dataclass(frozen=True)
class Layout:
    """How an entry's bytes are tensors: their dtype, and the name and shape of each, in order."""

    dtype: torch.dtype
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        """The layout of tensors, by name. Raises ValueError unless they are of one dtype that the cache keeps."""
        dtypes = {value.dtype for value in tensors.values()}
        if len(dtypes) != 1 or not dtypes <= NAMES.keys():
            raise ValueError(f"an entry has one dtype of {', '.join(NAMES.values())}, not {sorted(map(str, dtypes))}")
        return cls(dtypes.pop(), tuple((name, tuple(value.shape)) for name, value in sorted(tensors.items())))

    @classmethod
    def parse(cls, written: Any) -> "Layout":
        """The layout that a shard's table describes. Raises Damaged when it is none that the cache writes."""
        try:
            dtype, shapes = written
            layout = cls(DTYPES[dtype], tuple((name, tuple(shape)) for name, shape in shapes))
            sides = [side for _, shape in layout.shapes for side in shape]
            names = {name for name, _ in layout.shapes}
            sound = all(type(side) is int and 0 <= side < 2**31 for side in sides) and all(isinstance(name, str) for name in names)
            numbers = sum(math.prod(max(1, side) for side in shape) for _, shape in layout.shapes)  # an empty tensor's sides count too
        except (ValueError, TypeError, KeyError) as error:
            raise Damaged(f"it has a layout of an entry that is none ({reason(error)})") from None
        if not sound or not 0 < len(layout.shapes) == len(names) or numbers * layout.dtype.itemsize > ENTRY_BYTES or len(sides) > 64:
            raise Damaged("it has a layout of an entry that is none")
        return layout

    @cached_property
    def written(self) -> list:
        return [NAMES[self.dtype], [[name, list(shape)] for name, shape in self.shapes]]

    @cached_property
    def seed(self) -> int:
        """The CRC-32 that an entry's begins with."""
        return zlib.crc32(json.dumps(self.written).encode())

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each tensor."""
        return tuple(math.prod(shape) * self.dtype.itemsize for _, shape in self.shapes)

    def crc(self, key: bytes, *data: memoryview | bytes) -> int:
        """The CRC-32 of an entry of this layout."""
        value = zlib.crc32(key, self.seed)
        for part in data:
            value = zlib.crc32(part, value)
        return value


@dataclass(frozen=True)
class Shard:
    """What a shard's table says: its entries' rows (offsets from the beginning of the file) and their layouts."""

    path: Path
    rows: np.ndarray
    layouts: tuple[Layout, ...]


def raw(value: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return memoryview(value.reshape(-1).view(torch.uint8).numpy())


def padded(text: bytes) -> bytes:
    return text + b" " * (-len(text) % 8)


def key_bytes(key: str) -> bytes:
    """The 32 bytes of a hexadecimal key."""
    return bytes.fromhex(key)


def write_shard(path: Path, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes entries (hexadecimal key -> tensors by name, all of one dtype) to `path`, whole or not at all.

    Raises InputError when the disk refuses it.
    """
    layouts: dict[Layout, int] = {}
    rows = np.zeros(len(entries), ROW)
    header, data, end = {}, [], 0
    for number, (key, tensors) in enumerate(entries.items()):
        layout = Layout.of(tensors)
        parts = [raw(tensors[name].detach().cpu().contiguous()) for name, _ in layout.shapes]
        length = sum(layout.sizes)
        crc = layout.crc(key_bytes(key), *parts)
        rows[number] = (key_bytes(key), crc, layouts.setdefault(layout, len(layouts)), end, length)
        for (name, shape), size in zip(layout.shapes, layout.sizes, strict=True):
            header[f"{key}/{name}"] = {"dtype": NAMES[layout.dtype], "shape": shape, "data_offsets": (end, end + size)}
            end += size
        data += parts
    text = padded(json.dumps([layout.written for layout in layouts]).encode())
    size = PRELUDE.size + len(text) + rows.nbytes
    for entry in header.values():  # the table comes first
        entry["data_offsets"] = tuple(size + offset for offset in entry["data_offsets"])
    rows["offset"] += size
    table = PRELUDE.pack(MAGIC, len(rows), len(text), zlib.crc32(rows.tobytes(), zlib.crc32(text))) + text + rows.tobytes()
    first = {"__metadata__": {"format": "pt"}, "table": {"dtype": "U8", "shape": (size,), "data_offsets": (0, size)}}
    head = padded(json.dumps(first | header, separators=(",", ":")).encode())
    with whole_or_nothing(path) as partial, partial.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head + table)
        file.writelines(data)


def read_shard(path: Path) -> Shard:
    """The table of a shard. Raises Damaged when the file is cut short or not what is written, OSError when it cannot be read."""
    try:
        with open_file(path) as file:
            return parsed(path, file)
    except SpecialFile as error:
        raise Damaged(str(error)) from None


def parsed(path: Path, file: BinaryIO) -> Shard:
    """The table of an opened shard. Raises Damaged."""
    size = os.fstat(file.fileno()).st_size
    base = 8 + int.from_bytes(file.read(8), "little")
    file.seek(min(base, size))
    prelude = file.read(PRELUDE.size)
    if len(prelude) < PRELUDE.size or not prelude.startswith(MAGIC):
        raise Damaged("its header is damaged or cut short")
    _, count, length, crc = PRELUDE.unpack(prelude)
    wanted = length + count * ROW.itemsize
    if base + PRELUDE.size + wanted > size:
        raise Damaged("it is cut short")
    if wanted > TABLE_BYTES:
        raise Damaged(f"its table would have {wanted:,} bytes")
    table = file.read(wanted)
    if len(table) < wanted or zlib.crc32(table) != crc:
        raise Damaged("its table fails its checksum")
    try:
        written = json.loads(table[:length])
    except (ValueError, RecursionError):
        raise Damaged("the layouts in its table are damaged") from None
    if not isinstance(written, list):
        raise Damaged("the layouts in its table are damaged")
    layouts = tuple(map(Layout.parse, written))
    rows = np.frombuffer(table, ROW, count, length).copy()
    check_rows(rows, layouts, PRELUDE.size + wanted)
    rows["offset"] += np.uint64(base)
    end = int(rows["offset"][-1] + rows["length"][-1]) if count else base + PRELUDE.size + wanted
    if end != size:
        raise Damaged(f"it is cut short by {end - size:,} bytes" if end > size else f"{size - end:,} bytes follow its end")
    return Shard(path, rows, layouts)


def check_rows(rows: np.ndarray, layouts: tuple[Layout, ...], start: int) -> None:
    """Raises Damaged unless the entries follow one another from `start` on, each once and as large as its layout."""
    if not len(rows):
        return
    if int(rows["layout"].max()) >= len(layouts):
        raise Damaged("an entry has a layout that is not there")
    lengths = np.array([sum(layout.sizes) for layout in layouts], np.uint64)[rows["layout"]]
    if not (rows["length"] == lengths).all():
        raise Damaged("an entry is not as large as its layout")
    ends = np.uint64(start) + np.cumsum(lengths, dtype=np.uint64)  # at most TABLE_BYTES / 56 entries of ENTRY_BYTES: no overflow
    if not (rows["offset"] == ends - lengths).all():
        raise Damaged("its entries overlap, or do not lie where they should")
    if len(np.unique(rows["key"])) < len(rows):
        raise Damaged("an entry is there twice")


def read_at(descriptor: int, buffers: list[memoryview], offset: int) -> int:
    """Fills buffers, one after the other, from a place in a file that processes may share; returns how many bytes there were."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, buffers, offset)
    data = os.pread(descriptor, sum(map(len, buffers)), offset)  # macOS
    start = 0
    for buffer in buffers:
        part = data[start : start + len(buffer)]
        buffer[: len(part)] = part
        start += len(part)
    return start


def lost_of(shard: Path) -> frozenset[bytes]:
    """The keys that a shard's `.lost` file names; a line cut by a full disk names none, nor does what is no such file."""
    try:
        lines = read_bytes(shard.with_suffix(".lost"), LOST_BYTES).decode("ascii", "replace").split()
    except (OSError, InputError):
        return frozenset()
    return frozenset(key_bytes(line) for line in lines if re.fullmatch("[0-9a-f]{64}", line))


def note_lost(shard: Path, key: str) -> None:
    """Adds a key to a shard's `.lost` file. Raises OSError when the disk refuses it, or something else stands under that name."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(shard.with_suffix(".lost"), flags, 0o666)
    try:
        os.write(descriptor, f"{key}\n".encode())
    finally:
        os.close(descriptor)
