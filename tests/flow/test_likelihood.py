"""Log-likelihoods from exact fields against exact densities, and bits per dimension against integrals done by hand."""

import math

import pytest
import torch

from latentfm.flow.analytic import GaussianMixture
from latentfm.flow.grids import uniform_grid
from latentfm.flow.likelihood import bits_per_dim, dequantize, divergence, log_likelihood, rademacher_like
from latentfm.flow.ode import RK4, Euler, Heun
from latentfm.flow.schedules import CondOT, Cosine, Polynomial, VariancePreserving


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixture(*shape, dtype=torch.float64):
    return GaussianMixture(normal(3, *shape, seed=1, dtype=dtype), torch.tensor([0.3, 0.8, 0.5]), torch.tensor([1.0, 2.0, 1.0]))


def log_normal(x):
    return torch.distributions.Normal(0, 1).log_prob(x).flatten(1).sum(1)


def affine(matrix):
    """The field x -> A (x - 1): its divergence is the trace of A."""
    return lambda x, t: (x - 1) @ matrix.to(x).T


@pytest.mark.parametrize("schedule", [CondOT(), Cosine(), Polynomial()], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 8])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 5e-5), (torch.float64, 3e-5)])
def test_log_p_of_the_exact_field_is_the_density_of_the_data(schedule, dims, dtype, within):
    data = mixture(dims)
    x = data.sample(32, torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        found = log_likelihood(data.field(schedule), x, uniform_grid(100))
    assert found.log_p.dtype == found.noise.dtype == dtype
    assert found.log_p.shape == (32,) and found.noise.shape == x.shape
    torch.testing.assert_close(found.log_p, data.log_density(x.double()).to(dtype), rtol=0, atol=within)


@pytest.mark.parametrize("dims", [1, 2, 8])
def test_log_p_on_the_schedule_that_does_not_start_from_pure_noise(dims):
    """The flow starts at p_0, which is not quite N(0, I): exchanging the one for the other makes log p exact."""
    schedule, data = VariancePreserving(), mixture(dims)
    x = data.sample(32, torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = log_likelihood(data.field(schedule), x, uniform_grid(100) * (1 - schedule.shortest))
    trace = data.log_density(found.noise, 0.0, schedule) - log_normal(found.noise)
    torch.testing.assert_close(found.log_p + trace, data.log_density(x), rtol=0, atol=5e-4)
    assert 1e-4 < trace.abs().max() < 0.1


@pytest.mark.parametrize("solver", [Euler(), Heun(), RK4()], ids=str)
def test_the_integral_has_the_order_of_the_solver(solver):
    data = GaussianMixture(torch.tensor([[0.5, -1.0]]).double(), 0.4)
    x = data.sample(16, torch.Generator().manual_seed(0))
    errors, counts = [], [40, 80]
    for steps in counts:
        with torch.no_grad():
            found = log_likelihood(data.field(), x, torch.linspace(0, 1, steps + 1, dtype=torch.float64), solver)
        errors.append((found.log_p - data.log_density(x)).abs().mean().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(solver.order, abs=0.25)


def test_a_linear_field_from_gaussian_to_gaussian_in_closed_form():
    """u = A (x - 1) carries N(0, I) by x_1 - 1 = e^A (x_0 - 1) to N(1 - e^A 1, e^A e^A^T), and spreads by tr A."""
    matrix = torch.tensor([[0.5, 0.8, 0.0], [-0.3, 0.2, 0.1], [0.4, 0.0, -1.0]]).double()
    flow = torch.linalg.matrix_exp(matrix)
    law = torch.distributions.MultivariateNormal(1 - flow.sum(1), flow @ flow.T)
    x = normal(20, 3)
    found = log_likelihood(affine(matrix), x, uniform_grid(50))
    torch.testing.assert_close(found.log_p, law.log_prob(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.noise, 1 + torch.linalg.solve(flow, (x - 1).T).T, rtol=0, atol=1e-6)


def test_a_shift_changes_no_volume():
    """A field that does not look at x has divergence 0, and has it without a graph to go back through."""
    field, x, grid = (lambda x, t: torch.full_like(x, 2.0)), normal(4, 3, 2), uniform_grid(7)
    torch.testing.assert_close(log_likelihood(field, x, grid).log_p, log_normal(x - 2), rtol=1e-6, atol=0)
    assert divergence(field, x, grid[0], torch.ones_like(x))[1].tolist() == [0] * 4


def test_divergence_is_the_trace_of_the_jacobian():
    data, x, t = mixture(2, 3), normal(5, 2, 3), torch.tensor(0.6).double()
    velocity, found = divergence(data.field(), x, t)
    torch.testing.assert_close(velocity, data.field()(x, t))
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda x: data.field()(x, t), x[i : i + 1]).reshape(6, 6)
        torch.testing.assert_close(found[i], jacobian.trace())


@pytest.mark.parametrize("signs", [False, True], ids=["gaussian", "rademacher"])
def test_hutchinsons_estimate_is_unbiased(signs):
    """Mean over 20,000 probes, within 4 standard errors of the exact trace."""
    matrix, count = normal(4, 4, seed=3), 20_000
    x = normal(1, 4).expand(count, 4)
    probe = rademacher_like(x, torch.Generator().manual_seed(0)) if signs else normal(count, 4)
    _, estimates = divergence(affine(matrix), x, torch.tensor(0.5), probe)
    error = estimates.std() / count**0.5
    assert 0 < error < 0.05
    assert (estimates.mean() - matrix.trace()).abs() < 4 * error


def test_the_estimate_of_log_p_is_unbiased_too():
    """One probe is kept along the path, so the integral is estimated without bias: 2,000 probes of one datum."""
    data, count = mixture(3), 2000
    x, grid = normal(1, 3), uniform_grid(25)
    repeated = x.expand(count, 3).contiguous()
    with torch.no_grad():
        exact = log_likelihood(data.field(), x, grid)
        probe = rademacher_like(repeated, torch.Generator().manual_seed(0))
        found = log_likelihood(data.field(), repeated, grid, probe=probe)
    error = found.log_p.std() / count**0.5
    assert 0 < error < 0.05
    assert (found.log_p.mean() - exact.log_p).abs() < 4 * error
    torch.testing.assert_close(found.noise, exact.noise.expand(count, 3))  # the path itself is not estimated


def test_signs_are_exact_for_a_diagonal_jacobian_and_a_gaussian_probe_is_not():
    x, t = normal(6, 3), torch.tensor(0.5)
    field = affine(torch.diag(torch.tensor([1.0, -2.0, 4.0])))
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(divergence(field, x, t, rademacher_like(x, generator))[1], torch.full((6,), 3.0).double())
    assert (divergence(field, x, t, normal(6, 3, seed=5))[1] - 3).abs().min() > 0.01


def test_signs_are_fair_and_reproducible():
    x = torch.zeros(100, 100)
    signs = rademacher_like(x, torch.Generator().manual_seed(0))
    assert signs.dtype == x.dtype and set(signs.unique().tolist()) == {-1, 1}
    assert signs.mean().abs() < 4 / 100
    assert torch.equal(signs, rademacher_like(x, torch.Generator().manual_seed(0)))


def test_any_shape_and_no_sample_sees_another():
    data, grid = mixture(2, 1, 2), uniform_grid(10)
    x = data.sample(4, torch.Generator().manual_seed(0))
    probe = rademacher_like(x, torch.Generator().manual_seed(1))
    for signs in (None, probe):
        together = log_likelihood(data.field(), x, grid, probe=signs)
        for i in range(4):
            alone = log_likelihood(data.field(), x[i : i + 1], grid, probe=None if signs is None else signs[i : i + 1])
            torch.testing.assert_close(alone.log_p[0], together.log_p[i], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(alone.noise[0], together.noise[i], rtol=1e-10, atol=1e-10)
    flat = GaussianMixture(data.means.flatten(1), data.stds, data.weights)
    torch.testing.assert_close(log_likelihood(flat.field(), x.flatten(1), grid).log_p, log_likelihood(data.field(), x, grid).log_p)


def test_log_p_of_a_network_and_its_gradient():
    """With gradients on, log p can be climbed: against a difference quotient in one weight."""
    layer = torch.nn.Linear(2, 2).double()
    x, grid = normal(3, 2), uniform_grid(5)

    def total():
        return log_likelihood(lambda x, t: torch.tanh(layer(x)), x, grid).log_p.sum()

    (gradient,) = torch.autograd.grad(total(), layer.weight)
    with torch.no_grad():
        assert not total().requires_grad
        layer.weight[0, 1] += 1e-5
        above = total()
        layer.weight[0, 1] -= 2e-5
        quotient = (above - total()) / 2e-5
    torch.testing.assert_close(gradient[0, 1], quotient, rtol=1e-6, atol=1e-8)


def test_uniform_data_take_eight_bits():
    """On [-1, 1] their density is 2^-D."""
    for dims in (1, 12, 3072):
        log_p = torch.full((3,), -dims * math.log(2), dtype=torch.float64)
        torch.testing.assert_close(bits_per_dim(log_p, dims), torch.full((3,), 8.0, dtype=torch.float64))
        torch.testing.assert_close(bits_per_dim(log_p.expand(5, 3), dims), torch.full((3,), 8.0, dtype=torch.float64))


def test_bits_per_dim_is_the_code_length_of_the_levels():
    """A density that is even over each bin has the very probabilities of the bins, whose code length is -log2."""
    levels = torch.arange(256, dtype=torch.uint8)
    probability = torch.softmax(normal(256), 0)
    log_p = torch.log(probability * 128)  # bins of width 1 / 128
    torch.testing.assert_close(bits_per_dim(log_p, 1), -torch.log2(probability))
    assert dequantize(levels, torch.zeros(256)).diff().unique().tolist() == [1 / 128]


def test_more_draws_of_the_dequantisation_tighten_the_bound():
    """A narrow Gaussian across two bins, whose probabilities the error function knows: K = 1 is above, K = 4,000 there."""
    law = torch.distributions.Normal(torch.tensor(0.003).double(), 0.002)
    levels = torch.tensor([128], dtype=torch.uint8)
    exact = -torch.log2(law.cdf(torch.tensor(1 / 128)) - law.cdf(torch.tensor(0.0)))
    u = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_p = law.log_prob(dequantize(levels.expand(4000, 1), u))
    one, many = bits_per_dim(log_p[:, 0], 1).mean(), bits_per_dim(log_p, 1)
    assert one > exact + 0.2
    assert many.shape == (1,) and many.item() == pytest.approx(exact.item(), abs=0.06)
    few = bits_per_dim(log_p.reshape(8, 500), 1).mean()
    assert exact < few < one


def test_dequantised_levels_fill_their_bins():
    levels = torch.tensor([0, 127, 128, 255], dtype=torch.uint8)
    assert dequantize(levels, torch.zeros(4)).tolist() == [-1, -1 / 128, 0, 127 / 128]
    assert dequantize(levels, torch.full((4,), 0.5)).tolist() == [-1 + 1 / 256, -1 / 256, 1 / 256, 1 - 1 / 256]
    assert dequantize(levels, torch.full((4,), 1 - 2**-24)).max() < 1 + 1e-7
    assert dequantize(levels, torch.zeros(4).double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda field, x: log_likelihood(field, x, uniform_grid(2).flip(0)), r"must increase.* got \[1.0, 0.5, 0.0\]"),
        (lambda field, x: log_likelihood(field, x, torch.tensor([0.0])), r"\(1,\)"),
        (lambda field, x: log_likelihood(field, x.long(), uniform_grid(2)), "int64"),
        (lambda field, x: log_likelihood(field, x, uniform_grid(2), probe=x[:1]), r"probe .* got \(1, 3\) for \(2, 3\)"),
        (lambda field, x: log_likelihood(lambda x, t: x[:, :2], x, uniform_grid(2)), r"returned shape \(2, 2\) for .* \(2, 3\)"),
        (lambda field, x: divergence(field, x, torch.tensor(0.5), x[0]), r"probe .* got \(3,\)"),
        (lambda field, x: dequantize(x, x), "uint8.* got torch.float32"),
        (lambda field, x: dequantize(x.byte(), x[:1]), r"\(2, 3\) and \(1, 3\)"),
        (lambda field, x: bits_per_dim(torch.zeros(2), 0), "dims must be an integer of at least 1, got 0"),
        (lambda field, x: bits_per_dim(torch.zeros(2), 1.5), "got 1.5"),
        (lambda field, x: bits_per_dim(torch.tensor(0.0), 1), r"\[B\] or \[K, B\], got \(\)"),
        (lambda field, x: bits_per_dim(torch.zeros(0, 2), 1), r"\(0, 2\)"),
    ],
)
def test_bad_inputs_are_refused_with_their_values(call, message):
    with pytest.raises(ValueError, match=message):
        call(lambda x, t: x, torch.zeros(2, 3))
