"""The times that sampling visits, as a pipeline's own scheduler has them."""

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from latentfm.errors import InputError
from latentfm.words import shortened, shown

OWN = FlowMatchEulerDiscreteScheduler


def sampling_grid(scheduler: Any, steps: int, tokens: int) -> Tensor:
    """The times t of `steps` Euler steps, [steps + 1] from about 0 to 1: those that a scheduler visits.

    It is asked for its sigmas, so that all of its configuration counts. `tokens` is the number of image tokens, for schedulers whose
    shift depends on it. Raises InputError for a scheduler that steps in another way, or counts time in another way than the network.
    """
    own_step = getattr(type(scheduler), "step", None) is OWN.step and "step" not in vars(scheduler)
    if not own_step or scheduler.config.get("stochastic_sampling"):
        raise InputError(f"this {type(scheduler).__name__} does not fit; use a FlowMatchEulerDiscreteScheduler, not stochastic")
    config, extra = scheduler.config, {}
    try:
        if config.get("use_dynamic_shifting"):
            low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            slope = (config.get("max_shift", 1.16) - config.get("base_shift", 0.5)) / (high - low)
            extra["mu"] = config.get("base_shift", 0.5) + slope * (tokens - low)
        scheduler.set_timesteps(steps, device="cpu", **extra)
        sigmas = scheduler.sigmas.float()
        apart = (scheduler.timesteps.float() - 1000.0 * sigmas[:-1]).abs().max()  # from what the network is told
    except (ValueError, TypeError, ArithmeticError, IndexError, RuntimeError) as error:
        raise InputError(f"the scheduler's configuration cannot be followed for {steps} steps: {shown(error, 200)}") from error
    moves = sigmas.diff()
    if not (sigmas.isfinite().all() and ((moves < 0).all() or (moves > 0).all())):
        found = shortened(str(sigmas.tolist()), 80)
        raise InputError(f"the scheduler's {steps} steps are no way from noise to a picture: its sigmas are {found}")
    if apart > 0.01:
        count = config.get("num_train_timesteps")
        raise InputError(f"the scheduler counts time to {count} (num_train_timesteps), the network to 1000; use one that does too")
    return 1.0 - sigmas
