"""A content-addressed cache of VAE moments and prompt embeddings.

The key of an entry is the SHA-256 of everything it depends on: image bytes, transform and VAE; or caption, tokenizers,
length and text encoders. A changed input is another key, so a hit is never stale. Entries lie in shards,
`<folder>/<kind>/<32 hexadecimal digits>.safetensors` (latentfm.data.cache_file), each written whole under another name and renamed, and
never written again, so runs on many machines may fill one folder. An entry that fails its checksum is noted in the shard's `.lost`
file, counts as missing and is made again in another shard; a shard that is cut short or has a damaged table is renamed `.damaged`.
"""

import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentfm.data.cache_file import Damaged, Layout, Shard, key_bytes, lost_of, raw, read_at, read_shard, write_shard
from latentfm.errors import InputError

logger = logging.getLogger(__name__)
KINDS = ("moments", "prompts", "masks", "checks")
SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 30.0  # of work that a kill may lose
OPEN_FILES = 64
SHARD_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
INDEX = np.dtype([("key", "S32"), ("crc", "<u4"), ("layout", "<u4"), ("shard", "<u4"), ("length", "<u4"), ("offset", "<u8")])


def key_of(*parts: str) -> str:
    """The hexadecimal key of what an entry depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def fingerprint(module: torch.nn.Module | None) -> str:
    """SHA-256 of a module's configuration and weights (names, shapes, values as stored); "absent" for None."""
    if module is None:
        return "absent"
    config = {k: v for k, v in dict(module.config.to_dict() if hasattr(module.config, "to_dict") else module.config).items() if k[0] != "_"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's whole definition; "absent" for None."""
    if tokenizer is None:
        return "absent"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    state = json.loads(text) if backend is not None else {"vocabulary": text}
    for volatile in ("padding", "truncation"):  # set by the last call, no part of the definition
        state.pop(volatile, None)
    return key_of(json.dumps(state, sort_keys=True), str(tokenizer.pad_token), str(tokenizer.model_max_length))


class Entries:
    """Chosen entries by number, read where they lie: arrays and a few open files, so that forked processes share its memory.

    `rows` is one INDEX row an entry. Another process, forked or started anew, reads by itself.
    """

    def __init__(self, folder: Path, paths: Sequence[str], layouts: Sequence[Layout], rows: np.ndarray):
        self.folder, self.paths, self.layouts, self.rows = folder, list(paths), list(layouts), rows
        self.files: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, the one used last at the end
        self.elsewhere: dict[int, Entries] = {}  # a damaged entry's other copy

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "files", {}).values():
            os.close(descriptor)

    def layout(self, number: int) -> Layout:
        """The names and shapes of an entry's tensors."""
        return self.layouts[self.rows["layout"][number]]

    def has(self, name: str) -> np.ndarray:
        """Which entries have a tensor of that name, bool [N]."""
        return np.array([any(name == mine for mine, _ in layout.shapes) for layout in self.layouts], bool)[self.rows["layout"]]

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
        except OSError as error:
            raise Damaged(error.strerror) from error
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
        key, path = self.key(number).hex(), self.paths[self.rows["shard"][number]]
        cache = Cache(self.folder)
        cache.lose(Path(path), key)
        try:
            while (copy := cache.entries([key])).check(0) is not None:
                cache.lose(Path(copy.paths[copy.rows["shard"][0]]), key)
        except KeyError:
            raise InputError(f"the cache entry {key} in {path} is damaged ({reason}); start again and it will be made anew") from None
        return copy

    def file(self, shard: int) -> int:
        """The descriptor of a shard's file, opened when it is first asked for; at most OPEN_FILES are open."""
        if shard in self.files:
            self.files.move_to_end(shard)
        else:
            self.files[shard] = os.open(self.paths[shard], os.O_RDONLY)
            if len(self.files) > OPEN_FILES:
                os.close(self.files.popitem(last=False)[1])
        return self.files[shard]


