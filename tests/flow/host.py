"""A watch for the moments at which the host would wait for the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Counts the tensors whose value Python asks for (.item(), if tensor) from the first call of `field` on.

    On an accelerator each such question waits for all the work before it; asked on the CPU it is the same operation.
    """

    def __init__(self, field):
        super().__init__()
        self.count, self.armed, self._field = 0, False, field

    def field(self, x, t):
        self.armed = True
        return self._field(x, t)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += self.armed and func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))
