"""What a text encoder's answer to one prompt depends on, as a short print: cheap enough to be taken before every picture.

All bytes of all weights count, whichever way they were edited. They are added up once, at the speed of the memory they are in; after that a
print is that of before as long as a glance sees the same: each tensor's place, version and shape, which any edit that autograd is told of
changes, and for those that it is not told of (`.data`, as adapters are merged) its numbers, small tensors whole, of a large one a sample.
What a glance can miss: less than a row's numbers of a large matrix, changed through `.data` alone.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

WORDS = 2**16  # of a tensor that are added up together, each with a factor of its own
WHOLE = 2**14  # words; tensors up to this size a glance reads whole
SAMPLE, STEP = 2**12, 1001  # words that a glance reads of a larger one at least, and the most that it passes over: less than a row
ROWS = {"cpu": 1}  # times WORDS that are worked on at once: what a cache holds
MOST_ROWS = 64
FACTOR = 0x9E3779B1  # 2^32 divided by the golden ratio, odd
# of a configuration, and of a module: what says nothing of what the encoder computes
SILENT = {
    "transformers_version", "architectures", "dtype", "torch_dtype", "output_hidden_states", "output_attentions",
    "return_dict", "use_cache",
}  # fmt: skip
SILENT_SETTINGS = {"training", "gradient_checkpointing"}
PLAIN = (Tensor, nn.Parameter, nn.Buffer)

LOOKS: ContextVar[dict[nn.Module, str]] = ContextVar("glances")

Named = list[tuple[str, Tensor]]
_added_up: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()  # by encoder: what a glance saw, and the weights' print


@contextmanager
def one_glance() -> Iterator[None]:
    """A context in which no encoder changes, so that one glance at each is enough for all prints that are taken."""
    token = LOOKS.set({})
    try:
        yield
    finally:
        LOOKS.reset(token)


def encoder_print(encoder: nn.Module | None, ids: Tensor | None) -> str | None:
    """A print of all that an encoder's answer to the token ids of one prompt depends on; "absent" without one.

    None where that cannot be seen: an encoder with adapters, which may be switched and weighted, with somebody's hooks, or with weights
    that are elsewhere or, quantised, of a kind of their own.
    """
    if encoder is None or ids is None:
        return "absent"
    tensors = [*encoder.named_parameters(), *encoder.named_buffers()]
    odd = any(value.is_meta or type(value) not in PLAIN for _, value in tensors)
    if getattr(encoder, "peft_config", None) or odd or any(hooks_of(encoder)):
        _added_up.pop(encoder, None)
        return None
    config = {name: value for name, value in encoder.config.to_dict().items() if name[0] != "_" and name not in SILENT}
    digest = hashlib.sha256(json.dumps([ids.tolist(), config], sort_keys=True, default=str).encode())
    digest.update("\n".join(settings_of(encoder)).encode())
    digest.update(weights_print(encoder, tensors).encode())
    return digest.hexdigest()[:32]


def hooks_of(encoder: nn.Module) -> Iterator[object]:
    """What was hung onto the encoder's modules and may change their answers; transformers' own hooks only look."""
    for module in encoder.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        yield from (hook for hook in hooks if not getattr(hook, "__module__", "").startswith("transformers."))
        yield from (module.__dict__[name] for name in ("forward", "_hf_hook") if name in module.__dict__)


def settings_of(encoder: nn.Module) -> Iterator[str]:
    """A line for each of the encoder's modules: its place, its kind, and the numbers that are set on it."""
    for name, module in encoder.named_modules():
        own = {key: value for key, value in vars(module).items() if key[0] != "_" and key not in SILENT_SETTINGS}
        yield f"{name} {type(module).__name__} {[(key, own[key]) for key in sorted(own) if isinstance(own[key], bool | int | float)]}"


def weights_print(encoder: nn.Module, tensors: Named) -> str:
    """A print of all bytes of an encoder's tensors: that of before where a glance sees nothing new."""
    if any(value.is_inference() for _, value in tensors):  # these have no version
        return full_print(tensors)
    looks = LOOKS.get({})
    if encoder not in looks:
        looks[encoder] = glance(tensors)
    seen = looks[encoder]
    known = _added_up.get(encoder)
    if known is None or known[0] != seen:
        known = _added_up[encoder] = (seen, full_print(tensors))
    return known[1]


def full_print(tensors: Named) -> str:
    sums = totals([value for _, value in tensors])
    lines = [f"{name} {value.dtype} {tuple(value.shape)} {total}\n" for (name, value), total in zip(tensors, sums, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@torch.no_grad()
def glance(tensors: Named) -> str:
    """What is told of tensors without reading them all: where they are, their versions and shapes, a sum of a sample of each."""
    samples: dict[torch.device, list[Tensor]] = {}
    for _, value in tensors:
        words = as_words(value)
        samples.setdefault(value.device, []).append(words if len(words) <= WHOLE else words[:: min(len(words) // SAMPLE, STEP) | 1])
    sums = totals([torch.cat(found) for found in samples.values()])
    places = [(name, value.data_ptr(), value._version, value.dtype, value.shape, value.stride()) for name, value in tensors]
    return f"{places} {sums}"


def as_words(tensor: Tensor) -> Tensor:
    """A tensor's bytes as 32-bit words, [n]; bytes left over at the end are a word each."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = data.numel() // 4 * 4
    words = data[:whole].view(torch.int32)
    return words if whole == data.numel() else torch.cat([words, data[whole:].to(torch.int32)])


@torch.no_grad()
def totals(tensors: Sequence[Tensor]) -> list[int]:
    """A number of 64 bits for each tensor, the same on every device: its bytes as 32-bit words, each mixed and times a factor of its place.

    Mixed: the upper bits into the lower ones, else numbers whose signs alone change would change the sum by nothing that adds up. Odd
    factors: so that no change of one word is lost.
    """
    sums: list[list[Tensor]] = []  # of each tensor, of WORDS after WORDS
    for tensor in tensors:
        words = as_words(tensor)
        factors = (torch.arange(min(WORDS, len(words)), dtype=torch.int32, device=words.device) * 2 + 1) * (FACTOR - 2**32)
        whole = len(words) // WORDS * WORDS
        blocks = words[:whole].view(-1, WORDS).split(ROWS.get(words.device.type, MOST_ROWS)) if whole else ()
        sums.append([added_up(block, factors) for block in blocks])
        if rest := words[whole:].numel():
            sums[-1].append(added_up(words[whole:][None], factors[:rest]))
    device_sums = {device: [s for own in sums for s in own if s.device == device] for device in {s.device for own in sums for s in own}}
    values = {device: iter(torch.cat(found).tolist()) for device, found in device_sums.items()}  # the host waits once a device
    found = []
    for own in sums:
        total = 0
        for block in own:
            for _ in range(len(block)):
                total = (total * FACTOR + next(values[block.device])) % 2**64
        found.append(total)
    return found


def added_up(words: Tensor, factors: Tensor) -> Tensor:
    """The sums [rows] of 32-bit words [rows, n], mixed and times `factors` [n]; they wrap around, as all numbers here do."""
    mixed = words >> 15
    mixed ^= words
    mixed *= factors
    return mixed.sum(dim=1, dtype=torch.int32)
