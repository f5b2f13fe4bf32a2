"""What a device multiplies and copies at best: the roof that the benchmarks print beside their figures (Williams et al. 2009)."""

import time
from collections.abc import Callable

import torch

from latentfm.models.onednn import AS_IT_IS, BFLOAT16, ONEDNN


def seconds(call: Callable[[], object], device: str) -> float:
    """How long `call` takes, its work on the device included."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def ceilings(device: str, dtype: torch.dtype, shrunk: bool = False) -> dict[str, float]:
    """{"tflops", "gb_per_second"}: the best of several products of large squares and of copies, bytes read and written counted.

    On a CPU the products are PyTorch's and oneDNN's: which of the two is faster differs between processors, in float32 up to twofold.
    """
    on_gpu = device == "cuda"
    size, length = (8192, 1 << 32) if on_gpu else (2048, 1 << 29)
    size, length = (512, 1 << 22) if shrunk else (size, length)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    ways: list[Callable[[], object]] = [lambda: a @ b]
    if ONEDNN is not None and not on_gpu and (BFLOAT16 or dtype == torch.float32):
        ways.append(lambda: ONEDNN(a, b, None, *AS_IT_IS))
    product = min(seconds(way, device) for way in ways for _ in range(3 if shrunk else 20))
    x = torch.empty(length, dtype=torch.uint8, device=device).random_()
    y = torch.empty_like(x)
    copy = min(seconds(lambda: y.copy_(x), device) for _ in range(3 if shrunk else 10))
    return {"tflops": 2 * size**3 / product / 1e12, "gb_per_second": 2 * length / copy / 1e9}


def at_best(roof: dict[str, float], operations: float, moved: float = 0.0) -> float:
    """Seconds that `operations` of matrix products take at the roof, and after them `moved` bytes."""
    return operations / roof["tflops"] / 1e12 + moved / roof["gb_per_second"] / 1e9


def moved_by_adamw(parameters: int) -> float:
    """Bytes that a step of AdamW reads (weights, gradients, two moments) and writes (all but the gradients), in float32."""
    return 7 * 4.0 * parameters


def in_words(roof: dict[str, float]) -> str:
    return f"roof {roof['tflops']:.3g} TFLOP/s, {roof['gb_per_second']:.3g} GB/s"
