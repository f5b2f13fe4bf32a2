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

In the order of the notes, one file a subject:

    schedules     alpha_t and beta_t, and the time at a signal-to-noise ratio
    path          x_t and its velocity; velocity <-> score <-> denoiser <-> noise
    fields        velocity fields, and a field moved to another schedule
    timesteps     the law that training draws t from; grids the times that sampling visits
    coupling      which noise goes with which datum: independent, optimal transport, reflow
    objective     the loss, of a network that predicts any of the four, and its weight at t
    guidance      classifier-free guidance and what grew from it
    ode, sde      solvers, and sampling with noise (Theorem 17)
    likelihood    log p by the change of variables
    straightness  how straight the paths are, and how far from the shortest
    analytic      data whose fields are known exactly: the oracle of all the tests

scripts/toy2d.py uses most of them on data in the plane. Two functions ask for more than torch when they are called: optimal
transport for scipy, the adaptive solver for torchdiffeq.

SD3 and diffusers count noise instead: sigma = 1 - t, and their networks predict eps - z, minus the velocity here. Only
`timesteps` (whose densities and shift the SD3 paper states on sigma) and the adapter around the network know of it.
"""

from latentfm.flow.analytic import GaussianMixture, finite_dataset
from latentfm.flow.coupling import COUPLINGS, independent, optimal_transport, reflow_pairs
from latentfm.flow.fields import Field, change_schedule, velocity_field
from latentfm.flow.grids import GRIDS, beta_grid, diffusers_grid, karras_grid, uniform_grid
from latentfm.flow.guidance import (
    RULES,
    Projected,
    Rule,
    adaptive_projected,
    adaptive_projected_field,
    adaptive_projected_velocity,
    autoguidance,
    cfg_zero_star,
    classifier,
    classifier_field,
    classifier_free,
    combine,
    interval,
    rescale,
    zero_before,
)
from latentfm.flow.likelihood import Likelihood, bits_per_dim, dequantize, divergence, log_likelihood, rademacher_like
from latentfm.flow.objective import WEIGHTINGS, MinSNR, Weighting, by_time, cfm_loss, effective_weight, regression_target
from latentfm.flow.ode import (
    RK4,
    SOLVERS,
    AdamsBashforth2,
    DormandPrince,
    Euler,
    Heun,
    Integrated,
    Midpoint,
    OneStep,
    Solver,
    Step,
    evaluations,
    integrate,
    integrate_adaptive,
)
from latentfm.flow.path import QUANTITIES, Ends, PathSample, Quantity, conditional_velocity, convert, ends, expand_like, sample_path
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
from latentfm.flow.sde import SCHEMES, Diffusion, EulerMaruyama, Memoryless, PowerOfBeta, Scheme, StochasticHeun, integrate_sde, sde_drift
from latentfm.flow.straightness import PathMeasures, measure_paths, measure_states, normalized_path_energy, wasserstein2
from latentfm.flow.timesteps import (
    DENSITIES,
    CosMap,
    Density,
    LogitNormal,
    Mode,
    Uniform,
    draw_t,
    pdf_t,
    shift_from_resolution,
    shift_from_tokens,
    shift_sigma,
    stratified,
)
