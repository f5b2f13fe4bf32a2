"""The mathematics of flow matching, on tensors: no network, no file, nothing but torch.

Time runs as in the lecture notes "An Introduction to Flow Matching and Diffusion Models": t in [0, 1], t = 0 is noise
and t = 1 is data. A datum z and a noise eps ~ N(0, I) are joined by a path (notes, eq. 16) with a velocity (eq. 20):

    x_t = alpha_t z + beta_t eps                   CondOT, the linear schedule:  t z + (1 - t) eps
    u_t(x_t|z) = alpha'_t z + beta'_t eps                                        z - eps

A network trained to predict that velocity (eq. 26, Alg. 3) learns its mean over all the z that could have led to x_t,
and the equation dX_t = u_t(X_t) dt, run from t = 0 to t = 1 (Alg. 1), turns noise into data:

    t = draw_t(torch.rand(len(z)), LogitNormal())
    x_t, velocity = sample_path(z, torch.randn_like(z), t)
    loss = cfm_loss(network(x_t, t), velocity).mean()

    sample = integrate(field, torch.randn(shape), uniform_grid(steps=50))

SD3 and diffusers count noise instead: sigma = 1 - t, and their networks predict eps - z, minus the velocity here. Only
`timesteps` (whose densities and shift the SD3 paper states on sigma) and the adapter around the network know of it.
"""

from latentfm.flow.analytic import GaussianMixture, finite_dataset
from latentfm.flow.fields import Field, change_schedule, velocity_field
from latentfm.flow.guidance import classifier_free
from latentfm.flow.objective import cfm_loss
from latentfm.flow.ode import Euler, Solver, evaluations, integrate
from latentfm.flow.path import (
    QUANTITIES,
    Ends,
    PathSample,
    Quantity,
    conditional_velocity,
    convert,
    ends,
    expand_like,
    sample_path,
)
from latentfm.flow.schedules import (
    SCHEDULES,
    Coefficients,
    CondOT,
    Cosine,
    InvertibleSchedule,
    Polynomial,
    Schedule,
    VariancePreserving,
    log_snr,
)
from latentfm.flow.timesteps import (
    DENSITIES,
    GRIDS,
    Density,
    LogitNormal,
    Uniform,
    diffusers_grid,
    draw_t,
    shift_sigma,
    uniform_grid,
)

__all__ = [
    "DENSITIES",
    "GRIDS",
    "QUANTITIES",
    "SCHEDULES",
    "Coefficients",
    "CondOT",
    "Cosine",
    "Density",
    "Ends",
    "Euler",
    "Field",
    "GaussianMixture",
    "InvertibleSchedule",
    "LogitNormal",
    "PathSample",
    "Polynomial",
    "Quantity",
    "Schedule",
    "Solver",
    "Uniform",
    "VariancePreserving",
    "cfm_loss",
    "change_schedule",
    "classifier_free",
    "conditional_velocity",
    "convert",
    "diffusers_grid",
    "draw_t",
    "ends",
    "evaluations",
    "expand_like",
    "finite_dataset",
    "integrate",
    "log_snr",
    "sample_path",
    "shift_sigma",
    "uniform_grid",
    "velocity_field",
]
