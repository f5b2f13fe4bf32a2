"""What the processes of a run do together: share work, fail, and hear what the main one says."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from latentfm.data.cache.processes import Find, Processes
from latentfm.errors import Failure, InputError
from latentfm.files import reason

SECONDS_BETWEEN_POLLS = 0.1


def in_words(error: Exception) -> str:
    """What the other processes are told of an error: what it says, and its kind where it is none of the user's to mend."""
    if isinstance(error, InputError | OSError):
        return str(error)
    return f"a process of this run ended by {type(error).__name__}: {reason(error)}"


def exit_code(error: Exception) -> int:
    """What a process that ends by `error` ends with: 2 for wrong input, 1 for all else."""
    return error.exit_code if isinstance(error, InputError) else Failure.exit_code


def as_told(code: int, words: str) -> InputError:
    """The error that another process told of."""
    return InputError(words) if code == InputError.exit_code else Failure(words)


@contextmanager
def raise_on_all_ranks(accelerator: Accelerator) -> Iterator[None]:
    """A context after which every process raises InputError when one of them could not do its part, whatever kept it from it.

    No collective within: one that fails before it would leave the others waiting there.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    if accelerator.num_processes > 1:
        told = [said for said in gather_object([None if problem is None else (exit_code(problem), in_words(problem))]) if said is not None]
        if told and (problem is None or isinstance(problem, InputError | OSError)):
            raise as_told(*told[0]) from problem
    if problem is not None:
        raise problem


def broadcast_from_main(accelerator: Accelerator, value: Any) -> Any:
    """The main process's `value`, on every process."""
    if accelerator.num_processes == 1:
        return value
    told = [value]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


@contextmanager
def launched() -> Iterator[Processes]:
    """A context with the processes that torchrun or accelerate launch has started, for work in which no tensors meet.

    What they read they tell each other in their store, what they make lies in a folder.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    together = world > 1 and "MASTER_ADDR" in os.environ
    if together:
        torch.distributed.init_process_group("gloo")
    try:
        yield Processes(rank, world, partial(find_by_all, rank, world)) if together else Processes(rank, world)
    finally:
        if together:
            torch.distributed.destroy_process_group()  # or its threads are still there when the process ends


def find_by_all(rank: int, world: int, find: Find, items: Sequence[Any], name: str) -> list[Any]:
    """find(items), each of `world` processes doing its share and told of the others': values that JSON holds, tuples as lists.

    They meet in the store that the processes found each other by, by polling it: a collective would time out where one takes longer than
    the others. `name` is of this call alone. Raises InputError on every process when one of them raises anything.
    """
    if world == 1:
        return json.loads(json.dumps(find(items)))
    store = torch.distributed.PrefixStore(f"latentfm {name}", torch.distributed.distributed_c10d._get_default_store())
    problem: Exception | None = None
    try:
        told = json.dumps({"found": find(items[rank::world])})
    except Exception as error:
        problem, told = error, json.dumps({"failed": [exit_code(error), in_words(error)]})
    store.set(str(rank), told)
    if problem is not None:
        raise problem
    found: list[Any] = [None] * len(items)
    for other in range(world):
        while not store.check([str(other)]):
            time.sleep(SECONDS_BETWEEN_POLLS)
        answer = json.loads(store.get(str(other)))
        if "failed" in answer:
            raise as_told(*answer["failed"])
        found[other::world] = answer["found"]
    if store.add("done", 1) == world:  # the last one clears up
        for key in (*map(str, range(world)), "done"):
            store.delete_key(key)
    return found
