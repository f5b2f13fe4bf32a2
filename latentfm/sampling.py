"""How a picture is drawn from noise: a solver, the times that it visits and a rule of guidance, each by its name in latentfm.flow.

The names stand here without torch, so that options and `--help` know them at once; `latentfm.flow` holds what they mean.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from latentfm.errors import InputError, nearest
from latentfm.words import shortened, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from latentfm.config import SampleOptions

# the solvers of flow.ode and flow.sde, and how often each evaluates the network a step; None: as its tolerance needs
SOLVERS = {
    "euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "adams_bashforth2": 1, "dormand_prince": None,
    "euler_maruyama": 1, "stochastic_heun": 2,
}  # fmt: skip
Solver = Literal[tuple(SOLVERS)]
FLOW = "flow_prediction"  # what schedulers of diffusers that are of several kinds call ours
Schedule = Literal["model", "uniform", "diffusers", "karras", "beta"]
Guidance = Literal["cfg", "cfg_zero_star", "apg", "autoguidance"]


@dataclass(frozen=True)
class Sampler:
    """How pictures are drawn. The defaults are StableDiffusion3Pipeline's: by the model's own scheduler, guided by CFG.

    num_inference_steps: intervals of the schedule. How often the network is evaluated in each is in SOLVERS.
    guidance_scale: w; 1 or less is no guidance.
    solver: of flow.ode, or of flow.sde, which draws fresh noise at each step. None: the model's own scheduler makes the steps of its own
        schedule (SD3's makes Euler's), Euler's method those of another.
    schedule: "model", the times that the model's own scheduler visits, or one of flow.grids.
    shift: of a schedule of flow.grids (flow.shift_sigma); the scheduler's own if None.
    guidance: a rule of flow.guidance. "autoguidance" needs a weaker network to guide against.
    guidance_rescale: phi, the share by which the guided velocity is brought back to the conditional one's deviation (flow.rescale).
    guidance_interval: the first and last t (0 noise, 1 data) at which there is guidance (flow.interval); everywhere if None.
    zero_init: so many first steps stand still (flow.zero_before).
    noise: the scale of an SDE's diffusion coefficient sqrt(1 - t); 0 is the ODE.

    Raises InputError for a name that does not exist and for a number out of its range.
    """

    num_inference_steps: int = 28
    guidance_scale: float = 7.0
    solver: Solver | None = None
    schedule: Schedule = "model"
    shift: float | None = None
    guidance: Guidance = "cfg"
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    zero_init: int = 0
    noise: float = 1.0

    def __post_init__(self) -> None:
        for what, value, known in (
            ("solver", self.solver, (None, *SOLVERS)),
            ("schedule", self.schedule, get_args(Schedule)),
            ("guidance", self.guidance, get_args(Guidance)),
        ):
            if value not in known:
                names = [name for name in known if name is not None]
                raise InputError(f"no {what} {shown(repr(value), 60)}{nearest(str(value), names)}; there are {', '.join(names)}")
        if self.shift is not None and self.schedule == "model":
            raise InputError(f"shift {self.shift:g} needs a schedule of its own, as schedule 'uniform'; 'model' follows the scheduler's")
        if self.shift is not None and not 0 < self.shift <= 1000:
            raise InputError(f"shift {self.shift:g} must be above 0 and at most 1000; 1 is even steps, SD3 takes 3")
        if not 0 <= self.guidance_rescale <= 1:
            raise InputError(f"guidance_rescale {self.guidance_rescale:g} is no share from 0 to 1; 0.7 is usual")
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            raise InputError(f"guidance_interval {self.guidance_interval} must be a first and a last t, 0 noise and 1 data, as (0.1, 0.8)")
        if self.num_inference_steps < 1:
            raise InputError(f"steps {self.num_inference_steps} must be at least 1")
        if not 0 <= self.zero_init < self.num_inference_steps:
            raise InputError(f"zero_init {self.zero_init} must be fewer than the {self.num_inference_steps} steps")
        if not 0 <= self.noise <= 2:
            raise InputError(f"noise {self.noise:g} is no strength from 0, the ODE, to 2")

    @classmethod
    def of(cls, options: "SampleOptions") -> "Sampler":
        """The sampler of a training's own pictures."""
        return cls(
            options.steps, options.guidance, options.solver, options.schedule, options.shift, options.guidance_rule,
            options.guidance_rescale, options.guidance_interval, options.zero_init, options.noise,
        )  # fmt: skip

    def unusual(self) -> dict[str, Any]:
        """What differs from the default besides steps and scale, by the name that options have for it: for a picture's settings."""
        given = {field.name: (getattr(self, field.name), field.default) for field in fields(self)[2:]}
        return {"guidance_rule" if name == "guidance" else name: value for name, (value, default) in given.items() if value != default}

    @property
    def by_scheduler(self) -> bool:
        """Whether the model's own scheduler makes the steps."""
        return self.solver is None and self.schedule == "model"

    def grid(self, scheduler: Any, tokens: int, sigmas: Sequence[float] | None = None, mu: float | None = None) -> "Tensor":
        """The times t of the steps, [steps + 1] from about 0 to 1, to which the scheduler is set too; see `set_timesteps`."""
        if self.schedule == "model":
            return scheduler_grid(scheduler, self.num_inference_steps, tokens, sigmas, mu)
        if sigmas is not None or mu is not None:
            raise InputError(f"sigmas and mu are for the scheduler's own schedule; schedule '{self.schedule}' has times of its own")
        from latentfm import flow
        from latentfm.models.velocity import timesteps

        grid = flow.GRIDS[self.schedule](self.num_inference_steps, self.shift or scheduler.config.get("shift") or 1.0)
        scheduler.num_inference_steps = self.num_inference_steps
        scheduler.timesteps, scheduler.sigmas = timesteps(grid[:-1]), timesteps(grid) / 1000.0
        scheduler._step_index = scheduler._begin_index = None
        return grid

    def guides_at(self, t: "Tensor") -> bool:
        """Whether there is guidance at the time t, a scalar."""
        return self.guidance_interval is None or self.guidance_interval[0] <= float(t) <= self.guidance_interval[1]

    def guided(self, conditional: "Tensor", weaker: "Tensor", x: "Tensor", t: "Tensor", scale: float) -> "Tensor":
        """The guided velocity at (x, t) by the rule, rescaled; the two velocities [B, ...] are at (x, t)."""
        from latentfm import flow

        velocity = flow.RULES[self.guidance](conditional, weaker, x, t, scale)
        return flow.rescale(velocity, conditional, self.guidance_rescale) if self.guidance_rescale else velocity

    def integrate(
        self,
        field: "Callable[[Tensor, Tensor], Tensor]",
        x: "Tensor",
        grid: "Tensor",
        generator: "torch.Generator | Sequence[torch.Generator] | None" = None,
        on_step: "Callable[[int, Tensor, Tensor], Tensor | None] | None" = None,
    ) -> "Tensor":
        """The state at the end of the grid, given x at its beginning; field and on_step as flow.integrate has them, with times on the host.

        generator: of an SDE's noise. Raises InputError where the steps are too long for it.
        """
        from latentfm import flow

        if self.solver not in flow.SCHEMES:
            solver = flow.DormandPrince() if self.solver == "dormand_prince" else flow.SOLVERS[self.solver or "euler"]()
            return flow.integrate(field, x, grid, solver, on_step, host_times=True)
        diffusion, scheme = flow.PowerOfBeta(self.noise), flow.SCHEMES[self.solver]()
        try:
            return flow.integrate_sde(field, x, grid, diffusion, generator, scheme, on_step=on_step, host_times=True)
        except ValueError as error:
            raise error if isinstance(error, InputError) else InputError(f"{self.solver}: {error}") from error

    def times(self, grid: "Tensor") -> "Tensor":
        """Every time that `integrate` asks the field at, once, in order; a solver that chooses its own adds to them as it goes."""
        import torch

        if self.solver == "dormand_prince":
            return grid
        seen: list[float] = []

        def recording(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.append(t.item())
            return x

        self.integrate(recording, torch.zeros(1), grid, torch.Generator())
        return torch.tensor(list(dict.fromkeys(seen)))


def set_timesteps(scheduler: Any, steps: int, tokens: int, sigmas: Sequence[float] | None = None, mu: float | None = None) -> None:
    """Sets a scheduler of diffusers' to a run of `steps` steps, its timesteps on the CPU.

    tokens [int]: of the image, for schedulers that shift by them. sigmas: the steps' noise levels, where not the scheduler's own. mu: of
    dynamic shifting, where not by the tokens. Raises InputError for a scheduler that cannot be set so.
    """
    config, extra = scheduler.config, {} if mu is None else {"mu": mu}
    try:
        if config.get("use_dynamic_shifting") and mu is None:
            low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            slope = (config.get("max_shift", 1.16) - config.get("base_shift", 0.5)) / (high - low)
            extra["mu"] = config.get("base_shift", 0.5) + slope * (tokens - low)
        if sigmas is not None:
            extra["sigmas"] = list(sigmas)
        if unknown := extra.keys() - inspect.signature(scheduler.set_timesteps).parameters.keys():
            raise ValueError(f"{type(scheduler).__name__} takes no {' and no '.join(sorted(unknown))}")
        scheduler.set_timesteps(**{"num_inference_steps": steps} if sigmas is None else {}, device="cpu", **extra)
        if config.get("prediction_type", FLOW) != FLOW or not hasattr(scheduler, "sigmas"):
            raise ValueError(
                f"{type(scheduler).__name__} is none of flow matching as it is; take FlowMatchEulerDiscreteScheduler, or another with "
                f"prediction_type='{FLOW}' and use_flow_sigmas=True"
            )
        if not (scheduler.timesteps.isfinite().all() and len(scheduler.timesteps)):
            raise ValueError(f"its timesteps are {shortened(str(scheduler.timesteps.tolist()), 80)}")
    except (AttributeError, ValueError, TypeError, ArithmeticError, IndexError, RuntimeError) as error:
        raise InputError(f"the scheduler's configuration cannot be followed for {steps} steps: {shown(error, 240)}") from error


def scheduler_grid(scheduler: Any, steps: int, tokens: int, sigmas: Sequence[float] | None = None, mu: float | None = None) -> "Tensor":
    """The times t of the steps of a scheduler set by `set_timesteps`, [steps + 1] from about 0 to 1, for a solver of ours.

    Raises InputError for a scheduler whose sigmas are no such times, or that counts time in another way than the network.
    """
    from latentfm.models.velocity import times

    set_timesteps(scheduler, steps, tokens, sigmas, mu)
    visited = scheduler.sigmas.float()
    moves = visited.diff()
    if not (visited.isfinite().all() and ((moves < 0).all() or (moves > 0).all())):
        found = shortened(str(visited.tolist()), 80)
        raise InputError(f"the scheduler's {steps} steps are no way from noise to a picture: its sigmas are {found}; give a schedule")
    if (scheduler.timesteps.float() - 1000.0 * visited[:-1]).abs().max() > 0.01:  # from what the network is told
        count = scheduler.config.get("num_train_timesteps")
        raise InputError(f"the scheduler counts time to {count} (num_train_timesteps), the network to 1000; give a schedule, or no solver")
    return times(visited)