class Cache:
    """Entries of named tensors under a folder. What is found damaged is logged by name."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.shards: dict[Path, Shard] = {}
        self.lost: dict[Path, frozenset[bytes]] = {}
        self.noted: dict[Path, frozenset[bytes]] = {}  # by this object: on a disk that cannot be written it is all there is
        self.index = np.empty(0, INDEX)
        self.layouts: dict[Layout, int] = {}
        self.paths: list[str] = []

    def refresh(self) -> None:
        """Looks at the folder again: shards that came or went, and entries noted as lost."""
        files: dict[Path, frozenset[bytes]] = {}
        for kind in KINDS:
            names = set(os.listdir(self.folder / kind)) if (self.folder / kind).is_dir() else set()
            for name in sorted(name for name in names if SHARD_NAME.fullmatch(name)):
                path = self.folder / kind / name
                files[path] = self.noted.get(path, frozenset()) | (lost_of(path) if f"{path.stem}.lost" in names else frozenset())
        came = [path for path in files if path not in self.shards]
        if not came and files == self.lost:
            return
        self.shards = {path: self.shards[path] if path in self.shards else self.opened(path) for path in files}
        self.shards = {path: shard for path, shard in self.shards.items() if shard is not None}
        self.lost = {path: files[path] for path in self.shards}
        self.paths = [str(path) for path in self.shards]
        parts = []
        for number, shard in enumerate(self.shards.values()):
            rows = np.empty(len(shard.rows), INDEX)
            for name in ("key", "crc", "length", "offset"):
                rows[name] = shard.rows[name]
            rows["shard"] = number
            known = [self.layouts.setdefault(layout, len(self.layouts)) for layout in shard.layouts]
            rows["layout"] = np.array(known, np.uint32)[shard.rows["layout"]]
            lost = self.lost[shard.path]
            parts.append(rows[~np.isin(rows["key"], np.array(list(lost), "S32"))] if lost else rows)
        rows = np.concatenate([np.empty(0, INDEX), *parts])
        self.index = rows[np.argsort(rows["key"], kind="stable")]

    def opened(self, path: Path) -> Shard | None:
        """A shard's table; None for one that went, or is damaged and was set aside."""
        try:
            return read_shard(path)
        except FileNotFoundError:
            return None
        except Damaged as error:
            aside = path.with_name(path.name + ".damaged")
            try:
                path.rename(aside)
            except FileNotFoundError:  # another process was faster
                return None
            logger.warning("the cache's %s is damaged (%s): set aside as %s, its entries are made again", path, error, aside.name)
            return None
        except OSError as error:
            raise InputError(f"cannot read the cache's {path}: {error.strerror}; see that it can be read, or remove it") from error

    def find(self, keys: Sequence[str] | np.ndarray) -> np.ndarray:
        """Where each key (hexadecimal, or an array of S32) is in the index, int64 [M]; -1 where it is missing."""
        wanted = keys if isinstance(keys, np.ndarray) else np.array([key_bytes(key) for key in keys], "S32")
        if not len(self.index):
            return np.full(len(wanted), -1)
        places = np.searchsorted(self.index["key"], wanted)
        places[places == len(self.index)] = 0
        return np.where(self.index["key"][places] == wanted, places, -1)

    def entries(self, keys: Sequence[str] | np.ndarray) -> Entries:
        """The entries of keys, in their order. Raises KeyError with the first that is missing."""
        self.refresh()
        places = self.find(keys)
        if (places < 0).any():
            missing = keys[int(np.argmax(places < 0))]
            raise KeyError(missing if isinstance(missing, str) else missing.hex())
        return self.at(places)

    def at(self, places: np.ndarray) -> Entries:
        """The entries at places of the index."""
        return Entries(self.folder, self.paths, list(self.layouts), self.index[places])

    def read(self, key: str) -> dict[str, Tensor]:
        """An entry's tensors. Raises KeyError when it is missing, InputError when it is damaged."""
        return self.entries([key]).read(0)

    def whole(self, key: str) -> bool:
        """Whether the entry is there and undamaged."""
        try:
            return self.entries([key]).check(0) is None
        except KeyError:
            return False

    def write(self, kind: str, entries: Mapping[str, Mapping[str, Tensor]]) -> Path:
        """Writes entries, all of one dtype, as a shard of its own and returns its path. Raises InputError when the disk refuses it."""
        path = self.folder / kind / f"{uuid.uuid4().hex}.safetensors"  # two writers, on two machines even, never share it
        write_shard(path, entries)
        return path

    def drop(self, key: str) -> None:
        """Notes every copy of an entry as lost: it is missing from now on."""
        self.refresh()
        while (place := self.find([key])[0]) >= 0:
            self.lose(Path(self.paths[self.index["shard"][place]]), key)
            self.refresh()

    def lose(self, shard: Path, key: str) -> None:
        """Notes one copy of an entry as lost, for every later run."""
        self.noted[shard] = self.noted.get(shard, frozenset()) | {key_bytes(key)}
        try:
            with shard.with_suffix(".lost").open("a") as file:
                file.write(f"{key}\n")
        except OSError as error:
            logger.warning("could not note in %s that its entry %s is damaged: %s", shard, key, error.strerror)

    def damaged(self, places: np.ndarray, on_done: Callable[[int], None] = lambda count: None) -> np.ndarray:
        """Which of the entries at `places` of the index are damaged, bool [M]; each is noted as lost. `on_done` counts the others."""
        entries, found = self.at(places), np.zeros(len(places), bool)
        for number in range(len(places)):
            reason = entries.check(number)
            if reason is None:
                on_done(1)
                continue
            found[number] = True
            path, key = Path(entries.paths[entries.rows["shard"][number]]), entries.key(number).hex()
            logger.warning("the cache entry %s in %s is damaged (%s): it is made again", key, path, reason)
            self.lose(path, key)
        return found

    def fill(
        self,
        kind: str,
        wanted: Iterable[tuple[str, Any]],
        make: Callable[[Sequence[Any]], Sequence[Mapping[str, Tensor]]],
        batch_size: int,
        on_done: Callable[[int], None] = lambda count: None,
        *,
        verify: bool = True,
        load: Callable[[Any], Any] | None = None,
        threads: int = 1,
    ) -> int:
        """Makes the entries of `wanted` (key, item) that are missing or damaged, in batches; returns how many were made.

        `on_done` is told how many of `wanted` are settled since it was last called. With verify=False an entry that is there
        is taken to be whole. `load` turns an item into what `make` takes, ahead of it in `threads` threads.
        Raises InputError when the disk refuses a shard; what was written before stays.
        """
        self.refresh()
        wanted = list(wanted)
        places = self.find([key for key, _ in wanted])
        there = np.flatnonzero(places >= 0)
        if verify:
            while len(there):  # a damaged entry may have another copy
                there = there[self.damaged(places[there], on_done)]
                self.refresh()
                places = self.find([key for key, _ in wanted])
                there = there[places[there] >= 0]
        else:
            on_done(len(there))
        missing = [wanted[number] for number in np.flatnonzero(places < 0)]
        with Writer(self, kind) as writer:
            loaded = ahead(load, (item for _, item in missing), threads, 2 * batch_size) if load else (item for _, item in missing)
            for first in range(0, len(missing), batch_size):
                keys = [key for key, _ in missing[first : first + batch_size]]
                made = make([next(loaded) for _ in keys])
                for key, tensors in zip(keys, made, strict=True):
                    writer.add(key, tensors)
                on_done(len(keys))
        return len(missing)

    def leftovers(self) -> list[Path]:
        """What shards that were set aside and writers that were killed left behind. A writer at work has one such file too."""
        return sorted(path for kind in KINDS for path in (self.folder / kind).glob("*.safetensors.*"))

    def old_entries(self) -> bool:
        """Whether the folder holds entries of the first layout too, one file an entry."""
        folders = (path for path in self.folder.glob("[0-9a-f][0-9a-f]") if path.is_dir())
        return any(re.fullmatch(r"[0-9a-f]{64}\.safetensors", name) for path in folders for name in os.listdir(path)[:1])


