"""Work that the processes of a run share, here by threads that meet in one store; real processes are in test_processes.py."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local
from types import SimpleNamespace

import pytest
import torch

from latentfm.errors import InputError
from latentfm.training.distributed import processes
from latentfm.training.distributed.processes import find_by_all, raise_on_all_ranks


@pytest.fixture
def at_once(monkeypatch):
    """at_once(world, work) -> what `find_by_all` gives each of `world` processes, or the error it raises."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)

    def run(world, work, items, name="pictures"):
        def one(rank):
            try:
                return find_by_all(rank, world, lambda own: work(rank, own), items, name)
            except Exception as error:
                return error

        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(one, range(world)))

    run.store = store
    return run


@pytest.mark.parametrize("count", [0, 2, 10, 11])
@pytest.mark.parametrize("world", [1, 3])
def test_each_does_its_share_once_and_all_are_told(at_once, world, count):
    did = []

    def work(rank, own):
        did.extend(own)
        return [(item * item, None) for item in own]

    for name in ("pictures", "masks"):  # the work of one name leaves nothing in the way of another's
        found = at_once(world, work, list(range(count)), name)
        assert found == [[[item * item, None] for item in range(count)]] * world
    assert sorted(did) == sorted(2 * list(range(count)))
    assert at_once.store.num_keys() <= 2  # of the results nothing is left


def test_what_one_cannot_do_is_raised_by_all(at_once):
    def work(rank, own):
        if rank == 1:
            raise InputError("b.png went")
        return own

    assert [str(error) for error in at_once(3, work, list(range(9)))] == ["b.png went"] * 3


def test_an_error_of_our_own_in_one_is_raised_by_all_too(at_once):
    def work(rank, own):
        if rank == 1:
            raise KeyError("lost")
        return own

    first, own, last = at_once(3, work, list(range(9)))
    assert isinstance(own, KeyError) and isinstance(first, InputError) and str(first) == str(last)
    assert "a process of this run ended by KeyError: it has no 'lost'" in str(first)


@pytest.mark.parametrize("problem", [InputError("no room"), OSError(28, "No space left on device"), KeyError("lost"), None])
def test_a_part_that_one_process_cannot_do_raises_on_all(monkeypatch, problem):
    """Three threads that gather what each says, as processes do."""
    barrier, told = Barrier(3), [None] * 3

    def one(rank):
        def gather(said):
            told[rank] = said[0]
            barrier.wait(10)
            return list(told)

        rank_of.gather = gather
        try:
            with raise_on_all_ranks(SimpleNamespace(num_processes=3)):
                if rank == 1 and problem is not None:
                    raise problem
        except Exception as error:
            return error

    rank_of = local()
    monkeypatch.setattr(processes, "gather_object", lambda said: rank_of.gather(said))
    with ThreadPoolExecutor(3) as pool:
        first, own, last = pool.map(one, range(3))
    if problem is None:
        assert first is own is last is None
        return
    assert isinstance(own, KeyError if isinstance(problem, KeyError) else InputError)
    assert isinstance(first, InputError) and str(first) == str(last) and (isinstance(own, KeyError) or str(own) == str(first))



def test_what_was_launched_parts_when_its_work_fails_too(monkeypatch):
    told = []
    monkeypatch.setattr(torch.distributed, "init_process_group", told.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: told.append("parted"))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError), processes.launched() as found:
        assert (found.rank, found.world, told) == (1, 2, ["gloo"])
        raise InputError("no")
    assert told == ["gloo", "parted"]
