"""`latentfm generate`: pictures from prompts. Everything that can be checked without a model is checked before one is loaded."""

import math
import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, get_args

import typer

from latentfm.bounds import LAST_SEED, MOST_AT_ONCE, MOST_GUIDANCE, MOST_LORA, MOST_PICTURES, MOST_STEPS
from latentfm.cli.checks import (
    check_at_least_one,
    check_at_most,
    check_lora_strengths,
    check_name,
    check_size,
    chosen_device,
    chosen_dtype,
    model_folder,
    parse_size,
    wanted_prompts,
)
from latentfm.cli.completion import names
from latentfm.cli.drawing import Teller
from latentfm.cli.terminal import lasting, progress_bar, quiet_libraries, rank, say
from latentfm.cli.watch import Watch
from latentfm.drawing import PARTS, add_adapters, choose_attention, described, load, move
from latentfm.errors import InputError
from latentfm.files import check_can_be_written
from latentfm.models.folder import Usual, usual_sampling
from latentfm.requests import Prompt, Request, Settings, check_own, check_text, own_settings, requests, values
from latentfm.sampling import Guidance, Sampler, Schedule, Solver
from latentfm.series import Series
from latentfm.words import shown

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
DTYPES = ("auto", "float32", "bfloat16", "float16")
COMPILING = "note: the first step compiles the network: a minute, and seconds where the same was compiled before"
ATTENTION = ("auto", "native", "flash", "efficient", "math", "cudnn", "xformers", "flex")  # attention.BACKENDS, without torch
SWEPT = "4,8,16 or 1..7: a picture with each, and all in one table."
GRID_UP_TO = 64  # pictures; more go on a contact sheet only when --grid asks for it