class Writer:
    """A context that collects entries into shards: one is written when it is SHARD_BYTES large or SHARD_SECONDS old, and at the end."""

    def __init__(self, cache: Cache, kind: str):
        self.cache, self.kind = cache, kind
        self.waiting: dict[str, Mapping[str, Tensor]] = {}
        self.size, self.began = 0, 0.0

    def __enter__(self) -> "Writer":
        return self

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Takes an entry. Raises InputError when the disk refuses the shard it completes."""
        dtype = Layout.of(tensors).dtype
        if self.waiting and dtype != Layout.of(next(iter(self.waiting.values()))).dtype:
            self.flush()
        self.began = self.began if self.waiting else time.monotonic()
        self.waiting[key] = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        self.size += sum(value.nbytes for value in tensors.values())
        if self.size >= SHARD_BYTES or time.monotonic() - self.began >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what waits."""
        waiting, self.waiting, self.size = self.waiting, {}, 0
        if waiting:
            self.cache.write(self.kind, waiting)

    def __exit__(self, *error: object) -> None:
        self.flush()  # after an error too: what was made is not lost


def ahead(function: Callable[[Any], Any], items: Iterable[Any], threads: int, most: int) -> Iterator[Any]:
    """function(item) of each item in order, computed up to `most` items ahead in threads."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
