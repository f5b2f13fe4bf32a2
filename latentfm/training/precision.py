"""What a run computes in, where its options leave it to the device, and whether twice the same is the same to the bit."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from latentfm.config import TrainOptions


def computing_device(local_rank: int | None = None) -> torch.device:
    """The accelerator of this machine, the one of its process `local_rank` if given; the CPU where there is none."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator()
    return device if local_rank is None else torch.device(device.type, local_rank % torch.accelerator.device_count())


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 numbers itself; one that imitates it takes several times as long as for float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        imitates = platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported()  # AVX-512 alone does
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() and not imitates
    return device.type == "xpu"


def compute_dtype(options: TrainOptions) -> torch.dtype:
    """What the network's linears compute in; of options whose precision is chosen (planning.run.with_precision)."""
    return torch.bfloat16 if options.weights == "bfloat16" or options.mixed_precision == "bf16" else torch.float32


def choose_workspace() -> None:
    """Has cuBLAS keep to one order of its sums, which it asks for by a variable of the environment read when it is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """A context in which, if `wanted`, PyTorch takes kernels that repeat themselves to the bit; it raises where an operation has none.

    Without it the backward pass of a GPU's attention adds up in whatever order its blocks finish. `choose_workspace` goes before.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what was not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
