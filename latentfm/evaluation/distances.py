"""How far a set of pictures is from another, by their features [N, D]; all in float64, never a whole table of pairs in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

NEAREST = 5  # k of precision, recall, density and coverage, as in Naeem et al. 2020
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # of Jayasumana et al. 2024
PAIRS_AT_ONCE = 1 << 24  # 128 MB of them; the pairs of 100,000 pictures would be 80 GB


def in_rows(features: Tensor, others: int) -> Sequence[Tensor]:
    """Features [N, D], or numbers [N], in parts of which each makes at most PAIRS_AT_ONCE pairs with `others`, or is one row."""
    return features.split(max(1, PAIRS_AT_ONCE // others))


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """(the mean [D], R with R'R the covariance) of at least two."""
    features = features.double()
    mean = features.mean(dim=0)
    return mean, torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R


def frechet(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """FID of two sets whose `gaussian`s these are (Heusel et al. 2017).

    tr (S1 S2)^(1/2) is the sum of the singular values of R1 R2': no matrix is squared and no square root of one is taken.
    """
    (mean, root), (other_mean, other_root) = one, other
    shared = torch.linalg.svdvals(root @ other_root.T).sum()
    return ((mean - other_mean).square().sum() + root.square().sum() + other_root.square().sum() - 2 * shared).item()


def cmmd(one: Tensor, other: Tensor) -> float:
    """1000 times the squared maximum mean discrepancy with a Gaussian kernel of sigma 10, each feature brought to length 1.

    The estimate is the paper's, with each picture beside itself.
    """
    one, other = (torch.nn.functional.normalize(features.double(), dim=-1) for features in (one, other))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        sums = [torch.exp((rows @ b.T - 1) / CMMD_SIGMA**2).sum() for rows in in_rows(a, len(b))]  # |a - b|^2 = 2 - 2 a.b
        return torch.stack(sums).sum() / (len(a) * len(b))

    return (CMMD_SCALE * (kernel(one, one) + kernel(other, other) - 2 * kernel(one, other))).item()


def prdc(real: Tensor, drawn: Tensor, real_radius: Tensor | None = None, k: int = NEAREST) -> dict[str, float]:
    """precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), by the k nearest neighbours.

    real_radius: `radius(real, k)`, where it is known already.
    """
    real, drawn = real.double(), drawn.double()
    real_radius = radius(real, k) if real_radius is None else real_radius
    drawn_radius, around = radius(drawn, k), torch.zeros(len(drawn), dtype=torch.long, device=drawn.device)
    reached, covered = [], []
    for rows, own in zip(in_rows(real, len(drawn)), in_rows(real_radius, len(drawn)), strict=True):
        apart = torch.cdist(rows, drawn)
        around += (apart < own[:, None]).sum(dim=0)  # of each drawn one, the real ones in whose reach it is
        reached.append((apart < drawn_radius).any(dim=1))
        covered.append(apart.min(dim=1).values < own)
    return {
        "precision": (around > 0).double().mean().item(),
        "recall": torch.cat(reached).double().mean().item(),
        "density": around.double().mean().item() / k,
        "coverage": torch.cat(covered).double().mean().item(),
    }


def radius(features: Tensor, k: int = NEAREST) -> Tensor:
    """[N]: how far each feature's k-th nearest other one is."""
    features = features.double()
    return torch.cat([torch.cdist(rows, features).kthvalue(k + 1, dim=1).values for rows in in_rows(features, len(features))])


def spread(features: Tensor) -> float:
    """1 minus the mean cosine of all pairs: 0 where all are the same."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    count = len(unit)
    return (1 - (unit.sum(dim=0).square().sum() - count) / (count * (count - 1))).item()


def nearest(features: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """(1 minus the cosine to the most alike of `known`, its index), [N] each."""
    unit, other = (torch.nn.functional.normalize(each.double(), dim=-1) for each in (features, known))
    best = [(rows @ other.T).max(dim=1) for rows in in_rows(unit, len(other))]
    return 1 - torch.cat([each.values for each in best]), torch.cat([each.indices for each in best])


def own_nearest(known: Tensor) -> Tensor:
    """[N]: 1 minus the cosine of each to the most alike other one."""
    unit = torch.nn.functional.normalize(known.double(), dim=-1)
    alike, done = [], 0
    for rows in in_rows(unit, len(unit)):
        pairs = rows @ unit.T
        pairs.diagonal(done).fill_(-1)  # each one's cosine to itself
        alike.append(pairs.max(dim=1).values)
        done += len(rows)
    return 1 - torch.cat(alike)
