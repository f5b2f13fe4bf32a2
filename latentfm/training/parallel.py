"""What the processes of a run do together: write whole tensors, fail, and hear what the main one says."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latentfm.errors import InputError
from latentfm.interchange.tensors import Stored, in_order, split, write_split

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
