"""What a run computes on: GPUs as their data sheets have them, and the device that is here. Needs no torch but to see what is here."""

from typing import NamedTuple

GIB = 2**30
# left free of a GPU's memory: its context, the libraries' workspaces, and what the allocator cannot use
RESERVE = 3 * GIB // 2
EFFICIENCY = 0.4  # the share of its peak that a plan counts with


class GPU(NamedTuple):
    """A GPU as its data sheet has it."""

    name: str
    tflops: float  # bfloat16, dense
    gib: float


GPUS = {
    "h100": GPU("H100 SXM", 989, 80),
    "h200": GPU("H200", 989, 141),
    "b200": GPU("B200", 2250, 180),
    "a100": GPU("A100", 312, 80),
    "a100-40": GPU("A100 40 GB", 312, 40),
    "l40s": GPU("L40S", 362, 48),
    "4090": GPU("RTX 4090", 165, 24),
}


def known_gpu(name: str) -> GPU | None:
    """The GPU that a driver's name means, as in "NVIDIA A100-SXM4-80GB"; None when it is none of GPUS, or a slower edition of one."""
    words = name.lower().replace("-", " ").split()
    if {"pcie", "nvl", "laptop", "d"} & set(words):
        return None
    return next((gpu for key, gpu in GPUS.items() if key in words), None)


class Device(NamedTuple):
    """What a process computes on, and how much of its memory it can have. gpu: None where the data sheet is not known."""

    name: str
    memory: int  # bytes
    gpu: GPU | None
    cpu: bool = False

    @classmethod
    def of(cls, gpu: GPU) -> "Device":
        return cls(gpu.name, int(gpu.gib * GIB), gpu)

    @classmethod
    def here(cls, processes: int = 1) -> "Device":
        """The first GPU of this machine, or its CPU, whose memory so many processes share."""
        import torch

        if torch.cuda.is_available():
            found = torch.cuda.get_device_properties(0)
            return cls(found.name, found.total_memory, known_gpu(found.name))
        import psutil  # as Accelerate does

        return cls("CPU", psutil.virtual_memory().available // processes, None, cpu=True)

    def fits(self, amount: int) -> bool:
        """Whether so many bytes leave RESERVE free."""
        return amount + RESERVE <= self.memory
