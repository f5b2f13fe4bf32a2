"""A cache filled by as many processes as there are: each makes what nobody has made or is making, and waits for the others."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentfm.data.cache.claims import Claims
from latentfm.data.cache.shard import Layout, key_bytes
from latentfm.data.cache.store import Cache, key_of
from latentfm.data.images import decoders
from latentfm.words import count

SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 30.0  # of work that a kill may lose
CLAIMED = 256  # entries that a process keeps others from making at a time
SECONDS_BETWEEN_POLLS = 0.5  # of the cache, while other processes fill it
VERDICT = "verdict"  # the one, empty tensor of an entry that says that nothing can be made of an item

Made = Sequence[Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class Job:
    """Entries of one kind: (key, item) of each, and what makes them.

    `make` takes `at_once` items, as `load` turned them in threads, and gives their entries: None of one of which nothing can be made,
    which is kept under verdict_key(key).
    """

    kind: str
    wanted: list[tuple[str, Any]]
    make: Callable[[Sequence[Any]], Made]
    at_once: int
    load: Callable[[Any], Any] | None = None

    @cached_property
    def keys(self) -> np.ndarray:
        """The keys, S32 [N]."""
        return np.array([key_bytes(key) for key, _ in self.wanted], "S32")

    @cached_property
    def verdicts(self) -> np.ndarray:
        """The keys under which it is kept that nothing can be made of an item, S32 [N]."""
        return np.array([key_bytes(verdict_key(key)) for key, _ in self.wanted], "S32")

    def missing(self, cache: Cache) -> np.ndarray:
        """The numbers of the keys with neither an entry nor a verdict."""
        return np.flatnonzero((cache.find(self.keys) < 0) & (cache.find(self.verdicts) < 0))


def verdict_key(key: str) -> str:
    """Under which key it is kept that nothing can be made of an entry's item: by these decoders, within these bounds."""
    return key_of("unreadable", key, decoders())


def fill(
    cache: Cache, jobs: Sequence[Job], progress: Any, rank: int = 0, world: int = 1, verify: bool = True, threads: int = 1
) -> dict[str, list[str]]:
    """Makes what is missing or damaged, this process its share; returns the keys that were made here, by kind.

    `progress` is told of as one of rich is. Waits for the other processes, of this run or another, by looking at the folder, not in a
    collective, which would time out.
    """
    made: dict[str, list[str]] = {job.kind: [] for job in jobs}
    shares = [replace(job, wanted=job.wanted[rank::world]) for job in jobs]
    task = progress.add_task("caching pictures and captions", total=sum(len(job.wanted) for job in shares))
    while True:
        for job in shares:
            advance = partial(progress.advance, task)
            make_missing(cache, job, advance, verify=verify, threads=threads, on_made=made[job.kind].extend)
        cache.refresh()
        missing = sum(len(job.missing(cache)) for job in jobs)
        if not missing:
            break
        progress.update(task, description=f"waiting for other processes ({count(missing, 'entry', 'entries')})")
        verify = False
        time.sleep(SECONDS_BETWEEN_POLLS)
        shares = [replace(job, wanted=[job.wanted[number] for number in job.missing(cache)]) for job in shares]
    progress.remove_task(task)
    return made


def make_missing(
    cache: Cache, job: Job, on_done: Callable[[int], None] = lambda count: None, *, verify: bool = True, threads: int = 1,
    on_made: Callable[[Sequence[str]], None] = lambda keys: None,
) -> int:  # fmt: skip
    """Makes the entries of a job that are missing or damaged; returns how many were made.

    What another process is making is passed over. `on_done` is told how many entries are dealt with since it was last called, `on_made`
    which keys were made. With verify=False an entry that is there is taken to be whole. Raises InputError when the disk refuses a shard;
    what was written before stays.
    """
    cache.refresh()
    keys, made = job.keys, 0
    places = cache.find(keys)
    there = np.flatnonzero(places >= 0)
    if verify:
        while len(there):  # a damaged entry may have another copy
            there = there[cache.damaged(places[there], on_done)]
            cache.refresh()
            places = cache.find(keys)
            there = there[places[there] >= 0]
    else:
        on_done(len(there))
    missing = np.flatnonzero(places < 0)
    judged = cache.find(job.verdicts[missing]) >= 0
    on_done(int(judged.sum()))
    missing = missing[~judged]
    with Claims(cache.folder) as claims, Writer(cache, job.kind) as writer:
        for start in range(0, len(missing), CLAIMED):
            mine = missing[start : start + CLAIMED]
            mine = mine[claims.take(keys[mine], writer.keys())]
            cache.refresh()  # others may have been faster
            done = cache.find(keys[mine]) >= 0
            on_done(int(done.sum()))
            mine, nothing = mine[~done], []
            items = (job.wanted[number][1] for number in mine)
            loaded = map_ahead(job.load, items, threads, 2 * job.at_once) if job.load else items
            for first in range(0, len(mine), job.at_once):
                names = [job.wanted[number][0] for number in mine[first : first + job.at_once]]
                entries = dict(zip(names, job.make([next(loaded) for _ in names]), strict=True))
                for name, tensors in entries.items():
                    if tensors is not None:
                        writer.add(name, tensors)
                nothing += [name for name in names if entries[name] is None]
                on_made([name for name in names if entries[name] is not None])
                on_done(len(names))
                made += len(names)
            for name in nothing:
                writer.add(verdict_key(name), {VERDICT: torch.empty(0, dtype=torch.uint8)})
    return made


class Writer:
    """A context that collects entries into shards: one is written when it is SHARD_BYTES large or SHARD_SECONDS old, and at the end."""

    def __init__(self, cache: Cache, kind: str):
        self.cache, self.kind = cache, kind
        self.waiting: dict[str, Mapping[str, Tensor]] = {}
        self.size, self.began = 0, 0.0

    def __enter__(self) -> "Writer":
        return self

    def keys(self) -> np.ndarray:
        """The keys of what waits to be written, S32 [N]."""
        return np.array([key_bytes(key) for key in self.waiting], "S32")

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


def map_ahead(function: Callable[[Any], Any], items: Iterable[Any], threads: int, most: int) -> Iterator[Any]:
    """function(item) of each item in order, computed up to `most` items ahead in threads."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