def generate(
    ctx: typer.Context,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help='What to show, each prompt in quotes. "" is the empty prompt: no condition.', show_default=False),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            help="Prompts from a UTF-8 file: text with one a line; .csv, .tsv, .json or .jsonl with a prompt and settings "
            "of its own (seed, steps, guidance, negative, solver, width, height, image, ...) in each. - is standard input.",
            show_default=False,
        ),
    ] = None,
    number: Annotated[int, typer.Option("--number", "-n", help="Pictures of each prompt.")] = 1,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the first picture; each next picture has the next one. Default: random, printed.", show_default=False),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            help=f"Steps of the sampler: more is slower and finer. {SWEPT} Default: the model's own, 8 of the bundled one; or 28.",
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[
        str | None,
        typer.Option(
            help=f"How strongly the prompt pulls: 1 is no guidance, 2 to 5 usual, more is cruder and more literal. {SWEPT} Default: what "
            "the model's folder says, 2 of the bundled one, or 3; 1 of weights with guidance in them, as `latentfm reflow` makes them.",
            show_default=False,
        ),
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            autocompletion=names(get_args(Solver)),
            help=f"{', '.join(get_args(Solver))}. The last two draw fresh noise at each step. Several by commas, as --steps. Default: the "
            "model's own scheduler, Euler's.",
        ),
    ] = None,
    schedule: Annotated[
        Schedule, typer.Option(metavar="NAME", help=f"The times that the steps visit: {', '.join(get_args(Schedule))}.")
    ] = "model",
    shift: Annotated[
        float | None, typer.Option(help="Of a --schedule other than model: above 1 spends more steps near noise.", show_default=False)
    ] = None,
    guidance_rule: Annotated[
        Guidance, typer.Option(metavar="NAME", help=f"{', '.join(get_args(Guidance))}; the last needs --reference.")
    ] = "cfg",
    guidance_rescale: Annotated[float, typer.Option(help="Share, 0 to 1, by which guidance's contrast is taken back; 0.7 is usual.")] = 0.0,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(help="First and last t at which there is guidance: 0 is noise, 1 the picture.", show_default=False),
    ] = None,
    zero_init: Annotated[int, typer.Option(help="So many first steps stand still, as with CFG-Zero*.")] = 0,
    noise: Annotated[float, typer.Option(help="Strength of the noise of euler_maruyama and stochastic_heun.")] = 1.0,
    reference: Annotated[
        Path | None, typer.Option(help="Folder of a weaker model of this kind, which autoguidance steers away from.", show_default=False)
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="What to steer away from (needs guidance above 1). Default: no prompt at all.", show_default=False)
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Pixels: WIDTHxHEIGHT, or one number for a square. Default: the model's.", show_default=False)
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to begin from, in the drawn one's size.", show_default=False)] = None,
    mask: Annotated[
        Path | None, typer.Option(help="With --image: white where it is drawn anew, black where it stays.", show_default=False)
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="With --image: how much is drawn anew, to 1. Default: 0.6, with --mask 1.", show_default=False)
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="A picture made here: its prompt, seed, model and settings, but for those given beside it.", show_default=False),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Pipeline folder, ours or a stock SD3 / SD3.5 one. Default: the bundled model.", show_default=False)
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Of the model's files: fp16 loads model.fp16.safetensors and its like.", show_default=False)
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A text encoder not to load, to save its memory: {', '.join(PARTS)}.",
            metavar="PART",
            show_default=False,
            autocompletion=names(PARTS),
        ),
    ] = None,
    lora: Annotated[
        list[Path] | None,
        typer.Option(help="A LoRA upon the model: a file, whoever made it, or a folder, ours or peft's. They add up.", show_default=False),
    ] = None,
    lora_strength: Annotated[
        list[float] | None,
        typer.Option(help=f"How much of the --lora beside it, -{MOST_LORA:g} to {MOST_LORA:g}. Default: 1, all of it.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures, made when missing. No file in it is overwritten.")] = Path("outputs"),
    grid: Annotated[
        bool | None,
        typer.Option("--grid/--no-grid", help=f"A contact sheet besides. Default: for 2 to {GRID_UP_TO} pictures.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures made at a time: memory against speed; the pictures do not depend on it.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, xpu. auto: a GPU when there is one.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16, float16. auto: bfloat16 on a GPU or a CPU that multiplies it, else float32.")
    ] = "auto",
    attention: Annotated[
        str, typer.Option(help=f"What computes attention: {', '.join(ATTENTION)}. auto: torch's own choice, or $LATENTFM_ATTENTION.")
    ] = "auto",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="torch.compile the network's blocks: faster pictures after a start of a minute, later seconds.",
        ),
    ] = False,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Show the pictures as they form: in a terminal of kitty's or iTerm2's kind, else in OUT/watch.png."),
    ] = False,
    skip_existing: Annotated[
        bool,
        typer.Option("--skip-existing", help="Leave out pictures that --out has already with these settings: to go on where it stopped."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Prints a JSON object a picture, its path and its settings, in place of the path alone.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="First compare every byte of the model and of LoRA folders with what was saved there.")
    ] = False,
) -> None:
    """Make pictures from prompts.

    Prints the path of each picture on stdout. A picture depends on its prompt, its seed and the settings, not on what was made
    beside it; all of these are written into the PNG (latentfm.pictures.read_settings), so that any picture can be made again.
    """
    given = given_or_like(ctx, SimpleNamespace(**locals()))
    draw_wanted(given, checked(given))


def given_or_like(ctx: typer.Context, given: SimpleNamespace) -> SimpleNamespace:
    """The options; those not given are as in the picture that --like names, whose settings are `before`. Raises InputError."""
    given.before = before = {}
    if given.like is not None:
        from latentfm.pictures import read_settings

        given.before = before = own_settings(given.like, read_settings(given.like))
    for option, goes_with, taken_back in (
        ("lora", "lora_strength", True), ("schedule", "shift", given.schedule == "model"),
        ("guidance_rule", "reference", given.guidance_rule != "autoguidance"),
    ):  # fmt: skip
        if taken_back and was_given(ctx, option):
            before.pop(goes_with, None)  # is of the picture's own
    for name, value in ((name, value) for name, value in before.items() if name != "model"):
        option = {"negative_prompt": "negative", "compile": "compiled"}.get(name, name)
        if not was_given(ctx, option):
            paths = {"image": Path, "mask": Path, "reference": Path, "lora": lambda each: [Path(path) for path in each]}
            setattr(given, option, paths.get(name, lambda each: each)(value))
    if before.get("model", "bundled") != "bundled" and given.model is None:
        given.model = Path(before["model"])
    if not given.prompts and given.prompts_file is None and "prompt" in before:
        given.prompts = [before["prompt"]]
    if given.size is None and "width" in before and "height" in before:
        given.size = f"{before['width']}x{before['height']}"
    vars(given).update(usual_of(given.model).unless(vars(given)))
    return given


def was_given(ctx: typer.Context, option: str) -> bool:
    """Whether an option was given, and has not its default alone."""
    source = ctx.get_parameter_source(option)
    return source is not None and not source.name.startswith("DEFAULT")


