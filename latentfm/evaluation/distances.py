"""How far a set of pictures is from another, by their features [N, D]; all in float64."""

import torch
from torch import Tensor

NEAREST = 5  # k of precision, recall, density and coverage, as in Naeem et al. 2020
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # of Jayasumana et al. 2024


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
        return torch.exp((a @ b.T - 1) / CMMD_SIGMA**2).mean()  # |a - b|^2 = 2 - 2 a.b

    return (CMMD_SCALE * (kernel(one, one) + kernel(other, other) - 2 * kernel(one, other))).item()


def prdc(real: Tensor, drawn: Tensor, real_radius: Tensor | None = None, k: int = NEAREST) -> dict[str, float]:
    """precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), by the k nearest neighbours.

    real_radius: `radius(real, k)`, where it is known already.
    """
    real, drawn = real.double(), drawn.double()
    real_radius = radius(real, k) if real_radius is None else real_radius
    apart = torch.cdist(real, drawn)
    within = apart < real_radius[:, None]
    return {
        "precision": within.any(dim=0).double().mean().item(),
        "recall": (apart < radius(drawn, k)[None]).any(dim=1).double().mean().item(),
        "density": within.double().sum(dim=0).mean().item() / k,
        "coverage": (apart.min(dim=1).values < real_radius).double().mean().item(),
    }


def radius(features: Tensor, k: int = NEAREST) -> Tensor:
    """[N]: how far each feature's k-th nearest other one is."""
    features = features.double()
    return torch.cdist(features, features).kthvalue(k + 1, dim=1).values


def spread(features: Tensor) -> float:
    """1 minus the mean cosine of all pairs: 0 where all are the same."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    count = len(unit)
    return (1 - (unit.sum(dim=0).square().sum() - count) / (count * (count - 1))).item()


def nearest(features: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """(1 minus the cosine to the most alike of `known`, its index), [N] each."""
    unit, other = (torch.nn.functional.normalize(each.double(), dim=-1) for each in (features, known))
    best = (unit @ other.T).max(dim=1)
    return 1 - best.values, best.indices


def own_nearest(known: Tensor) -> Tensor:
    """[N]: 1 minus the cosine of each to the most alike other one."""
    unit = torch.nn.functional.normalize(known.double(), dim=-1)
    return 1 - (unit @ unit.T).fill_diagonal_(-1).max(dim=1).values
