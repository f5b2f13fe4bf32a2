"""Densities against numerical integration, shifts against their algebra, stratified draws against their variance."""

import math

import pytest
import torch

from latentfm.flow import CondOT, Cosine, log_snr
from latentfm.flow.timesteps import (
    DENSITIES,
    CosMap,
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

LAWS = [Uniform(), LogitNormal(), LogitNormal(-0.5, 0.6), LogitNormal(1.0, 1.5), Mode(), Mode(-0.7), Mode(0.0), CosMap()]
LARGEST_SCALE = 2 / (math.pi - 2)
SHIFTS = [0.25, 1.0, 1.1, 3.0, 6.0]
UNIT = torch.linspace(0, 1, 200_001, dtype=torch.float64)
LARGEST_DRAW = 1 - 2**-24


def cumulative(law):
    """The distribution function of the law on UNIT, by the trapezoidal rule over its pdf."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(law.pdf(UNIT), UNIT)])


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_pdf_is_a_density(law):
    pdf = law.pdf(UNIT)
    assert torch.isfinite(pdf).all() and (pdf >= 0).all()
    assert cumulative(law)[-1].item() == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_icdf_inverts_the_integrated_pdf(law):
    cdf = cumulative(law)
    for u in torch.linspace(0.001, 0.999, 41, dtype=torch.float64):
        i = torch.searchsorted(UNIT, law.icdf(u)).clamp(1, len(UNIT) - 1)
        share = (law.icdf(u) - UNIT[i - 1]) / (UNIT[i] - UNIT[i - 1])
        assert torch.lerp(cdf[i - 1], cdf[i], share).item() == pytest.approx(u.item(), abs=1e-6)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_random_draws_follow_the_pdf(law):
    """Kolmogorov-Smirnov: sqrt(n) times the largest distance of the two distribution functions exceeds 1.95 in 1e-3."""
    count = 20_000
    t = draw_t(torch.rand(count, generator=torch.Generator().manual_seed(0)), law)
    sigma = (1 - t.double()).sort().values
    expected = cumulative(law)[torch.searchsorted(UNIT, sigma).clamp(max=len(UNIT) - 1)]
    empirical = torch.arange(1, count + 1) / count
    assert (empirical - expected).abs().max().item() * count**0.5 < 1.95


def test_logit_normal_mean_is_on_sigma():
    """The median of sigma is sigmoid(mean): a positive mean means more noise, that is smaller t."""
    median = draw_t(torch.tensor([0.5]), LogitNormal(mean=1.0))
    assert median.item() == pytest.approx(1 - 0.7310586, abs=1e-6)


def test_logit_normal_pdf_vanishes_at_the_ends_and_beyond():
    assert LogitNormal().pdf(torch.tensor([-0.1, 0.0, 1.0, 1.1])).tolist() == [0, 0, 0, 0]


def test_mode_and_cosmap_vectors():
    """The paper's f_mode falls in u and is 1 minus the increasing map here; cosmap rises."""
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    for s in (-1.0, 0.5, 1.29, LARGEST_SCALE):
        paper = 1 - u - s * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        torch.testing.assert_close(Mode(s).icdf(1 - u), paper)
        torch.testing.assert_close(Mode(s).icdf(u), 1 - paper)
    assert Mode(1.29).icdf(torch.tensor(0.75)).item() == pytest.approx(0.616416, abs=1e-6)
    torch.testing.assert_close(CosMap().icdf(u), 1 - 1 / (torch.tan(math.pi * u / 2) + 1))
    assert CosMap().icdf(torch.tensor(0.25)).item() == pytest.approx(0.292893, abs=1e-6)


@pytest.mark.parametrize("law", [law for law in LAWS if not isinstance(law, LogitNormal)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pdf_is_one_over_the_slope_of_the_icdf(law, dtype):
    u = torch.linspace(0.01, 0.99, 99, dtype=dtype)
    sigma, slope = torch.func.jvp(law.icdf, (u,), (torch.ones_like(u),))
    density = law.pdf(sigma)
    assert density.dtype == dtype
    torch.testing.assert_close(density, 1 / slope, rtol=2e-5 if dtype == torch.float32 else 1e-12, atol=0)


def test_mode_at_the_ends_of_its_range():
    """Scale -1 is the arcsine law, infinite at both ends; the largest is infinite in the middle; beyond, f is not monotone."""
    sigma = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(Mode(-1.0).pdf(sigma), 1 / (math.pi * torch.sqrt(sigma * (1 - sigma))))
    assert Mode(-1.0).pdf(torch.tensor([0.0])).item() > 1e6
    assert Mode(LARGEST_SCALE).pdf(torch.tensor([0.5], dtype=torch.float64)).item() > 1e6
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for scale, monotone in ((-1.01, False), (-1.0, True), (LARGEST_SCALE, True), (1.76, False)):
        image = u + scale * (u - torch.sin(math.pi * u / 2) ** 2)
        assert (image.diff() > -1e-12).all().item() == monotone
        if monotone:
            assert torch.equal(Mode(scale).icdf(u), image)
            assert image[0] == 0 and image[-1] == 1
    assert Mode(0.0).pdf(sigma).tolist() == [1] * 99


def test_cosmap_gives_the_linear_schedule_the_cosines_signal_to_noise():
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(log_snr(CondOT(), 1 - CosMap().icdf(u)), log_snr(Cosine(), 1 - u))


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_draw_is_a_time(law, shift, dtype):
    middle = torch.linspace(2**-12, 1 - 2**-12, 1000, dtype=dtype)
    u = torch.cat([torch.tensor([0, 2**-24], dtype=dtype), middle, torch.tensor([LARGEST_DRAW], dtype=dtype)])
    t = draw_t(u, law, shift)
    assert t.dtype == torch.float32
    assert ((t >= 0) & (t <= 1)).all()
    assert (t.diff() <= 0).all() and (t[2:-1].diff() < 0).all()


def test_draws_keep_their_shape_and_uniform_is_the_complement():
    u = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw_t(u, Uniform()), 1 - u)


def test_shift_moves_draws_towards_noise():
    u = torch.linspace(0.1, 0.9, 9)
    torch.testing.assert_close(draw_t(u, Uniform(), 3.0), 1 - 3 * u / (1 + 2 * u))
    assert (draw_t(u, Uniform(), 3.0) < draw_t(u, Uniform())).all()


@pytest.mark.parametrize("shift", SHIFTS)
def test_shift_is_the_papers_formula_and_fixes_the_ends(shift):
    sigma = torch.linspace(0, 1, 101)
    shifted = shift_sigma(sigma, shift)
    torch.testing.assert_close(shifted, (shift * sigma.double() / (1 + (shift - 1) * sigma.double())).float())
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted.diff() > 0).all()


def test_shift_one_is_the_identity_and_shifts_multiply():
    sigma = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small = torch.logspace(-12, 0, 1000)
    assert torch.equal(shift_sigma(sigma, 1.0), sigma) and torch.equal(shift_sigma(small, 1.0), small)
    torch.testing.assert_close(shift_sigma(shift_sigma(sigma, 1.7), 2.5), shift_sigma(sigma, 1.7 * 2.5))
    torch.testing.assert_close(shift_sigma(shift_sigma(sigma, 4.0), 1 / 4.0), sigma)


@pytest.mark.parametrize("shift", [1e-3, 0.1, 1.1, 1.3, 7.7, 1e3])
def test_rounding_never_leaves_the_unit_interval(shift):
    near_one = 1 - torch.arange(2**12) * 2**-24
    assert near_one.dtype == torch.float32
    shifted = shift_sigma(near_one, shift)
    assert shifted[0] == 1 and (shifted <= 1).all()


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("shift", SHIFTS)
def test_pdf_t_is_the_density_of_the_draws(law, shift):
    """Its integral from t to 1 is the share of draws beyond t, that is u itself, because t falls as u rises."""
    # fine at the ends of sigma where a shift stretches the density
    sigma = shift_sigma(UNIT, shift)
    density = pdf_t(1 - sigma, law, shift)
    share = torch.cumulative_trapezoid(density, sigma)
    assert share[-1].item() == pytest.approx(1, abs=1e-6)
    u = torch.tensor([0.01, 0.3, 0.5, 0.9], dtype=torch.float64)
    drawn = 1 - draw_t(u, law, shift).double()
    found = share[torch.searchsorted(sigma, drawn).clamp(1, len(share)) - 1]
    torch.testing.assert_close(found, u, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("tokens", "sigmas"), [
    (4096, [1, 0.904531, 0.759511, 0.512844, 0]),
    (1024, [1, 0.849235, 0.652489, 0.384945, 0]),
])
def test_shift_from_tokens_gives_fluxs_sigmas(tokens, sigmas):
    evenly = torch.linspace(1, 0, 5, dtype=torch.float64)
    expected = torch.tensor(sigmas, dtype=torch.float64)
    torch.testing.assert_close(shift_sigma(evenly, shift_from_tokens(tokens)), expected, rtol=0, atol=1e-6)


def test_shift_from_tokens_passes_through_its_points_and_is_log_linear():
    assert shift_from_tokens(256) == math.exp(0.5)
    assert shift_from_tokens(64, low=(64, 0.0), high=(128, math.log(2))) == 1
    assert shift_from_tokens(256, low=(64, 0.0), high=(128, math.log(2))) == pytest.approx(8)


def test_shift_from_resolution_keeps_the_uncertainty_of_the_mean():
    """Equation 23, and what it is derived from: sigma / (1 - sigma) / sqrt(pixels) stays the same."""
    sigma, m, n = torch.linspace(0.1, 0.9, 9, dtype=torch.float64), 1024**2, 256**2
    shift = shift_from_resolution(m, n)
    assert shift == 4
    shifted = shift_sigma(sigma, shift)
    torch.testing.assert_close(shifted / (1 - shifted) / m**0.5, sigma / (1 - sigma) / n**0.5)
    assert shift_from_resolution(n, m) == 1 / 4


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 3, 7, 64, 1000])
def test_every_stratum_is_hit_exactly_once(count):
    draws = [uniform(count), torch.zeros(count), torch.full((count,), LARGEST_DRAW)]
    for i, u in enumerate(draws):
        for rotation in (0.0, 0.37, LARGEST_DRAW, 1 - 2**-53):
            drawn = stratified(u, torch.randperm(count, generator=torch.Generator().manual_seed(i)), count, rotation)
            assert drawn.dtype == torch.float64 and (drawn >= 0).all() and (drawn < 1).all()
            # the nudge is for u = 0, on the lower edge of its stratum
            assert torch.floor(drawn * count + 1e-9).long().sort().values.tolist() == list(range(count))


