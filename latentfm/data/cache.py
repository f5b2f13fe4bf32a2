"""A content-addressed cache of VAE moments and prompt embeddings.

The key of an entry is the SHA-256 of everything it depends on: image bytes, transform and VAE; or caption, tokenizers,
length and text encoders. A changed input is another key, so a hit is never stale. Entries are safetensors files written under a
temporary name and renamed; each carries a checksum, and a damaged one counts as missing and is made again.
"""

import hashlib
import json
import uuid
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from latentfm.errors import InputError


def key_of(*parts: str) -> str:
    """The hexadecimal key of what an entry depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def fingerprint(module: torch.nn.Module | None) -> str:
    """SHA-256 of a module's configuration and weights (names, shapes, values as stored); "absent" for None."""
    if module is None:
        return "absent"
    config = {k: v for k, v in dict(module.config.to_dict() if hasattr(module.config, "to_dict") else module.config).items() if k[0] != "_"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's whole definition; "absent" for None."""
    if tokenizer is None:
        return "absent"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    state = json.loads(text) if backend is not None else {"vocabulary": text}
    for volatile in ("padding", "truncation"):  # set by the last call, no part of the definition
        state.pop(volatile, None)
    return key_of(json.dumps(state, sort_keys=True), str(tokenizer.pad_token), str(tokenizer.model_max_length))


class Cache:
    """Entries of named tensors under a folder, `<folder>/<first two digits>/<key>.safetensors`."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def write(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Stores an entry in one rename. Raises OSError when the disk refuses it; nothing half-written remains."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{key}.{uuid.uuid4().hex}.partial")  # two writers, on two machines even, never share it
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        try:
            save_file(tensors, partial, metadata={"crc32": str(checksum(tensors))})
            partial.rename(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"could not write the cache entry {path}: {error}; free some space or set data.cache to another disk") from error

    def read(self, key: str) -> dict[str, Tensor]:
        """An entry's tensors. Raises KeyError when it is missing, InputError when it is damaged."""
        path = self.path(key)
        try:
            data = path.read_bytes()  # once: safe_open opens a file twice, and another run may replace it in between
            tensors = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            expected = header.get("__metadata__", {}).get("crc32")
        except FileNotFoundError:
            raise KeyError(key) from None
        except (OSError, SafetensorError) as error:
            raise InputError(f"the cache entry {path} is damaged ({error}); start again and it will be made anew") from error
        if expected != str(checksum(tensors)):
            raise InputError(f"the cache entry {path} fails its checksum; start again and it will be made anew")
        return tensors

    def whole(self, key: str) -> bool:
        """Whether the entry is there and undamaged."""
        try:
            self.read(key)
        except (KeyError, InputError):
            return False
        return True

    def fill(
        self,
        wanted: Iterable[tuple[str, Any]],
        make: Callable[[Sequence[Any]], Sequence[dict[str, Tensor]]],
        batch_size: int,
        on_done: Callable[[int], None] = lambda count: None,
    ) -> int:
        """Makes the entries of `wanted` (key, item) that are missing or damaged, in batches; returns how many were made.

        `on_done` is told how many of `wanted` are settled since it was last called.
        """
        made, waiting = 0, []

        def flush() -> None:
            nonlocal made
            for (key, _), tensors in zip(waiting, make([item for _, item in waiting]), strict=True):
                self.write(key, tensors)
            made += len(waiting)
            on_done(len(waiting))
            waiting.clear()

        for key, item in wanted:
            if self.whole(key):
                on_done(1)
                continue
            waiting.append((key, item))
            if len(waiting) == batch_size:
                flush()
        if waiting:
            flush()
        return made


def checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 over names, dtypes, shapes and bytes, in name order."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.view(-1).view(torch.uint8).numpy(), value)
    return value
