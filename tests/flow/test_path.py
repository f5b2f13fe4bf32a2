"""The conditional path and its velocity, against automatic differentiation and the notes' eq. 20."""

import pytest
import torch

from latentfm.flow import Coefficients, CondOT, expand_like, sample_path


class Quarter:
    """alpha = sin(pi t / 2), beta = cos(pi t / 2): a schedule whose derivatives are not constant."""

    def __call__(self, t):
        rate = torch.pi / 2
        sin, cos = torch.sin(rate * t), torch.cos(rate * t)
        return Coefficients(alpha=sin, beta=cos, d_alpha=rate * cos, d_beta=-rate * sin)


def batch(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(2))
    return z, eps, torch.rand(shape[0], generator=generator, dtype=dtype)


def test_condot_derivatives_are_those_of_autograd():
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    at = CondOT()(t)
    for value, slope in ((lambda t: CondOT()(t).alpha, at.d_alpha), (lambda t: CondOT()(t).beta, at.d_beta)):
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(value))(t), slope, rtol=0, atol=0)
    assert all(c.shape == t.shape and c.dtype == t.dtype for c in at)


@pytest.mark.parametrize("schedule", [CondOT(), Quarter()])
def test_velocity_is_the_time_derivative_of_the_path(schedule):
    z, eps, t = batch(5, 3, 2, dtype=torch.float64)
    point, rate = torch.func.jvp(lambda t: sample_path(z, eps, t, schedule).x_t, (t,), (torch.ones_like(t),))
    sample = sample_path(z, eps, t, schedule)
    torch.testing.assert_close(sample.x_t, point)
    torch.testing.assert_close(sample.velocity, rate)


@pytest.mark.parametrize("schedule", [CondOT(), Quarter()])
def test_velocity_is_equation_20_at_the_sampled_point(schedule):
    z, eps, t = batch(6, 4, dtype=torch.float64)
    t = 0.05 + 0.9 * t
    sample = sample_path(z, eps, t, schedule)
    at = schedule(t[:, None])
    ratio = at.d_beta / at.beta
    torch.testing.assert_close(sample.velocity, (at.d_alpha - ratio * at.alpha) * z + ratio * sample.x_t)


def test_the_ends_are_noise_and_data_exactly():
    z, eps, _ = batch(4, 3, 2, 2)
    assert torch.equal(sample_path(z, eps, torch.zeros(4)).x_t, eps)
    assert torch.equal(sample_path(z, eps, torch.ones(4)).x_t, z)


def test_condot_velocity_is_bitwise_z_minus_eps_even_at_the_ends():
    z, eps, t = batch(64, 3, 5)
    t[0], t[1] = 0, 1
    assert torch.equal(sample_path(z, eps, t).velocity, z - eps)


def test_each_sample_uses_its_own_time_when_batch_and_width_agree():
    z, eps, t = batch(4, 4)
    together = sample_path(z, eps, t).x_t
    alone = torch.cat([sample_path(z[i : i + 1], eps[i : i + 1], t[i : i + 1]).x_t for i in range(4)])
    assert torch.equal(together, alone)
    assert len(t.unique()) == 4


def test_half_precision_data_is_noised_in_float32():
    z, eps, t = batch(4, 3)
    half = sample_path(z.bfloat16(), eps.bfloat16(), t)
    full = sample_path(z.bfloat16().float(), eps.bfloat16().float(), t)
    assert half.x_t.dtype == half.velocity.dtype == torch.float32
    assert torch.equal(half.x_t, full.x_t) and torch.equal(half.velocity, full.velocity)


def test_expand_like_aligns_times_with_the_batch():
    t = torch.rand(3)
    assert torch.equal(expand_like(t, torch.zeros(3)), t)
    assert expand_like(t, torch.zeros(3, 16, 8, 8)).shape == (3, 1, 1, 1)


@pytest.mark.parametrize(
    ("z", "eps", "t", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2), r"\(2, 3\) and \(2, 4\)"),
        (torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(2), r"\(2, 3\) and \(1, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1), r"\(2, 1\) for \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1), r"\(1,\) for \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor(0.5), r"\(\) for \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0.5, 1.25]), r"1\.25"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([-0.5, 1.0]), r"-0\.5"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0.5, torch.nan]), "nan"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0.5, torch.inf]), "inf"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]), "int64"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2).bfloat16(), "bfloat16"),
        (torch.zeros(2, 3).int(), torch.zeros(2, 3), torch.zeros(2), "z must be floating point, got torch.int32"),
        (torch.zeros(2, 3), torch.zeros(2, 3).long(), torch.zeros(2), "eps must be floating point, got torch.int64"),
    ],
)
def test_bad_inputs_are_refused_with_their_values(z, eps, t, message):
    with pytest.raises(ValueError, match=message):
        sample_path(z, eps, t)
