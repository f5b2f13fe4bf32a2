"""`latentfm`: the command line's front door. Light: whatever is heavy is imported by the command that needs it."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from latentfm.cli.app import app as page
from latentfm.cli.cache import cache
from latentfm.cli.convert import convert
from latentfm.cli.data import app as data
from latentfm.cli.generate import generate
from latentfm.cli.info import info
from latentfm.cli.plan import plan
from latentfm.cli.terminal import steady_streams
from latentfm.cli.train import train
from latentfm.cli.verify import verify
from latentfm.errors import Failure, InputError
from latentfm.files import expanded
from latentfm.words import shown

UsageError = typer.BadParameter.__base__  # an option or argument that typer refuses; typer carries its own click and exports no more
MOST_SAID = 4000  # characters of an error


@contextmanager
def one_way_to_fail() -> Iterator[None]:
    """A context that turns an error into one line "error: ..." on stderr and exit code 1 (it failed) or 2 (wrong input), Ctrl-C into 130.

    With LATENTFM_DEBUG=1 the exception goes through, traceback and all.
    """
    try:
        yield
    except (InputError, UsageError, KeyboardInterrupt, MemoryError) as error:
        if os.environ.get("LATENTFM_DEBUG") == "1":
            raise
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        if isinstance(error, MemoryError):
            error = Failure(f"out of memory ({str(error) or 'nothing is left'}); ask for less at once, or close other programs")
        message = error.format_message() if isinstance(error, UsageError) else str(error)
        print("error:", shown(" ".join(message.splitlines()), MOST_SAID), file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


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
app.command()(with_homes(train))
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
    app(prog_name="latentfm")


if __name__ == "__main__":
    main()