def usual_of(model: Path | None) -> Usual:
    """What a model is drawn with where nothing else is asked for."""
    try:
        return usual_sampling(model_folder(model))
    except InputError:  # which is told when all options are checked
        return Usual()


@dataclass(frozen=True)
class Wanted:
    """What the options come to: the prompts, what all pictures' settings begin with, the values of the swept options, how many pictures."""

    prompts: list[Prompt]
    base: Settings
    sweeps: dict[str, list[Any]]
    count: int


def checked(given: SimpleNamespace) -> Wanted:
    """What the options come to. Raises InputError for whatever can be told to be wrong before a model is loaded."""
    prompts = wanted_prompts(given.prompts, given.prompts_file)
    check_at_least_one({"--number": given.number, "--batch": given.batch})
    sweeps = {
        "steps": values("--steps", str(given.steps), int),
        "guidance": values("--guidance", str(given.guidance), float),
        "solver": list(dict.fromkeys(name.strip() or None for name in (given.solver or "").split(","))),
    }
    check_own(prompts, given.number, sweeps)
    pictures = len(prompts) * given.number
    count = pictures * math.prod(len(each) for each in sweeps.values())
    check_at_most({"--steps": (max(sweeps["steps"]), MOST_STEPS), "--batch": (given.batch, MOST_AT_ONCE)})
    check_at_most({"the number of pictures,": (count, MOST_PICTURES)})
    if given.grid:
        check_at_most({"--grid of pictures,": (count, MOST_AT_ONCE)})
    check_at_least_one({"--steps": min(sweeps["steps"])})
    if wrong := [each for each in sweeps["guidance"] if not 0 <= each <= MOST_GUIDANCE]:  # nan too
        raise InputError(f"--guidance {wrong[0]} is not a strength from 0 to {MOST_GUIDANCE:g}; 1 is no guidance, 2 to 5 is usual")
    sampler = Sampler(
        *(each[0] for each in sweeps.values()), given.schedule, given.shift, given.guidance_rule, given.guidance_rescale,
        tuple(given.guidance_interval) if given.guidance_interval else None, given.zero_init, given.noise,
    )  # fmt: skip
    if processes() > 1 and given.seed is None:
        raise InputError(f"--seed is needed where {processes()} processes share the pictures, as --seed 0")
    if given.seed is not None and not 0 <= given.seed <= LAST_SEED - (pictures - 1):
        raise InputError(f"--seed {given.seed} is out of range: {pictures} pictures need a seed from 0 to {LAST_SEED - (pictures - 1)}")
    if given.negative is not None:
        check_text(given.negative, "--negative")
    width, height = (None, None) if given.size is None else parse_size(given.size)
    base = Settings(sampler, given.negative, width, height, given.image, given.mask, given.strength)
    requests(prompts, 1, 0, base, sweeps)  # for what does not go together
    for prompt in prompts:
        settings, place = prompt.settings(base), f"{prompt.where}: " if prompt.own else ""
        if (given.reference is None) == (settings.sampler.guidance == "autoguidance"):
            raise InputError(f"{place}--guidance-rule autoguidance and --reference, the folder of a weaker model, need each other")
        for path in (settings.image, settings.mask):
            if path is not None and not path.is_file():
                raise InputError(f"{place}there is no picture {shown(path)}")
    given.without = [part for parts in given.without or [] for part in parts.split(",")]
    for part in given.without:
        check_name("--without", part, tuple(PARTS))
    check_name("--device", given.device.split(":")[0], DEVICES)
    check_name("--dtype", given.dtype, DTYPES)
    check_name("--attention", given.attention, ATTENTION)
    check_can_be_written(given.out, "--out")
    model_folder(given.model)
    for path in given.lora or []:
        if not path.exists():
            raise InputError(f"--lora {shown(path)} does not exist; a training writes one to OUTPUT/lora")
        if (path / "lora").is_dir() and not any(path.glob("*.safetensors")):
            raise InputError(f"--lora {shown(path)} holds no LoRA; did you mean {shown(path / 'lora')}?")
    strengths = given.lora_strength or []
    if strengths and len(strengths) != len(given.lora or []):
        raise InputError(f"{len(strengths)} --lora-strength for {len(given.lora or [])} --lora; give one for each, or none")
    check_lora_strengths(strengths, "--lora-strength")
    return Wanted(prompts, base, sweeps, count)


