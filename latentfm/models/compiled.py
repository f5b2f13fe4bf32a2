"""torch.compile of a network's blocks: one graph for all sizes, and what was compiled kept on disk for the next process."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentfm.errors import InputError

FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # torch's own variable, which is heeded where it is set
GRAPHS = 64  # of one block: kinds of blocks, with a schedule and without, one row and several, in training and in sampling, with adapters


class CompiledBlocks:
    """A network of ModelMixin's kind, whose repeated blocks torch.compile takes."""

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Has each block compiled when it is first run: as ModelMixin's, with dynamic=True unless it is given.

        So one graph serves all sizes, lengths and batches but a batch of one row, which has its own. What was compiled is kept in the
        user's cache (or TORCHINDUCTOR_CACHE_DIR), and is loaded by the next process in a few seconds. Arguments are torch.compile's.
        Raises InputError when there is no compiler for the network's device.
        """
        if kwargs.get("backend", "inductor") == "inductor":
            check_compiler(self.device)
        keep_on_disk()
        torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
        torch._dynamo.config.specialize_float = True  # no eps changes: taken for a number that does, each block is traced twice
        super().compile_repeated_blocks(*args, **({"dynamic": True} | kwargs))

    @property
    def blocks_are_compiled(self) -> bool:
        return self.transformer_blocks[0]._compiled_call_impl is not None

    def as_between_blocks(self, tokens: Tensor) -> Tensor:
        """Tokens for the first of the blocks: where these are compiled no view, for which the first block would have a graph of its own."""
        return tokens.clone() if tokens._is_view() and self.blocks_are_compiled else tokens


def compiled_folder() -> Path:
    """Where compiled blocks are kept, over reboots too, which torch's own default, a folder for what is temporary, is not."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    given = os.environ.get(FOLDER)
    if given and given != default_cache_dir():  # torch sets the variable itself when its compiler is imported
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "latentfm", "compiled").expanduser()


def keep_on_disk() -> None:
    """Has torch keep what it compiles in compiled_folder; where that cannot be written its own default is left."""
    folder = compiled_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    os.environ[FOLDER] = str(folder)


def check_compiler(device: torch.device) -> None:
    """Raises InputError unless there is what torch.compile needs to make code for `device`."""
    if device.type == "cpu":
        wanted = os.environ.get("CXX", "g++"), "clang++", "cl"
        if not any(shutil.which(name) for name in wanted):
            raise InputError("torch.compile needs a C++ compiler here: g++ (Debian: apt install g++) or clang++, or one named by $CXX")
    elif device.type in ("cuda", "xpu"):
        from torch.utils._triton import has_triton

        if not has_triton():
            raise InputError(f"torch.compile needs Triton for {device}: pip install triton, and a GPU that it knows")
