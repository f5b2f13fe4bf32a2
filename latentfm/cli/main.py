"""`latentfm`: the command line's front door. Light: whatever is heavy is imported by the command that needs it."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from latentfm.cli.app import app as page
from latentfm.cli.cache import cache
from latentfm.cli.convert import convert
from latentfm.cli.data import app as data
from latentfm.cli.evaluate import evaluate
from latentfm.cli.generate import generate
from latentfm.cli.info import info
from latentfm.cli.plan import plan
from latentfm.cli.reflow import reflow
from latentfm.cli.terminal import left_at_once, steady_streams
from latentfm.cli.train import train
from latentfm.cli.train_vae import train_vae
from latentfm.cli.verify import verify
from latentfm.errors import Failure, InputError
from latentfm.files import expanded
from latentfm.words import shown

UsageError = typer.BadParameter.__base__  # an option or argument that typer refuses; typer carries its own click and exports no more
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h numbers what mallopt sets
MOST_SAID = 4000  # characters of an error


@contextmanager
def one_way_to_fail() -> Iterator[None]:
    """A context that turns an error into one line "error: ..." on stderr and exit code 1 (it failed) or 2 (wrong input), Ctrl-C into 130.

    With LATENTFM_DEBUG=1 the exception goes through, traceback and all.
    """
    try:
        yield
    except (InputError, UsageError, KeyboardInterrupt, MemoryError, OSError) as error:
        if os.environ.get("LATENTFM_DEBUG") == "1":
            raise
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        if isinstance(error, MemoryError):
            error = Failure(f"out of memory ({str(error) or 'nothing is left'}); ask for less at once, or close other programs")
        elif isinstance(error, OSError):  # a full disk, a folder that may not be written: the message names it
            error = Failure(str(error))
        message = error.format_message() if isinstance(error, UsageError) else str(error)
        print("error:", shown(" ".join(message.splitlines()), MOST_SAID), file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


def keep_freed_memory() -> None:
    """Has the C library keep what this process frees for what it asks for next, up to 32 MiB a piece, where it is one that can (glibc).

    Left to itself it gives memory back to the system after each step of a training on a CPU, and the system clears the pages of the next:
    one part in twenty of the step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that it takes


