"""Prompts that were read before: another seed or size of the same prompt need not ask the text encoders again."""

from collections import OrderedDict
from typing import Any

import torch

from latentfm.models.prints import encoder_print
from latentfm.models.text import PromptEncoder, PromptParts

MOST_BYTES = 64 * 2**20  # of answers that are kept: about twenty prompts of SD3's length in bfloat16, many of the bundled model's


class KnownPrompts:
    """What the text encoders answered to the prompts last read, by a print of all that an answer depends on.

    An encoder that cannot be printed (models/prints.py: adapters, hooks, offloaded or quantised weights) is asked each time.
    """

    def __init__(self) -> None:
        self.answers: OrderedDict[Any, PromptParts] = OrderedDict()

    def encode(
        self, encoder: PromptEncoder, prompts: list[str], t5_length: int, prompts_2: list[str] | None = None,
        prompts_3: list[str] | None = None, clip_skip: int = 0, chunks: int = 1,
    ) -> PromptParts:  # fmt: skip
        """As PromptEncoder.encode, whose arguments these are."""
        ids = encoder.read((prompts, prompts_2 or prompts, prompts_3 or prompts), t5_length, chunks)
        prints = [printed(one, own) for one, own in zip(encoder.encoders, ids, strict=True)]
        key = (*prints, len(prompts), t5_length, clip_skip, chunks, encoder.joint_dim)
        if None not in key and key in self.answers:
            self.answers.move_to_end(key)
            return self.answers[key]
        found = encoder.answers(ids, len(prompts), t5_length * chunks, clip_skip, chunks)
        if None not in key and size_of(found) <= MOST_BYTES:
            self.answers[key] = found
            while sum(map(size_of, self.answers.values())) > MOST_BYTES:
                self.answers.popitem(last=False)
        return found


def printed(encoder: torch.nn.Module | None, ids: torch.Tensor | None) -> tuple[Any, ...] | None:
    """What an encoder's answer to these ids depends on: its print, where it is, and the precision it works in; None if that is unknown."""
    mark = encoder_print(encoder, ids)
    if mark is None or encoder is None:
        return mark and (mark,)
    device = next(encoder.parameters()).device
    narrow = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return mark, device, narrow


def size_of(parts: PromptParts) -> int:
    return sum(value.nbytes for _, value in parts.items())