def draw_wanted(given: SimpleNamespace, wanted: Wanted) -> None:
    """Loads the model and draws. Raises InputError for what only a model can tell, and for pictures that could not be drawn."""
    quiet_libraries()
    folder, sweeps = model_folder(given.model), wanted.sweeps
    adapters, strengths = given.lora or [], given.lora_strength or []
    with progress_bar() as bar:
        task = bar.add_task("loading the model", total=None)
        chosen = chosen_device(given.device)
        if processes() > 1 and given.device == "auto" and chosen.type == "cuda":
            chosen = chosen_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        kind = chosen_dtype(given.dtype, chosen)
        with lasting():
            pipe = load(folder, kind, given.verify, variant=given.variant, without=given.without)
        add_adapters(pipe, adapters, strengths, given.verify)
        choose_attention(pipe, given.attention, chosen)
        shared = {}
        if given.reference is not None:
            from latentfm.pipelines.text_to_image import check_reference

            weaker = load(model_folder(given.reference, "--reference"), kind, given.verify, "--reference")
            try:
                check_reference(pipe.transformer, weaker.transformer)
            except InputError as error:
                raise InputError(f"--reference {shown(given.reference)}: {error}") from None
            shared = {"reference": weaker.transformer.to(chosen)}
        own = {"width": pipe.default_width, "height": pipe.default_height}
        base = replace(wanted.base, **{side: value for side, value in own.items() if getattr(wanted.base, side) is None})
        for prompt in wanted.prompts:
            own_size, settings = {"width", "height"} & prompt.own.keys(), prompt.settings(base)
            place = f"{prompt.where}: size" if own_size else "--size"
            check_size(settings.width, settings.height, pipe.size_multiple, pipe.max_side, place)
        negatives = [prompt.own.get("negative", given.negative or "") for prompt in wanted.prompts]
        for line in pipe.prompt_warnings(list(dict.fromkeys([*map(str, wanted.prompts), *negatives]))):
            say(f"note: {line}", bar)
        if given.negative and max(sweeps["guidance"]) <= 1:
            say(f"note: --negative does nothing at --guidance {sweeps['guidance'][0]:g}; it needs more than 1", bar)
        if given.negative and given.reference is not None:
            say("note: --negative does nothing with --reference, which is what is guided against", bar)
        seed = given.seed
        if seed is None:
            seed = secrets.randbelow(2**32)
            if any("seed" not in prompt.own for prompt in wanted.prompts):
                say(f"seed {seed} (to repeat: --seed {seed})", bar)
        more = {
            "reference": given.reference and str(given.reference), "variant": given.variant, "without": given.without,
            "compile": given.compiled,
        }  # fmt: skip
        common = described(given.model, folder, adapters, strengths, chosen, kind, given.attention, **more)
        if given.before.get("model_fingerprint", common["model_fingerprint"]) != common["model_fingerprint"]:
            say(f"note: {shown(given.like)} was made by a model of other weights than {common['model']}", bar)
        asked = requests(wanted.prompts, given.number, seed, base, sweeps)[rank() :: processes()]
        bar.update(task, description="drawing", total=sum(each.settings.sampler.num_inference_steps for each in asked))
        move(pipe, chosen, given.compiled)
        if given.compiled:
            say(COMPILING, bar)
        several = wanted.count > 1 and processes() == 1
        with_grid = several and (wanted.count <= GRID_UP_TO if given.grid is None else given.grid)
        swept = [name for name, each in sweeps.items() if len(each) > 1]
        watched = Watch(given.out / "watch.png") if given.watch and rank() == 0 else None
        if watched is not None and watched.protocol is None:
            say(f"the pictures form in {watched.path}", bar)
        teller = Teller(bar, task, given.out, len(asked), given.as_json, watched)
        series = Series(pipe, shared, common, given.out, with_grid, swept, teller)
        if given.skip_existing:
            asked = [each for each in asked if not already(series, each)]
        batch = 1 if "dormand_prince" in sweeps["solver"] else given.batch  # its steps suit the mean of a batch
        try:
            series.draw(asked, batch, given.number)
        finally:
            teller.closed()


def already(series: Series, request: Request) -> bool:
    """Whether a picture is there; it is told then as if it were drawn."""
    path = series.existing(request)
    if path is not None:
        series.listener.kept(path, series.settings(request))
    return path is not None


def processes() -> int:
    """How many processes share the pictures, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", 1))
