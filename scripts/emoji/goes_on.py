"""A training that goes on where it was interrupted: weights and the optimizer, saved every minute. Used by encoders.py."""

import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from latentfm.training.checkpoint import storage
from latentfm.training.checkpoint.state import pack, unpack
from latentfm.training.distributed.shards import LocalShards


class Run:
    """`module` and `optimizer` as `folder`'s last checkpoint has them, or as they are; `start` is the step to go on with.

    Raises ValueError when the checkpoint was made with other `options`.
    """

    def __init__(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, options: dict[str, Any], every_seconds: float = 60
    ):
        self.folder, self.options, self.every_seconds = folder, options, every_seconds
        self.optimizer, self.accelerator = optimizer, Accelerator()
        self.shards = LocalShards(module)
        self.start, self.saved_at = 0, time.monotonic()
        saved = storage.checkpoints(folder)
        if saved:
            tensors, info = storage.load(saved[-1])
            if info["options"] != options:
                raise ValueError(f"{saved[-1]} was made with other options, {info['options']}; remove {folder} to start again")
            self.start = info["step"]
            unpack(tensors, self.shards, None, optimizer)

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self.saved_at >= self.every_seconds

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`, whole or not at all; the two newest are kept."""
        storage.save(self.folder, step, pack(self.shards, None, self.optimizer), {"options": self.options}, self.accelerator, keep=2)
        self.saved_at = time.monotonic()
