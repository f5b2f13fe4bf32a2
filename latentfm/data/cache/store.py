"""A content-addressed cache of VAE moments and prompt embeddings.

The key of an entry is the SHA-256 of everything it depends on: image bytes, transform and VAE; or caption, tokenizers,
length and text encoders. A changed input is another key, so a hit is never stale. Entries lie in shards,
`<folder>/<kind>/<32 hexadecimal digits>.safetensors` (latentfm.data.cache.shard), each written whole under another name and renamed, and
never written again, so runs on many machines may fill one folder. An entry that fails its checksum is noted in the shard's `.lost`
file, counts as missing and is made again in another shard; a shard that is cut short or not laid out as shards are is renamed `.damaged`.

A checksum tells damage, not malice: who may write into the folder is believed. So a shard of another user counts after one's own and
is not used at all where everybody may write, and of two entries of one key that differ neither is used.
"""

import hashlib
import logging
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from latentfm.data.cache.entries import Entries
from latentfm.data.cache.shard import Damaged, Layout, Shard, key_bytes, lost_of, note_lost, read_shard, write_shard
from latentfm.data.cache.trust import LISTINGS, anyone_writes, distrust, rank_of
from latentfm.errors import InputError
from latentfm.words import count, listed, shown

logger = logging.getLogger(__name__)
KINDS = ("moments", "pairs", "prompts", "masks", "checks", "conditions")
SHARD_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
INDEX = np.dtype([
    ("key", "S32"), ("crc", "<u4"), ("layout", "<u4"), ("shard", "<u4"), ("length", "<u4"), ("offset", "<u8"), ("rank", "u1"),
])  # fmt: skip


def key_of(*parts: str) -> str:
    """The hexadecimal key of what an entry depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Cache:
    """Entries of named tensors under a folder. What is found damaged is logged by name.

    Entries of the one tensor `outdated` are passed over as if they were not there.
    """

    def __init__(self, folder: Path, outdated: str | None = None):
        self.folder, self.outdated = Path(folder), outdated
        self.shards: dict[Path, Shard] = {}
        self.ranks: dict[Path, int] = {}
        self.strange: set[Path] = set()  # shards that are not used: others may have written them
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
                if path not in self.strange:
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
            rows["shard"], rows["rank"] = number, self.ranks[shard.path]
            known = [self.layouts.setdefault(layout, len(self.layouts)) for layout in shard.layouts]
            rows["layout"] = np.array(known, np.uint32)[shard.rows["layout"]]
            lost = self.lost[shard.path]
            parts.append(rows[~np.isin(rows["key"], np.array(list(lost), "S32"))] if lost else rows)
        rows = np.concatenate([np.empty(0, INDEX), *parts])
        old = np.array([[name for name, _ in layout.shapes] == [self.outdated] for layout in self.layouts], bool)
        rows = rows[~old[rows["layout"]]] if old.any() else rows
        self.index = self.without_conflicts(rows[np.lexsort((rows["rank"], rows["key"]))])

    def opened(self, path: Path) -> Shard | None:
        """A shard's table; None for one that went, that others may have written, or that is damaged and was set aside."""
        try:
            rank = rank_of(os.stat(path), anyone_writes(path.parent))
            if rank is None:
                self.strange.add(path)
                return None
            self.ranks[path] = rank
            return read_shard(path)
        except FileNotFoundError:
            return None
        except Damaged as error:
            aside = path.with_name(path.name + ".damaged")
            try:
                path.rename(aside)
                told = f"set aside as {shown(aside.name)}, its entries are made again"
            except FileNotFoundError:  # another process was faster
                return None
            except OSError as refused:
                self.strange.add(path)
                told = f"it cannot be set aside: {refused.strerror}, and is passed over"
            logger.warning("the cache's %s is damaged (%s): %s", shown(path), error, told)
            return None
        except OSError as error:
            raise InputError(f"cannot read the cache's {shown(path)}: {error.strerror}; see that it can be read, or remove it") from error

    def without_conflicts(self, rows: np.ndarray) -> np.ndarray:
        """The rows, sorted by key and rank, without those that differ from another of their key and rank: one of them is forged or
        was made by another machine, and which is not to be seen. They are noted as lost, and made again.
        """
        first = np.r_[True, rows["key"][1:] != rows["key"][:-1]] if len(rows) else np.empty(0, bool)
        group = np.cumsum(first) - 1
        leading = rows["rank"] == rows["rank"][first][group]
        differs = np.r_[False, ~first[1:] & ((rows["crc"][1:] != rows["crc"][:-1]) | (rows["layout"][1:] != rows["layout"][:-1]))]
        odd = np.unique(group[differs & leading])
        if not len(odd):
            return rows
        dropped = np.isin(group, odd) & leading
        shards = [Path(self.paths[number]) for number in np.unique(rows["shard"][dropped])]
        logger.warning(
            "the cache holds %s in several shards that differ (%s): none of them is used, they are made again",
            count(len(odd), "entry", "entries"), listed(shards),
        )  # fmt: skip
        for row in rows[dropped]:
            self.lose(Path(self.paths[row["shard"]]), row["key"].ljust(32, b"\0").hex())
        self.lost = {path: self.lost[path] | self.noted.get(path, frozenset()) for path in self.lost}
        return rows[~dropped]

    def distrust(self) -> list[str]:
        """What is to be said of who may write into the folder, once a run."""
        return distrust(self.folder, [self.folder / kind for kind in KINDS], self.shards, self.strange)

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

    def write(self, kind: str, entries: Mapping[str, Mapping[str, Tensor]]) -> Path:
        """Writes entries, all of one dtype, as a shard of its own and returns its path. Raises InputError when the disk refuses it."""
        path = self.folder / kind / f"{uuid.uuid4().hex}.safetensors"  # two writers, on two machines even, never share it
        write_shard(path, entries)
        return path

    def lose(self, shard: Path, key: str) -> None:
        """Notes one copy of an entry as lost, for every later run."""
        self.noted[shard] = self.noted.get(shard, frozenset()) | {key_bytes(key)}
        try:
            note_lost(shard, key)
        except OSError as error:
            logger.warning("could not note in %s that its entry %s is damaged: %s", shown(shard), key, error.strerror)

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
            logger.warning("the cache entry %s in %s is damaged (%s): it is made again", key, shown(path), reason)
            self.lose(path, key)
        return found

    def verify(self, on_done: Callable[[int], None] = lambda count: None) -> int:
        """Reads every entry that is there; returns how many are damaged, which are noted as lost. `on_done` counts the others."""
        places = np.lexsort((self.index["offset"], self.index["shard"]))  # as they lie on the disk
        return int(self.damaged(places, on_done).sum())

    def prune(self) -> tuple[int, int]:
        """Removes `leftovers`; returns how many files they were, and their bytes."""
        self.refresh()
        found = self.leftovers()
        size = sum(path.stat().st_size for path in found)
        for path in found:
            path.unlink(missing_ok=True)
        return len(found), size

    def leftovers(self) -> list[Path]:
        """What shards that were set aside and writers that were killed left behind. A writer at work has one such file too."""
        folders = [*((self.folder / kind).glob("*.safetensors.*") for kind in KINDS), (self.folder / LISTINGS).glob("*.json.*")]
        return sorted(path for found in folders for path in found)

    def old_entries(self) -> bool:
        """Whether the folder holds entries of the first layout too, one file an entry."""
        folders = (path for path in self.folder.glob("[0-9a-f][0-9a-f]") if path.is_dir())
        return any(re.fullmatch(r"[0-9a-f]{64}\.safetensors", name) for path in folders for name in os.listdir(path)[:1])
