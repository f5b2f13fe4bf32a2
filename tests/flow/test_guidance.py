"""Guidance: the identities of each rule, and mixtures, whose conditional fields and labels' posteriors are known."""

import math
from functools import partial

import pytest
import torch
from flow.host import HostReads

from latentfm.flow.analytic import GaussianMixture
from latentfm.flow.grids import uniform_grid
from latentfm.flow.guidance import (
    adaptive_projected,
    adaptive_projected_field,
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
from latentfm.flow.ode import Heun, integrate
from latentfm.flow.schedules import CondOT, Cosine, Polynomial, VariancePreserving

# five components in the plane; the first two carry the label that is asked for
MEANS = torch.tensor([[1.5, 0.5], [0.5, 1.5], [-1.0, 1.0], [0.0, -1.5], [-1.0, -1.0]], dtype=torch.float64)
STDS, WEIGHTS = torch.tensor([0.4, 0.3, 0.6, 0.5, 0.2]).double(), torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2]).double()
ALL = GaussianMixture(MEANS, STDS, WEIGHTS)
LABELLED = GaussianMixture(MEANS[:2], STDS[:2], WEIGHTS[:2])
SCHEDULES = [CondOT(), Cosine(), Polynomial(2.0), VariancePreserving()]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dot(a, b):
    """The inner product of each sample."""
    return (a * b).unsqueeze(-1).flatten(1).sum(1)


def log_label(x, t, schedule):
    """log p_t(y|x) of the label of the first two components."""
    return ALL.responsibilities(x, t, schedule)[:, :2].sum(1).log()


RULES = {
    "classifier_free": partial(classifier_free, scale=4.0),
    "autoguidance": partial(autoguidance, scale=2.0),
    "cfg_zero_star": partial(cfg_zero_star, scale=4.0),
    "rescale": lambda c, u: rescale(classifier_free(c, u, 4.0), c, 0.7),
    "interval": lambda c, u: interval(classifier_free(c, u, 4.0), c, torch.linspace(0, 1, len(c)), 0.0, 0.3),
    "adaptive_projected": lambda c, u: adaptive_projected(c, u, 4.0, 0.3, 1.5, -0.5, torch.ones_like(c)).denoiser,
    "classifier": lambda c, u: classifier(c, u, torch.tensor(0.4), 4.0),
}


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3), (5, 16, 4, 4)])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_treats_each_sample_alone_and_works_in_float32(rule, shape):
    conditional, unconditional = normal(*shape), 2 * normal(*shape, seed=1)
    together = rule(conditional, unconditional)
    assert together.shape == shape and torch.isfinite(together).all()
    torch.testing.assert_close(together[:1], rule(conditional[:1], unconditional[:1]), rtol=1e-6, atol=1e-6)
    others_changed = rule(torch.cat([conditional[:1], 9 * conditional[1:]]), unconditional)
    torch.testing.assert_close(together[:1], others_changed[:1], rtol=1e-6, atol=1e-6)
    half = rule(conditional.bfloat16(), unconditional.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, rule(conditional.bfloat16().float(), unconditional.bfloat16().float()), rtol=0, atol=0)
    assert rule(conditional.double(), unconditional.double()).dtype == torch.float64


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_no_rule_makes_the_host_wait_for_the_device(rule):
    t = torch.tensor(0.5)
    with HostReads(lambda x, t: zero_before(combine(lambda x, t: x, lambda x, t: 2 * x, rule), 0.2)(x, t)) as reads:
        reads.field(normal(2, 3), t)
        adaptive_projected_field(lambda x, t: x, lambda x, t: 2 * x, 3.0, radius=0.1)(normal(2, 3), t)
    assert reads.armed and reads.count == 0


def test_classifier_free_is_equation_65_and_exact_at_its_ends():
    conditional, unconditional = normal(4, 3, 2), 100 * normal(4, 3, 2, seed=1)
    assert torch.equal(classifier_free(conditional, unconditional, 1.0), conditional)
    assert torch.equal(classifier_free(conditional, unconditional, 0.0), unconditional)
    for w in (-1.0, 0.3, 2.0, 7.5):
        expected = (1 - w) * unconditional + w * conditional
        torch.testing.assert_close(classifier_free(conditional, unconditional, w), expected, rtol=1e-5, atol=1e-4)


def test_guided_sampling_of_two_gaussians_of_equal_width():
    """The field is affine in the mean, so guidance between m_c and m_u aims at m_u + w (m_c - m_u)."""
    m_c, m_u, w, std = torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0, 0.5]]), 3.0, 0.4
    fields = GaussianMixture(m_c, std).field(), GaussianMixture(m_u, std).field()
    noise = normal(16, 2)
    sample = integrate(combine(*fields, partial(classifier_free, scale=w)), noise, uniform_grid(200), Heun())
    torch.testing.assert_close(sample, m_u + w * (m_c - m_u) + std * noise, rtol=0, atol=1e-3)


