"""`latentfm generate`: pictures from prompts. Everything that can be checked without a model is checked before one is loaded."""

import hashlib
import importlib.metadata
import os
import re
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentfm.bounds import LAST_SEED, MOST_AT_ONCE, MOST_GUIDANCE, MOST_PICTURES, MOST_STEPS
from latentfm.cli.checks import (
    check_at_least_one,
    check_at_most,
    check_folder_can_be_written,
    check_name,
    check_size,
    check_text,
    chosen_device,
    model_folder,
    parse_size,
    wanted_prompts,
)
from latentfm.cli.terminal import progress_bar, quiet_libraries, say, show, uninterrupted
from latentfm.errors import InputError
from latentfm.words import count as count_of
from latentfm.words import shortened, shown

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from rich.progress import Progress

    from latentfm.pipeline import LatentFMPipeline

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTION = ("auto", "native", "flash", "efficient", "math", "cudnn", "xformers", "flex")  # attention.BACKENDS, without torch
ENOUGH = 16  # pictures that could not be drawn: so many are told, and no more are tried where none could be
MOST_IN_SHEET = 1000  # characters of a prompt in the settings of a contact sheet
GRID_UP_TO = 64  # pictures; more go on a contact sheet only when --grid asks for it
PIECES, PIECE_BYTES = 64, 4096  # what the fingerprint reads of each large file


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
    if seed is not None and not 0 <= seed <= LAST_SEED - (count - 1):
        raise InputError(f"--seed {seed} is out of range: {count} pictures need a seed from 0 to {LAST_SEED - (count - 1)}")
    if negative is not None:
        check_text(negative, "--negative")
    wanted_size = parse_size(size) if size is not None else None
    check_name("--device", device.split(":")[0], DEVICES)
    check_name("--dtype", dtype, DTYPES)
    check_name("--attention", attention, ATTENTION)
    check_folder_can_be_written(out)
    folder = model_folder(model)
    adapters = lora or []
    for path in adapters:
        if not path.exists():
            raise InputError(f"--lora {shown(path)} does not exist; a training writes one to OUTPUT/lora")
        if (path / "lora").is_dir() and not any(path.glob("*.safetensors")):
            raise InputError(f"--lora {shown(path)} holds no LoRA; did you mean {shown(path / 'lora')}?")

    from latentfm.pictures import cell

    quiet_libraries()
    with progress_bar() as bar:
        task = bar.add_task("loading the model", total=None)
        chosen = chosen_device(device)
        kind = dtype if dtype != "auto" else "float32" if chosen.type == "cpu" else "bfloat16"
        pipe = load(folder, kind, verify)
        add_adapters(pipe, adapters, verify)
        choose_attention(pipe, attention, chosen)
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
        with_grid = count > 1 and (count <= GRID_UP_TO if grid is None else grid)
        made, thumbnails, saved, failures = [], [], 0, Failures(count)

        bar.update(task, description="drawing", total=count * steps)
        move(pipe, chosen)
        for start in range(0, count, batch):
            part = [(texts[index // number], seed + index) for index in range(start, min(start + batch, count))]
            images = draw(pipe, part, settings, bar, task)
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


def load(folder: Path, dtype: str, verify: bool = False) -> "LatentFMPipeline":
    """The pipeline in `folder`, on the CPU; with `verify` once every byte is what was saved. Raises InputError when it cannot be read."""
    import torch

    from latentfm.files import reading
    from latentfm.pipeline import LatentFMPipeline

    with reading(f"--model {shown(folder)}", "its copy may be incomplete or damaged"):
        pipe = LatentFMPipeline.from_pretrained(folder, verify, torch_dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_adapters(pipe: "LatentFMPipeline", paths: list[Path], verify: bool = False) -> None:
    """Merges LoRA adapters into the network's weights. Raises InputError for one that is none, or of another network."""
    from latentfm.files import reading

    names = [f"adapter_{number}" for number in range(len(paths))]
    for name, path in zip(names, paths, strict=True):
        try:
            with reading(path, "it does not fit this model"):
                pipe.load_lora_weights(path, adapter_name=name, verify=verify)
        except InputError as error:
            raise InputError(f"--lora {shown(path)}: {error}") from error
    if paths:
        pipe.set_adapters(names)
        pipe.fuse_lora(adapter_names=names)
        pipe.unload_lora_weights()


def choose_attention(pipe: "LatentFMPipeline", name: str, device: "torch.device") -> None:
    """Has the backend `name` compute the attention. Raises InputError when it is not installed or cannot work on `device`."""
    from latentfm.models.backends import check_backend

    config = pipe.transformer.config
    check_backend(name, config.num_attention_heads, config.attention_head_dim, device, pipe.transformer.dtype)
    pipe.transformer.set_attention(name)


def move(pipe: "LatentFMPipeline", device: "torch.device") -> None:
    """Puts the model on `device`; InputError when it does not fit."""
    import torch

    try:
        pipe.to(device)
        pipe.transformer.fuse_qkv_projections()
        pipe.vae.enable_slicing()  # decoding a whole batch at once is the peak of memory, and no faster
    except torch.OutOfMemoryError:
        raise InputError(f"the model does not fit into the memory of {device}: try --dtype bfloat16, or --device cpu") from None


def draw(
    pipe: "LatentFMPipeline", part: list[tuple[str, int]], settings: dict, bar: "Progress", task: int
) -> "list[Image.Image | InputError]":
    """The pictures of `part`, a list of (prompt, seed): one batch. Each picture's noise comes from its own seed, drawn on the CPU.

    In the place of a picture that cannot be drawn stands why: its latents are no numbers, or the memory does not suffice for it alone.
    """
    import torch

    lost: set[int] = set()

    def after_step(pipe: "LatentFMPipeline", step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        bar.advance(task, len(part))
        if step < settings["steps"] - 1:
            return {}
        finite = torch.isfinite(tensors["latents"]).flatten(1).all(dim=1)
        lost.update(row for row, good in enumerate(finite.tolist()) if not good)
        return {"latents": torch.where(finite.view(-1, 1, 1, 1), tensors["latents"], 0.0)}  # so that the others are decoded

    try:
        images = pipe(
            prompt=[text for text, _ in part],
            negative_prompt=settings["negative_prompt"] or None,
            height=settings["height"],
            width=settings["width"],
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"],
            generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in part],
            output_type="pil",
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=["latents"],
        ).images
    except (InputError, torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, InputError) and not is_lack_of_memory(error):
            raise
        problem = error if isinstance(error, InputError) else InputError("out of memory with one picture at a time: use a smaller --size")
    else:
        way_out = "use --dtype float32" if settings["dtype"] != "float32" else "try a lower --guidance; else its weights are damaged"
        no_numbers = InputError(f"the model's latents are not finite numbers in {settings['dtype']}: {way_out}")
        return [no_numbers if row in lost else image for row, image in enumerate(images)]
    if len(part) == 1:
        return [problem]
    half = len(part) // 2  # out here the error no longer holds on to what had been allocated; a batch changes no picture
    return [picture for few in (part[:half], part[half:]) for picture in draw(pipe, few, settings, bar, task)]


def is_lack_of_memory(error: Exception) -> bool:
    """Whether an exception tells that memory did not suffice; torch has no class of its own for the CPU's."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def contact_sheet(images: "list[Image.Image]", pictures: list[tuple[str, int]], number: int, prompts: int) -> "Image.Image":
    """The contact sheet of (prompt, seed) pictures, labelled by prompt; by seed when all prompts are the same.

    A row a prompt where its `number` pictures fit one, and all pictures of all prompts are there.
    """
    from latentfm.pictures import grid

    if prompts == 1:
        return grid(images, labels=[f"seed {seed}" for _, seed in pictures])
    columns = number if 1 < number <= 12 and len(images) == number * prompts else None
    return grid(images, columns=columns, labels=[text or "(empty prompt)" for text, _ in pictures])


def save(image: "Image.Image", folder: Path, stem: str, settings: dict) -> Path:
    """The path of the saved picture. Raises InputError when the disk refuses it."""
    from latentfm.pictures import save_png

    try:
        return save_png(image, folder, stem, settings)
    except OSError as error:
        raise InputError(f"cannot write a picture into {folder}: {error.strerror or error}; the finished ones are kept") from error


def slug(prompt: str) -> str:
    """The prompt as part of a file name: words joined by hyphens, at most 80 bytes."""
    words = re.sub(r"[\W_]+", "-", prompt[:1000].lower()).strip("-")
    try:
        os.fsencode(words)
    except UnicodeEncodeError:  # a file system of another encoding
        words = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
    return words.encode()[:80].decode(errors="ignore").strip("-") or ("picture" if prompt.strip() else "empty-prompt")


def fingerprint(folder: Path) -> str:
    """12 hex digits that tell models apart: a hash over the files' names, sizes and evenly spaced pieces of their contents.

    Reads at most 256 kB of each file, so it is instant for any model. Retrained weights differ nearly everywhere, hence in it.
    """
    from latentfm.files import open_file, read_json, reading
    from latentfm.models.folder import COMPONENT
    from latentfm.models.stored import names_in

    hashed = hashlib.sha256()
    index = read_json(folder / "model_index.json")
    components = sorted(name for name in index if COMPONENT.fullmatch(name) and (folder / name).is_dir())
    names = ["model_index.json", *(f"{part}/{name}" for part in components for name in names_in(folder / part))]
    for name in names:
        if (folder / name).is_dir():
            continue
        with reading(folder / name), open_file(folder / name) as content:
            size = os.fstat(content.fileno()).st_size
            hashed.update(f"{name} {size}\n".encode("utf-8", "surrogateescape"))
            if size <= PIECES * PIECE_BYTES:
                hashed.update(content.read())
                continue
            for piece in range(PIECES):
                content.seek((size - PIECE_BYTES) * piece // (PIECES - 1))
                hashed.update(content.read(PIECE_BYTES))
    return hashed.hexdigest()[:12]


def versions() -> dict[str, str]:
    """The versions of latentfm, torch and diffusers, by name; imports none of them."""
    from latentfm import __version__

    return {"latentfm": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "diffusers")}}