def test_a_stratified_draw_alone_is_uniform_at_every_place():
    """Kolmogorov-Smirnov, for the first and for the third place of 5, over many steps."""
    steps, rotations = 4000, uniform(4000, seed=1).tolist()
    u = uniform(steps, 2)
    drawn = torch.stack([stratified(row, torch.tensor([0, 2]), 5, r) for row, r in zip(u, rotations, strict=True)])
    empirical = torch.arange(1, steps + 1) / steps
    for place in drawn.T:
        assert (place.sort().values - empirical).abs().max().item() * steps**0.5 < 1.95


def test_stratification_divides_the_variance_of_a_mean_by_the_square_of_the_count():
    """Of the mean of n values of u: 1 / (12 n) independent, 1 / (12 n^3) stratified. Standard error of a ratio 2.2 %."""
    n, steps = 16, 4000
    u = uniform(steps, n, seed=2).double()
    rotations = uniform(steps, seed=3).tolist()
    means = torch.stack([stratified(row, torch.arange(n), n, r).mean() for row, r in zip(u, rotations, strict=True)])
    assert u.mean(1).var().item() * 12 * n == pytest.approx(1, abs=0.09)
    assert means.var().item() * 12 * n**3 == pytest.approx(1, abs=0.09)
    t_means = torch.stack([
        draw_t(stratified(row, torch.arange(n), n, r), LogitNormal()).mean() for row, r in zip(u[:500], rotations, strict=False)
    ])
    assert t_means.var() < draw_t(u[:500], LogitNormal()).mean(1).var() / 50


