"""What is to be known of the captions: their lengths in each encoder's tokens, what is cut off, and which are empty or shared."""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentfm.data.sources.base import Sample
from latentfm.errors import InputError
from latentfm.models.encoders import CLIP, ENCODERS
from latentfm.models.text import PromptEncoder
from latentfm.models.tokenizers import load_tokenizer
from latentfm.words import shown

AT_ONCE = 1024
SHOWN = 20  # of the worst truncations and the most shared captions


def load_tokenizers(folder: Path) -> PromptEncoder:
    """The tokenizers of a pipeline folder beside no encoder. Raises InputError when the folder has none, or one cannot be read."""
    places = [(folder / f"text_encoder{suffix}", folder / f"tokenizer{suffix}") for suffix in ("", "_2", "_3")]
    found = [load_tokenizer(tokenizer) if encoder.is_dir() else None for encoder, tokenizer in places]
    if not any(found):
        raise InputError(f"{shown(folder)} has no text_encoder; it is not an SD3-style pipeline, or its copy is not complete")
    return PromptEncoder(found, (None, None, None), 0, 0)


def limits_of(encoder: PromptEncoder, t5_lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(encoder, tokens it reads) of the tokenizers there are; T5 once for each of the run's lengths."""
    pairs = [(kind, tokenizer) for kind, tokenizer in zip(ENCODERS, encoder.tokenizers, strict=True)]
    clip_length = next((tokenizer.model_max_length for kind, tokenizer in pairs if kind.family is CLIP and tokenizer), 77)
    lengths = [[clip_length] if kind.family is CLIP else sorted(t5_lengths) for kind, _ in pairs]
    return [(index, length) for index, (_, tokenizer) in enumerate(pairs) if tokenizer for length in lengths[index]]


def token_counts(
    encoder: PromptEncoder, index: int, captions: Sequence[str], advance: Callable[[int], None] = lambda count: None
) -> np.ndarray:
    """How many tokens of an encoder's each caption has, start and end included, int32 [N]."""
    found = []
    for start in range(0, len(captions), AT_ONCE):
        part = list(captions[start : start + AT_ONCE])
        found += map(len, encoder.tokenizers[index](part, verbose=False).input_ids)
        advance(len(part))
    return np.array(found, np.int32)


def first_users(samples: Sequence[Sample]) -> dict[str, int]:
    """Each distinct caption and the first sample that has it."""
    users: dict[str, int] = {}
    for index, sample in enumerate(samples):
        for caption in sample.captions:
            users.setdefault(caption, index)
    return users


def token_report(
    samples: Sequence[Sample], encoder: PromptEncoder, t5_lengths: Sequence[int], advance: Callable[[int], None] = lambda count: None
) -> list[dict[str, Any]]:
    """For each encoder and length: how many tokens the distinct captions have, start and end included, and what of them is cut off.

    A row is {"encoder", "limit", "captions", "lengths": {"min", "median", "mean", "p95", "max"}, "truncated": count,
    "worst": [{"name", "caption", "tokens", "lost"}]}, the worst first, at most SHOWN.
    """
    users = first_users(samples)
    captions = list(users)
    limits, rows = limits_of(encoder, t5_lengths), []
    lengths = {index: token_counts(encoder, index, captions, advance) for index in dict.fromkeys(index for index, _ in limits)}
    for index, limit in limits:
        mine = lengths[index]
        over = np.flatnonzero(mine > limit)
        worst = heapq.nlargest(SHOWN, over.tolist(), key=lambda place, mine=mine: (mine[place], -place))
        lost = dict(encoder.lost_text(index, [captions[place] for place in worst], limit)) if worst else {}
        rows.append({
            "encoder": str(ENCODERS[index]), "limit": limit, "captions": len(captions),
            "lengths": {
                "min": int(mine.min()), "median": float(np.median(mine)), "mean": round(float(mine.mean()), 1),
                "p95": float(np.quantile(mine, 0.95, method="higher")), "max": int(mine.max()),
            },
            "truncated": len(over),
            "worst": [
                {"name": samples[users[captions[place]]].id, "caption": captions[place], "tokens": int(mine[place]),
                 "lost": lost[captions[place]]}
                for place in worst
            ],
        })  # fmt: skip
    return rows


def empty_captions(samples: Sequence[Sample]) -> list[str]:
    """The ids of samples with an empty caption: such a draw is trained without a condition."""
    return [sample.id for sample in samples if "" in sample.captions]


def shared_captions(samples: Sequence[Sample]) -> tuple[int, list[dict[str, Any]]]:
    """How many captions, empty ones aside, several pictures have, and the SHOWN most shared: [{"caption", "pictures", "names"}]."""
    counts = Counter(caption for sample in samples for caption in set(sample.captions) if caption)
    several = sum(number > 1 for number in counts.values())
    most = {caption: [] for caption, number in heapq.nsmallest(SHOWN, counts.items(), key=lambda item: (-item[1], item[0])) if number > 1}
    for sample in samples:
        for caption in dict.fromkeys(sample.captions):
            if caption in most and len(most[caption]) < 5:
                most[caption].append(sample.id)
    return several, [{"caption": caption, "pictures": counts[caption], "names": names} for caption, names in most.items()]

