"""Stochastic sampling: the law of its samples on a mixture, and its weak order on a Gaussian, where moments are closed forms."""

import math

import pytest
import torch
from flow.host import HostReads
from flow.sliced import sliced_w2

from latentfm.flow.analytic import GaussianMixture, finite_dataset
from latentfm.flow.grids import uniform_grid
from latentfm.flow.ode import SOLVERS, Heun, evaluations, integrate
from latentfm.flow.schedules import CondOT, Cosine, Polynomial, VariancePreserving
from latentfm.flow.sde import SCHEMES, EulerMaruyama, Memoryless, PowerOfBeta, StochasticHeun, integrate_sde, sde_drift

MEANS = torch.tensor([[1.5, 0.5], [-1.0, 1.0], [0.0, -1.5]])
MIXTURE = GaussianMixture(MEANS, torch.tensor([0.3, 0.4, 0.2]), torch.tensor([1.0, 2.0, 3.0]))
SCHEDULES = [CondOT(), Cosine(), Polynomial(2.0), VariancePreserving()]
COUNT = 10000


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


@pytest.fixture(scope="module")
def exact():
    return MIXTURE.sample(COUNT, seeded(1))


@pytest.fixture(scope="module")
def sampling_error(exact):
    """The distances between independent exact samples: the best that any sampler can do."""
    return [sliced_w2(exact, MIXTURE.sample(COUNT, seeded(seed))) for seed in range(2, 12)]


def assert_is_the_mixture(samples, exact, sampling_error):
    """Their distance is no farther above the mean of exact samples' than 4 of these' standard deviations."""
    errors = torch.tensor(sampling_error)
    assert sliced_w2(samples, exact) < errors.mean() + 4 * errors.std()


def late_grid(steps):
    """Even steps to t = 0.92, and one more: the constant diffusion coefficient needs a long last step."""
    return torch.cat([torch.linspace(0, 0.92, steps), torch.ones(1)])


FORMS = {
    "constant": (PowerOfBeta(0.5, 0.0), late_grid(100)),
    "square root": (PowerOfBeta(1.0, 0.5), uniform_grid(100)),
    "proportional": (PowerOfBeta(2.0, 1.0), uniform_grid(100)),
    "memoryless": (Memoryless(), uniform_grid(100)),
}


