"""Prompts to embeddings: two CLIP text encoders and T5, any of them absent, and the one null condition.

SD3's layout (paper, section 4; diffusers' StableDiffusion3Pipeline): the second-to-last hidden states of both CLIPs are joined
on the features and zero-padded to the joint width; T5's last hidden states follow on the sequence, padding unmasked;
the pooled vector joins both CLIP projections. What an absent encoder would give is zeros.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from latentfm.errors import InputError
from latentfm.models.manifest import MANIFEST, renew_entry
from latentfm.words import shortened

logger = logging.getLogger(__name__)
NULL_FILE = "null_condition.safetensors"


@dataclass(frozen=True)
class Condition:
    """What the MM-DiT is conditioned on: embeds [B, L, joint width] and pooled [B, P]."""

    embeds: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class PromptParts:
    """Each encoder's share of a batch of prompts, kept apart so that each can be dropped by itself.

    clip_1, clip_2 [B, Lc, w_i]; pooled_1, pooled_2 [B, p_i]; t5 [B, L, w]. None where the encoder is absent.
    """

    clip_1: Tensor | None = None
    pooled_1: Tensor | None = None
    clip_2: Tensor | None = None
    pooled_2: Tensor | None = None
    t5: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "PromptParts":
        """The same parts with `function` applied to each one present."""
        return PromptParts(**{name: function(value) for name, value in self.items()})

    def items(self) -> list[tuple[str, Tensor]]:
        return [(f.name, value) for f in fields(self) if (value := getattr(self, f.name)) is not None]

    def drop(self, dropped: dict[str, Tensor], null: "PromptParts") -> "PromptParts":
        """Parts whose encoder's row is marked in `dropped` ("clip_1", "clip_2", "t5": bool [B]) become `null`'s ([1, ...])."""
        encoder = {"pooled_1": "clip_1", "pooled_2": "clip_2"}

        def chosen(name: str, value: Tensor) -> Tensor:
            mask = dropped[encoder.get(name, name)].to(value.device)
            return torch.where(mask.view(-1, *[1] * (value.ndim - 1)), getattr(null, name).to(value), value)

        return PromptParts(**{name: chosen(name, value) for name, value in self.items()})


def stack(parts: Sequence[PromptParts]) -> PromptParts:
    """The rows of several PromptParts as one batch."""
    return PromptParts(**{name: torch.cat([getattr(p, name) for p in parts]) for name, _ in parts[0].items()})


def assemble(parts: PromptParts, joint_dim: int, pooled_dim: int) -> Condition:
    """The Condition of SD3 from its parts; zeros stand for what is absent.

    When only the first CLIP is absent its width is pooled_dim less the second's (in SD3 a CLIP's hidden and pooled widths agree).
    """
    present = [value for _, value in parts.items()]
    if not present:
        raise ValueError("no text encoder gave anything to condition on")
    rows, like = present[0].shape[0], present[0]
    absent = pooled_dim - sum(p.shape[-1] for p in (parts.pooled_1, parts.pooled_2) if p is not None)
    pooled = [parts.pooled_1, parts.pooled_2]
    if absent > 0:
        missing = 0 if parts.pooled_1 is None else 1
        pooled[missing] = like.new_zeros(rows, absent)
    sequence = []
    if parts.clip_1 is not None or parts.clip_2 is not None:
        clips = [parts.clip_1, parts.clip_2]
        if parts.clip_1 is None:
            clips[0] = parts.clip_2.new_zeros(rows, parts.clip_2.shape[1], absent)
        joined = torch.cat([clip for clip in clips if clip is not None], dim=-1)
        if joined.shape[-1] > joint_dim:
            raise ValueError(f"the CLIP features are {joined.shape[-1]} wide, more than the joint width {joint_dim}")
        sequence.append(F.pad(joined, (0, joint_dim - joined.shape[-1])))
    if parts.t5 is not None:
        sequence.append(parts.t5)
    return Condition(
        embeds=torch.cat([part.to(like.dtype) for part in sequence], dim=1),
        pooled=torch.cat([part.to(like.dtype) for part in pooled if part is not None], dim=-1),
    )


class PromptEncoder:
    """The tokenizers and text encoders of a pipeline, in SD3's order (CLIP, CLIP, T5); None where absent."""

    def __init__(self, tokenizers: Sequence, encoders: Sequence, joint_dim: int, pooled_dim: int):
        self.tokenizers, self.encoders = tuple(tokenizers), tuple(encoders)
        self.joint_dim, self.pooled_dim = joint_dim, pooled_dim
        first = next((t for t, e in zip(self.tokenizers[:2], self.encoders[:2], strict=True) if e is not None), None)
        positions = [e.config.max_position_embeddings for e in self.encoders[:2] if e is not None]
        self.clip_length = int(min(first.model_max_length, *positions)) if first is not None else 77  # as said, and as can be read

    def to(self, device: torch.device) -> "PromptEncoder":
        for encoder in self.encoders:
            if encoder is not None:
                encoder.to(device)
        return self

    def tokenize(self, index: int, texts: list[str], length: int) -> Tensor:
        """Token ids [B, length] of encoder `index`, padded; a text too long is cut, and the cut part is logged."""
        tokenizer = self.tokenizers[index]
        ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        encoder = self.encoders[index]
        if encoder is not None and int(ids.max()) >= (size := encoder.config.vocab_size):
            raise InputError(f"the tokenizer of {encoder_name(index)} has tokens beyond its vocabulary of {size:,}: they are not a pair")
        for text, lost in self.lost_text(index, texts, length):
            logger.warning("prompt cut at %d tokens for %s: %r loses %r", length, encoder_name(index), shortened(text), shortened(lost))
        return ids

    def lost_text(self, index: int, texts: list[str], length: int) -> list[tuple[str, str]]:
        """(text, the part cut off) for every text longer than `length` tokens in encoder `index`."""
        tokenizer = self.tokenizers[index]
        found = []
        for text, ids in zip(texts, tokenizer(texts, verbose=False).input_ids, strict=True):
            if len(ids) > length:
                found.append((text, tokenizer.decode(ids[length - 1 : -1], skip_special_tokens=True)))
        return found

    @torch.no_grad()
    def encode(
        self, prompts: list[str], t5_length: int, prompts_2: list[str] | None = None, prompts_3: list[str] | None = None
    ) -> PromptParts:
        """Each encoder's share of `prompts` [B]; `prompts_2` and `prompts_3` replace them for the second CLIP and for T5.

        t5_length is the number of T5 tokens, padding included. Without T5, t5 is that many rows of zeros, as in SD3.
        """
        found: dict[str, Tensor] = {}
        for index, texts in enumerate((prompts, prompts_2 or prompts)):
            encoder = self.encoders[index]
            if encoder is None:
                continue
            ids = self.tokenize(index, texts, self.clip_length).to(encoder.device)
            out = encoder(ids, output_hidden_states=True)
            found[f"clip_{index + 1}"], found[f"pooled_{index + 1}"] = out.hidden_states[-2], out[0]
        if self.encoders[2] is not None:
            ids = self.tokenize(2, prompts_3 or prompts, t5_length).to(self.encoders[2].device)
            found["t5"] = self.encoders[2](ids)[0]
        else:
            like = next(iter(found.values()), torch.zeros(0))
            found["t5"] = like.new_zeros(len(prompts), t5_length, self.joint_dim)
        return PromptParts(**found)


