"""Couplings: which noise goes with which datum. Every one keeps the two marginals, the data and N(0, I).

The notes draw z and eps independently (Alg. 3), and the straight lines between them cross: at a crossing the velocity to
learn is a mean over several pairs (notes, eq. 18), and the learned paths bend. The path, the loss and Theorem 12 ask only that z
be a datum and eps be noise, so that the pairs may be chosen for fewer crossings, hence straighter paths and fewer steps:

    t = draw_t(u, density)
    x_t, velocity = sample_path(z, optimal_transport(z, eps), t)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from latentfm.flow.fields import Field
from latentfm.flow.ode import Euler, Solver, integrate
from latentfm.flow.path import Ends

_EULER = Euler()


def independent(z: Tensor, eps: Tensor) -> Tensor:
    """Returns eps as it is: the coupling of the notes (Alg. 3).

    Raises:
        ValueError: the shapes differ or have no batch dimension.
    """
    _check(z, eps)
    return eps


def optimal_transport(z: Tensor, eps: Tensor) -> Tensor:
    """Returns eps reordered so that sum_i |z_i - eps_i|^2 is the least that any order gives (minibatch optimal transport).

    From Pooladian et al. 2023, "Multisample Flow Matching", and Tong et al. 2023, "Improving and Generalizing Flow-Based
    Generative Models with Minibatch Optimal Transport". z keeps its order, and with it its labels.

    Two cautions. The pairs depend on the whole batch, so that a sample's noise is no longer a function of the sample alone;
    and the noise learns of the label: given a label, the eps of its data are no longer N(0, I), from which a sampler with that label
    starts. The smaller the batch beside the dimension, the less of either, and the less is gained.

    The assignment is solved on the CPU (the host waits for the device), in time of order B^3 at worst: milliseconds for a
    few hundred samples.

    Args:
        z: data, [B, ...], floating point.
        eps: noise, of z's shape.

    Raises:
        ValueError: the shapes differ or have no batch dimension, or there is a value that is not finite.
        ImportError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("optimal_transport solves its assignment with scipy: pip install scipy") from error

    _check(z, eps)
    # |z_i|^2 + |eps_j|^2 adds up to the same for every order: the least distance is the largest inner product
    dtype = torch.promote_types(torch.promote_types(z.dtype, eps.dtype), torch.float32)
    products = (_rows(eps, dtype) @ _rows(z, dtype).T).detach().cpu()
    if not torch.isfinite(products).all():
        raise ValueError("z and eps must be finite, got an infinite or undefined inner product")
    # a row for each noise: scipy's method takes up to twice as long with a row for each datum, since data come in clusters
    _, datum_of = linear_sum_assignment(products.numpy(), maximize=True)
    return eps[torch.as_tensor(datum_of).argsort().to(eps.device)]


COUPLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "independent": independent,
    "optimal_transport": optimal_transport,
}


@torch.no_grad()
def reflow_pairs(field: Field, eps: Tensor, grid: Tensor, solver: Solver = _EULER) -> Ends:
    """Returns pairs (z, eps) for reflow: each noise with the sample that the field's flow carries it to.

    From Liu et al. 2022, "Flow Straight and Fast". Trajectories of one field never cross, so the lines between
    their ends cross less than those of independent pairs; a field trained on the pairs has straighter paths and the same
    marginals, up to the error of this field and of this solver. In one dimension the pairs are those of optimal transport.
    Nothing is drawn at random: the same eps give the same pairs, which can be saved, or made again from a seed.

    Args:
        field: the velocity of the trained model, its condition and guidance included (keep each pair's condition with it).
        eps: noise, [B, ...].
        grid: the times of the solver, from 0 to 1: finer than for a picture, since its error is learned too.
        solver: the method of each step.

    Returns:
        z, in the dtype of the solver's state, without gradients, and eps as given.

    Raises:
        ValueError: the grid does not run from 0 to 1, or `ode.integrate` refuses an argument.
    """
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 0 or grid[-1] != 1:
        raise ValueError(f"grid must run from 0 (noise) to 1 (data), got {grid.tolist()}")
    return Ends(z=integrate(field, eps, grid, solver), eps=eps)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a matrix [B, D]."""
    return x.to(dtype).reshape(len(x), -1)


def _check(z: Tensor, eps: Tensor) -> None:
    """Returns nothing; raises ValueError unless z and eps have one shape [B, ...]."""
    if z.shape != eps.shape or z.ndim == 0:
        raise ValueError(f"z and eps must have one shape [B, ...], got {tuple(z.shape)} and {tuple(eps.shape)}")
