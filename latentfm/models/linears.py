"""The blocks and linears of an MM-DiT that the options of a training name. Needs no torch."""

import re
from collections.abc import Iterable

from latentfm.errors import InputError, nearest

BLOCKS = "transformer_blocks."
# what a LoRA adapts by default: query, key, value and output of both streams' joint attention, as diffusers' training script for SD3 has it
LORA_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
TARGETS = {  # endings of the names of a block's linears; every name ends with nothing
    "attention": LORA_TARGETS, "feed_forward": FEED_FORWARD, "modulation": ("norm1.linear", "norm1_context.linear"), "all_linear": ("",),
}  # fmt: skip
RANGE = re.compile(r"(-?\d+)(?:(-)(-?\d+)?)?")


def parse_blocks(text: str, layers: int) -> list[int]:
    """The blocks that `text` names, in order, counted from 0: "3", "0-5,20-", "-4-" (the last four), "0--2" (all but the last).

    Numbers below 0 count from the end. Raises InputError for what is no such list, or names a block that is not among `layers`.
    """
    blocks: set[int] = set()
    for part in text.replace(" ", "").split(","):
        found = RANGE.fullmatch(part)
        if found is None:
            raise InputError(f"train.blocks '{text}' should look like 3, 0-5, 20- or -4-, several with commas; '{part}' does not")
        first = int(found[1])
        last = first if found[2] is None else -1 if found[3] is None else int(found[3])
        first, last = (number + layers if number < 0 else number for number in (first, last))
        if not 0 <= first <= last < layers:
            raise InputError(
                f"train.blocks '{part}' does not fit this network of {layers} blocks: they are 0 to {layers - 1}, "
                f"or counted from the end -{layers} to -1, the smaller first"
            )
        blocks |= set(range(first, last + 1))
    return sorted(blocks)


def adapted_linears(names: Iterable[str], targets: str | list[str], blocks: Iterable[int]) -> list[str]:
    """Those of the linears `names` in `blocks` that a preset of TARGETS, an ending of names, or a list of these stands for.

    Raises InputError for an unknown preset, and for an ending that no linear of these blocks has, each with the nearest there is.
    """
    chosen = set(blocks)
    linears = [name for name in names if int(name.split(".")[1]) in chosen]
    if isinstance(targets, str) and targets in TARGETS:
        return [name for name in linears if any(ends_with(name, ending) for ending in TARGETS[targets])]
    tails = {tail for name in linears for tail in endings(name)}
    if isinstance(targets, str):
        if not any(targets and ends_with(name, targets) for name in linears):
            raise InputError(
                f"train.adapter.targets '{targets}' is no preset and no linear's name{nearest(targets, {*TARGETS, *tails})}; there are "
                f"{', '.join(TARGETS)}, or give a name, as attn.to_q, or a list of them, as [attn.to_q, ff.net.2]"
            )
        targets = [targets]
    if not targets:
        raise InputError(f"train.adapter.targets names no module; there are the presets {', '.join(TARGETS)}")
    for ending in targets:
        if not any(ending and ends_with(name, ending) for name in linears):
            raise InputError(
                f"train.adapter.targets: no linear of the trained blocks is called '{ending}'{nearest(ending, tails)}; "
                f"a block has {', '.join(dict.fromkeys(name.split('.', 2)[2] for name in linears))}"
            )
    return [name for name in linears if any(ends_with(name, ending) for ending in targets)]


def ends_with(name: str, ending: str) -> bool:
    """Whether the last parts of a module's dotted name are `ending`."""
    return not ending or name == ending or name.endswith(f".{ending}")


def endings(name: str) -> list[str]:
    """The endings of a linear's name below its block: attn.to_out.0, to_out.0."""
    parts = name.split(".")[2:]
    return [".".join(parts[start:]) for start in range(len(parts)) if not parts[start].isdigit()]