def test_autoguidance_at_scale_1_is_the_main_network_and_extrapolates_beyond():
    main, reference = normal(4, 3), 100 * normal(4, 3, seed=1)
    assert torch.equal(autoguidance(main, reference, 1.0), main)
    torch.testing.assert_close(autoguidance(main, reference, 2.5), reference.lerp(main, 2.5))
    torch.testing.assert_close(autoguidance(main, reference, 2.0) - main, main - reference, rtol=1e-5, atol=1e-4)


def test_interval_is_closed_in_our_time_and_the_conditional_velocity_outside():
    guided, conditional = normal(5, 3), normal(5, 3, seed=1)
    t = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.8])
    chosen = interval(guided, conditional, t, 0.25, 0.75)
    assert torch.equal(chosen, torch.cat([conditional[:1], guided[1:4], conditional[4:]]))
    for time, expected in ((0.2, conditional), (0.25, guided), (0.75, guided), (0.9, conditional)):
        assert torch.equal(interval(guided, conditional, torch.tensor(time), 0.25, 0.75), expected)


def test_rescale_mixes_the_two_standard_deviations():
    conditional, unconditional = normal(5, 4, 3), 3 * normal(5, 4, 3, seed=1) + 1
    guided = classifier_free(conditional, unconditional, 5.0)
    assert torch.equal(rescale(guided, conditional, 0.0), guided)

    def std(value):
        return value.flatten(1).std(1)

    torch.testing.assert_close(std(rescale(guided, conditional, 1.0)), std(conditional))
    torch.testing.assert_close(std(rescale(guided, conditional, 0.7)), 0.7 * std(conditional) + 0.3 * std(guided))
    flat = torch.ones(2, 3)
    assert torch.equal(rescale(flat, conditional[:2, 0], 1.0), flat)


