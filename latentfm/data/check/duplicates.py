"""Pictures that are there more than once: byte for byte, or nearly, scaled or compressed again."""

from itertools import combinations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

DISTANCE = 3  # bits of 64 in which the hashes of near duplicates may differ
COLOUR_DISTANCE = 10  # of 255, in which each of their mean colours may differ
BANDS = (11, 11, 11, 11, 10, 10)  # bits; three differing bits leave three of six bands whole
NEIGHBOURS = 64


def exact_groups(digests: np.ndarray) -> list[list[int]]:
    """Groups of two or more rows of digests [N, 32] that are equal, each ascending, in order of their first."""
    _, labels = np.unique(np.ascontiguousarray(digests).view(f"V{digests.shape[1]}").ravel(), return_inverse=True)
    return groups_of(labels)


def near_groups(hashes: np.ndarray, colours: np.ndarray) -> list[list[int]]:
    """Groups of two or more pictures that look alike, by difference hashes [N] uint64 and mean colours [N, K] uint8.

    Two pictures are alike when their hashes differ in at most DISTANCE bits and no mean colour by more than COLOUR_DISTANCE; a group
    is what such pairs join. No all-pairs loop: alike hashes agree in at least three of six bands (pigeonhole), so for each
    choice of three the hashes are sorted by these bits, and those that agree compared, in order of brightness with the next NEIGHBOURS at
    most: only among more than that many pictures as good as empty may a pair be missed.
    """
    count = len(hashes)
    brightness = colours.mean(axis=1) if count else np.zeros(0)
    left, right = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for chosen in combinations(range(len(BANDS)), 3):
        keys = hashes & bits(chosen)
        order = np.lexsort((brightness, keys))
        keys = keys[order]
        first = np.arange(count)
        for step in range(1, NEIGHBOURS + 1):
            first = first[first + step < count]
            first = first[keys[first] == keys[first + step]]
            if not len(first):
                break
            a, b = order[first], order[first + step]
            near = ones(hashes[a] ^ hashes[b]) <= DISTANCE
            a, b = a[near], b[near]
            alike = (np.abs(colours[a].astype(np.int16) - colours[b]) <= COLOUR_DISTANCE).all(axis=1)
            left.append(a[alike])
            right.append(b[alike])
    a, b = np.concatenate(left), np.concatenate(right)
    _, labels = connected_components(coo_array((np.ones(len(a), bool), (a, b)), shape=(count, count)), directed=False)
    return groups_of(labels)


def bits(chosen: tuple[int, ...]) -> np.uint64:
    """The mask of some bands."""
    return np.uint64(sum(((1 << BANDS[band]) - 1) << sum(BANDS[:band]) for band in chosen))


def ones(values: np.ndarray) -> np.ndarray:
    """How many bits of each uint64 are set (Warren, Hacker's Delight, section 5-1)."""
    two, four, eight = (np.uint64(int(pattern * 8, 16)) for pattern in ("55", "33", "0f"))
    values = values - (values >> np.uint64(1) & two)
    values = (values & four) + (values >> np.uint64(2) & four)
    values = values + (values >> np.uint64(4)) & eight
    return values * np.uint64(int("01" * 8, 16)) >> np.uint64(56)


def groups_of(labels: np.ndarray) -> list[list[int]]:
    """The indices of each label that occurs twice or more, ascending, in order of their first."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    return sorted(part.tolist() for part in np.split(order, starts[1:]) if len(part) > 1)
