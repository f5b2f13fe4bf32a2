"""A few shapes of about one area, and which of them a picture is brought to: the one that crops least of it.

Every picture has a bucket, none is dropped, and all pictures of a batch have one shape.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from latentfm.errors import InputError

AREA_TOLERANCE = 0.125  # of the base's area: what a shape may have more or less of it, and so of its tokens


@dataclass(frozen=True)
class Buckets:
    """The shapes, each (width, height) in pixels, distinct. `Buckets.make` finds good ones; ties go to the first."""

    shapes: tuple[tuple[int, int], ...]

    def __post_init__(self):
        if not self.shapes or len(set(self.shapes)) < len(self.shapes) or min(map(min, self.shapes)) < 1:
            raise ValueError(f"buckets are one or more distinct shapes of at least 1 x 1 pixel, not {self.shapes}")

    @classmethod
    def make(
        cls, width: int, height: int, multiple: int, count: int = 1, max_aspect: float = 2.0, largest: int | None = None
    ) -> "Buckets":
        """`count` shapes of about width x height pixels, from the tallest to the widest; that base is always one of them.

        The aspects (width / height) are spread evenly on a log scale on either side of the base's, down to 1 / max_aspect and up to
        max_aspect, or as far as `largest` allows. Sides are multiples of `multiple` and at most `largest`; areas are within
        AREA_TOLERANCE of the base's. An even count has one more shape on the side with more room, of equal sides the tall one. A
        count of 1 is the base alone.

        Raises InputError when the base does not fit `multiple`, `largest` or max_aspect, and when there are not that many shapes,
        saying how many there are.
        """
        if multiple < 1 or count < 1 or not max_aspect >= 1:
            raise ValueError(f"multiple {multiple} and count {count} should be at least 1, and max_aspect {max_aspect} too")
        largest = max(width, height) * 2 * math.ceil(max_aspect) if largest is None else largest
        if min(width, height) < 1 or width % multiple or height % multiple or max(width, height) > largest:
            raise InputError(f"a size of {width} x {height} does not fit: sides should be multiples of {multiple}, at most {largest}")
        base = (width, height)
        if count == 1:
            return cls((base,))
        if not 1 / max_aspect <= width / height <= max_aspect:
            raise InputError(
                f"{count} buckets of aspects up to {max_aspect:g} do not reach {width} x {height}, their base; "
                f"allow {math.ceil(100 * max(width / height, height / width)) / 100:g} or more, or one bucket"
            )
        shapes = possible_shapes(base, multiple, max_aspect, largest)
        if count > len(shapes):
            raise InputError(
                f"there are no {count} shapes of about {width} x {height} pixels with sides in multiples of {multiple} up to {largest} "
                f"and aspects up to {max_aspect:g}, only {len(shapes)}; take {len(shapes)} buckets or fewer, or a larger size or aspect"
            )
        return cls(nearest_shapes(shapes, targets(shapes, base, count), base))

    def of(self, sizes: np.ndarray | Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """(index of the shape that crops least, of equal ones the first, int64 [N]; the share that it crops away, float64 [N]).

        Of each picture of sizes [N, 2] (width, height).
        """
        widths, heights = np.asarray(sizes, dtype=np.int64).reshape(-1, 2).T
        best, kept = np.zeros(len(widths), dtype=np.int64), np.zeros(len(widths))
        for index, (width, height) in enumerate(self.shapes):  # one shape at a time: no [N, K] array
            # whole numbers up to the one division, so that equal shares are equal numbers and ties are ties
            across, down = widths * height, heights * width
            share = np.minimum(across, down) / np.maximum(across, down)
            best[share > kept] = index
            kept = np.maximum(kept, share)
        return best, 1 - kept


@dataclass(frozen=True)
class DataPlan:
    """What a run makes of its pictures and captions. `factor` pixels a side are one latent; t5_lengths: tokens -> share of the steps."""

    buckets: Buckets
    factor: int
    max_crop: float
    batch_size: int
    t5_lengths: Mapping[int, float]

    def place(self, sizes: Sequence[tuple[int, int]] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(bucket, share that it crops away, whether the picture is trained on) of each picture of sizes [N, 2] (width, height).

        A picture that would lose more than max_crop is left out.
        """
        buckets, lost = self.buckets.of(sizes)
        return buckets, lost, lost <= self.max_crop


