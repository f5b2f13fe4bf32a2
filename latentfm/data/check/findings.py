"""What a run would make of a dataset, before it starts: every finding as plain data, and the crops as they will be trained."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from latentfm.data.buckets import DataPlan
from latentfm.data.check.captions import empty_captions, shared_captions, token_report
from latentfm.data.check.duplicates import exact_groups, near_groups
from latentfm.data.check.pictures import ODD, Survey, survey
from latentfm.data.images import Transform, apply, opened_rgb
from latentfm.data.placement import HoldOut, Placement
from latentfm.data.sources.base import Dataset, Sample
from latentfm.models.text import PromptEncoder
from latentfm.words import shortened

LONGEST = 1000  # characters of a caption on the page
TINY = 2.0  # a picture whose sides must be scaled up more than this is called tiny


@dataclass(frozen=True)
class Crop:
    """A picture as it will be trained: RGB, of its bucket's shape, with the share of it that is lost and how it was scaled."""

    name: str
    caption: str
    image: Image.Image
    size: tuple[int, int]
    lost: float
    scale: float


def check(
    dataset: Dataset,
    plan: DataPlan,
    encoder: PromptEncoder,
    progress: Callable[[str, int], Callable[[int], None]] | None = None,
    hold_out: HoldOut = lambda samples: (),
) -> tuple[dict[str, Any], Placement]:
    """(the findings of a dataset under a plan, as JSON can hold them; where the plan places its pictures). Nothing is written.

    `encoder` holds the tokenizers (`captions.load_tokenizers`). `progress(what, total)` gives a function that is told of each
    count done. `hold_out` names, among the samples that can be used, those that a run keeps for its validation: they are never drawn.
    """
    start = progress or (lambda what, total: lambda count: None)
    samples = dataset.samples
    advance = start("reading pictures", len(samples))
    seen = survey(samples, plan.buckets, plan.factor, lambda: advance(1))
    placed = Placement.of(samples, seen.sizes, seen.usable, plan, hold_out)
    used, sizes = int(placed.used.sum()), seen.sizes[seen.usable]
    captions = {caption for sample in samples for caption in sample.captions}
    tokenizations = len(captions) * sum(tokenizer is not None for tokenizer in encoder.tokenizers)
    tokens = token_report(samples, encoder, plan.t5_lengths, start("counting tokens", tokenizations))
    duplicates, alike = duplicate_names(samples, seen)
    several, most = shared_captions(samples)
    buckets = [rounded(row) for row in placed.buckets(placed.used)]
    problems, remarks = (
        [{"reason": reason, "names": names} for reason, names in dataset.problems_by_reason(used).items()] for used in (False, True)
    )
    findings = {
        "place": str(dataset.folder),
        "pictures": dataset.pictures,
        "used": used,
        "held_out": int((placed.used & ~placed.trained).sum()),
        "captions": sum(len(sample.captions) for sample in samples),
        "distinct_captions": len(captions),
        "sources": source_table(samples, placed.trained),
        "problems": problems,
        "remarks": remarks,
        "unusable": [{"name": samples[index].id, "reason": reason} for index, reason in seen.reasons.items()],
        "max_crop": plan.max_crop,
        "left_out": [{"name": samples[index].id, "crop": round(float(placed.lost[index]), 4)} for index in placed.left_out()],
        "odd": odd_table(samples, seen, np.array(plan.buckets.shapes)[placed.bucket_of]),
        "sizes": size_table(sizes),
        "aspects": aspect_histogram(sizes),
        "buckets": buckets,
        "batch_size": plan.batch_size,
        "steps_an_epoch": round(sum(row["steps_an_epoch"] for row in buckets), 2),
        "tokens": tokens,
        "empty_captions": empty_captions(samples),
        "shared_captions": {"captions": several, "most": most},
        "exact_duplicates": duplicates,
        "near_duplicates": alike,
        "dropped": len(samples) - used + sum(len(row["names"]) for row in problems),
        "truncated": max((row["truncated"] for row in tokens), default=0),
    }
    return findings, placed


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """A bucket's row with as many digits as a table shows."""
    digits = {"draws_an_epoch": 6, "steps_an_epoch": 2}
    return {name: round(value, digits.get(name, 4)) if isinstance(value, float) else value for name, value in row.items()}


def source_table(samples: Sequence[Sample], trained: np.ndarray) -> list[dict[str, Any]]:
    """A row for each source: its pictures and captions, and how often it is drawn."""
    rows: dict[str, dict[str, Any]] = {}
    for sample, drawn in zip(samples, trained.tolist(), strict=True):
        share = sample.share
        new = {"name": share.source, "pictures": 0, "captions": 0, "masks": 0, "rate": share.rate, "draws_an_epoch": 0.0}
        row = rows.setdefault(share.source, new | {"regularisation": share.regularisation})
        row["pictures"] += 1
        row["captions"] += len(sample.captions)
        row["masks"] += sample.mask is not None
        row["draws_an_epoch"] += share.rate * drawn
    return [row | {"draws_an_epoch": round(row["draws_an_epoch"], 6)} for row in rows.values()]


