"""95 % confidence intervals of figures over pictures, of which those of one prompt are alike: what varies freely is the prompt.

Each figure is a dict {"value", "low", "high", "of"}: `of` how many pictures, or whatever it is a figure of.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
GROUPS = 20  # of prompts that are left out in turn
BIASED = ("fid", "cmmd", "mmd")  # by something over the number of pictures; precision and the like are defined for a number of them
PERMUTATIONS = 20_000
AT_ONCE = 2**22  # signs drawn at a time: 32 MB


def figure(value: float, low: float, high: float, of: int) -> dict[str, float]:
    return {"value": float(value), "low": float(low), "high": float(high), "of": int(of)}


def wilson(share: float, number: float, z: float | None = None) -> tuple[float, float]:
    """Wilson's interval of a share among `number` that need not be whole."""
    z = stats.norm.ppf(0.5 + LEVEL / 2) if z is None else z
    spread = z * z / number
    middle, half = share + spread / 2, z * math.sqrt(max(0.0, share * (1 - share)) / number + spread / (4 * number))
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


def by_prompt(values: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """The mean of each prompt's values."""
    _, place = np.unique(prompts, return_inverse=True)
    return np.bincount(place, values) / np.bincount(place)


def share(right: Sequence[bool], prompts: Sequence[int], strata: Sequence[str] | None = None) -> dict[str, float]:
    """The share that is right, the mean of the shares of the strata where there are some (GenEval's overall score).

    Wilson's interval for as many independent pictures as vary like these, by the variance between prompts, with Student's t of the
    prompts (Korn and Graubard 1998); where all or none are right, a prompt's pictures count as one.
    """
    right, prompts = np.asarray(right, float), np.asarray(prompts)
    strata = np.zeros(len(right), int) if strata is None else np.unique(np.asarray(strata), return_inverse=True)[1]
    number = strata.max() + 1
    means, variance, independent, freedom = [], 0.0, 0, 0
    for stratum in range(number):
        each = by_prompt(right[strata == stratum], prompts[strata == stratum])
        means.append(each.mean())
        variance += each.var(ddof=1) / len(each) / number**2 if len(each) > 1 else 0.25 / number**2
        independent, freedom = independent + len(each), freedom + len(each) - 1
    value = float(np.mean(means))
    t = stats.t.ppf(0.5 + LEVEL / 2, max(1, freedom))
    effective = value * (1 - value) / variance if variance > 0 and 0 < value < 1 else independent
    return figure(value, *wilson(value, max(1.0, min(effective, len(right))), t), len(right))


def mean(values: Sequence[float], prompts: Sequence[int]) -> dict[str, float]:
    """The mean over prompts, with Student's interval; none, low and high are the value, where there is one prompt only."""
    each = by_prompt(np.asarray(values, float), np.asarray(prompts))
    half = student(each) if len(each) > 1 else 0.0
    return figure(each.mean(), each.mean() - half, each.mean() + half, len(values))


def student(values: np.ndarray) -> float:
    """Half the width of Student's interval of a mean."""
    return stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))


def jackknife(statistic: Callable[[np.ndarray], dict[str, float]], prompts: Sequence[int], of: int) -> dict[str, dict[str, float]]:
    """Figures of `statistic(prompts that are kept)`, with intervals by leaving out one group of prompts at a time (Shao and Wu 1989).

    "bias" of those in BIASED is the jackknife's estimate of how far too high the value is for there being so few pictures; low and high
    are around the value without it, and "p" is that of its being 0, for differences. of: how many pictures there are.
    """
    prompts = np.unique(np.asarray(prompts))
    groups, whole = np.arange(len(prompts)) % GROUPS, statistic(prompts)
    number = int(groups.max()) + 1
    if number < 3:
        return {name: figure(value, -math.inf, math.inf, of) for name, value in whole.items()}
    without = [statistic(prompts[groups != group]) for group in range(number)]
    found = {}
    for name, value in whole.items():
        left = np.array([each[name] for each in without])
        bias = (number - 1) * (left.mean() - value) if name in BIASED else 0.0
        error = math.sqrt((number - 1) * left.var())
        half = stats.t.ppf(0.5 + LEVEL / 2, number - 1) * error
        p = 2 * stats.t.sf(abs(value - bias) / error, number - 1) if error else float(value == bias)
        found[name] = figure(value, value - bias - half, value - bias + half, of) | {"bias": float(bias), "p": float(p)}
    return found


def paired(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """The mean of second - first over prompts, Student's interval, and p of no difference: signs of the differences turned at random.

    first, second: [prompts], a mean for each, in the same order. All 2^n turns are made where they are few, else PERMUTATIONS (seeded).
    """
    apart = second - first
    half = student(apart) if len(apart) > 1 else math.inf
    moving = apart[apart != 0]
    if not len(moving):
        p = 1.0
    else:
        count = len(moving)
        least = abs(moving.sum()) - 1e-12 * np.abs(moving).sum()
        if 2**count <= PERMUTATIONS:
            signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
            p = float((np.abs(signs @ moving) >= least).mean())
        else:
            draws, rows, as_far = np.random.default_rng(0), max(1, AT_ONCE // count), 0
            for start in range(0, PERMUTATIONS, rows):
                signs = draws.choice((-1, 1), size=(min(rows, PERMUTATIONS - start), count))
                as_far += int((np.abs(signs @ moving) >= least).sum())
            p = (as_far + 1) / (PERMUTATIONS + 1)
    return figure(apart.mean(), apart.mean() - half, apart.mean() + half, len(apart)) | {"p": p}