def with_homes(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, with a leading ~ in any path it is given standing for a home, as a shell has it."""

    @wraps(command)
    def run(**given: Any) -> Any:
        return command(**{name: at_home(value) for name, value in given.items()})

    return run


def at_home(value: Any) -> Any:
    if isinstance(value, list):
        return [at_home(each) for each in value]
    return expanded(value) if isinstance(value, Path) else value


class Commands(TyperGroup):
    """The commands, all failing in one way."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """What typer makes of the options before the command."""
        with one_way_to_fail():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> object:
        """Whatever the command returns, its own options parsed on the way."""
        with one_way_to_fail():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    invoke_without_command=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Start with:  latentfm generate "a red apple"\n\nEvery command explains itself:  latentfm generate --help',
)
app.command(
    epilog="Examples\n\n"
    'latentfm generate "a red apple"\n\n'
    'latentfm generate "a red apple" "a green car" -n 4 --seed 7\n\n'
    "latentfm generate --prompts-file prompts.txt --model runs/mine/model --out pictures\n\n"
    'latentfm generate "a violin" --seed 7 --steps 4,8,16 --guidance 1..4  (a table)\n\n'
    "latentfm generate --like outputs/7-a-violin.png --seed 8  (its settings, another seed)\n\n"
    "accelerate launch -m latentfm generate --prompts-file prompts.txt --seed 0 --skip-existing  (a share for each GPU)\n\n"
    'latentfm generate "a slice of cake" --image pizza.png --strength 0.7  (from a picture; --mask for a part of it)\n\n'
    'latentfm generate ""  (the empty prompt: an unconditional picture)'
)(with_homes(generate))
app.command(
    epilog="Examples\n\n"
    "latentfm train --config configs/quickstart.yaml data.folder=my_pictures output.folder=runs/mine --dry-run  (what it will take)\n\n"
    "latentfm train --config configs/quickstart.yaml data.folder=my_pictures output.folder=runs/mine\n\n"
    "latentfm train --config configs/quickstart.yaml data.folder=my_pictures output.folder=runs/mine --resume  (after a stop)\n\n"
    "latentfm train --config configs/quickstart.yaml data.folder=my_pictures output.folder=runs/mine train.adapter.rank=8  (a LoRA)\n\n"
    "accelerate launch --config_file configs/accelerate/ddp-8.yaml -m latentfm train --config configs/quickstart.yaml  (eight GPUs)"
)(with_homes(train))
app.command(
    "train-vae",
    epilog="Examples\n\n"
    "latentfm train-vae --config configs/vae.yaml data.folder=my_pictures output.folder=runs/vae --dry-run\n\n"
    "latentfm train-vae --config configs/vae.yaml data.folder=my_pictures output.folder=runs/vae\n\n"
    "latentfm train-vae model.vae=path/to/sd3-medium model.part=decoder data.folder=my_pictures data.size=512 output.folder=runs/decoder"
    " loss.edges=0.5 validation.held_out=64\n\n"
    "torchrun --nproc_per_node 8 -m latentfm train-vae --config configs/vae.yaml  (the same run on eight GPUs)",
)(with_homes(train_vae))
app.command(
    epilog="Examples\n\n"
    "latentfm reflow --prompts-file prompts.txt --out runs/fast\n\n"
    "latentfm reflow --prompts-file prompts.txt --model sd3 --out runs/fast --pairs 50000 --rounds 2 --one-step train.steps=2000\n\n"
    "torchrun --nproc_per_node 8 -m latentfm reflow --prompts-file prompts.txt --model sd3 --out runs/fast data.pairs.at_once=4"
)(with_homes(reflow))
app.command(
    epilog="Examples\n\n"
    "latentfm evaluate --out evaluation  (the bundled model, on the prompts and by the detector of its own art)\n\n"
    "latentfm evaluate runs/mine/model --out evaluation --detector emoji --against runs/before/model\n\n"
    "latentfm evaluate an/sd3/folder --prompts evaluation_metadata.jsonl --detector models/owlv2 --clip models/clip --out evaluation\n\n"
    "latentfm evaluate an/sd3/folder --prompts prompts.jsonl --clip models/clip --real photos --sweep steps=4,8,28 --sweep guidance=1..7 "
    "--out evaluation\n\n"
    "accelerate launch -m latentfm evaluate runs/mine/model --prompts prompts.jsonl --out evaluation  (a share for each GPU)"
)(with_homes(evaluate))
app.command(
    epilog="Examples\n\n"
    "latentfm cache --config configs/quickstart.yaml data.folder=my_pictures\n\n"
    "torchrun --nproc_per_node 8 -m latentfm cache --config configs/quickstart.yaml data.folder=my_pictures\n\n"
    "latentfm cache --verify --config configs/quickstart.yaml"
)(with_homes(cache))
app.command(
    epilog="Examples\n\n"
    "latentfm convert sd3.5_medium.safetensors sd35 --pipeline an/sd3/folder  (encoders and tokenizers from there)\n\n"
    "latentfm convert sd3_medium_incl_clips.safetensors sd3  (a folder without T5)\n\n"
    "latentfm convert runs/mine/model mine.safetensors --with transformer,vae --dtype float16  (for other programs)\n\n"
    "latentfm convert sd3.5_large.safetensors large --transformer-only --max-shard-size 5GB\n\n"
    "latentfm convert pytorch_lora_weights.safetensors adapter  (diffusers' LoRA to peft; the other way round too)\n\n"
    "latentfm convert runs/mine/lora mine.safetensors --naming kohya  (for other programs)"
)(with_homes(convert))
app.command(
    epilog="Examples\n\n"
    "latentfm plan --preset sd3-medium train.batch_size=64 --gpus 8\n\n"
    "latentfm plan --preset sd3.5-large train.adapter.rank=16 train.weights=bfloat16 train.gradient_checkpointing=0.5 --gpu 4090\n\n"
    "latentfm plan --config configs/sd35-medium-full.yaml --model runs/mine/model --gpus 8 --shard full\n\n"
    "latentfm plan --preset sd3.5-medium --generate 4 sample.steps=40 sample.guidance=4.5"
)(with_homes(plan))
app.command(
    epilog="Examples\n\n"
    "latentfm verify runs/mine/model\n\n"
    "latentfm verify runs/mine/lora\n\n"
    "latentfm verify --renew runs/mine/model  (after a change made on purpose)"
)(with_homes(verify))
app.command(
    "app",
    epilog="Examples\n\n"
    "latentfm app  (the bundled model, on this machine)\n\n"
    "latentfm app --model runs/mine/model --loras loras\n\n"
    "latentfm app --runs runs --data my_pictures  (trainings are followed and started there too)\n\n"
    "latentfm app --host 0.0.0.0 --password  (for others too)",
)(with_homes(page))
app.command()(with_homes(info))

for information in data.registered_commands:
    information.callback = with_homes(information.callback)
app.add_typer(data, name="data")


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Pictures from words: train and sample latent flow-matching models in the Stable Diffusion 3 style."""
    if version:
        from latentfm.drawing import versions

        print(f"latentfm {versions()['latentfm']}")
        raise typer.Exit()
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), nl=False)


def main() -> None:
    """Runs the command line on sys.argv and exits with its code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    steady_streams()
    keep_freed_memory()
    with nullcontext() if os.environ.get("WORLD_SIZE", "1") == "1" else left_at_once():
        app(prog_name="latentfm")


if __name__ == "__main__":
    main()
