"""The modules that a LoRA adapts, by the names that trainers have for them, and a LoRA of SD3's original modules as one of diffusers'.

The original network has one linear for query, key and value, diffusers three. Its last modulations hold shift before scale, diffusers' hold
scale before shift (original.py). Both are a matter of the rows of `up`, so that either naming becomes the other with nothing computed anew.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from latentfm.interchange.lora.formats import OWNERS
from latentfm.interchange.lora.kinds import Matrices, made, rows, whole
from latentfm.interchange.original import IMAGE, TEXT, TOP
from latentfm.interchange.tensors import Stored

# Where diffusers' modules begin
STARTS = ("transformer_blocks.", "pos_embed.", "time_text_embed.", "context_embedder", "norm_out.", "proj_out")
# Of a block: the original module and diffusers' one or three
STREAMS = {f"x_block.{name}": names for name, names in IMAGE.items()} | {f"context_block.{name}": names for name, names in TEXT.items()}
# OneTrainer's names for the parts of a fused linear
THIRDS = {f"{module}.{i}": name for module, names in STREAMS.items() if len(names) == 3 for i, name in enumerate(names)}
LAST = "context_block.adaLN_modulation.1"  # of the last block: shift and scale alone, and these the other way round
FINAL = "final_layer.adaLN_modulation.1"
CLIP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
T5 = tuple(f"layer.0.SelfAttention.{name}" for name in "qkvo") + tuple(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo"))

# By owner: the lists of blocks, and the modules in each; and the modules outside of blocks
BLOCKS = {
    "transformer": {
        "transformer_blocks.": {name for names in STREAMS.values() for name in names}, "joint_blocks.": {*STREAMS, *THIRDS},
    },
    "text_encoder": {"text_model.encoder.layers.": set(CLIP)},
    "text_encoder_2": {"text_model.encoder.layers.": set(CLIP)},
    "text_encoder_3": {"encoder.block.": set(T5)},
}  # fmt: skip
OUTSIDE = {
    "transformer": {*TOP, *(name for names in TOP.values() for name in names)}, "text_encoder": {"text_projection"},
    "text_encoder_2": {"text_projection"}, "text_encoder_3": set(),
}  # fmt: skip
FLAT = {
    owner: {block.replace(".", "_"): (block, {name.replace(".", "_"): name for name in names}) for block, names in BLOCKS[owner].items()}
    for owner in OWNERS
}


def module_of(owner: str, text: str, flat: bool) -> str | None:
    """The module of `owner` that is called `text`, flat: with _ for its dots; None when there is none. Original names stay."""
    module = with_dots(text, owner) if flat else text
    if module is None or (owner == "transformer" and not module.startswith(STARTS) and not is_original(module)):
        return None
    block, third = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", module), None
    if block and (third := THIRDS.get(block[2])):
        return f"transformer_blocks.{block[1]}.{third}"
    return module


def with_dots(flat: str, owner: str = "transformer") -> str | None:
    """The module of `owner` that is called so with _ for its dots; None when there is none."""
    for start, (block, names) in FLAT[owner].items():
        found = re.fullmatch(rf"{start}(\d{{1,4}})_(\w+)", flat)
        if found and found[2] in names:
            return f"{block}{found[1]}.{names[found[2]]}"
    return next((name for name in OUTSIDE[owner] if name.replace(".", "_") == flat), None)


def is_original(module: str) -> bool:
    """Whether a module of the transformer has SD3's original name and not diffusers'."""
    found = re.fullmatch(r"joint_blocks\.\d{1,4}\.(.+)", module)
    return module in TOP and (module,) != TOP[module] or bool(found and found[1] in BLOCKS["transformer"]["joint_blocks."])


def diffusers_names(original: str) -> tuple[str, ...]:
    """diffusers' modules, one or three, for an original one."""
    found = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", original)
    return tuple(f"transformer_blocks.{found[1]}.{name}" for name in STREAMS[found[2]]) if found else TOP[original]


def is_swapped(original: str, adapter: Matrices) -> bool:
    """Whether the halves of an original modulation are shift and scale, where diffusers has scale and shift."""
    return original == FINAL or (original.endswith(LAST) and adapter.up.shape[0] == 2 * adapter.down.shape[1])


def to_diffusers(original: str, adapter: Matrices) -> dict[str, Matrices]:
    """The adapter of an original module as those of diffusers' modules."""
    names = diffusers_names(original)
    if is_swapped(original, adapter):
        adapter = swapped(adapter)
    if len(names) == 1:
        return {names[0]: adapter}
    return {name: part for name, part in zip(names, thirds(adapter), strict=True) if part is not None}


def to_original(adapters: Mapping[str, Matrices]) -> dict[str, Matrices]:
    """The inverse of to_diffusers, for all modules of the transformer. Raises ValueError for a DoRA that has no place there."""
    originals: dict[str, str] = {name: original for original, names in TOP.items() for name in names}
    found: dict[str, Matrices] = {}
    for module in adapters:
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
        stream = next((original for original, names in STREAMS.items() if block and block[2] in names), None)
        original = f"joint_blocks.{block[1]}.{stream}" if stream else originals.get(module)
        if original is None:
            raise ValueError(f"{module} has no name in SD3's original naming")
        if original in found:
            continue
        names = diffusers_names(original)
        adapter = joined(original, [adapters.get(name) for name in names]) if len(names) == 3 else adapters[module]
        found[original] = swapped(adapter) if is_swapped(original, adapter) else adapter
    return found


