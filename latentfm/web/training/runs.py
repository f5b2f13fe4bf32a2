"""The runs in a folder: which there are, how each stands, and those that are checked, started, stopped and gone on with.

A client gives no path: it picks a run, a folder of pictures or a configuration of those that are listed, and a new run has a plain name. A
training is a process of its own, `python -m latentfm train ...`, which outlives the page and its server; how it stands, its folder tells.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

from latentfm.bundled import bundled_configurations
from latentfm.config import RunConfig, load_config
from latentfm.data.sources.base import is_image
from latentfm.data.sources.listing import METADATA_NAMES
from latentfm.errors import InputError
from latentfm.files import SpecialFile, check_regular, expanded, open_file
from latentfm.training.checkpoint.claim import NAME as LOCK
from latentfm.training.checkpoint.claim import holder
from latentfm.training.records.run_page import RECORDS, RunPage
from latentfm.words import count, is_text, listed, shown

LOG = "train.log"  # what a training that was started here prints
LOG_BYTES = 2**16  # of its end, which are read
WARNINGS = 5  # of the log, the last, that are shown with the curves
PLAIN = re.compile("[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")
DEFAULTS = "the defaults"  # instead of a configuration
EVERY_WEIGHT, ADAPTER = "every weight", "an adapter"
DEEPEST, MOST = 4, 500  # folders below the data that are looked into, and names of a list


@dataclass(frozen=True)
class Wanted:
    """A training as it is asked for. What is None is left to the configuration; `pictures` and `configuration` are names of the lists."""

    pictures: str | None
    configuration: str
    name: str
    steps: float | None = None
    learning_rate: float | None = None
    trains: str | None = None  # EVERY_WEIGHT or ADAPTER
    rank: float | None = None  # of the adapter; 16 if not given


@dataclass(frozen=True)
class Look:
    """How a run stands: `run` and `pictures` as the run's page has them, the end of its log, whether it can be stopped and gone on with.

    `seen` has, by the name of these parts, what is equal as long as they are the same.
    """

    run: dict[str, Any]
    pictures: dict[str, Any]
    log: str
    running: bool
    resumable: bool
    seen: dict[str, list[Any]]


class Runs:
    """The runs in `folder`, and the trainings on pictures below `data`, where that is given; `at_once` of them train at a time."""

    def __init__(self, folder: str | Path, data: str | Path | None = None, at_once: int = 1):
        self.folder, self.data, self.at_once = expanded(folder), None if data is None else expanded(data), at_once
        self.reading, self.starting = threading.Lock(), threading.Lock()
        self.pages: dict[str, RunPage] = {}
        self.processes: dict[str, subprocess.Popen] = {}

    # What there is

    def names(self) -> list[str]:
        """The folders that hold a run's records, by name, the latest begun first; links are not followed."""
        found = []
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                if is_text(entry.name) and entry.is_dir(follow_symlinks=False):
                    paths = [f"{entry.path}/{name}" for name in (*RECORDS, LOG, LOCK)]
                    begun = next((os.lstat(path).st_mtime for path in paths if os.path.lexists(path)), None)
                    found += [] if begun is None else [(begun, entry.name)]
        return [name for _, name in sorted(found, reverse=True)[:MOST]]

    def place(self, name: str | None) -> Path:
        """The folder of a run that is listed. Raises InputError for any other name."""
        if name not in self.names():
            raise InputError(f"there is no run '{shown(name, 80)}' here; choose one of the list")
        return self.folder / name

    def running(self, name: str) -> bool | None:
        """Whether a process is at a run; None where that cannot be known."""
        process = self.processes.get(name)
        if process is not None and process.poll() is None:
            return True
        try:
            return holder(self.folder / name) != 0
        except OSError:
            return None

    def look(self, name: str) -> Look:
        """How a run stands; only what is new of its records is read."""
        folder = self.place(name)
        with self.reading:
            page, running = self.pages.setdefault(name, RunPage(folder)), self.running(name)
            data, log = dict(page.data(running)), page.once("log", tail, folder / LOG)
            pictures = data.pop("pictures") | {"progress": False}  # which is a link to a file beside the page
            seen = {"run": page.stamps("data") + page.stamps("log"), "pictures": page.stamps("pictures"), "log": page.stamps("log")}
        data["notes"] = [*data["notes"], *warnings_of(log)]
        resumable = not running and not data["state"]["finished"] and (folder / "checkpoints").is_dir()
        return Look(data, pictures, log, bool(running), resumable, seen)

    def pictures(self) -> dict[str, Path]:
        """The folders at and below `data` that hold pictures themselves, by their names from there; links are not followed."""
        found, waiting = {}, [] if self.data is None else [("", self.data, 0)]
        while waiting and len(found) < MOST:
            name, path, depth = waiting.pop(0)
            with suppress(OSError), os.scandir(path) as listing:
                entries = sorted((e for e in listing if is_text(e.name) and not e.name.startswith(".")), key=lambda e: e.name)
                if any(is_image(e.name) or e.name in METADATA_NAMES for e in entries):
                    found[name or "."] = path
                below = [e for e in entries if e.is_dir(follow_symlinks=False)] if depth < DEEPEST else []
                waiting += [(f"{name}/{e.name}".lstrip("/"), Path(e.path), depth + 1) for e in below]
        return found

    @staticmethod
    def configurations() -> dict[str, Path | None]:
        """The configurations that a folder of pictures can be given to, by name, quickstart.yaml first; DEFAULTS is none."""
        found: dict[str, Path | None] = {}
        for name, path in sorted(bundled_configurations().items(), key=lambda item: item[0] != "quickstart.yaml"):
            with suppress(InputError):  # of another command, or with sources of its own
                load_config(path, ["data.folder=pictures", "output.folder=run"])
                found[name] = path
        return found | {DEFAULTS: None}

    # What is done

    def words(self, wanted: Wanted) -> list[str]:
        """The arguments of `latentfm train` for what is wanted.

        Raises InputError for what is not listed, for a name that is not plain, and for a rank of what is not asked to be an adapter.
        """
        config = picked("configuration", wanted.configuration, self.configurations())
        words = [] if config is None else ["--config", str(config)]
        words.append(f"data.folder={picked('folder of pictures', wanted.pictures, self.pictures())}")
        words.append(f"output.folder={self.folder / plain(wanted.name)}")
        if wanted.trains not in (None, EVERY_WEIGHT, ADAPTER):
            raise InputError(f"trains should be '{EVERY_WEIGHT}' or '{ADAPTER}', got '{shown(wanted.trains, 80)}'; or leave it out")
        if wanted.rank is not None and wanted.trains != ADAPTER:
            raise InputError(f"rank {shown(wanted.rank, 80)} is an adapter's: give trains '{ADAPTER}' too, or leave it out")
        numbers = {"train.steps": wanted.steps, "train.learning_rate": wanted.learning_rate}
        if wanted.trains == ADAPTER:
            numbers["train.adapter.rank"] = 16 if wanted.rank is None else wanted.rank
        elif wanted.trains == EVERY_WEIGHT:
            words.append("train.adapter=null")
        return words + [f"{name}={written(name, value)}" for name, value in numbers.items() if value is not None]

    def check(self, wanted: Wanted) -> tuple[list[str], dict[str, Any], str]:
        """(the arguments of `latentfm train`, their dry run, what the command line says of it). Raises InputError as that does."""
        from latentfm.cli.plan_tables import plain_console, show_dry_run
        from latentfm.training.dry_run import dry_run

        words, text = self.words(wanted), StringIO()
        try:
            found = dry_run(configured(words))
        except OSError as error:
            raise InputError(" ".join(str(error).split())) from error
        show_dry_run(found, plain_console(text, 160))
        return words, found, text.getvalue()

    def start(self, wanted: Wanted) -> None:
        """Begins a training, to be checked before. Raises InputError while as many train as may."""
        self.launch(wanted.name, self.words(wanted))

    def resume(self, name: str) -> None:
        """Goes on with a run that was stopped or died, by the options it was made with. Raises InputError where it cannot."""
        folder = self.place(name)
        if not (folder / "config.json").is_file():
            raise InputError(f"{shown(name)} was not begun, nothing of it can be gone on with; start it again")
        self.launch(name, ["--config", str(folder / "config.json"), f"output.folder={folder}", "--resume"])

    def launch(self, name: str, words: list[str]) -> None:
        """Starts `latentfm train` with these arguments on the run `name`, as a process of its own that writes its log there."""
        from latentfm.cli.app import PASSWORD
        from latentfm.training.checks import check_output

        environment = {name: value for name, value in os.environ.items() if name != PASSWORD} | {"PYTHONUNBUFFERED": "1"}
        folder = self.folder / name
        with self.starting:
            busy = [other for other in self.names() if self.running(other)]
            if len(busy) >= self.at_once or name in busy:
                raise InputError(
                    f"{listed(busy)} {'is' if len(busy) == 1 else 'are'} training; {count(self.at_once, 'training')} at a time may run "
                    "here: wait for the end, or stop it"
                )
            check_output(configured(words), "--resume" in words)
            if folder.is_symlink():
                raise InputError(f"'{shown(name)}' is a link to elsewhere; choose another name")
            folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            log = os.open(folder / LOG, flags, 0o666)
            try:
                check_regular(log)
                os.write(log, f"# {datetime.now().astimezone().isoformat(' ', 'seconds')}\n$ {command(words)}\n".encode())
                self.processes[name] = subprocess.Popen(
                    [sys.executable, "-m", "latentfm", "train", *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True, env=environment,
                )  # fmt: skip
            finally:
                os.close(log)

    def stop(self, name: str) -> None:
        """Asks a training to save after the step under way and end. Raises InputError where none runs, or on another machine."""
        folder, process = self.place(name), self.processes.get(name)
        if process is not None and process.poll() is None:
            process.terminate()
            return
        number = holder(folder)
        if number < 0:
            raise InputError(f"{shown(name)} is trained by another machine, or by another user's container; stop it there")
        if number == 0:
            raise InputError(f"{shown(name)} is not training")
        os.kill(number, signal.SIGTERM)


def configured(words: list[str]) -> RunConfig:
    """The options that arguments of `latentfm train` make."""
    config = words[1] if words[0] == "--config" else None
    return load_config(config, [word for word in words[2 if config else 0 :] if word != "--resume"])


def command(words: list[str]) -> str:
    """The command line that does the same."""
    return shlex.join(["latentfm", "train", *words])


def plain(name: Any) -> str:
    """The name of a new run. Raises InputError for one that is no plain name of a folder."""
    if not isinstance(name, str) or not PLAIN.fullmatch(name) or name.endswith((" ", ".")):
        raise InputError(
            f"the name '{shown(name, 80)}' of a run should be a plain one, as it names a folder: up to 64 letters from a to z, digits, and "
            "between them spaces, . _ or -"
        )
    return name


def picked(what: str, name: Any, known: dict[str, Any]) -> Any:
    """What stands under the name in a list. Raises InputError for a name that is not there."""
    if not isinstance(name, str) or name not in known:
        raise InputError(f"there is no {what} '{shown(name, 80)}' here; choose one of the list")
    return known[name]


def written(name: str, value: Any) -> str:
    """A number as an option's value. Raises InputError for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} should be a number, got '{shown(value, 80)}'")
    return str(int(value) if value == int(value) else value) if abs(value) < 1e15 else str(value)


def tail(path: Path) -> str:
    """The last lines of a log, safe to show, each as it stood at its end; "" where there is none."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - LOG_BYTES))
            text = file.read(LOG_BYTES).decode("utf-8", "replace")
    except (OSError, SpecialFile):
        return ""
    lines = text.split("\n")[1 if size > LOG_BYTES else 0 :]
    return "\n".join(shown(line.rstrip("\r").rsplit("\r", 1)[-1]) for line in lines).rstrip()


def warnings_of(log: str) -> list[str]:
    """The last warnings in a log, and the error at its end, since the training was last started."""
    lines = log.rpartition("\n$ ")[2].splitlines()
    return list(dict.fromkeys(line for line in lines if line.startswith(("warning: ", "error: "))))[-WARNINGS:]
