"""Entries of the cache by number, read where they lie, each checked as it is read."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from latentfm.data.cache.shard import Damaged, Layout, raw, read_at
from latentfm.errors import InputError
from latentfm.files import SpecialFile, open_file, reason
from latentfm.words import shown

OPEN_FILES = 64


class Entries:
    """Chosen entries by number, read where they lie: arrays and a few open files, so that forked processes share its memory.

    `rows` is one INDEX row an entry. Another process, forked or started anew, reads by itself.
    """

    def __init__(self, folder: Path, paths: Sequence[str], layouts: Sequence[Layout], rows: np.ndarray):
        self.folder, self.paths, self.layouts, self.rows = folder, list(paths), list(layouts), rows
        self.files: OrderedDict[int, BinaryIO] = OrderedDict()  # by shard, the one used last at the end
        self.elsewhere: dict[int, Entries] = {}  # a damaged entry's other copy

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"files": OrderedDict()}

    def __del__(self) -> None:
        for file in getattr(self, "files", {}).values():
            file.close()

    def layout(self, number: int) -> Layout:
        """The names and shapes of an entry's tensors."""
        return self.layouts[self.rows["layout"][number]]

    def read(self, number: int) -> dict[str, Tensor]:
        """An entry's tensors. Raises InputError as `stack` does."""
        return {name: value[0] for name, value in self.stack([number]).items()}

    def stack(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Entries of one layout as a batch: by name, [B, ...] in the dtype they are kept in.

        Raises InputError for an entry that is damaged, once that is noted, ValueError when they are of several layouts.
        """
        layout = self.layout(numbers[0])
        batch = {name: torch.empty(len(numbers), *shape, dtype=layout.dtype) for name, shape in layout.shapes}
        views = [(raw(value), size) for value, size in zip(batch.values(), layout.sizes, strict=True)]
        for place, number in enumerate(numbers):
            if self.layout(number) != layout:
                raise ValueError(f"entries of a batch have one layout, not {layout.shapes} and {self.layout(number).shapes}")
            self.fill(number, [view[place * size : (place + 1) * size] for view, size in views])
        return batch

    def fill(self, number: int, buffers: list[memoryview]) -> None:
        """Reads an entry into buffers of its tensors' sizes, from another copy where this one is damaged. Raises InputError without one."""
        if number in self.elsewhere:
            return self.elsewhere[number].fill(0, buffers)
        try:
            self.pull(number, buffers)
        except Damaged as error:
            self.elsewhere[number] = self.another(number, str(error))
            self.elsewhere[number].fill(0, buffers)

    def pull(self, number: int, buffers: list[memoryview]) -> None:
        """Reads an entry into buffers and checks it. Raises Damaged."""
        row = self.rows[number]
        layout = self.layouts[row["layout"]]
        try:
            got = read_at(self.file(int(row["shard"])), buffers, int(row["offset"])) if row["length"] else 0
        except (OSError, SpecialFile) as error:
            raise Damaged(reason(error)) from error
        if got != row["length"]:
            raise Damaged("its shard ends before it")
        if layout.crc(self.key(number), *buffers) != row["crc"]:
            raise Damaged("it fails its checksum")

    def check(self, number: int) -> str | None:
        """What is wrong with an entry; None when it is what was written."""
        layout = self.layout(number)
        try:
            self.pull(number, [memoryview(bytearray(size)) for size in layout.sizes])
        except Damaged as error:
            return str(error)
        return None

    def key(self, number: int) -> bytes:
        return self.rows["key"][number].ljust(32, b"\0")  # numpy leaves out zeros at the end

    def another(self, number: int, reason: str) -> "Entries":
        """A damaged entry's copy in another shard, this one noted as lost. Raises InputError when there is none."""
        from latentfm.data.cache.store import Cache

        key, path = self.key(number).hex(), self.paths[self.rows["shard"][number]]
        cache = Cache(self.folder)
        cache.lose(Path(path), key)
        try:
            while (copy := cache.entries([key])).check(0) is not None:
                cache.lose(Path(copy.paths[copy.rows["shard"][0]]), key)
        except KeyError:
            where = f"the cache entry {key} in {shown(path)}"
            raise InputError(f"{where} is damaged ({reason}); start again and it will be made anew") from None
        return copy

    def file(self, shard: int) -> int:
        """The descriptor of a shard's file, opened when it is first asked for; at most OPEN_FILES are open."""
        if shard in self.files:
            self.files.move_to_end(shard)
        else:
            self.files[shard] = open_file(self.paths[shard])
            if len(self.files) > OPEN_FILES:
                self.files.popitem(last=False)[1].close()
        return self.files[shard].fileno()
