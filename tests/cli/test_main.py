"""The front door: what the TAB key adds, and what an exit code says."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from latentfm.cli.checks import chosen_dtype
from latentfm.cli.main import app
from latentfm.errors import Failure, InputError


def completed(*words):
    """What the TAB key adds after the last of `words`, as a shell asks for it."""
    asked = {"_LATENTFM_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("latentfm", *words)), "COMP_CWORD": str(len(words))}
    return CliRunner().invoke(app, [], env=asked, prog_name="latentfm").stdout.split()


@pytest.mark.parametrize(
    ("words", "answers"),
    [
        (("gen",), ["generate"]),
        (("generate", "--sched"), ["--schedule"]),
        (("generate", "--schedule", "ka"), ["karras"]),
        (("generate", "--solver", "euler,he"), ["euler,heun"]),
        (("train", "train.weight_d"), ["train.weight_decay="]),
        (("train", "train.optimizer=adamw8"), ["train.optimizer=adamw8bit"]),
        (("cache", "data.onl"), ["data.online="]),
        (("train", "nothing.like=th"), []),
        (("plan", "--preset", "sd3.5-l"), ["sd3.5-large"]),
    ],
)
def test_the_shell_completes(words, answers):
    assert completed(*words) == answers


@pytest.mark.parametrize(
    ("name", "device", "multiplies", "chosen"),
    [
        ("auto", "cpu", True, "bfloat16"), ("auto", "cpu", False, "float32"), ("auto", "cuda", False, "bfloat16"),
        ("float16", "cpu", True, "float16"), ("float32", "cpu", True, "float32"),
    ],
)  # fmt: skip
def test_the_dtype_is_the_fast_one_unless_another_is_asked_for(monkeypatch, name, device, multiplies, chosen):
    monkeypatch.setattr("latentfm.training.precision.has_bfloat16", lambda _: multiplies)
    assert chosen_dtype(name, torch.device(device)) == chosen


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("no such folder"), 2, "error: no such folder"),
        (Failure("the disk is full"), 1, "error: the disk is full"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_exit_code_tells_wrong_input_from_failed_work(monkeypatch, error, code, said):
    def train(*_):
        raise error

    monkeypatch.setattr("latentfm.training.trainer.train", train)
    result = CliRunner().invoke(app, ["train", "data.folder=pictures", "output.folder=run"])
    assert (result.exit_code, result.stderr, result.stdout) == (code, said + "\n", "")


PEERS = """
import atexit, sys, time
from pathlib import Path
import torch
from latentfm.cli import main as command_line

folder, rank = Path(sys.argv[1]), int(sys.argv[2])

class SlowToGo:
    def __del__(self):  # while the interpreter is taken apart
        time.sleep(0.2)

def work(prog_name):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.distributed.barrier()
    if rank == 0:
        sys.setswitchinterval(100)  # the thread that lets go of the sum waits for its turn until Python ends
        torch.distributed.all_reduce(torch.ones(4), async_op=True)
        command_line.kept = SlowToGo()
        until = time.monotonic() + 2
        while time.monotonic() < until:
            pass
        print("done")
        atexit.register(lambda: print("said at the exit"))
    else:
        time.sleep(0.2)
        torch.distributed.all_reduce(torch.ones(4))
    sys.exit(3)

command_line.app = work
command_line.main()
"""


def test_a_process_of_several_ends_with_its_own_code_whatever_its_threads_still_do(tmp_path):
    """As two with a process group that nothing has destroyed; a thread that lets go of a tensor while Python ends would abort it."""
    (tmp_path / "peers.py").write_text(PEERS)
    environment = os.environ | {"WORLD_SIZE": "2", "PYTHONPATH": str(Path(__file__).parents[2])}
    peers = [
        subprocess.Popen([sys.executable, tmp_path / "peers.py", tmp_path, str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    told = [peer.communicate(timeout=60)[0] for peer in peers]
    assert [peer.returncode for peer in peers] == [3, 3] and told[0] == "done\nsaid at the exit\n"


FAULTS = """
import ctypes, resource, sys
from latentfm.cli.main import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for turn in range(9):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [libc.malloc(ctypes.c_size_t(size << 20)) for size in (1, 8, 24, 24, 24)]
    for piece, size in zip(pieces, (1, 8, 24, 24, 24)):
        ctypes.memset(piece, turn, size << 20)
    for piece in pieces:
        libc.free(piece)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
def test_memory_that_is_freed_is_there_for_the_next_step():
    """Pages that the system had to clear after the first turn: of 81 MiB a turn, or none."""
    counts = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("given back", "kept")
    }
    assert counts["kept"] < 100 and counts["given back"] > 8 * 1000
