"""What a text encoder's answer to one prompt depends on, as a short print: cheap enough to be taken before every picture.

All bytes of all weights count, so that an encoder edited in place is another one however it was edited (a version counter or an address
does not see what `.data` is given). They are added up by the device they are on, at the speed of its memory.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

WORDS = 2**16  # of a tensor that are added up together, each with a factor of its own
FACTOR = 0x9E3779B1  # 2^32 divided by the golden ratio, odd
# of a configuration: what says nothing of what the encoder computes
SILENT = {
    "transformers_version", "architectures", "dtype", "torch_dtype", "output_hidden_states", "output_attentions",
    "return_dict", "use_cache",
}  # fmt: skip


def encoder_print(encoder: nn.Module | None, ids: Tensor | None) -> str | None:
    """A print of all that an encoder's answer to the token ids of one prompt depends on; "absent" without one.

    None where that cannot be seen: an encoder with adapters, which may be switched and weighted, with somebody's hooks, or with weights
    that are elsewhere.
    """
    if encoder is None or ids is None:
        return "absent"
    tensors = [*encoder.named_parameters(), *encoder.named_buffers()]
    if getattr(encoder, "peft_config", None) or any(value.is_meta for _, value in tensors) or any(hooks_of(encoder)):
        return None
    config = {name: value for name, value in encoder.config.to_dict().items() if name[0] != "_" and name not in SILENT}
    digest = hashlib.sha256(json.dumps([ids.tolist(), config], sort_keys=True, default=str).encode())
    digest.update(str(encoder).encode())  # its modules, their sizes and constants
    for (name, value), total in zip(tensors, totals([value for _, value in tensors]), strict=True):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} {total}\n".encode())
    return digest.hexdigest()[:32]


def hooks_of(encoder: nn.Module) -> Iterator[object]:
    """What was hung onto the encoder's modules and may change their answers; transformers' own hooks only look."""
    for module in encoder.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        yield from (hook for hook in hooks if not getattr(hook, "__module__", "").startswith("transformers."))
        yield from (module.__dict__[name] for name in ("forward", "_hf_hook") if name in module.__dict__)


@torch.no_grad()
def totals(tensors: Sequence[Tensor]) -> list[int]:
    """A number of 64 bits for each tensor, the same on every device: its bytes as 32-bit words, each times a factor of its place."""
    sums, where = [], []
    for index, tensor in enumerate(tensors):
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        whole = data.numel() // 4 * 4
        words = data[:whole].view(torch.int32)
        if whole < data.numel():
            words = torch.cat([words, data[whole:].to(torch.int32)])
        factors = torch.arange(1, min(WORDS, words.numel()) + 1, dtype=torch.int32, device=words.device) * (FACTOR - 2**32)
        for block in words.split(WORDS) if words.numel() else ():
            sums.append((block * factors[: block.numel()]).sum())
            where.append(index)
    found = [0] * len(tensors)
    values = {device: iter(torch.stack([s for s in sums if s.device == device]).tolist()) for device in {s.device for s in sums}}
    for index, total in zip(where, sums, strict=True):
        found[index] = (found[index] * FACTOR + next(values[total.device])) % 2**64
    return found