def test_cfg_zero_star_removes_the_projection():
    conditional, unconditional = normal(5, 4, 3), 3 * normal(5, 4, 3, seed=1) + 1
    projected = cfg_zero_star(conditional, unconditional, 0.0)  # s v_u
    # the residual of a least-squares fit is orthogonal to what was fitted, and s v_u is parallel to v_u
    torch.testing.assert_close(dot(conditional - projected, unconditional), torch.zeros(5), rtol=0, atol=1e-4)
    parallel = dot(projected, unconditional).square() / (dot(projected, projected) * dot(unconditional, unconditional))
    torch.testing.assert_close(parallel, torch.ones(5))
    guided = projected + 4 * (conditional - projected)
    torch.testing.assert_close(cfg_zero_star(conditional, unconditional, 4.0), guided, rtol=1e-5, atol=1e-5)
    assert torch.equal(cfg_zero_star(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(cfg_zero_star(conditional, conditional, 4.0), conditional, rtol=1e-6, atol=1e-6)
    # the length of v_u does not matter, and 0 is no direction
    torch.testing.assert_close(cfg_zero_star(conditional, 7 * unconditional, 4.0), guided, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cfg_zero_star(conditional, torch.zeros_like(conditional), 4.0), 4 * conditional)


def test_zero_before_is_to_start_later():
    field, grid, noise = ALL.field(), uniform_grid(10), normal(8, 2)
    held = integrate(zero_before(field, grid[2].item()), noise, grid)
    assert torch.equal(held, integrate(field, noise, grid[2:]))


def test_projected_guidance_without_its_parts_is_classifier_free():
    conditional, unconditional = normal(5, 4, 3), normal(5, 4, 3, seed=1)
    plain = adaptive_projected(conditional, unconditional, 4.0, parallel=1.0)
    torch.testing.assert_close(plain.denoiser, classifier_free(conditional, unconditional, 4.0), rtol=1e-6, atol=1e-5)
    assert torch.equal(plain.momentum, conditional - unconditional)
    for options in ({}, {"parallel": 0.3, "radius": 0.1}, {"decay": -0.5, "momentum": unconditional}):
        assert torch.equal(adaptive_projected(conditional, unconditional, 1.0, **options).denoiser, conditional)


def test_projected_guidance_moves_across_the_conditional_denoiser_and_no_farther_than_its_radius():
    conditional, unconditional = normal(5, 4, 3), 2 * normal(5, 4, 3, seed=1)
    moved = adaptive_projected(conditional, unconditional, 3.0).denoiser - conditional
    torch.testing.assert_close(dot(moved, conditional), torch.zeros(5), rtol=0, atol=1e-4)
    half = adaptive_projected(conditional, unconditional, 3.0, parallel=0.5).denoiser - conditional
    torch.testing.assert_close(dot(half, conditional), dot(conditional - unconditional, conditional), rtol=1e-4, atol=1e-4)
    short = adaptive_projected(conditional, unconditional, 3.0, parallel=1.0, radius=1.5).denoiser - conditional
    torch.testing.assert_close(dot(short, short).sqrt(), torch.full((5,), 2 * 1.5))
    long = adaptive_projected(conditional, unconditional, 3.0, parallel=1.0, radius=1e3).denoiser
    torch.testing.assert_close(long, adaptive_projected(conditional, unconditional, 3.0, parallel=1.0).denoiser)


def test_momentum_is_the_decayed_sum_of_the_differences():
    differences, decay, momentum = [normal(2, 3, seed=i) for i in range(3)], -0.5, None
    for difference in differences:
        guided, momentum = adaptive_projected(difference, torch.zeros(2, 3), 2.0, 1.0, decay=decay, momentum=momentum)
    expected = differences[2] + decay * differences[1] + decay**2 * differences[0]
    torch.testing.assert_close(momentum, expected)
    torch.testing.assert_close(guided, differences[2] + expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_projected_field_with_all_its_difference_is_classifier_free_in_velocities(schedule):
    x, conditional, unconditional = normal(6, 2).double(), LABELLED.field(schedule), ALL.field(schedule)
    for t in torch.tensor([0.1, 0.5, 0.9, 1.0]).double():
        guided = adaptive_projected_field(conditional, unconditional, 3.0, parallel=1.0, schedule=schedule)(x, t)
        if t == 1:
            torch.testing.assert_close(guided, conditional(x, t), rtol=0, atol=1e-6)
        else:
            torch.testing.assert_close(guided, classifier_free(conditional(x, t), unconditional(x, t), 3.0))


def test_projected_field_keeps_the_denoiser_within_its_radius():
    x, t, radius = normal(6, 2).double(), torch.tensor(0.3).double(), 0.2
    guided = adaptive_projected_field(LABELLED.field(), ALL.field(), 5.0, 1.0, radius)(x, t)
    moved = x + (1 - t) * guided - LABELLED.quantity("denoiser", x, t)  # D = x + (1 - t) u
    apart = (LABELLED.quantity("denoiser", x, t) - ALL.quantity("denoiser", x, t)).norm(dim=1)
    torch.testing.assert_close(moved.norm(dim=1), 4 * apart.clamp(max=radius))
    assert (apart > radius).any()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_classifier_guidance_with_the_exact_posterior_is_classifier_free(w, schedule):
    """At w = 1, Bayes' rule: the field of the labelled components; at any w, eq. 62 is eq. 65."""
    x = normal(6, 2).double()
    field = classifier_field(ALL.field(schedule), lambda x, t: log_label(x, t, schedule), w, schedule)
    for t in torch.tensor([0.05, 0.5, 0.95]).double():
        expected = classifier_free(LABELLED.quantity("velocity", x, t, schedule), ALL.quantity("velocity", x, t, schedule), w)
        torch.testing.assert_close(field(x, t), expected)


def test_classifier_guidance_is_finite_at_noise_and_takes_a_time_for_each_sample():
    x, velocity = normal(6, 2), normal(6, 2, seed=1)
    assert torch.equal(classifier(velocity, torch.zeros(6, 2), torch.tensor(0.0), 3.0), velocity)
    t = torch.linspace(0.1, 0.9, 6)
    each = torch.cat([classifier(velocity[i : i + 1], x[i : i + 1], t[i], 3.0) for i in range(6)])
    torch.testing.assert_close(classifier(velocity, x, t, 3.0), each)


def test_bad_inputs_are_refused_with_their_values():
    two, one = torch.zeros(2, 3), torch.zeros(1, 3)
    for rule in RULES.values():
        with pytest.raises(ValueError, match=r"\(2, 3\) and \(1, 3\)"):
            rule(two, one)
    for scale in (math.nan, math.inf):
        for rule in (classifier_free, autoguidance, cfg_zero_star, adaptive_projected):
            with pytest.raises(ValueError, match=f"scale must be finite, got {scale}"):
                rule(two, two, scale)
        with pytest.raises(ValueError, match=str(scale)):
            classifier(two, two, torch.tensor(0.5), scale)
    for phi in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"phi must lie in .*{phi}"):
            rescale(two, two, phi)
    with pytest.raises(ValueError, match=r"low <= high, got 0\.5 and 0\.25"):
        interval(two, two, torch.tensor(0.5), 0.5, 0.25)
    with pytest.raises(ValueError, match=r"t must be \[B\].*\(3,\) for \(2, 3\)"):
        interval(two, two, torch.zeros(3), 0.0, 1.0)
    with pytest.raises(ValueError, match="radius must be positive, got 0"):
        adaptive_projected(two, two, 2.0, radius=0.0)
    with pytest.raises(ValueError, match="decay must be finite, got nan"):
        adaptive_projected(two, two, 2.0, decay=math.nan)
    with pytest.raises(ValueError, match="conditional and momentum"):
        adaptive_projected(two, two, 2.0, momentum=one)
