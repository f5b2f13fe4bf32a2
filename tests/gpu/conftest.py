"""What only a GPU can tell: `pytest -m gpu` on a machine that has one; with LATENTFM_TEST_DEVICE=cpu the same tests try themselves out.

There nothing moves and nobody waits for a device, so what counts such things counts their nearest likeness on a CPU, as each says.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from training.conftest import cache_folder, make_pictures, options, pictures, run, start  # noqa: F401

from latentfm.models.mmdit import MMDiT

DEVICE = torch.device(os.environ.get("LATENTFM_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(scope="session")
def gpu_only() -> None:
    """Skips a test that says nothing on another device."""
    if not ON_GPU:
        pytest.skip("says nothing without a GPU")


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU graphs are captured and differentiated, and not compiled, which takes minutes."""
    if not ON_GPU:
        monkeypatch.setattr(MMDiT, "compile_repeated_blocks", partialmethod(MMDiT.compile_repeated_blocks, backend="aot_eager"))


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    yield
    torch.compiler.reset()
    if ON_GPU:
        torch.cuda.empty_cache()


@contextmanager
def counted_waits(found: list[str], but: tuple[str, ...] = ()) -> Iterator[None]:
    """A context that puts into `found` each time the host waits for the device; on a CPU each time it reads a tensor's value.

    but: ways of reading that on a GPU too read what the host has.
    """
    if ON_GPU:
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
        found += [str(warning.message) for warning in caught if "called a synchronizing" in str(warning.message)]
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in set(READS) - set(but):
            patch.setattr(torch.Tensor, name, noting(found, name))
        yield


def noting(found: list[str], name: str) -> Callable:
    """torch.Tensor's method `name`, noted in `found` at each call."""
    original = getattr(torch.Tensor, name)

    def read(tensor, *arguments, **named):
        found.append(name)
        return original(tensor, *arguments, **named)

    return read


@pytest.fixture(scope="session")
def waits() -> Callable:
    """`counted_waits`."""
    return counted_waits