def swapped(adapter: Matrices) -> Matrices:
    """The adapter with the halves of its rows exchanged."""

    def exchanged(value: Stored | None) -> Stored | None:
        if value is None:
            return None
        halves = rows(value, 2)
        return made(value.dtype, value.shape, lambda: torch.cat([half.load() for half in reversed(halves)]))

    return replace(adapter, up=exchanged(adapter.up), magnitude=exchanged(adapter.magnitude), bias=exchanged(adapter.bias))


def thirds(adapter: Matrices) -> list[Matrices | None]:
    """The adapters of query, key and value that one of all three together is; None where it changes nothing.

    Their down is its own. Where its up is of three blocks, so that each rank belongs to one of the three, each keeps its ranks alone.
    """
    ups = rows(adapter.up, 3)
    magnitudes, biases = (rows(value, 3) if value else [None] * 3 for value in (adapter.magnitude, adapter.bias))
    own = [up.load().count_nonzero(dim=0).nonzero().flatten().tolist() for up in ups]
    in_blocks = sorted(sum(own, [])) == list(range(adapter.rank))
    if not in_blocks or ((adapter.magnitude or adapter.bias) and not all(own)):
        parts = zip(ups, magnitudes, biases, strict=True)
        return [replace(adapter, up=up, magnitude=magnitude, bias=bias) for up, magnitude, bias in parts]
    found: list[Matrices | None] = []
    for up, columns, magnitude, bias in zip(ups, own, magnitudes, biases, strict=True):
        if not columns:
            found.append(None)
            continue
        alpha = None if adapter.alpha is None else whole(adapter.alpha * len(columns) / adapter.rank)
        down = made(adapter.down.dtype, (len(columns), *adapter.down.shape[1:]), lambda columns=columns: adapter.down.load()[columns])
        up = made(up.dtype, (up.shape[0], len(columns)), lambda up=up, columns=columns: up.load()[:, columns])
        found.append(Matrices(down, up, alpha, magnitude, bias))
    return found


def joined(original: str, adapters: list[Matrices | None]) -> Matrices:
    """One adapter of query, key and value together: with the down that they share, else with all theirs, up being of three blocks."""
    there = [adapter for adapter in adapters if adapter is not None]
    if any(adapter.magnitude or adapter.bias for adapter in there) and len(there) < 3:
        raise ValueError(f"{original} is query, key and value together, and it has magnitudes or biases for {len(there)} of the three")
    first = there[0]
    magnitude, bias = (stacked([getattr(adapter, name) for adapter in there]) for name in ("magnitude", "bias"))
    if len(there) == 3 and all(adapter.alpha == first.alpha and same(adapter.down, first.down) for adapter in there[1:]):
        return Matrices(first.down, stacked([adapter.up for adapter in there]), first.alpha, magnitude, bias)
    scales = [1.0 if adapter is None or adapter.alpha is None else adapter.alpha / adapter.rank for adapter in adapters]
    own_scales = {scale for adapter, scale in zip(adapters, scales, strict=True) if adapter is not None}
    if alike := len(own_scales) == 1:
        dtype, common = reduce(torch.promote_types, [adapter.up.dtype for adapter in there]), own_scales.pop()
    else:
        dtype, common = torch.float32, 1.0
    rank, height = sum(adapter.rank for adapter in there), first.up.shape[0]
    if any(adapter.up.shape[0] != height for adapter in there):
        raise ValueError(f"{original} is query, key and value together, and the adapters of the three are not of one size")

    def in_blocks() -> Tensor:
        up, column = torch.zeros(3 * height, rank, dtype=dtype), 0
        for row, (adapter, scale) in enumerate(zip(adapters, scales, strict=True)):
            if adapter is not None:
                block = adapter.up.load(dtype)
                up[row * height : (row + 1) * height, column : column + adapter.rank] = block if alike else block * scale
                column += adapter.rank
        return up

    down = stacked([adapter.down for adapter in there])
    return Matrices(down, made(dtype, (3 * height, rank), in_blocks), whole(common * rank), magnitude, bias)


def stacked(values: list[Stored | None]) -> Stored | None:
    """The tensors as one, along the first dimension; None of none."""
    if values[0] is None:
        return None
    dtype = reduce(torch.promote_types, [value.dtype for value in values])
    shape = (sum(value.shape[0] for value in values), *values[0].shape[1:])
    return made(dtype, shape, lambda: torch.cat([value.load(dtype) for value in values]))


def same(one: Stored, other: Stored) -> bool:
    """Whether two tensors are equal; reads them unless they lie in one place."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return one is other or bool(one.pieces and one.pieces == other.pieces) or torch.equal(one.load(), other.load())