def odd_table(samples: Sequence[Sample], seen: Survey, shapes: np.ndarray) -> list[dict[str, Any]]:
    """A row for each kind of oddity that occurs: {"kind", "meaning", "names"}; shapes [N, 2] are those of the pictures' buckets."""
    found = {kind: (meaning, seen.odd[kind]) for kind, meaning in ODD.items()}
    kept = np.flatnonzero(seen.usable)
    scales = (shapes[kept] / seen.sizes[kept]).max(axis=1, initial=0)
    tiny, enlarged = kept[scales > TINY], kept[(scales > 1) & (scales <= TINY)]
    found["tiny"] = (f"scaled up more than {TINY:g} times: soft, better left out", tiny.tolist())
    found["enlarged"] = (f"scaled up, at most {TINY:g} times", enlarged.tolist())
    return [
        {"kind": kind, "meaning": meaning, "names": [samples[index].id for index in indices]}
        for kind, (meaning, indices) in found.items()
        if indices
    ]


def size_table(sizes: np.ndarray) -> dict[str, Any]:
    """The smallest, median and largest width, height and area, and the ten most common sizes; {} without a picture."""
    if not len(sizes):
        return {}
    columns = {"width": sizes[:, 0], "height": sizes[:, 1], "megapixels": sizes.astype(np.int64).prod(axis=1) / 1e6}
    common = Counter(map(tuple, sizes.tolist())).most_common(10)
    spread = {
        name: {word: round(float(f(values)), 4) for word, f in (("min", np.min), ("median", np.median), ("max", np.max))}
        for name, values in columns.items()
    }
    return spread | {"distinct": len(np.unique(sizes, axis=0)), "common": [[*size, count] for size, count in common]}


def aspect_histogram(sizes: np.ndarray) -> list[dict[str, Any]]:
    """How many pictures have a width to height in each of 17 intervals of a quarter octave, the outer two open."""
    edges = 2.0 ** ((np.arange(1, 17) - 8.5) / 4)  # 1:1 lies in the middle of an interval
    places = np.searchsorted(edges, sizes[:, 0] / sizes[:, 1], side="right") if len(sizes) else np.zeros(0, int)
    counts = np.bincount(places, minlength=17).tolist()
    bounds = [None, *np.round(edges, 3).tolist(), None]
    return [{"from": bounds[i], "to": bounds[i + 1], "pictures": count} for i, count in enumerate(counts)]


def duplicate_names(samples: Sequence[Sample], seen: Survey) -> tuple[list[list[str]], list[list[str]]]:
    """The ids of pictures that are equal byte for byte, group by group, and of those that look alike, one of each equal group."""
    kept = np.flatnonzero(seen.usable)
    equal = exact_groups(seen.digests[kept])
    rest = np.ones(len(kept), bool)
    for group in equal:
        rest[group[1:]] = False
    single = kept[rest]
    alike = near_groups(seen.hashes[single], seen.colours[single])
    return [[samples[kept[i]].id for i in group] for group in equal], [[samples[single[i]].id for i in group] for group in alike]


def contact_sheet(placed: Placement, count: int, advance: Callable[[int], None] = lambda count: None) -> list[list[Crop]]:
    """For each bucket some of its pictures as they will be trained, worst crops first: `count` in all, as evenly as the buckets allow."""
    shapes, worst_first = placed.plan.buckets.shapes, np.argsort(-placed.lost, kind="stable")
    used = worst_first[placed.used[worst_first]]
    queues = [used[placed.bucket_of[used] == bucket].tolist() for bucket in range(len(shapes))]
    quota = quotas([len(queue) for queue in queues], count)
    chosen = {place: bucket for bucket, queue in enumerate(queues) for place in queue[: quota[bucket]]}
    made = {}
    for place in sorted(chosen):  # in the order of the source, which may be read in order only
        sample, (width, height) = placed.samples[place], shapes[chosen[place]]
        with opened_rgb(sample.path) as image:
            size, crop = image.size, Image.fromarray(apply(image, Transform(height, width)))
        crop.thumbnail((192, 192))
        scale = max(width / size[0], height / size[1])
        made[place] = Crop(sample.id, shortened(sample.captions[0], LONGEST), crop, size, float(placed.lost[place]), scale)
        advance(1)
    return [[made[place] for place in queue[: quota[bucket]]] for bucket, queue in enumerate(queues)]


def quotas(sizes: Sequence[int], count: int) -> list[int]:
    """`count` places given to buckets of these sizes in turn, none more than it has."""
    given = [0] * len(sizes)
    while sum(given) < min(count, sum(sizes)):
        for bucket, size in enumerate(sizes):
            if given[bucket] < size and sum(given) < count:
                given[bucket] += 1
    return given
