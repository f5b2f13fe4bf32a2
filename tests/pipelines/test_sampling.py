"""Every solver, schedule and rule of guidance reaches a picture by its name, and the picture is what latentfm.flow says it is."""

import copy
import math
from typing import get_args

import pytest
import torch

from latentfm import flow
from latentfm.config import SampleOptions
from latentfm.errors import InputError
from latentfm.models.velocity import velocity
from latentfm.pipelines.denoising import GuidedVelocity, joined
from latentfm.pipelines.text_to_image import LatentFMPipeline
from latentfm.sampling import Guidance, Sampler, Schedule, Solver, scheduler_grid

STEPS, SCALE = 6, 4.0
ROUNDING = 2e-5
FIXED = [*flow.SOLVERS, *flow.SCHEMES]


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    pipe = LatentFMPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def conditions(pipe):
    """(the prompt's, the null condition), one row each."""
    length = pipe.max_sequence_length
    return pipe.assemble(pipe.prompt_encoder.encode(["a red apple"], length)), pipe.assemble(pipe.null.parts(length))


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def drawn(pipe, **arguments) -> torch.Tensor:
    given = {"prompt": "a red apple", "num_inference_steps": STEPS, "guidance_scale": SCALE, "latents": noise(), "output_type": "latent"}
    return pipe(**{**given, **arguments}).images


@torch.no_grad()
def expected(pipe, conditions, rule=None, grid=None, integrate=flow.integrate) -> torch.Tensor:
    """The same from latentfm.flow alone: fields of the network, one call each."""
    with_prompt, without = (lambda x, t, c=c: velocity(pipe.transformer, x, t, c) for c in conditions)
    rule = rule or (lambda v, u, x, t: flow.classifier_free(v, u, SCALE))
    grid = scheduler_grid(pipe.scheduler, STEPS, 16) if grid is None else grid
    return integrate(lambda x, t: rule(with_prompt(x, t), without(x, t), x, t), noise(), grid)


def assert_close(a: torch.Tensor, b: torch.Tensor, most: float = ROUNDING) -> None:
    assert a.shape == b.shape and float((a - b).abs().max()) < most


def test_the_names_are_those_of_flow():
    assert set(get_args(Solver)) == {*flow.SOLVERS, *flow.SCHEMES, "dormand_prince"}
    assert set(get_args(Schedule)) == {"model", *flow.GRIDS}
    assert set(get_args(Guidance)) == set(flow.RULES)


@pytest.mark.parametrize("name", flow.SOLVERS)
def test_each_solver_is_that_of_flow(pipe, conditions, name):
    solver = flow.SOLVERS[name]()
    found = drawn(pipe, solver=name)
    assert_close(found, expected(pipe, conditions, integrate=lambda f, x, grid: flow.integrate(f, x, grid, solver)))
    assert pipe.num_evaluations == STEPS * solver.evaluations_per_step
    assert name == "euler" or float((found - drawn(pipe)).abs().max()) > 1e-3


@pytest.mark.parametrize("name", flow.SCHEMES)
def test_noise_is_each_pictures_own(pipe, conditions, name):
    scheme, strength = flow.SCHEMES[name](), 0.7

    def integrate(field, x, grid):
        return flow.integrate_sde(field, x, grid, flow.PowerOfBeta(strength), torch.Generator().manual_seed(5), scheme)

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    alone = drawn(pipe, solver=name, noise=strength, generator=seeded(5))
    assert_close(alone, expected(pipe, conditions, integrate=integrate))
    two = drawn(pipe, solver=name, noise=strength, generator=seeded(5, 6), latents=noise().repeat(2, 1, 1, 1), num_images_per_prompt=2)
    assert_close(two[:1], alone)
    assert float((two[1] - two[0]).abs().max()) > 1e-2
    still = drawn(pipe, solver=name, noise=0.0)
    assert_close(still, drawn(pipe, solver="euler" if name == "euler_maruyama" else "heun"))


def test_an_adaptive_solver_takes_the_evaluations_it_needs(pipe, conditions):
    found = drawn(pipe, solver="dormand_prince")
    assert pipe.num_evaluations > 6 * STEPS

    def integrate(field, x, grid):
        for start, end in grid.unfold(0, 2, 1).tolist():
            x = flow.integrate_adaptive(field, x, start, end, 1e-4, 1e-4).x
        return x

    assert_close(found, expected(pipe, conditions, integrate=integrate), 1e-3)  # rounding moves where its steps end


