"""The processes that prepare a run's data together, as the one that works here sees them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Find = Callable[[Sequence[Any]], list[Any]]  # what it finds of each item, in their order


def in_one_process(find: Find, items: Sequence[Any], name: str) -> list[Any]:
    """find(items)."""
    return find(items)


@dataclass(frozen=True)
class Processes:
    """This process's rank, how many there are, and how they divide reading among them.

    share(find, items, name) is find(items) for each of them, every process doing its share and told of the others': values that JSON
    holds, tuples as lists. `name` is of this call alone.
    """

    rank: int = 0
    world: int = 1
    share: Callable[[Find, Sequence[Any], str], list[Any]] = in_one_process

    def first(self, work: Callable[[], Any], name: str) -> Any:
        """work(), by the first process before the others, who find what it kept. Raises InputError on all when the first does."""
        found: list[Any] = []
        self.share(lambda own: [found.append(work()) for _ in own], [name], name)
        return found[0] if found else work()


ONE_PROCESS = Processes()