def base_shape(size: int | tuple[int, int] | None, own: int, multiple: int, largest: int) -> tuple[int, int]:
    """(width, height) in pixels that data.size means for a network whose own side is `own`.

    Raises InputError for a side that is no multiple of `multiple`, or beyond `largest`.
    """
    size = own if size is None else size
    width, height = (size, size) if isinstance(size, int) else size
    for side in (width, height):
        if side < multiple or side % multiple:
            low = max(multiple, side // multiple * multiple)
            raise InputError(f"data.size {side} is not a multiple of {multiple}; the nearest are {low} and {low + multiple}")
        if side > largest:
            raise InputError(f"data.size {side} is larger than this network's {largest}")
    return width, height


def possible_shapes(base: tuple[int, int], multiple: int, max_aspect: float, largest: int) -> list[tuple[int, int]]:
    """Every shape that may be a bucket, by aspect; of those of one aspect the nearest to the base's area, and the base."""
    area = base[0] * base[1]
    best: dict[tuple[int, int], tuple[int, int]] = {}
    for width in range(multiple, largest + 1, multiple):
        low, high = (1 - AREA_TOLERANCE) * area / width, (1 + AREA_TOLERANCE) * area / width
        for height in range(math.ceil(low / multiple) * multiple, min(math.floor(high), largest) + 1, multiple):
            if not height or max(width, height) > max_aspect * min(width, height):
                continue
            divisor = math.gcd(width, height)
            aspect = (width // divisor, height // divisor)
            other = best.get(aspect)
            if other is None or (abs(width * height - area), width) < (abs(other[0] * other[1] - area), other[0]):
                best[aspect] = (width, height)
    return sorted(best.values(), key=lambda shape: shape[0] / shape[1])


def targets(shapes: list[tuple[int, int]], base: tuple[int, int], count: int) -> list[float]:
    """The log aspects wished for, ascending, the base's among them: even steps down to the tallest and up to the widest of `shapes`.

    How many lie below and above is what leaves the farthest picture nearest to a shape, and what the shapes there are allow.
    """
    lowest, middle, highest = (math.log(width / height) for width, height in (shapes[0], base, shapes[-1]))
    place = shapes.index(base)

    def farthest(below: int) -> float:
        sides = ((middle - lowest, below), (highest - middle, count - 1 - below))
        return max(span / (2 * number) if number else span for span, number in sides)

    fitting = range(max(0, count - (len(shapes) - place)), min(place, count - 1) + 1)
    below = min(fitting, key=lambda number: (round(farthest(number), 9), -number))
    above = count - 1 - below
    low = [middle + (lowest - middle) * (below - i) / below for i in range(below)]
    return [*low, middle, *(middle + (highest - middle) * (i + 1) / above for i in range(above))]


def nearest_shapes(shapes: list[tuple[int, int]], wished: list[float], base: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """A distinct shape for each wished log aspect, in order: the least sum of log distances in aspect and in area from the base.

    `shapes` ascend in aspect, and so does the choice, so the best one is a shortest path: cost[i] is that of the wishes so far
    when the last of them takes a shape before i.
    """
    area, place, middle = base[0] * base[1], shapes.index(base), wished.index(math.log(base[0] / base[1]))
    aspects = np.log([width / height for width, height in shapes])
    areas = np.abs(np.log([width * height / area for width, height in shapes]))
    cost = np.zeros(len(shapes) + 1)
    chosen = []
    for number, wish in enumerate(wished):
        mine = np.abs(aspects - wish) + (1 + 1e-6) * areas  # of equal sums the nearer area, so that tall and wide mirror each other
        mine[np.arange(len(shapes)) != place if number == middle else place] = np.inf
        total = cost[:-1] + mine
        cost = np.minimum.accumulate(np.concatenate([[np.inf], total]))
        chosen.append(total)
    found, stop = [], len(shapes)
    for total in reversed(chosen):
        stop = int(np.argmin(total[:stop]))
        found.append(shapes[stop])
    found.reverse()
    assert all(a[0] * b[1] < b[0] * a[1] for a, b in pairwise(found))
    return tuple(found)
