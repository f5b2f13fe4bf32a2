"""What the processes of a run do together: share work, write whole tensors, fail, and hear what the main one says."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latentfm.errors import InputError
from latentfm.interchange.tensors import Stored, in_order, split, write_split

Work = Callable[[Sequence[Any]], list[Any]]  # what it finds of each item, in their order
SECONDS_BETWEEN_LOOKS = 0.1
LARGEST_FILE = 5 * 10**9  # bytes, as diffusers splits its own


@dataclass(frozen=True)
class Late(Stored):
    """A tensor that is made whole only when it is written, by `value`."""

    value: Callable[[], Tensor]

    @classmethod
    def of(cls, dtype: torch.dtype, shape: Iterable[int], value: Callable[[], Tensor]) -> "Late":
        return cls(dtype, tuple(shape), (), value)

    def blocks(self) -> Iterator[Tensor]:
        yield self.value().detach().cpu().contiguous().view(-1)


class Gathering:
    """Writes whole tensors into files on the main process, while the others help to make them; called by all alike.

    A write that fails is told by `error` and not raised where others would be left waiting for their next tensor.
    """

    def __init__(self, accelerator: Accelerator, sharded: bool):
        self.main, self.sharded = accelerator.is_main_process, sharded
        self.error: Exception | None = None

    @contextmanager
    def careful(self) -> Iterator[None]:
        """A context, on the main process, whose failure is kept until the others need nothing more of it."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def raise_error(self) -> None:
        """Raises what failed, if anything did: at the end, when nobody waits."""
        if self.error is not None:
            raise self.error

    def write(self, folder: Path, stem: str, tensors: Mapping[str, Stored], dtype: torch.dtype | None = None) -> None:
        """Writes folder/STEM.safetensors (above LARGEST_FILE shards and an index), floating-point tensors in `dtype` where it is given."""
        files = split(dict(tensors), dtype, LARGEST_FILE)
        ordered = [file[name] for file in files for name in in_order(file, dtype)]  # as write_split goes
        waiting = iter([stored for stored in ordered if isinstance(stored, Late)])

        def counted(stored: Stored) -> Stored:
            if not isinstance(stored, Late):
                return stored
            return replace(stored, value=lambda: next(waiting).value())

        if self.main and self.error is None:
            with self.careful():
                counting = [{name: counted(stored) for name, stored in file.items()} for file in files]
                write_split(folder, stem, counting, {"format": "pt"}, dtype)
        for late in waiting if self.sharded else ():  # all of them on the other processes, on the main one what a failure left
            late.value()


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """A context after which every process raises InputError when the main one could not do its part."""
    problem: BaseException | None = None
    try:
        yield
    except (InputError, OSError) as error:
        problem = error
    told = from_main(accelerator, None if problem is None else str(problem))
    if accelerator.num_processes > 1 and told is not None:
        raise InputError(told) from problem
    if problem is not None:
        raise problem


def from_main(accelerator: Accelerator, value: Any) -> Any:
    """The main process's `value`, on every process."""
    if accelerator.num_processes == 1:
        return value
    told = [value]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def shared(accelerator: Accelerator, work: Work, items: Sequence[Any], name: str) -> list[Any]:
    """work(items), each process doing its share and told of the others': values that JSON holds, tuples as lists.

    They meet in the store that the processes found each other by, by looking: a collective would time out where one takes longer than
    the others. `name` is of this work alone. Raises InputError on every process when one of them does.
    """
    world = accelerator.num_processes
    if world == 1:
        return json.loads(json.dumps(work(items)))
    store = torch.distributed.PrefixStore(f"latentfm {name}", torch.distributed.distributed_c10d._get_default_store())
    try:
        told = json.dumps({"found": work(items[accelerator.process_index :: world])})
    except InputError as error:
        told = json.dumps({"failed": str(error)})
    store.set(str(accelerator.process_index), told)
    found: list[Any] = [None] * len(items)
    for rank in range(world):
        while not store.check([str(rank)]):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        said = json.loads(store.get(str(rank)))
        if "failed" in said:
            raise InputError(said["failed"])
        found[rank::world] = said["found"]
    if store.add("done", 1) == world:  # the last one clears up
        for rank in range(world):
            store.delete_key(str(rank))
    return found
