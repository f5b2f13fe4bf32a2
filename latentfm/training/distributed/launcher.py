"""What started this process and its peers, and which of them is gone when one no longer answers."""

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from threading import Event, Thread

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from latentfm.errors import Failure
from latentfm.files import reason
from latentfm.training.distributed.processes import in_words
from latentfm.training.stop import Stopped
from latentfm.words import count, shortened, shown

SECONDS_BETWEEN_POLLS, SECONDS_TO_NOTICE = 1.0, 5.0
LOST = ("gloo", "NCCL", "Connection", "connection", "Socket", "Broken pipe", "TCPStore")  # in what torch says where a peer went


def fewer_than_asked(joined: int, environment: Mapping[str, str] | None = None) -> str | None:
    """A line where a launcher was asked for more processes than the `joined` that train together; None where that cannot be told."""
    told = os.environ if environment is None else environment
    asked = int(told["WORLD_SIZE"]) if told.get("WORLD_SIZE", "").isdecimal() else None
    if asked is None and "ACCELERATE_MIXED_PRECISION" in told:  # accelerate launch, whose plain way of starting tells no number
        asked = asked_of_accelerate(parent_command())
    if asked is None or asked <= joined:
        return None
    return (
        f"{count(asked, 'process', 'processes')} were asked for and {joined} started (accelerate launch --cpu starts one where there is no "
        f"MPI); for {asked} without GPUs: torchrun --nproc_per_node {asked} -m latentfm train ..., or configs/accelerate/cpu-2.yaml"
    )


def parent_command() -> list[str]:
    """The command line of the process that started this one; empty where it cannot be seen."""
    import psutil  # as Accelerate does

    try:
        return psutil.Process(os.getppid()).cmdline()
    except (psutil.Error, OSError):
        return []


def asked_of_accelerate(command: Sequence[str]) -> int | None:
    """The number of processes in a command line of accelerate launch, or in the configuration it names."""
    from accelerate.commands.launch import launch_command_parser

    at = next((place for place, word in enumerate(command[:3]) if "accelerate" in word), None)
    if at is not None:
        with suppress(SystemExit), redirect_stderr(StringIO()):  # what it cannot read is the launcher's to tell
            given, _ = launch_command_parser().parse_known_args([word for word in command[at + 1 :] if word != "launch"] + ["script"])
            return given.num_processes or (processes_of(Path(given.config_file)) if given.config_file else None)
    return None


def processes_of(path: Path) -> int | None:
    """The number of processes in a configuration of Accelerate."""
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        found = getattr(load_config_from_file(str(path)), "num_processes", None)
    except Exception:  # it is the launcher's to judge
        return None
    return found if isinstance(found, int) else None


class Peers:
    """The processes of a run by machine and process id, so that one that goes can be named. All make it together."""

    def __init__(self, accelerator: Accelerator):
        self.rank = accelerator.process_index
        own = [(platform.node(), os.getpid())]
        self.places: list[tuple[str, int]] = gather_object(own) if accelerator.num_processes > 1 else []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A context in which a connection that breaks is a Failure that names the process at its other end.

        An error of one process ends the others: at once where its connections break with it (gloo), else (NCCL waits for minutes)
        SECONDS_TO_NOTICE after it has left word in the store that they all met at.
        """
        if not self.places:
            yield
            return
        store, left = torch.distributed.PrefixStore("latentfm peers", torch.distributed.distributed_c10d._get_default_store()), Event()
        Thread(target=self.end_with_the_others, args=(store, left), daemon=True).start()
        try:
            with self.lost_ones_named():
                yield
        except Exception as error:
            with suppress(RuntimeError, OSError):  # who holds the store may be gone
                if not isinstance(error, Stopped):  # which all are
                    store.set("ended", f"process {self.rank} of {len(self.places)}: {in_words(error)}")
            raise
        finally:
            left.set()

    def end_with_the_others(self, store: torch.distributed.Store, left: Event) -> None:
        """Ends this process, in whatever collective it waits, when another one has ended by an error; not when it has `left` by itself."""
        with suppress(RuntimeError, OSError):
            while not left.wait(SECONDS_BETWEEN_POLLS):
                if store.check(["ended"]) and not left.wait(SECONDS_TO_NOTICE):
                    said = shown(store.get("ended").decode())
                    print(f"error: {said}; --resume goes on from the newest checkpoint", file=sys.stderr, flush=True)
                    os._exit(1)

    @contextmanager
    def lost_ones_named(self) -> Iterator[None]:
        """A context whose broken connections are Failures that name who is gone."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            lost = isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in LOST)
            if isinstance(error, torch.OutOfMemoryError) or not lost:
                raise
            said = re.sub(r"^\[[^]]*\] ", "", reason(error, 300))  # without the line of C++ that says it
            raise Failure(f"{self.who_is_gone()} ({shortened(said)}); --resume goes on from the newest checkpoint") from error

    def who_is_gone(self) -> str:
        """Which processes of this machine are no more, in words; of other machines that cannot be seen."""
        here = platform.node()
        gone = [(rank, pid) for rank, (node, pid) in enumerate(self.places) if node == here and rank != self.rank and is_gone(pid)]
        if gone:
            named = ", ".join(f"process {rank} of {len(self.places)} (pid {pid} on {shown(here)})" for rank, pid in gone)
            return f"{named} is gone, killed or ended by an error of its own"
        others = sorted({node for node, _ in self.places} - {here})
        return f"a process of this run no longer answers{' on ' + shown(' or '.join(others)) if others else ''}"


def is_gone(pid: int) -> bool:
    """Whether a process of this machine has ended, waited for by its parent or not."""
    import psutil

    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
