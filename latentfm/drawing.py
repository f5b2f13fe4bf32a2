"""Prompts drawn with a model of a folder, and what is written down of each picture: for the command line and whoever draws many.

Heavy libraries are imported where they are used: what a model is called by can be asked without loading it.
"""

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentfm.errors import Failure, InputError
from latentfm.words import shown

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from latentfm.pipelines.text_to_image import LatentFMPipeline

PIECES, PIECE_BYTES = 64, 4096  # what the fingerprint reads of each large file


# what a model can be loaded without, by the names that people have for SD3's text encoders
PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "text_encoder_3"}


def load(
    folder: Path, dtype: str, verify: bool = False, option: str = "--model", variant: str | None = None, without: Sequence[str] = ()
) -> "LatentFMPipeline":
    """The pipeline in `folder`, that `option` named, on the CPU; with `verify` once every byte is what was saved.

    variant: of the weights' files, as "fp16". without: which of PARTS are left out.

    Raises InputError when it cannot be read.
    """
    import torch

    from latentfm.files import reading
    from latentfm.pipelines.text_to_image import LatentFMPipeline

    with reading(f"{option} {shown(folder)}", "its copy may be incomplete or damaged"):
        absent = {name: None for part in without for name in (PARTS[part], PARTS[part].replace("text_encoder", "tokenizer"))}
        pipe = LatentFMPipeline.from_pretrained(folder, verify, torch_dtype=getattr(torch, dtype), variant=variant, **absent)
    lacking = [name for name in ("transformer", "scheduler", "vae") if getattr(pipe, name) is None]
    if lacking or not pipe.has_encoders:
        what = lacking[0] if lacking else "text encoder, and prompts are read by one"
        raise InputError(f"{option} {shown(folder)} has no {what}: pictures are drawn with a whole model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_adapters(pipe: "LatentFMPipeline", paths: Sequence[Path], strengths: Sequence[float] = (), verify: bool = False) -> None:
    """Merges LoRA adapters into the weights, of each so much, or all where strengths has none; see `load_adapters`."""
    names = load_adapters(pipe, paths, strengths, verify)
    if names:
        pipe.fuse_lora(adapter_names=names)
        pipe.unload_lora_weights()


def load_adapters(pipe: "LatentFMPipeline", paths: Sequence[Path], strengths: Sequence[float] = (), verify: bool = False) -> list[str]:
    """The names of LoRA adapters, loaded beside the weights, from where `pipe.unload_lora_weights` takes them again.

    Raises InputError for one that is none, or of another network.
    """
    from latentfm.files import reading

    names = [f"adapter_{number}" for number in range(len(paths))]
    for name, path in zip(names, paths, strict=True):
        try:
            with reading(path, "it does not fit this model"):
                pipe.load_lora_weights(path, adapter_name=name, verify=verify)
        except InputError as error:
            raise InputError(f"--lora {shown(path)}: {error}") from error
    if paths:
        pipe.set_adapters(names, list(strengths) or None)
    return names


def choose_attention(pipe: "LatentFMPipeline", name: str, device: "torch.device") -> None:
    """Has the backend `name` compute the attention. Raises InputError when it is not installed or cannot work on `device`."""
    from latentfm.models.backends import check_backend

    config = pipe.transformer.config
    check_backend(name, config.num_attention_heads, config.attention_head_dim, device, pipe.transformer.dtype)
    pipe.transformer.set_attention(name)


def move(pipe: "LatentFMPipeline", device: "torch.device", compiled: bool = False) -> None:
    """Puts the model on `device`; Failure when it does not fit. With `compiled` its blocks are compiled when they are first run."""
    import torch

    try:
        pipe.to(device)
        if compiled:
            pipe.transformer.compile_repeated_blocks()
        else:
            pipe.transformer.fuse_qkv_projections()
        pipe.vae.enable_slicing()  # decoding a whole batch at once is the peak of memory, and no faster
    except torch.OutOfMemoryError:
        raise Failure(f"the model does not fit into the memory of {device}: try --dtype bfloat16, or --device cpu") from None


def draw(
    pipe: "LatentFMPipeline", part: list[tuple[str, int]], arguments: dict[str, Any], advance: Callable[[int], None],
    look: "Callable[[list[Image.Image]], None] | None" = None,
) -> "list[Image.Image | InputError]":  # fmt: skip
    """The pictures of `part`, a list of (prompt, seed): one batch. Each picture's noise comes from its own seed, drawn on the CPU.

    arguments: of the pipeline's call, besides. advance(n) is called when n pictures are a step further, look with
    previews of them as they will be. In the place of a picture that
    cannot be drawn stands why: its latents are no numbers, or the memory does not suffice for it alone.
    """
    import torch

    lost: set[int] = set()

    def after_step(pipe: "LatentFMPipeline", step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        advance(len(part))
        if look is not None:
            look(pipe.preview(tensors["denoised"]))
        if step < pipe.num_timesteps - 1:
            return {}
        finite = torch.isfinite(tensors["latents"]).flatten(1).all(dim=1)
        lost.update(row for row, good in enumerate(finite.tolist()) if not good)
        return {"latents": torch.where(finite.view(-1, 1, 1, 1), tensors["latents"], 0.0)}  # so that the others are decoded

    try:
        images = pipe(
            prompt=[text for text, _ in part],
            generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in part],
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=["latents", "denoised"] if look else ["latents"],
            **arguments,
        ).images
    except (InputError, torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, InputError) and not is_lack_of_memory(error):
            raise
        problem = error if isinstance(error, InputError) else Failure("out of memory with one picture at a time: use a smaller --size")
    else:
        dtype = str(pipe.transformer.dtype).removeprefix("torch.")
        way_out = "use --dtype float32" if dtype != "float32" else "try a lower --guidance; else its weights are damaged"
        no_numbers = Failure(f"the model's latents are not finite numbers in {dtype}: {way_out}")
        return [no_numbers if row in lost else image for row, image in enumerate(images)]
    if len(part) == 1:
        return [problem]
    half = len(part) // 2  # out here the error no longer holds on to what had been allocated; a batch changes no picture
    return [picture for few in (part[:half], part[half:]) for picture in draw(pipe, few, arguments, advance, look)]


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
    """The path of the saved picture. Raises Failure when the disk refuses it."""
    from latentfm.pictures import save_png

    try:
        return save_png(image, folder, stem, settings)
    except OSError as error:
        raise Failure(f"cannot write a picture into {folder}: {error.strerror or error}; the finished ones are kept") from error


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


def described(
    model: Path | None, folder: Path, adapters: Sequence[Path], strengths: Sequence[float], device: "torch.device", dtype: str,
    attention: str, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """What every picture's PNG says of its model: `model` as it was named, in `folder`, with so much of each LoRA; `more` where set."""
    return {
        **{name: value for name, value in more.items() if value},
        "model": str(model) if model else "bundled",
        "model_fingerprint": fingerprint(folder),
        **({"lora": [str(path) for path in adapters]} if adapters else {}),
        **({"lora_strength": list(strengths)} if any(strength != 1 for strength in strengths) else {}),
        "device": str(device),
        "dtype": dtype,
        "attention": attention,
        **versions(),
    }


def versions() -> dict[str, str]:
    """The versions of latentfm, torch and diffusers, by name; imports none of them."""
    from latentfm import __version__

    return {"latentfm": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "diffusers")}}
