"""How a conditional velocity and a weaker one are combined into a guided one, which follows the condition more closely.

All start from Bayes' rule (notes, eq. 61): the score given a label y is the score plus grad log p_t(y|x), and guidance counts
that second term w times. As Prop. 1 makes velocity, score and denoiser affine in each other at (x, t), a combination whose
weights sum to 1 may be made of any of them, with the same result.

The rules here are functions of values [B, ...], so that a network may be asked for both in one batch; `combine` makes a field
of two fields by any of them. Sums and norms in a rule run over all the dimensions of one sample, in float32 at least: what
guides one picture never depends on the others in the batch. No rule makes the host wait for the device.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from latentfm.flow.fields import Field
from latentfm.flow.path import SMALLEST_DIVISOR, convert, expand_like
from latentfm.flow.schedules import CondOT, Schedule

_COND_OT = CondOT()


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Returns the guided velocity v_u + w (v_c - v_u), with w the scale (notes, eq. 65).

    Scale 0 is the unconditional velocity and 1 the conditional one, both to the last bit; above 1 the samples follow
    the condition more closely than the data do, and below 0 they flee it.

    Args:
        conditional: v_c = u(x, t | y), [B, ...], floating point.
        unconditional: v_u = u(x, t | null), of the same shape.
        scale: the guidance scale w, finite.

    Returns:
        A tensor of that shape, float32 at least: a scale of 5 makes the rounding of bf16 five times as large.

    Raises:
        ValueError: the shapes differ, or scale is infinite or not a number.
    """
    conditional, unconditional = _pair("conditional", conditional, "unconditional", unconditional)
    _require_finite("scale", scale)
    return torch.lerp(unconditional, conditional, scale)


def autoguidance(main: Tensor, reference: Tensor, scale: float) -> Tensor:
    """Returns v_ref + w (v_main - v_ref): away from what a worse network says under the same condition.

    The combination of `classifier_free`; what differs is who is asked. The reference is a smaller or less trained version of
    the network, which errs in the same places but by more, so that the difference points to where the data are without
    narrowing their variety (Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself").

    Args:
        main, reference: the two networks' velocities at (x, t | y), [B, ...], floating point.
        scale: w, finite; 1 is the main network alone, to the last bit.

    Raises:
        ValueError: the shapes differ, or scale is infinite or not a number.
    """
    return classifier_free(main, reference, scale)


def interval(guided: Tensor, conditional: Tensor, t: Tensor, low: float, high: float) -> Tensor:
    """Returns the guided velocity where low <= t <= high, and the conditional one elsewhere to the last bit.

    Guidance near noise narrows the variety of the samples and near data does little (Kynkaanniemi et al. 2024, "Applying
    Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models"). The interval is in our t:
    0 noise, 1 data. The paper's noise level is beta_t / alpha_t, so that for CondOT its interval [a, b] is
    low = 1 / (1 + b), high = 1 / (1 + a); diffusers' sigma is 1 - t. To save the unconditional evaluations outside,
    decide by the grid, on the host, before the network is asked.

    Args:
        guided, conditional: velocities at (x, t), [B, ...], floating point.
        t: the time, a scalar or [B].
        low, high: the ends of the interval, low <= high.

    Raises:
        ValueError: the shapes differ, t is neither a scalar nor [B], or not low <= high.
    """
    guided, conditional = _pair("guided", guided, "conditional", conditional)
    if not low <= high:
        raise ValueError(f"the interval must have low <= high, got {low} and {high}")
    t = t if t.ndim == 0 else expand_like(t, guided)
    return torch.where((t >= low) & (t <= high), guided, conditional)


def rescale(guided: Tensor, conditional: Tensor, phi: float) -> Tensor:
    """Returns the guided velocity shrunk, by a share phi, to the conditional one's standard deviation sample by sample.

    A large scale makes the velocity, and so the picture's contrast, too large. With std over all of a sample's numbers
    (Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4):

        phi (std(v_c) / std(v)) v + (1 - phi) v

    Args:
        guided: v, of any rule, [B, ...], floating point. One whose numbers are all equal is left alone.
        conditional: v_c, of the same shape.
        phi: 0 returns v to the last bit, 1 gives it the std of v_c; the paper uses 0.7.

    Raises:
        ValueError: the shapes differ, or phi is not in [0, 1].
    """
    guided, conditional = _pair("guided", guided, "conditional", conditional)
    if not 0 <= phi <= 1:
        raise ValueError(f"phi must lie in [0, 1], got {phi}")
    std = _per_sample(guided).std(1, correction=0)
    ratio = torch.where(std > 0, _per_sample(conditional).std(1, correction=0) / std, 1.0)
    return expand_like(1 + phi * (ratio - 1), guided) * guided


