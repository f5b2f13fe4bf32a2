"""Prompts to embeddings: two CLIP text encoders and T5, any of them absent, and the one null condition.

SD3's layout (paper, section 4; diffusers' StableDiffusion3Pipeline): the second-to-last hidden states of both CLIPs are joined
on the features and zero-padded to the joint width, or cut to it; T5's last hidden states follow on the sequence, padding unmasked;
the pooled vector joins both CLIP projections. What an absent encoder would give is zeros.
"""

import io
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from latentfm.errors import InputError
from latentfm.files import read_bytes, reading, whole_or_nothing
from latentfm.models.encoders import CLIP, ENCODERS, T5, TextEncoder
from latentfm.models.manifest import MANIFEST, renew_entry
from latentfm.models.offloading import execution_device
from latentfm.models.prints import encoder_print
from latentfm.models.stored import header_of
from latentfm.words import shortened

logger = logging.getLogger(__name__)
NULL_FILE = "null_condition.safetensors"
MOST_BYTES = 2**30  # of that file: twice eight thousand tokens of T5-XXL's width are a quarter
PRINTS = "encoders"  # in that file's metadata: the prints of the encoders it belongs to, by T5 length
ENCODER_OF = {part: index for index, kind in enumerate(ENCODERS) for part in kind.parts}
NOBODY = (None,) * len(ENCODERS)  # prints of encoders that cannot be known


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

        def chosen(name: str, value: Tensor) -> Tensor:
            mask = dropped[ENCODERS[ENCODER_OF[name]].parts[0]].to(value.device)
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
    widths = [("pooled answers of the CLIPs", pooled_dim - absent, pooled_dim)] if absent < 0 or (absent and None not in pooled) else []
    if parts.t5 is not None and parts.t5.shape[-1] != joint_dim:
        widths.append(("states of T5", parts.t5.shape[-1], joint_dim))
    for what, found, wanted in widths:
        raise InputError(f"the {what} are {found} wide, and the network reads {wanted}: load the text encoders of its own model")
    if absent > 0:
        missing = 0 if parts.pooled_1 is None else 1
        pooled[missing] = like.new_zeros(rows, absent)
    sequence = []
    if parts.clip_1 is not None or parts.clip_2 is not None:
        clips = [parts.clip_1, parts.clip_2]
        if parts.clip_1 is None:
            clips[0] = parts.clip_2.new_zeros(rows, parts.clip_2.shape[1], absent)
        joined = torch.cat([clip.to(like) for clip in clips if clip is not None], dim=-1)
        sequence.append(F.pad(joined, (0, joint_dim - joined.shape[-1])))  # a negative number of zeros cuts off
    if parts.t5 is not None:
        sequence.append(parts.t5.to(like))
    return Condition(torch.cat(sequence, dim=1), torch.cat([part.to(like) for part in pooled if part is not None], dim=-1))