def test_sliced_w2_of_shifted_points_and_of_different_laws(exact, sampling_error):
    shift = torch.tensor([0.3, -0.4])
    # E[(shift . axis)^2] = |shift|^2 / 2 in the plane
    assert sliced_w2(exact[:200], exact[:200] + shift, 4096) == pytest.approx(0.5 / math.sqrt(2), rel=0.03)
    assert sliced_w2(exact, exact) == 0
    # what the tests below would notice: 10 % too wide, or 5 % of the points in the wrong component
    for wrong in (1.1 * exact, torch.cat([exact[: COUNT // 20] * 0 + MEANS[0], exact[COUNT // 20 :]])):
        with pytest.raises(AssertionError):
            assert_is_the_mixture(wrong, exact, sampling_error)


@pytest.mark.parametrize("solver", [kind() for kind in SOLVERS.values()], ids=SOLVERS)
def test_the_ode_reaches_the_mixture(solver, exact, sampling_error):
    samples = integrate(MIXTURE.field(), normal(COUNT, 2), uniform_grid(96 // solver.evaluations_per_step), solver)
    assert_is_the_mixture(samples, exact, sampling_error)


@pytest.mark.parametrize("scheme", [kind() for kind in SCHEMES.values()], ids=SCHEMES)
@pytest.mark.parametrize("form", FORMS)
def test_every_diffusion_reaches_the_mixture(form, scheme, exact, sampling_error):
    diffusion, grid = FORMS[form]
    samples = integrate_sde(MIXTURE.field(), normal(COUNT, 2), grid, diffusion, seeded(3), scheme)
    assert_is_the_mixture(samples, exact, sampling_error)


@pytest.mark.parametrize("form", FORMS)
def test_points_are_reached_exactly_and_in_their_proportions(form):
    """Data without width are the stiffest: the last, noiseless step must take all the noise away."""
    points, weights = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -2.0]]), torch.tensor([0.2, 0.3, 0.5])
    diffusion, grid = FORMS[form]
    samples = integrate_sde(finite_dataset(points, weights).field(), normal(COUNT, 2), grid, diffusion, seeded(3))
    apart, which = torch.cdist(samples, points).min(dim=1)
    assert apart.max() < 1e-3
    shares = torch.bincount(which, minlength=3) / COUNT
    # one standard error of a share is 0.005 at most; the rest is for the error of the steps
    torch.testing.assert_close(shares, weights, rtol=0, atol=0.03)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("diffusion", [PowerOfBeta(), Memoryless()])
def test_every_schedule_reaches_the_mixture(schedule, diffusion, exact, sampling_error):
    # the polynomial schedule's memoryless diffusion needs a first step longer than the second
    grid = torch.cat([torch.zeros(1), torch.linspace(0.02, 1, 80)])
    samples = integrate_sde(MIXTURE.field(schedule), normal(COUNT, 2), grid, diffusion, seeded(3), StochasticHeun(), schedule)
    assert_is_the_mixture(samples, exact, sampling_error)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("diffusion", [PowerOfBeta(1.0, 0.0), PowerOfBeta(), PowerOfBeta(2.0, 1.0), Memoryless()])
def test_drift_and_diffusion_satisfy_the_fokker_planck_equation(schedule, diffusion):
    """d/dt p = -div(b p) + sigma^2 / 2 laplace p (notes, Theorem 19), of log p by automatic differentiation, in one dimension."""
    mixture = GaussianMixture(torch.tensor([[1.0], [-0.5]]).double(), torch.tensor([0.5, 0.8]).double())
    x, drift = torch.linspace(-1.5, 2, 9).double()[:, None].requires_grad_(), sde_drift(mixture.field(schedule), diffusion, schedule)
    for time in (0.2, 0.5, 0.8):
        t = torch.full((9,), time, dtype=torch.float64, requires_grad=True)
        log_p = mixture.log_density(x, t, schedule)
        rate, score = torch.autograd.grad(log_p.sum(), (t, x), create_graph=True)
        (curvature,) = torch.autograd.grad(score.sum(), x, retain_graph=True)
        b = drift(x, t[0].detach())
        (divergence,) = torch.autograd.grad(b.sum(), x)
        half = diffusion(t[0].detach(), schedule) / 2
        expected = -divergence - b * score + half * (curvature + score.square())
        torch.testing.assert_close(rate[:, None], expected)


def test_memoryless_is_twice_prop_1_and_the_rate_of_the_variance_preserving_diffusion():
    t = torch.linspace(0.01, 0.99, 50).double()
    torch.testing.assert_close(Memoryless()(t, CondOT()), 2 * (1 - t) / t)
    torch.testing.assert_close(Memoryless()(t, VariancePreserving(0.1, 20.0)), 0.1 + 19.9 * (1 - t))
    for schedule in SCHEDULES:
        alpha, beta, d_alpha, d_beta = schedule(t)
        a = beta**2 * d_alpha / alpha - d_beta * beta  # eq. 41
        torch.testing.assert_close(Memoryless()(t, schedule), 2 * a)


def test_memoryless_samples_forget_their_noise_and_the_ode_does_not():
    noise, field = normal(COUNT, 2), GaussianMixture(torch.tensor([[1.0, -1.0]]), 0.5).field()

    def correlation(samples):
        return torch.corrcoef(torch.stack([noise[:, 0], samples[:, 0]]))[0, 1].item()

    forgetful = integrate_sde(field, noise, uniform_grid(100), Memoryless(), seeded(3), StochasticHeun())
    assert abs(correlation(forgetful)) < 4 / math.sqrt(COUNT)
    assert correlation(integrate(field, noise, uniform_grid(100), Heun())) > 0.999


def moments(scheme, diffusion, steps, mean, std, schedule, start=0.1, end=0.9):
    """The exact mean and variance of the scheme's state at `end`, started from the exact law at `start`, on Gaussian data.

    There the drift is affine in x, and so is a step in (x, noise): three probes of it give the map, without chance.
    """
    mixture = GaussianMixture(torch.tensor([[mean]], dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
    drift, times = sde_drift(mixture.field(schedule), diffusion, schedule), torch.linspace(start, end, steps + 1, dtype=torch.float64)
    x, noise = torch.tensor([[0.0], [1.0], [0.0]]).double(), torch.tensor([[0.0], [0.0], [1.0]]).double()
    centre, variance = law(mean, std, times[0], schedule)
    for t, t_next in zip(times[:-1], times[1:]):
        shift, moved, kicked = scheme.step(drift, lambda time: diffusion(time, schedule), x, t, t_next, noise).flatten().tolist()
        centre, variance = shift + (moved - shift) * centre, (moved - shift) ** 2 * variance + (kicked - shift) ** 2
    return centre, variance


def law(mean, std, t, schedule):
    """The mean and variance of x_t for data N(mean, std^2)."""
    at = schedule(t)
    return (at.alpha * mean).item(), (at.alpha**2 * std**2 + at.beta**2).item()


@pytest.mark.parametrize("diffusion", [PowerOfBeta(0.5, 0.0), PowerOfBeta(1.0, 0.5), PowerOfBeta(2.0, 1.0), Memoryless()])
@pytest.mark.parametrize("scheme", [kind() for kind in SCHEMES.values()], ids=SCHEMES)
def test_a_scheme_is_of_the_weak_order_it_declares(scheme, diffusion):
    """In the mean and in the variance; on the cosine schedule, since the mean of CondOT is linear in t and always right."""
    mean, std, schedule, counts = 1.5, 0.4, Cosine(), torch.tensor([100, 200, 400])
    exact = law(mean, std, torch.tensor(0.9, dtype=torch.float64), schedule)
    reached = [moments(scheme, diffusion, steps, mean, std, schedule) for steps in counts.tolist()]
    x = counts.double().log() - counts.double().log().mean()
    for k in range(2):
        y = torch.tensor([abs(moment[k] - exact[k]) for moment in reached], dtype=torch.float64).log()
        assert -(x * y).sum().item() / (x * x).sum().item() == pytest.approx(scheme.weak_order, abs=0.2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("scheme", [kind() for kind in SCHEMES.values()], ids=SCHEMES)
def test_without_noise_it_is_the_ode_solver(scheme, schedule):
    noise, grid, field = normal(16, 2), uniform_grid(20), MIXTURE.field(schedule)
    walked = integrate_sde(field, noise, grid, PowerOfBeta(0.0), seeded(3), scheme, schedule)
    torch.testing.assert_close(walked, integrate(field, noise, grid, scheme.noiseless), rtol=1e-6, atol=1e-6)
    assert scheme.noiseless.evaluations_per_step == scheme.evaluations_per_step


def test_one_step_of_euler_maruyama_is_equation_9():
    t, t_next, x, eps = torch.tensor(0.5), torch.tensor(0.75), normal(3, 2), normal(3, 2, seed=1)
    stepped = EulerMaruyama().step(lambda x, t: x * t, lambda t: 4 * t, x, t, t_next, eps)
    torch.testing.assert_close(stepped, x + 0.25 * 0.5 * x + math.sqrt(0.25 * 2) * eps)


@pytest.mark.parametrize("scheme", [kind() for kind in SCHEMES.values()], ids=SCHEMES)
def test_a_generator_for_each_sample_makes_it_the_same_in_any_batch(scheme):
    noise, seeds = normal(5, 4, 3), [11, 12, 13, 14, 15]

    def sample(rows):
        generators = [seeded(seeds[i]) for i in rows]
        return integrate_sde(lambda x, t: -x, noise[list(rows)], uniform_grid(8), PowerOfBeta(), generators, scheme)

    together = sample(range(5))
    for rows in ((0,), (3, 1), (4, 2, 0)):
        assert torch.equal(sample(rows), together[list(rows)])
    assert not torch.equal(integrate_sde(lambda x, t: -x, noise, uniform_grid(8), PowerOfBeta(), seeded(11), scheme), together)


@pytest.mark.parametrize("generator", [seeded, lambda seed: [seeded(seed)], lambda seed: None])
def test_one_seed_is_one_result_and_another_seed_another(generator):
    def sample(seed):
        torch.manual_seed(seed)
        return integrate_sde(lambda x, t: -x, torch.ones(1, 3), uniform_grid(8), PowerOfBeta(), generator(seed))

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))


def test_the_first_and_last_step_have_no_noise():
    """At t = 0 and into t = 1 the steps are the solver's; a grid that ends before has noise to its end."""
    eps, field = normal(4, 3), lambda x, t: x * t
    ends = torch.tensor([0.0, 0.4, 1.0])
    for diffusion in (Memoryless(), PowerOfBeta()):
        first = integrate_sde(field, eps, ends[:2], diffusion, seeded(0))
        last = integrate_sde(field, eps, ends[1:], diffusion, seeded(0))
        assert torch.equal(first, integrate(field, eps, ends[:2])) and torch.equal(last, integrate(field, eps, ends[1:]))
        inside = integrate_sde(field, eps, torch.tensor([0.4, 0.5]), diffusion, seeded(0))
        assert not torch.equal(inside, integrate(field, eps, torch.tensor([0.4, 0.5])))


@pytest.mark.parametrize("scheme", [kind() for kind in SCHEMES.values()], ids=SCHEMES)
@pytest.mark.parametrize("diffusion", [Memoryless(), PowerOfBeta()])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_evaluations_dtypes_and_steps_are_those_of_integrate(scheme, diffusion, schedule):
    calls, seen, grid = [], [], torch.cat([torch.zeros(1), torch.linspace(0.15, 1, 10)])

    def field(x, t):
        calls.append((x.dtype, t.dtype, t.shape))
        return x.bfloat16()

    end = integrate_sde(
        field, normal(2, 3).double(), grid, diffusion, seeded(0), scheme, schedule, on_step=lambda i, t, x: seen.append((i, t.item()))
    )
    assert len(calls) == evaluations(scheme, grid) == 10 * scheme.evaluations_per_step
    assert set(calls) == {(torch.float64, torch.float64, ())} and end.dtype == torch.float64
    assert seen == list(enumerate(grid[1:].tolist())) and torch.isfinite(end).all()
    assert integrate_sde(field, normal(2, 3).bfloat16(), grid, diffusion, None, scheme, schedule).dtype == torch.float32


@pytest.mark.parametrize("generator", [seeded(0), [seeded(1), seeded(2)]])
@pytest.mark.parametrize("scheme", [kind() for kind in SCHEMES.values()], ids=SCHEMES)
def test_the_host_never_waits_for_the_device(scheme, generator):
    for diffusion in (PowerOfBeta(), Memoryless()):
        with HostReads(lambda x, t: -x * t) as reads:
            integrate_sde(reads.field, torch.ones(2, 3), uniform_grid(8), diffusion, generator, scheme)
        assert reads.armed and reads.count == 0


def test_no_usual_grid_is_too_coarse():
    for steps in (4, 10, 50):
        for shift in (1.0, 3.0):
            for diffusion in (PowerOfBeta(2.0), PowerOfBeta(1.0, 1.0), Memoryless()):
                integrate_sde(lambda x, t: -x, torch.zeros(1, 1), uniform_grid(steps, shift), diffusion)


def test_bad_inputs_are_refused_with_their_values():
    field, x, grid = (lambda x, t: -x), torch.zeros(2, 3), uniform_grid(4)
    for name in ("scale", "power"):
        for value in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"{name} must be at least 0 and finite, got {value}"):
                PowerOfBeta(**{name: value})
    with pytest.raises(ValueError, match="got 3 for 2 samples"):
        integrate_sde(field, x, grid, PowerOfBeta(), [seeded(i) for i in range(3)])
    with pytest.raises(ValueError, match="cannot be run backward"):
        integrate_sde(field, x, grid.flip(0), PowerOfBeta())
    for bad in (torch.tensor([0.0, 1.5]), torch.tensor([-0.5, 1.0]), torch.tensor([0.0, math.nan])):
        with pytest.raises(ValueError, match=r"times in \[0, 1\]"):
            integrate_sde(field, x, bad, PowerOfBeta())
    with pytest.raises(ValueError, match=r"from t = 0\.98 to 0\.99 is too long for sigma\^2 = 1 there: at most"):
        integrate_sde(field, x, torch.tensor([0.9799, 0.98, 0.99, 1.0]), PowerOfBeta(1.0, 0.0))
    with pytest.raises(ValueError, match="int64"):
        integrate_sde(field, x.long(), grid, PowerOfBeta())