def test_stratified_draws_do_not_depend_on_the_split():
    u, index = uniform(12), torch.arange(12)
    whole = stratified(u, index, 12, 0.4)
    for ranks in (2, 3, 4):
        parts = [stratified(u[rank::ranks], index[rank::ranks], 12, 0.4) for rank in range(ranks)]
        for rank, part in enumerate(parts):
            assert torch.equal(part, whole[rank::ranks])


def test_registry_holds_what_its_names_say():
    assert {"uniform": Uniform, "logit_normal": LogitNormal, "mode": Mode, "cosmap": CosMap} == DENSITIES
    for law in DENSITIES.values():
        assert torch.equal(law().icdf(torch.tensor([0.0, 1.0])), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("shift", [0.0, -3.0, float("nan"), float("inf")])
def test_bad_shifts_are_refused_with_their_value(shift):
    calls = (
        lambda: shift_sigma(torch.rand(2), shift),
        lambda: draw_t(torch.rand(2), Uniform(), shift),
        lambda: pdf_t(torch.rand(2), Uniform(), shift),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"shift .*{shift}"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LogitNormal(std=0.0), r"std .*0\.0"),
        (lambda: LogitNormal(std=-1.0), r"std .*-1\.0"),
        (lambda: LogitNormal(std=float("inf")), "std .*inf"),
        (lambda: LogitNormal(mean=float("nan")), "mean .*nan"),
        (lambda: draw_t(torch.tensor([0.5, 1.5]), Uniform()), r"1\.5"),
        (lambda: draw_t(torch.tensor([-0.5, 0.5]), Uniform()), r"-0\.5"),
        (lambda: draw_t(torch.tensor([0.5, torch.nan]), Uniform()), "nan"),
        (lambda: draw_t(torch.tensor([0, 1]), Uniform()), "int64"),
        (lambda: draw_t(torch.rand(2).half(), Uniform()), "float16"),
        (lambda: Mode(-1.01), r"scale .*\[-1, 1\.751938\].*-1\.01"),
        (lambda: Mode(1.752), r"scale .*1\.752$"),
        (lambda: Mode(float("nan")), "scale .*nan"),
        (lambda: shift_from_tokens(0), "tokens .*0"),
        (lambda: shift_from_tokens(9.5), r"tokens .*9\.5"),
        (lambda: shift_from_tokens(9, low=(256, 0.5), high=(256, 1.0)), r"\(256, 0\.5\) and \(256, 1\.0\)"),
        (lambda: shift_from_resolution(0, 4), "pixels .*0"),
        (lambda: shift_from_resolution(4, -4), "base_pixels .*-4"),
        (lambda: stratified(torch.rand(2), torch.arange(3), 3, 0.0), r"\(2,\) and \(3,\)"),
        (lambda: stratified(torch.rand(2), torch.tensor([0, 2]), 2, 0.0), r"0 to 1, got \[2\]"),
        (lambda: stratified(torch.rand(2), torch.tensor([-1, 0]), 2, 0.0), r"got \[-1\]"),
        (lambda: stratified(torch.rand(2), torch.rand(2), 2, 0.0), "integers, got torch.float32"),
        (lambda: stratified(torch.rand(2), torch.arange(2), 0, 0.0), "count .*0"),
        (lambda: stratified(torch.rand(2), torch.arange(2), 2, 1.0), r"rotation .*1\.0"),
    ],
)
def test_other_bad_inputs_are_refused_with_their_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
