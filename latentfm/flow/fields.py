"""Velocity fields: what a sampler integrates, and how a network's prediction becomes one."""

from collections.abc import Callable

import torch
from torch import Tensor

from latentfm.flow.path import Quantity, convert, ends
from latentfm.flow.schedules import CondOT, InvertibleSchedule, Schedule, log_snr

# u(x [B, ...], t): the velocity at x, of x's shape, at one time t for the whole batch, a scalar float32 (or float64) tensor.
Field = Callable[[Tensor, Tensor], Tensor]

_COND_OT = CondOT()


def velocity_field(
    prediction: Callable[[Tensor, Tensor], Tensor], quantity: Quantity, schedule: Schedule = _COND_OT
) -> Field:
    """Returns the velocity field of a network that predicts `quantity` at (x, t); the network itself for "velocity".

    A network that predicts noise or the score has no velocity at t = 0, and one that predicts the denoiser none at
    t = 1 (see `path.ends`): start, or end, a grid a little way off.
    """
    if quantity == "velocity":
        return prediction

    def field(x: Tensor, t: Tensor) -> Tensor:
        return convert(prediction(x, t), x, t, quantity, "velocity", schedule)

    return field


def change_schedule(field: Field, trained: InvertibleSchedule, sampling: Schedule) -> Field:
    """Returns the velocity field, on the schedule `sampling`, of the data that `field` describes on the schedule `trained`.

    Any two schedules draw the same marginals up to a scale: x on the one at t is s x on the other at the time r of equal
    signal-to-noise ratio. So the field is asked there, and its answer's two ends (data and noise, the same for both)
    are put together by the other schedule's slopes. Noise and data are mapped to themselves: samples are unchanged, up
    to the solver's error, which is the reason to do this. Where `path.ends` is singular for the velocity on `trained`,
    so is this; and where `trained` never has the ratio asked for (VariancePreserving, which keeps a trace of the data at
    t = 0, beside a schedule that keeps none), its nearest end answers, an approximation as good as that trace is small.
    """

    def changed(x: Tensor, r: Tensor) -> Tensor:
        t = trained.time_at(log_snr(sampling, r)).clamp(0, 1)
        here, there = sampling(r), trained(t)
        scale = torch.hypot(there.alpha, there.beta) / torch.hypot(here.alpha, here.beta)
        moved = scale * x
        z, eps = ends(field(moved, t), moved, t, "velocity", trained)
        return here.d_alpha * z + here.d_beta * eps

    return changed