@pytest.mark.parametrize("name", [*FIXED, "dormand_prince"])
def test_what_is_computed_for_all_times_at_once_changes_nothing(pipe, monkeypatch, name):
    """Modulations are looked up by the time a solver asks at, half steps included."""
    found = drawn(pipe, solver=name, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(GuidedVelocity, "precompute", lambda self: None)
    again = drawn(pipe, solver=name, generator=torch.Generator().manual_seed(1))
    assert_close(again, found, *[1e-3] * (name == "dormand_prince"))  # rounding moves where its steps end


@pytest.mark.parametrize("name", FIXED)
def test_every_time_a_solver_asks_at_is_known_before(name):
    grid, asked = flow.uniform_grid(5, 3.0), set()
    sampler = Sampler(5, solver=name)
    sampler.integrate(lambda x, t: asked.add(t.item()) or x, torch.randn(2, 3), grid, torch.Generator())
    times = sampler.times(grid)
    assert asked == set(times.tolist()) and len(times) == len(asked)
    assert (times.diff() > 0).all()


@pytest.mark.parametrize("name", flow.GRIDS)
def test_each_schedule_is_that_of_flow(pipe, conditions, name):
    assert_close(drawn(pipe, schedule=name, shift=2.0), expected(pipe, conditions, grid=flow.GRIDS[name](STEPS, 2.0)))
    own = pipe.scheduler.config.shift
    assert_close(drawn(pipe, schedule=name), expected(pipe, conditions, grid=flow.GRIDS[name](STEPS, own)))


@pytest.mark.parametrize("name", ["cfg", "cfg_zero_star", "apg"])
def test_each_rule_is_that_of_flow(pipe, conditions, name):
    expect = {
        "cfg": lambda v, u, x, t: flow.classifier_free(v, u, SCALE),
        "cfg_zero_star": lambda v, u, x, t: flow.cfg_zero_star(v, u, SCALE),
        "apg": lambda v, u, x, t: flow.adaptive_projected_field(lambda x, t: v, lambda x, t: u, SCALE)(x, t),
    }[name]
    assert_close(drawn(pipe, guidance=name), expected(pipe, conditions, rule=expect))
    assert_close(
        drawn(pipe, guidance=name, guidance_rescale=0.7),
        expected(pipe, conditions, rule=lambda v, u, x, t: flow.rescale(expect(v, u, x, t), v, 0.7)),
    )


def test_a_weaker_network_guides(pipe, conditions):
    weaker = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        weaker.proj_out.weight.mul_(0.5)
    found = drawn(pipe, guidance="autoguidance", reference=weaker)

    def rule(v, u, x, t):
        return flow.autoguidance(v, velocity(weaker, x, t, conditions[0]), SCALE)

    assert_close(found, expected(pipe, conditions, rule=rule))
    assert_close(drawn(pipe, guidance="autoguidance", reference=pipe.transformer), drawn(pipe, guidance_scale=1.0), 1e-4)


def test_guidance_in_an_interval_asks_for_the_weaker_velocity_there_alone(pipe, conditions, monkeypatch):
    rows = []
    real = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda *args, **kw: rows.append(len(kw["hidden_states"])) or real(*args, **kw))
    found = drawn(pipe, schedule="uniform", shift=1.0, guidance_interval=(0.2, 0.6))
    assert rows == [1, 1, 2, 2, 1, 1]  # at t = 0, 1/6, 2/6, 3/6, 4/6, 5/6
    monkeypatch.undo()

    def rule(v, u, x, t):
        return flow.interval(flow.classifier_free(v, u, SCALE), v, t, 0.2, 0.6)

    assert_close(found, expected(pipe, conditions, rule=rule, grid=flow.uniform_grid(STEPS)))


def test_the_first_steps_stand_still(pipe, conditions):
    grid = scheduler_grid(pipe.scheduler, STEPS, 16)
    assert_close(drawn(pipe, zero_init=2), expected(pipe, conditions, grid=grid[2:]))
    assert pipe.num_evaluations == STEPS - 2


def test_joined_rows_are_the_weaker_condition_first(pipe, conditions):
    both = joined(conditions[1], conditions[0])
    assert torch.equal(both.embeds[1:], conditions[0].embeds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "huen"}, r"no solver 'huen' \(did you mean 'heun'\?\); there are euler, "),
        ({"solver": ["heun"]}, "no solver"),
        ({"schedule": "kerras"}, "did you mean 'karras'"),
        ({"guidance": 3.0}, "no guidance 3.0"),
        ({"shift": 3.0}, "shift 3 needs a schedule of its own"),
        ({"schedule": "uniform", "shift": 0.0}, "shift 0 must be above 0"),
        ({"schedule": "uniform", "shift": math.nan}, "shift nan"),
        ({"guidance_rescale": 1.5}, "no share from 0 to 1"),
        ({"guidance_interval": (0.9, 0.1)}, "guidance_interval"),
        ({"guidance_interval": 0.5}, "must be two numbers"),
        ({"guidance_interval": (10, 80)}, r"guidance_interval \(10.0, 80.0\) must be a first and a last t, 0 noise and 1 data"),
        ({"zero_init": STEPS}, "must be fewer than the 6 steps"),
        ({"noise": -1}, "noise -1"),
        ({"guidance": "autoguidance"}, "need each other"),
        ({"reference": torch.nn.Linear(1, 1)}, "need each other"),
        ({"guidance": "autoguidance", "reference": "folder"}, "reference must be a network"),
    ],
)
def test_what_cannot_be_used_is_said(pipe, arguments, message):
    with pytest.raises(InputError, match=message):
        drawn(pipe, **arguments)


def test_pictures_of_a_training_take_the_same_names():
    options = SampleOptions(steps=9, guidance=2.5, solver="heun", schedule="karras", shift=2.0, guidance_rule="apg", zero_init=1)
    assert Sampler.of(options) == Sampler(9, 2.5, "heun", "karras", 2.0, "apg", zero_init=1)
    assert Sampler.of(options).unusual() == {"solver": "heun", "schedule": "karras", "shift": 2.0, "guidance_rule": "apg", "zero_init": 1}
    assert Sampler.of(SampleOptions()).unusual() == {}
    for wrong, message in (({"shift": 2.0}, "needs a schedule of its own"), ({"steps": 2, "zero_init": 2}, "fewer than the 2 steps")):
        with pytest.raises(ValueError, match=message):
            SampleOptions(**wrong)