def encoder_name(index: int) -> str:
    return ("text_encoder (CLIP)", "text_encoder_2 (CLIP)", "text_encoder_3 (T5)")[index]


class NullCondition:
    """What "no prompt" means for each encoder: the encoding of the empty prompt, which is what stock SD3 guides against.

    The one object that label dropout (training) and classifier-free guidance (sampling) both read. It is kept by T5
    length, since the encoding of "" depends on how far it is padded, and is saved with the model.
    """

    def __init__(self, encoder: PromptEncoder | None = None, by_length: dict[int, PromptParts] | None = None):
        self.encoder = encoder
        self.by_length = dict(by_length or {})

    def parts(self, t5_length: int) -> PromptParts:
        """The null condition's parts ([1, ...]) for prompts of `t5_length` T5 tokens; encodes "" the first time.

        Raises InputError when that length is not saved and there are no encoders to make it.
        """
        if t5_length not in self.by_length:
            if self.encoder is None or all(e is None for e in self.encoder.encoders):
                raise InputError(
                    f"the null condition is saved for T5 lengths {sorted(self.by_length)}, not {t5_length}, and no text encoder "
                    "is loaded to make it; use one of those lengths or load the text encoders"
                )
            self.by_length[t5_length] = self.encoder.encode([""], t5_length)
        return self.by_length[t5_length]

    def save(self, folder: Path) -> None:
        """Writes null_condition.safetensors: every length made so far, in float32."""
        tensors = {
            f"{length}.{name}": value.float().cpu().contiguous()
            for length, parts in self.by_length.items()
            for name, value in parts.items()
        }
        save_file(tensors, folder / NULL_FILE)
        if (folder / MANIFEST).exists():
            renew_entry(folder, NULL_FILE)

    @classmethod
    def load(cls, folder: Path, encoder: PromptEncoder | None = None) -> "NullCondition":
        """The null condition saved in `folder`, or, where there is none (a stock SD3 folder), the empty prompt's."""
        path = Path(folder) / NULL_FILE
        by_length: dict[int, dict[str, Tensor]] = {}
        if path.exists():
            for name, value in load_file(path).items():
                length, part = name.split(".")
                by_length.setdefault(int(length), {})[part] = value
        return cls(encoder, {length: PromptParts(**parts) for length, parts in by_length.items()})
