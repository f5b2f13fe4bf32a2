"""`latentfm app`: the page, in a browser."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from latentfm.cli.checks import check_at_least_one, check_name, model_folder
from latentfm.cli.generate import DEVICES, DTYPES
from latentfm.cli.terminal import quiet_libraries, say
from latentfm.errors import InputError
from latentfm.files import check_can_be_written
from latentfm.web.limits import Limits

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PASSWORD = "LATENTFM_PASSWORD"
DEFAULT = Limits()


def app(
    model: Annotated[
        list[Path] | None,
        typer.Option(help="A pipeline folder to offer beside the bundled model; the first is the page's own.", show_default=False),
    ] = None,
    loras: Annotated[
        Path | None, typer.Option(help="A folder of LoRAs to offer: files of safetensors, and folders of trainings.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures, made when missing; what is in it is the gallery.")] = Path("outputs"),
    runs: Annotated[
        Path | None, typer.Option(help="A folder of runs of `latentfm train` to follow in a second tab, live.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A folder below which pictures lie that may be trained on: --runs are started and stopped there, too.",
                     show_default=False),
    ] = None,
    trainings: Annotated[int, typer.Option(help="How many may train at a time in --runs.")] = 1,
    host: Annotated[
        str, typer.Option(help="The address to listen on. 0.0.0.0 is every one of this machine's, and needs a password.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860.", show_default=False)] = None,
    password: Annotated[
        bool, typer.Option("--password", help=f"Ask for a password, that the page then asks for. ${PASSWORD} is one, too.")
    ] = False,
    without_password: Annotated[
        bool, typer.Option("--without-password", help="Let everybody in who reaches a --host beyond this machine.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, xpu. auto: a GPU when there is one.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16, float16. auto: bfloat16 on a GPU or a CPU that multiplies it, else float32.")
    ] = "auto",
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="torch.compile the network's blocks: faster pictures after a start of a minute, later seconds."),
    ] = False,
    max_size: Annotated[int, typer.Option(help="Pixels a side that may be asked for.")] = DEFAULT.size,
    max_steps: Annotated[int, typer.Option(help="Steps that may be asked for.")] = DEFAULT.steps,
    max_batch: Annotated[int, typer.Option(help="Pictures that may be asked for at once, those of a sweep included.")] = DEFAULT.batch,
    max_prompt: Annotated[int, typer.Option(help="Characters of a prompt.")] = DEFAULT.prompt,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait.")] = DEFAULT.waiting,
    batch: Annotated[int, typer.Option(help="Pictures drawn at a time: memory against speed.")] = DEFAULT.at_once,
) -> None:
    """Open the page: draw, vary, inpaint and look through what was drawn, in a browser.

    It is on this machine alone unless --host says otherwise. Whoever asks while others do waits in a queue.
    """
    limits = {"--max-size": max_size, "--max-steps": max_steps, "--max-batch": max_batch, "--max-prompt": max_prompt,
              "--max-waiting": max_waiting, "--batch": batch, "--trainings": trainings}  # fmt: skip
    check_at_least_one(limits)
    check_name("--device", device.split(":")[0], DEVICES)
    check_name("--dtype", dtype, DTYPES)
    check_can_be_written(out, "--out")
    for folder in model or []:
        model_folder(folder)
    if loras is not None and not loras.is_dir():
        raise InputError(f"--loras {loras} is no folder")
    check_training_folders(runs, data)
    secret = asked_password() if password else os.environ.get(PASSWORD) or None
    local = host in LOOPBACK
    if not local and secret is None and not without_password:
        raise InputError(
            f"--host {host} can be reached from other machines: protect it by --password or ${PASSWORD}, or say --without-password"
        )
    if not local and secret is None and runs is not None:
        raise InputError("--runs shows trainings, and with --data starts and stops them: where others reach the page that needs a password")
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise InputError('the page needs Gradio: pip install "latentfm[app]"') from None
    limited = Limits(max_size, max_steps, max_batch, max_prompt, max_waiting, batch)
    run(limited, model or [], loras, out, host, port, secret, device, dtype, compiled, None if runs is None else (runs, data, trainings))


def check_training_folders(runs: Path | None, data: Path | None) -> None:
    """Raises InputError for folders of trainings that are not there, or cannot be made."""
    if data is not None and runs is None:
        raise InputError(f"--data {data} goes with --runs: give the folder that runs are written to")
    if data is not None and not data.is_dir():
        raise InputError(f"--data {data} is no folder; give the one below which the folders of pictures lie")
    if data is not None:
        check_can_be_written(runs, "--runs")
    elif runs is not None and not runs.is_dir():
        raise InputError(f"--runs {runs} is no folder; give the one in which the folders of runs are")


def asked_password() -> str:
    """A password, from the environment or else typed in where nobody sees it. Raises InputError for none."""
    found = os.environ.get(PASSWORD)
    if not found and sys.stdin.isatty():
        import getpass

        found = getpass.getpass("password for the page: ")
    if not found:
        raise InputError(f"--password needs a terminal to ask on, or ${PASSWORD}")
    return found


def run(
    limits: Limits, models: list[Path], loras: Path | None, out: Path, host: str, port: int | None, secret: str | None, device: str,
    dtype: str, compiled: bool = False, trainings: tuple[Path, Path | None, int] | None = None,
) -> None:  # fmt: skip
    """Serves the page until Ctrl-C."""
    from latentfm.web.serve import application, harmless_errors, listening, private_uploads, server

    with private_uploads() as uploads, harmless_errors():
        from latentfm.web.models import Models
        from latentfm.web.studio import Studio

        quiet_libraries()
        found = listening(host, port)
        studio = Studio.of(Models(models, loras, device, dtype, compiled), limits, out)
        local = host in LOOPBACK
        second_tab = None
        if trainings is not None:
            from latentfm.web.training.tab import training_tab

            second_tab = partial(training_tab, *trainings)
        served = application(studio, uploads, secret, local, second_tab)
        name = f"[{host}]" if ":" in host else host
        if not local:
            who = "with the password" if secret else "WITHOUT A PASSWORD"
            say(f"WARNING: the page can be reached from other machines, {who}; what is sent is not encrypted")
        print(f"http://{name}:{found.getsockname()[1]}", flush=True)
        server(served).run(sockets=[found])
