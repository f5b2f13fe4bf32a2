"""`latentfm generate`: pictures from prompts. Everything that can be checked without a model is checked before one is loaded."""

import secrets
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from latentfm.bounds import LAST_SEED, MOST_AT_ONCE, MOST_GUIDANCE, MOST_PICTURES, MOST_STEPS
from latentfm.cli.checks import (
    check_at_least_one,
    check_at_most,
    check_name,
    check_size,
    check_text,
    chosen_device,
    model_folder,
    parse_size,
    wanted_prompts,
)
from latentfm.cli.terminal import progress_bar, quiet_libraries, say, show, uninterrupted
from latentfm.drawing import add_adapters, choose_attention, contact_sheet, draw, fingerprint, load, move, save, slug, versions
from latentfm.errors import InputError
from latentfm.files import check_can_be_written
from latentfm.sampling import Guidance, Sampler, Schedule, Solver
from latentfm.words import count as count_of
from latentfm.words import shortened, shown

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from latentfm.pipelines.text_to_image import LatentFMPipeline

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTION = ("auto", "native", "flash", "efficient", "math", "cudnn", "xformers", "flex")  # attention.BACKENDS, without torch
ENOUGH = 16  # pictures that could not be drawn: so many are told, and no more are tried where none could be
MOST_IN_SHEET = 1000  # characters of a prompt in the settings of a contact sheet
GRID_UP_TO = 64  # pictures; more go on a contact sheet only when --grid asks for it


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help='What to show, each prompt in quotes. "" is the empty prompt: no condition.', show_default=False),
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="A text file (UTF-8) with one prompt a line; blank lines are skipped.", show_default=False)
    ] = None,
    number: Annotated[int, typer.Option("--number", "-n", help="Pictures of each prompt.")] = 1,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the first picture; each next picture has the next one. Default: random, printed.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the sampler: more is slower and finer.")] = 28,
    guidance: Annotated[
        float, typer.Option(help="How strongly the prompt pulls: 1 is no guidance, 2 to 5 usual, more is cruder and more literal.")
    ] = 3.0,
    solver: Annotated[
        Solver | None,
        typer.Option(
            metavar="NAME", show_default=False,
            help=f"{', '.join(get_args(Solver))}. The last two draw fresh noise at each step. Default: the model's own scheduler, Euler's.",
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
    model: Annotated[
        Path | None, typer.Option(help="Pipeline folder, ours or a stock SD3 / SD3.5 one. Default: the bundled model.", show_default=False)
    ] = None,
    lora: Annotated[
        list[Path] | None,
        typer.Option(help="A LoRA upon the model: a file or folder of ours, diffusers' or peft's. Several add up.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures, made when missing. No file in it is overwritten.")] = Path("outputs"),
    grid: Annotated[
        bool | None,
        typer.Option("--grid/--no-grid", help=f"A contact sheet besides. Default: for 2 to {GRID_UP_TO} pictures.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures made at a time: memory against speed; the pictures do not depend on it.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, xpu. auto: a GPU when there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16. auto: float32 on the CPU, bfloat16 on a GPU.")] = "auto",
    attention: Annotated[
        str, typer.Option(help=f"What computes attention: {', '.join(ATTENTION)}. auto: torch's own choice, or $LATENTFM_ATTENTION.")
    ] = "auto",
    verify: Annotated[
        bool, typer.Option("--verify", help="First compare every byte of the model and of LoRA folders with what was saved there.")
    ] = False,
) -> None:
    """Make pictures from prompts.

    Prints the path of each picture on stdout. A picture depends on its prompt, its seed and the settings, not on what was made
    beside it; all of these are written into the PNG (latentfm.pictures.read_settings), so that any picture can be made again.
    """
    texts = wanted_prompts(prompts, prompts_file)
    check_at_least_one({"--number": number, "--steps": steps, "--batch": batch})
    count = len(texts) * number
    check_at_most({"--steps": (steps, MOST_STEPS), "--batch": (batch, MOST_AT_ONCE), "the number of pictures,": (count, MOST_PICTURES)})
    if grid:
        check_at_most({"--grid of pictures,": (count, MOST_AT_ONCE)})
    if not 0 <= guidance <= MOST_GUIDANCE:  # false for nan too
        raise InputError(f"--guidance {guidance} is not a strength from 0 to {MOST_GUIDANCE:g}; 1 is no guidance, 2 to 5 is usual")
    sampler = Sampler(steps, guidance, solver, schedule, shift, guidance_rule, guidance_rescale, guidance_interval, zero_init, noise)
    if (reference is None) == (guidance_rule == "autoguidance"):
        raise InputError("--guidance-rule autoguidance and --reference, the folder of a weaker model, need each other")
    if solver == "dormand_prince":
        batch = 1  # its steps suit the mean of a batch
    if seed is not None and not 0 <= seed <= LAST_SEED - (count - 1):
        raise InputError(f"--seed {seed} is out of range: {count} pictures need a seed from 0 to {LAST_SEED - (count - 1)}")
    if negative is not None:
        check_text(negative, "--negative")
    wanted_size = parse_size(size) if size is not None else None
    check_name("--device", device.split(":")[0], DEVICES)
    check_name("--dtype", dtype, DTYPES)
    check_name("--attention", attention, ATTENTION)
    check_can_be_written(out, "--out")
    folder = model_folder(model)
    adapters = lora or []
    for path in adapters:
        if not path.exists():
            raise InputError(f"--lora {shown(path)} does not exist; a training writes one to OUTPUT/lora")
        if (path / "lora").is_dir() and not any(path.glob("*.safetensors")):
            raise InputError(f"--lora {shown(path)} holds no LoRA; did you mean {shown(path / 'lora')}?")

    quiet_libraries()
    with progress_bar() as bar:
        task = bar.add_task("loading the model", total=None)
        chosen = chosen_device(device)
        kind = dtype if dtype != "auto" else "float32" if chosen.type == "cpu" else "bfloat16"
        pipe = load(folder, kind, verify)
        add_adapters(pipe, adapters, verify)
        choose_attention(pipe, attention, chosen)
        weaker = None if reference is None else load(model_folder(reference, "--reference"), kind, verify, "--reference").transformer
        width, height = wanted_size or (pipe.default_width, pipe.default_height)
        check_size(width, height, pipe.size_multiple, pipe.max_side)
        for line in pipe.prompt_warnings(list(dict.fromkeys([*texts, negative or ""]))):
            say(f"note: {line}", bar)
        if negative and guidance <= 1:
            say(f"note: --negative does nothing at --guidance {guidance:g}; it needs more than 1", bar)
        if seed is None:
            seed = secrets.randbelow(2**32)
            say(f"seed {seed} (to repeat: --seed {seed})", bar)
        settings = {
            "negative_prompt": negative or "",
            "steps": steps,
            "guidance": guidance,
            **sampler.unusual(),
            **({"reference": str(reference)} if reference else {}),
            "width": width,
            "height": height,
            "model": str(model) if model else "bundled",
            "model_fingerprint": fingerprint(folder),
            **({"lora": [str(path) for path in adapters]} if adapters else {}),
            "device": str(chosen),
            "dtype": kind,
            "attention": attention,
            **versions(),
        }
        bar.update(task, description="drawing", total=count * steps)
        move(pipe, chosen)
        arguments = {"negative_prompt": negative or None, "height": height, "width": width, **asdict(sampler)}
        if weaker is not None:
            arguments["reference"] = weaker.to(chosen)
        with_grid = count > 1 and (count <= GRID_UP_TO if grid is None else grid)
        draw_all(pipe, texts, number, seed, batch, arguments, settings, out, with_grid, bar, task)


def draw_all(
    pipe: "LatentFMPipeline", texts: list[str], number: int, seed: int, batch: int, arguments: dict[str, Any], settings: dict[str, Any],
    out: Path, with_grid: bool, bar: "Progress", task: "TaskID",
) -> None:  # fmt: skip
    """Draws `number` pictures of each text, a batch at a time, and saves each at once, under its seed and prompt; prints the paths.

    Raises InputError, at the end, for those that could not be drawn.
    """
    from latentfm.pictures import cell

    count, steps = len(texts) * number, settings["steps"]
    made, thumbnails, saved, failures = [], [], 0, Failures(count)
    for start in range(0, count, batch):
        part = [(texts[index // number], seed + index) for index in range(start, min(start + batch, count))]
        images = draw(pipe, part, arguments, lambda pictures: bar.advance(task, pictures))
        bar.update(task, completed=(start + len(part)) * steps)
        with uninterrupted():  # what is drawn is saved, and told
            for (text, picture_seed), image in zip(part, images, strict=True):
                if isinstance(image, InputError):
                    failures.tell(text, picture_seed, image, bar)
                    continue
                own = {"prompt": text, "seed": picture_seed}
                path = save(image, out, f"{picture_seed}-{slug(text)}", own | settings)
                saved += 1
                if with_grid:
                    made.append({"file": path.name, **own, "prompt": shortened(text, MOST_IN_SHEET)})
                    thumbnails.append(cell(image))
                show(path, bar)
        if not saved and failures.number >= ENOUGH:
            break
    if with_grid and thumbnails:
        sheet = contact_sheet(thumbnails, [(picture["prompt"], picture["seed"]) for picture in made], number, len(texts))
        show(save(sheet, out, f"grid-{seed}", settings | {"seed": seed, "pictures": made}), bar)
    if getattr(sys.stdout, "lost", False):
        say(f"note: standard output was closed; {count_of(saved, 'picture')} saved in {out}", bar)
    failures.raise_any(saved)


class Failures:
    """The pictures that could not be drawn: each is told at once, all of them in the error at the end."""

    def __init__(self, count: int):
        self.count, self.number = count, 0
        self.first: InputError | None = None

    def tell(self, text: str, seed: int, error: InputError, bar: "Progress") -> None:
        self.number, self.first = self.number + 1, self.first or error
        if self.count > 1 and self.number <= ENOUGH:
            say(f"not drawn: seed {seed}, '{shortened(text)}': {error}", bar)

    def raise_any(self, saved: int) -> None:
        """Raises InputError when there was any."""
        if self.first is not None and self.count == 1:
            raise self.first
        if self.first is not None:
            raise InputError(f"{self.number:,} of {count_of(self.count, 'picture')} could not be drawn, {saved:,} are saved; {self.first}")