def cfg_zero_star(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Returns s v_u + w (v_c - s v_u), with s v_u the projection of v_c on v_u, sample by sample.

    s = <v_c, v_u> / |v_u|^2 is the least-squares fit of v_u to v_c; it takes out of the difference what is only a wrong
    length of v_u, as of a network not yet trained (Fan et al. 2025, "CFG-Zero*: Improved Classifier-Free Guidance for Flow
    Matching Models"). The paper's other half, no velocity in the first K steps, is `zero_before`.

    Args:
        conditional, unconditional: v_c and v_u, [B, ...], floating point; s = 0 where v_u = 0.
        scale: w, finite; 1 is the conditional velocity to the last bit.

    Raises:
        ValueError: the shapes differ, or scale is infinite or not a number.
    """
    conditional, unconditional = _pair("conditional", conditional, "unconditional", unconditional)
    return classifier_free(conditional, _projection(conditional, unconditional), scale)


class Projected(NamedTuple):
    """The guided denoiser, and the running sum of the differences for the next step; both of the denoisers' shape."""

    denoiser: Tensor
    momentum: Tensor


def adaptive_projected(
    conditional: Tensor,
    unconditional: Tensor,
    scale: float,
    parallel: float = 0.0,
    radius: float = math.inf,
    decay: float = 0.0,
    momentum: Tensor | None = None,
) -> Projected:
    """Returns the denoiser of adaptive projected guidance, and its momentum for the next step.

    What oversaturates under a large scale is the part of D_c - D_u along D_c; it is weakened, and the whole kept short
    (Sadat et al. 2024, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models"):

        m <- D_c - D_u + decay m        d = m min(1, radius / |m|)        D_c + (w - 1) (d_perp + parallel d_par)

    where d_par is the projection of d on D_c and d_perp the rest. With parallel = 1, no radius and no decay it is
    `classifier_free`, and with w = 1 the conditional denoiser. Norms depend on the quantity: these are denoisers', not
    velocities' (`adaptive_projected_field` converts).

    Args:
        conditional, unconditional: the denoisers D_c and D_u at (x, t), [B, ...], floating point.
        scale: w, finite.
        parallel: the paper's eta, the weight of the part along D_c; 0 drops it.
        radius: the paper's r > 0, the largest norm of the difference; infinite for none.
        decay: the paper's momentum beta; negative values, the useful ones, push away from the earlier directions.
        momentum: the sum that the last step returned; none at the first.

    Raises:
        ValueError: shapes differ, scale, parallel or decay is not finite, or radius is not positive.
    """
    conditional, unconditional = _pair("conditional", conditional, "unconditional", unconditional)
    for name, value in (("scale", scale), ("parallel", parallel), ("decay", decay)):
        _require_finite(name, value)
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}")
    difference = conditional - unconditional
    if momentum is not None:
        _, momentum = _pair("conditional", conditional, "momentum", momentum)
        difference = difference + decay * momentum
    momentum = difference
    if math.isfinite(radius):
        length = torch.linalg.vector_norm(_per_sample(difference), dim=1)
        difference = difference * expand_like(radius / length.clamp(min=radius), difference)
    along = _projection(difference, conditional)
    return Projected(conditional + (scale - 1) * (difference + (parallel - 1) * along), momentum)


def classifier(velocity: Tensor, gradient: Tensor, t: Tensor, scale: float, schedule: Schedule = _COND_OT) -> Tensor:
    """Returns u + w a_t grad log p_t(y|x), the velocity guided by a classifier of noisy data (notes, eq. 62).

    From u = a s + b x (Prop. 1) and Bayes' rule, eq. 61: the score grows by the gradient, so the velocity by a_t times it,

        a_t = beta^2 alpha' / alpha - beta beta' = beta (alpha' beta - alpha beta') / alpha        CondOT: (1 - t) / t

    At t = 0 the coefficient is infinite and the gradient 0, since noise says nothing of y; computed with
    `path.SMALLEST_DIVISOR` for alpha, their product is 0 where its limit is not: the first step is unguided from there.

    Args:
        velocity: u(x, t), unconditional, [B, ...], floating point.
        gradient: the gradient of log p_t(y|x) in x, of the same shape.
        t: the time, a scalar or [B], float32 or float64.
        scale: w, finite; at 1 the result is the conditional velocity of the classifier that is right.
        schedule: alpha and beta; linear (CondOT) by default.

    Raises:
        ValueError: the shapes differ, t is neither a scalar nor [B], or scale is infinite or not a number.
    """
    velocity, gradient = _pair("velocity", velocity, "gradient", gradient)
    _require_finite("scale", scale)
    at = schedule(t if t.ndim == 0 else expand_like(t, velocity))
    coefficient = at.beta * (at.d_alpha * at.beta - at.alpha * at.d_beta) / at.alpha.clamp(min=SMALLEST_DIVISOR)
    return velocity + scale * coefficient.to(velocity.dtype) * gradient


def combine(first: Field, second: Field, rule: Callable[[Tensor, Tensor], Tensor]) -> Field:
    """Returns the field rule(first(x, t), second(x, t)), for instance of `functools.partial(classifier_free, scale=4.0)`."""
    return lambda x, t: rule(first(x, t), second(x, t))


def zero_before(field: Field, start: float) -> Field:
    """Returns the field that is 0 for t < start, and `field` from there on (the zero-init of CFG-Zero*, Fan et al. 2025).

    For the first K steps on a grid, start is grid[K]. A state that stands still need not be integrated: started at grid[K:],
    `field` itself gives the same samples for K evaluations less. This one is for a sampler whose count of steps is fixed.
    """

    def zeroed(x: Tensor, t: Tensor) -> Tensor:
        velocity = field(x, t)
        return torch.where(t < start, 0.0, velocity)

    return zeroed


def adaptive_projected_velocity(
    conditional: Tensor,
    unconditional: Tensor,
    x: Tensor,
    t: Tensor,
    scale: float,
    parallel: float = 0.0,
    radius: float = math.inf,
    schedule: Schedule = _COND_OT,
) -> Tensor:
    """Returns the velocity of adaptive projected guidance without momentum (`adaptive_projected`), given the two velocities at (x, t).

    Momentum is a matter of a sampler's steps and not of (x, t). At t = 1, where the two denoisers are x whatever the velocities, this is
    the conditional velocity.

    Args:
        conditional, unconditional: velocities, [B, ...], floating point.
        x, t: the state, of that shape, and the time, a scalar or [B].
        scale, parallel, radius: see `adaptive_projected`.
        schedule: alpha and beta; linear (CondOT) by default.

    Raises:
        ValueError: see `adaptive_projected`.
    """
    denoiser = convert(conditional, x, t, "velocity", "denoiser", schedule)
    weaker = convert(unconditional, x, t, "velocity", "denoiser", schedule)
    moved = adaptive_projected(denoiser, weaker, scale, parallel, radius).denoiser - denoiser
    # u = (alpha' - alpha beta' / beta) D + (beta' / beta) x, eq. 20: the change alone, so that u_c is not converted and back
    at = schedule(t if t.ndim == 0 else expand_like(t, x))
    return conditional + (at.d_alpha - at.alpha * at.d_beta / at.beta.clamp(min=SMALLEST_DIVISOR)) * moved


def adaptive_projected_field(
    conditional: Field,
    unconditional: Field,
    scale: float,
    parallel: float = 0.0,
    radius: float = math.inf,
    schedule: Schedule = _COND_OT,
) -> Field:
    """Returns the field of `adaptive_projected_velocity` of two velocity fields."""
    return lambda x, t: adaptive_projected_velocity(conditional(x, t), unconditional(x, t), x, t, scale, parallel, radius, schedule)


def classifier_field(
    field: Field, log_likelihood: Callable[[Tensor, Tensor], Tensor], scale: float, schedule: Schedule = _COND_OT
) -> Field:
    """Returns the velocity field guided by a classifier (see `classifier`), whose gradient is found by differentiation.

    Args:
        field: the unconditional velocity field.
        log_likelihood: log p_t(y|x) of each sample's wanted label at (x, t), [B], up to a constant; differentiable in x, and
            each sample's of its own x alone.
        scale, schedule: see `classifier`.
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_likelihood(point, t).sum(), point)
        return classifier(field(x, t), gradient, t, scale, schedule)

    return guided


# rule(v_strong, v_weak, x, t, scale): the guided velocity at (x, t). What the two are is `classifier_free`'s or `autoguidance`'s matter.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]

RULES: dict[str, Rule] = {
    "cfg": lambda conditional, unconditional, x, t, scale: classifier_free(conditional, unconditional, scale),
    "cfg_zero_star": lambda conditional, unconditional, x, t, scale: cfg_zero_star(conditional, unconditional, scale),
    "apg": adaptive_projected_velocity,
    "autoguidance": lambda main, reference, x, t, scale: autoguidance(main, reference, scale),
}


def _pair(name: str, value: Tensor, other_name: str, other: Tensor) -> tuple[Tensor, Tensor]:
    """The two values in their widest dtype, float32 at least; raises ValueError, by name, if their shapes differ."""
    if value.shape != other.shape:
        raise ValueError(f"{name} and {other_name} must have one shape, got {tuple(value.shape)} and {tuple(other.shape)}")
    dtype = torch.promote_types(torch.promote_types(value.dtype, other.dtype), torch.float32)
    return value.to(dtype), other.to(dtype)


def _per_sample(value: Tensor) -> Tensor:
    """The value as [B, n], one row a sample, also where n = 1 and the value [B]."""
    return value.unsqueeze(-1).flatten(1)


def _projection(value: Tensor, on: Tensor) -> Tensor:
    """The projection of each sample of `value` on the same sample of `on`; 0 where that is 0."""
    value_rows, rows = _per_sample(value), _per_sample(on)
    share = (value_rows * rows).sum(1) / rows.square().sum(1).clamp(min=torch.finfo(on.dtype).tiny)
    return expand_like(share, on) * on


def _require_finite(name: str, value: float) -> None:
    """Returns nothing; raises ValueError unless the value is finite."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