class PromptEncoder:
    """The tokenizers and text encoders of a pipeline, in SD3's order (CLIP, CLIP, T5); None where absent."""

    tells_cuts = True  # whether a prompt that is cut is logged; who encodes many says so of all at once

    def __init__(self, tokenizers: Sequence, encoders: Sequence, joint_dim: int, pooled_dim: int):
        self.tokenizers, self.encoders = tuple(tokenizers), tuple(encoders)
        self.joint_dim, self.pooled_dim = joint_dim, pooled_dim
        clips = [(t, e) for kind, t, e in self.rows() if kind.family is CLIP and e is not None]
        said = [tokenizer.model_max_length for tokenizer, _ in clips[:1] if tokenizer is not None]
        read = [encoder.config.max_position_embeddings for _, encoder in clips]
        self.clip_length = int(min(said + read)) if said else 77

    def rows(self) -> list[tuple[TextEncoder, Any, Any]]:
        """(which it is, tokenizer, encoder) of each."""
        return list(zip(ENCODERS, self.tokenizers, self.encoders, strict=True))

    def lengths(self, t5_length: int) -> tuple[int, ...]:
        """The number of tokens that each reads, padding included."""
        return tuple(self.clip_length if kind.family is CLIP else t5_length for kind in ENCODERS)

    def to(self, device: torch.device) -> "PromptEncoder":
        for encoder in self.encoders:
            if encoder is not None:
                encoder.to(device)
        return self

    def tokenize(self, index: int, texts: list[str], length: int) -> Tensor:
        """Token ids [B, length] of encoder `index`, padded; a text too long is cut, and the cut part is logged."""
        tokenizer = self.tokenizers[index]
        if tokenizer is None:
            raise InputError(f"{ENCODERS[index]} has no tokenizer; load its tokenizer too, or leave both out")
        ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        encoder = self.encoders[index]
        if encoder is not None and int(ids.max()) >= (size := encoder.config.vocab_size):
            raise InputError(f"the tokenizer of {ENCODERS[index]} has tokens beyond its vocabulary of {size:,}: they are not a pair")
        for text, lost in self.lost_text(index, texts, length) if self.tells_cuts else ():
            logger.warning("prompt cut at %d tokens for %s: %r loses %r", length, ENCODERS[index], shortened(text), shortened(lost))
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
        self,
        prompts: list[str],
        t5_length: int,
        prompts_2: list[str] | None = None,
        prompts_3: list[str] | None = None,
        clip_skip: int = 0,
        chunks: int = 1,
    ) -> PromptParts:
        """Each encoder's share of `prompts` [B]; `prompts_2` and `prompts_3` replace them for the second CLIP and for T5.

        t5_length is the number of T5 tokens, padding included. Without T5, t5 is that many rows of zeros, as in SD3. clip_skip: how many
        more of CLIP's last layers are left out than the one that SD3 leaves out. chunks: CLIP reads so many pieces of a prompt one by one,
        its pooled answer being the first one's, and T5 as many times its length. The encoders answer in evaluation mode, whatever mode
        they are in.
        """
        ids = self.read((prompts, prompts_2 or prompts, prompts_3 or prompts), t5_length, chunks)
        return self.answers(ids, len(prompts), t5_length * chunks, clip_skip, chunks)

    def read(self, prompts: Sequence[list[str]], t5_length: int, chunks: int = 1) -> list[Tensor | None]:
        """The token ids of each encoder's own prompts, as `encode` has them read; None where it is absent."""
        lengths, found = self.lengths(t5_length * chunks), []
        for index, (kind, _, encoder) in enumerate(self.rows()):
            if encoder is None:
                found.append(None)
            elif chunks > 1 and kind.family is CLIP:
                found.append(self.pieces(index, prompts[index], chunks))
            else:
                found.append(self.tokenize(index, prompts[index], lengths[index]))
        return found

    def chunks_of(self, prompts: Sequence[list[str]], t5_length: int) -> int:
        """The least number of chunks in which no encoder loses a word of its `prompts`."""
        most = 1
        for index, (kind, tokenizer, encoder) in enumerate(self.rows()):
            if encoder is not None:
                marks = 2 if kind.family is CLIP else 1  # the beginning and the end are marked in each of CLIP's chunks
                counts = [len(ids) - marks for ids in tokenizer(prompts[index], verbose=False).input_ids]
                most = max(most, *(-(-count // (self.lengths(t5_length)[index] - marks)) for count in counts))
        return most

    def pieces(self, index: int, texts: list[str], chunks: int) -> Tensor:
        """Token ids [B chunks, length] of CLIP `index`: each text in so many pieces, each with its own beginning and end."""
        tokenizer, length, rows = self.tokenizers[index], self.clip_length, []
        for ids in tokenizer(texts, verbose=False).input_ids:
            words = ids[1:-1]
            for first in range(0, chunks * (length - 2), length - 2):
                piece = [ids[0], *words[first : first + length - 2], ids[-1]]
                rows.append(piece + [tokenizer.pad_token_id] * (length - len(piece)))
        return torch.tensor(rows)

    @torch.no_grad()
    def answers(self, ids: Sequence[Tensor | None], count: int, t5_length: int, clip_skip: int = 0, chunks: int = 1) -> PromptParts:
        """What `encode` returns, from the token ids of `count` prompts; t5_length is that of all chunks."""
        found: dict[str, Tensor] = {}
        with evaluating(*self.encoders):
            for (kind, _, encoder), own in zip(self.rows(), ids, strict=True):
                if encoder is None:
                    continue
                out = encoder(own.to(execution_device(encoder)), output_hidden_states=kind.family is CLIP)
                if kind.family is CLIP and clip_skip + 2 > len(out.hidden_states):
                    most = len(out.hidden_states) - 2
                    raise InputError(f"clip_skip {clip_skip} leaves no layer of {kind.title}; {most} is the most that it has to leave out")
                states = (out.hidden_states[-2 - clip_skip], out[0]) if kind.family is CLIP else (out[0],)
                if chunks > 1 and kind.family is CLIP:
                    states = states[0].unflatten(0, (-1, chunks)).flatten(1, 2), states[1][::chunks]
                found |= dict(zip(kind.parts, states, strict=True))
        if "t5" not in found:
            like = next(iter(found.values()), torch.zeros(0))
            found["t5"] = like.new_zeros(count, t5_length, self.joint_dim)
        return PromptParts(**found)


class NullCondition:
    """What "no prompt" means for each encoder: the encoding of the empty prompt, which is what stock SD3 guides against.

    The one object that label dropout (training) and classifier-free guidance (sampling) both read. It is kept by T5
    length, since the encoding of "" depends on how far it is padded, and is saved with the model. With each part is kept a print of
    the encoder that it belongs to: where another encoder is loaded, or none where there was one, the part is made anew by what is there.
    Parts that come without prints are taken for those of `encoder`.
    """

    def __init__(self, encoder: PromptEncoder | None = None, by_length: Mapping[int, PromptParts] | None = None):
        self.encoder = encoder
        self.by_length = dict(by_length or {})
        # of the three encoders that each length was made by; None where that cannot be known
        self.prints: dict[int, tuple[str | None, ...]] = {length: encoder_prints(encoder, length) for length in self.by_length}

    def read_by(self, encoder: PromptEncoder | None) -> "NullCondition":
        """The same null condition, kept in the same place, for the encoders that are loaded now."""
        other = NullCondition(encoder)
        other.by_length, other.prints = self.by_length, self.prints
        return other

    def is_bare(self) -> bool:
        """Whether nobody told which encoders the parts belong to."""
        return self.encoder is None and all(prints == NOBODY for prints in self.prints.values())

    def kept(self, lengths: Iterable[int], device: torch.device | None = None) -> "NullCondition":
        """The parts of these lengths, which from now on stand by themselves: a training reads them at every step, its encoders frozen.

        With `device` they are there.
        """
        found = NullCondition(None, {length: self.parts(length).map(lambda value: value.to(device)) for length in lengths})
        found.prints = {length: self.prints[length] for length in found.by_length}
        return found

    def parts(self, t5_length: int) -> PromptParts:
        """The null condition's parts ([1, ...]) for prompts of `t5_length` T5 tokens, encoding "" where they are not those of the encoders.

        Raises InputError when that length is not saved and there are no encoders to make it.
        """
        saved, loaded = self.by_length.get(t5_length), self.encoder is not None and any(e is not None for e in self.encoder.encoders)
        if not loaded:
            if saved is None:
                raise InputError(
                    f"the null condition is saved for T5 lengths {sorted(self.by_length)}, not {t5_length}, and no text encoder "
                    "is loaded to make it; use one of those lengths or load the text encoders"
                )
            return saved
        now, before = encoder_prints(self.encoder, t5_length), self.prints.get(t5_length, NOBODY)
        same = [was is not None and was == now[index] for index, was in enumerate(before)]
        if saved is None or not all(same):
            made = dict(self.encoder.encode([""], t5_length).items())
            kept = {name: value for name, value in saved.items() if same[ENCODER_OF[name]]} if saved is not None else {}
            made |= {name: value.to(made[name].device) for name, value in kept.items()}
            self.by_length[t5_length], self.prints[t5_length] = PromptParts(**made), now
        return self.by_length[t5_length]

    def save(self, folder: Path) -> None:
        """Writes null_condition.safetensors, see `to_bytes`."""
        with whole_or_nothing(folder / NULL_FILE) as partial:  # safetensors' own writer would leave a file that others may not read
            partial.write_bytes(self.to_bytes())
        if (folder / MANIFEST).exists():
            renew_entry(folder, NULL_FILE)

    def to_bytes(self) -> bytes:
        """The content of null_condition.safetensors: every length made so far, in float32, with the prints of the encoders."""
        by_length = {length: self.parts(length) for length in sorted(self.by_length)}
        tensors = {
            f"{length}.{name}": value.float().cpu().contiguous() for length, parts in by_length.items() for name, value in parts.items()
        }
        prints = {str(length): self.prints[length] for length in by_length}
        return save(tensors, {PRINTS: json.dumps(prints)} if prints else None)

    @classmethod
    def load(cls, folder: Path, encoder: PromptEncoder | None = None, replaced: Collection[int] = ()) -> "NullCondition":
        """The null condition saved in `folder`, or, where there is none (a stock SD3 folder), the empty prompt's.

        `replaced`: which of the three encoders (0, 1, 2) are not the folder's own; of these a file without prints knows nothing.
        Raises InputError for a file that is damaged.
        """
        path = Path(folder) / NULL_FILE
        if not path.exists():
            return cls(encoder)
        with reading(path, "copy it again, or remove it: it is made anew where the text encoders are", also=(SafetensorError,)):
            return cls.from_bytes(read_bytes(path, MOST_BYTES), encoder, replaced)  # not mapped: the file may be written while it is used

    @classmethod
    def from_bytes(cls, data: bytes, encoder: PromptEncoder | None = None, replaced: Collection[int] = ()) -> "NullCondition":
        """The null condition that `to_bytes` gave, as `load` has it. Raises ValueError, or what safetensors raises, when it is damaged."""
        by_length: dict[int, dict[str, Tensor]] = {}
        for name, value in load(data).items():
            length, part = name.split(".")
            by_length.setdefault(int(length), {})[part] = checked(name, int(length), value)
        written = json.loads(header_of(Path(NULL_FILE), io.BytesIO(data)).metadata.get(PRINTS, "null"))
        saved = {length: PromptParts(**parts) for length, parts in by_length.items()}
        if written is None:
            found = cls(encoder, saved)
            found.prints = {n: tuple("" if i in replaced else p for i, p in enumerate(prints)) for n, prints in found.prints.items()}
            return found
        found = cls(None, saved)
        found.encoder, found.prints = encoder, {length: tuple(written[str(length)]) for length in saved}
        if any(len(prints) != len(ENCODERS) for prints in found.prints.values()):
            raise ValueError(f"its {PRINTS} are not those of {len(ENCODERS)} encoders")
        return found


def checked(name: str, length: int, value: Tensor) -> Tensor:
    """A saved part of the null condition. Raises ValueError for one of another shape, or with values that are no numbers."""
    rows = (1, length) if name.endswith("t5") else (1,)
    if value.shape[: len(rows)] != rows or value.ndim != (2 if "pooled" in name else 3) or not value.isfinite().all():
        raise ValueError(f"{name} of shape {tuple(value.shape)} is no part of a null condition for {length} tokens")
    return value


def encoder_prints(encoder: PromptEncoder | None, t5_length: int) -> tuple[str | None, ...]:
    """A print of each of the three encoders and of how it reads the empty prompt, see `prints.encoder_print`."""
    if encoder is None:
        return NOBODY
    lengths = encoder.lengths(t5_length)
    ids = [encoder.tokenize(i, [""], lengths[i]) if e is not None else None for i, e in enumerate(encoder.encoders)]
    prints = [(kind, encoder_print(e, i)) for (kind, _, e), i in zip(encoder.rows(), ids, strict=True)]
    absent = f"absent, {encoder.joint_dim} wide"  # zeros that wide stand for T5
    return tuple(absent if kind.family is T5 and mark == "absent" else mark for kind, mark in prints)


@contextmanager
def evaluating(*networks: nn.Module | None) -> Iterator[None]:
    """A context with the networks in evaluation mode, so that no dropout draws; afterwards each module is in the mode it was in."""
    training = [module for network in networks if network is not None for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
