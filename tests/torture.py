"""Kills a training at random moments, resumes it each time, and compares it with the same training left alone.

    python tests/torture.py                         # 20 kills, one process: a minute on two cores
    python tests/torture.py --processes             # then 1 -> 2 -> 4 processes by DDP, FSDP2 and a mixture: a minute more
    python tests/torture.py --points 100 --seed 7   # other moments

The training is real and tiny: two buckets, several captions a picture, two T5 lengths, flips, dropout, validation, pictures. SIGKILL hits
all its processes at once: while the cache is filled, while a run starts, inside a step, inside a save, just after its rename, inside a
validation, inside the drawing of pictures. With one process all that is compared must be equal to the bit: losses, gradient norms, losses
and counts by t, validations, every checkpoint, the pictures and the finished model. With other numbers of processes the same samples at
the same times must give the same losses to 1e-5. Prints a line a kill; exit code 1 when anything differs.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT, VALIDATION, PICTURES = 6, 5, 9  # steps between
STEPS, STEPS_OF_A_CHAIN = 120, 30
PICTURES_ON_DISK, BATCH = 96, 8
EXACT = ("loss", "gradient_norm", "learning_rate", "loss_by_t", "count_by_t")
KINDS = ("step", "save", "validation", "pictures", "rename", "step", "start")
WAIT = 180.0  # seconds for a moment to come
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip
MODES = {  # how processes share a training: what accelerate launch puts into their environment
    "DDP": {}, "FSDP2": FSDP2, "FSDP2, CPU": FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"},
}  # fmt: skip
CHAINS = {"DDP": ("DDP", "DDP"), "FSDP2": ("FSDP2", "FSDP2"), "mixed": ("FSDP2, CPU", "FSDP2")}  # of two processes, then of four


# The training


def write_inputs(folder: Path, pictures: int = PICTURES_ON_DISK) -> None:
    """Writes folder/pictures, of two shapes with one to three captions each, and folder/pipeline, the tests' tiny Stable Diffusion 3."""
    import numpy as np
    from PIL import Image

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import SENTENCES, tiny_pipeline

    tiny_pipeline(folder / "pipeline")
    (folder / "pictures").mkdir()
    for number in range(pictures):
        coarse = Image.fromarray(np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize((96, 96) if number % 2 else (72, 110), Image.Resampling.BICUBIC).save(folder / "pictures" / f"{number:03d}.png")
        captions = [SENTENCES[(number + 3 * turn) % len(SENTENCES)] for turn in range(1 + number % 3)]
        (folder / "pictures" / f"{number:03d}.txt").write_text("\n".join(captions), "utf-8")


def settings(inputs: Path, out: Path, cache: Path, steps: int = STEPS, *more: str) -> list[str]:
    """The options of the training into `out`."""
    return [
        f"model.pipeline={inputs / 'pipeline'}", f"data.folder={inputs / 'pictures'}", f"data.cache={cache}", f"output.folder={out}",
        "data.size=32", "data.buckets=2", "data.flip=true", "data.t5_lengths={8: 0.5, 12: 0.5}", "data.workers=1", f"train.steps={steps}",
        f"train.batch_size={BATCH}", "train.learning_rate=1e-3", "train.warmup_steps=4", "train.decay=constant",
        "train.mixed_precision=no", "train.dropout=0.2", "train.dropout_each=0.2", "validation.held_out=4", "validation.times=4",
        f"validation.every={VALIDATION}", f"sample.every={PICTURES}", "sample.steps=2", "sample.prompts=[a red apple, a blue car]",
        f"output.checkpoint_every={CHECKPOINT}", *more,
    ]  # fmt: skip


def train_apart(options: list[str], resume: bool, log: Path, environment: dict[str, str]) -> None:
    """`latentfm train` in this process, which leads a group of its own, its output going to the end of `log`."""
    os.setsid()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    import torch

    from latentfm.cli.main import main

    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as it is where nobody set another
    torch.set_num_threads(1)
    sys.argv = ["latentfm", "train", *(["--resume"] if resume else []), *options]
    main()


class Started:
    """A training under way, of one process or several, forked from a server that has imported everything, with what torchrun tells them."""

    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["latentfm.training.trainer", "torch.utils.tensorboard"])

    def __init__(self, options: list[str], resume: bool, log: Path, processes: int = 1, mode: str = "DDP"):
        self.log, self.began = log, time.time()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)} | meeting | MODES[mode]
        alone = processes == 1 and not MODES[mode]
        self.ranks = []
        for rank in range(processes):
            told = {"LATENTFM_DEBUG": "1"} | ({} if alone else world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            self.ranks.append(self.forks.Process(target=train_apart, args=(options, resume, log, told)))
            self.ranks[-1].start()

    def code(self) -> int | None:
        """The exit code, of the process that failed where one did; None while all run, or the others of one that ended well."""
        codes = [rank.exitcode for rank in self.ranks]
        failed = next((code for code in codes if code), None)
        return failed if failed is not None else None if None in codes else 0

    def tell(self, number: int) -> None:
        """Sends a signal to its first process."""
        os.kill(self.ranks[0].pid, number)

    def kill(self) -> None:
        """Ends all its processes at once, and what they have started."""
        tree = []
        for rank in self.ranks:
            try:
                tree += [psutil.Process(rank.pid), *psutil.Process(rank.pid).children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        for process in tree:
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        psutil.wait_procs(tree, timeout=30)
        for rank in self.ranks:
            rank.join(timeout=30)

    def finish(self, seconds: float = 600.0) -> int:
        """Waits for its end and returns the exit code; the others of one that failed are killed, as torchrun does."""
        end = time.monotonic() + seconds
        while (code := self.code()) is None and time.monotonic() < end:
            time.sleep(0.02)
        self.kill()
        return -signal.SIGALRM if code is None else code


# What is in a run's folder


def rows_of(path: Path) -> list[dict]:
    """The whole rows of a file of JSON lines."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def last_step(out: Path) -> int:
    rows = rows_of(out / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def saved(out: Path) -> list[int]:
    """The steps of the checkpoints that are in place."""
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step-????????") if (path / "state.json").exists())


def newest(out: Path) -> int:
    return max(saved(out), default=0)


def version(path: Path) -> int:
    """A number that changes when a file is replaced, or a folder written into; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def count_files(folder: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))


# The moments


@dataclass(frozen=True)
class Moment:
    """A moment to kill at: `delay` seconds after `come` first says True."""

    kind: str
    come: Callable[[], bool]
    delay: float


def moment(kind: str, draw: random.Random, out: Path, cache: Path, before: int) -> Moment:
    """A random moment of a kind in a run that goes on from its newest checkpoint; `before` is the version of run.json before the start."""
    metrics, at = out / "metrics.jsonl", newest(out)

    def going() -> bool:
        return version(out / "run.json") != before

    def after(every: int, skip: int = 0) -> int:
        return (at // every + 1 + skip) * every

    def reached(step: int) -> bool:
        return going() and metrics.exists() and last_step(out) >= step

    if kind == "cache":
        files = draw.randrange(3)  # there are three: the prompts of two lengths, the pictures
        return Moment(kind, lambda: count_files(cache) > files, draw.uniform(0, (0.01, 0.1, 0.002)[files]))
    if kind == "start":
        return Moment(kind, going, draw.uniform(0, 0.4))
    if kind == "save":
        partial = out / "checkpoints" / f"step-{after(CHECKPOINT, draw.randrange(2)):08d}.partial"
        left = version(partial)  # by an earlier kill
        return Moment(kind, lambda: going() and version(partial) not in (0, left), draw.uniform(0, 0.03))
    if kind == "rename":
        folder = out / "checkpoints" / f"step-{after(CHECKPOINT, draw.randrange(2)):08d}"
        return Moment(kind, lambda: going() and folder.exists(), draw.uniform(0, 0.005))
    if kind == "validation":
        step = after(VALIDATION)
        return Moment(kind, lambda: reached(step), draw.uniform(0, 0.02))
    if kind == "pictures":
        step = after(PICTURES)
        rows = out / "validation.jsonl"
        validated = (lambda: step in {row["step"] for row in rows_of(rows)}) if step % VALIDATION == 0 else lambda: True
        return Moment(kind, lambda: reached(step) and validated(), draw.uniform(0, 0.04))
    step = at + 1 + draw.randrange(2 * CHECKPOINT)
    return Moment(kind, lambda: reached(step), draw.uniform(0, 0.06))


def wait_for(awaited: Moment, started: Started) -> bool:
    """Waits for a moment; whether it came before the run's end."""
    began = time.monotonic()
    while not awaited.come():
        if started.code() is not None:
            return False
        if time.monotonic() - began > WAIT:
            raise TimeoutError(f"the moment '{awaited.kind}' did not come; see {started.log}")
        time.sleep(0.0005)
    time.sleep(awaited.delay)
    return started.code() is None


def what_was_hit(out: Path, cache: Path, before: int, began: float) -> str:
    """What a run that was killed was doing, by what it left."""
    if version(out / "run.json") == before:
        kinds = [path.name for path in sorted(cache.iterdir())] if cache.exists() else []
        partial = any(cache.rglob("*.partial"))
        return "starting" if before else f"the cache, with {' and '.join(kinds) or 'nothing'}{', in a write' if partial else ''}"
    if partial := [path for path in (out / "checkpoints").glob("*.partial") if path.stat().st_mtime >= began]:
        return f"the save of step {int(partial[0].name[5:13])}, {count_files(partial[0])} files in"
    step = last_step(out)
    picture = out / "samples" / f"step-{step:08d}.png"
    if step % VALIDATION == 0 and step not in {row["step"] for row in rows_of(out / "validation.jsonl")}:
        return f"the validation of step {step}"
    if step % PICTURES == 0 and not (picture.exists() and picture.stat().st_mtime >= began):
        return f"the pictures of step {step}"
    if step % CHECKPOINT == 0:
        return f"just saved, at step {step}" if step == newest(out) else f"the save of step {step}, before its first file"
    return f"step {step + 1}"


# What must be equal


def differing_rows(out: Path, reference: Path, tolerance: float = 0.0) -> str | None:
    """The first row of the log or of the validations that differs from the reference's; None when none does."""
    for name, columns in (("metrics.jsonl", EXACT), ("validation.jsonl", ("validation_loss", "by_t"))):
        theirs = {row["step"]: row for row in rows_of(reference / name)}
        mine = rows_of(out / name)
        steps = [row["step"] for row in mine]
        if name == "metrics.jsonl" and steps != list(range(1, len(steps) + 1)):
            return f"{name} has the steps {steps}"
        if len(set(steps)) != len(steps):
            return f"{name} has a step twice"
        for row in mine:
            for column in columns:
                value, wanted = row[column], theirs[row["step"]][column]
                if not same(value, wanted, tolerance * (10 * value if column == "gradient_norm" else 1)):
                    return f"{name} step {row['step']} {column}: {value} is not {wanted}"
    return None


def same(first: object, second: object, tolerance: float) -> bool:
    """Whether two values of a row are equal, or with a tolerance close."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name], tolerance) for name in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(same(a, b, tolerance) for a, b in zip(first, second))
    if isinstance(first, float) and isinstance(second, float) and tolerance:
        return math.isclose(first, second, rel_tol=0, abs_tol=tolerance)
    return first == second


def differing_checkpoints(out: Path, reference: Path) -> str | None:
    """What of the checkpoints in place is not the reference's of that step, to the bit; None when all is."""
    from latentfm.errors import InputError
    from latentfm.training.checkpoint import storage

    for step in saved(out)[-2:]:
        paths = [folder / "checkpoints" / f"step-{step:08d}" for folder in (out, reference)]
        try:
            (mine, info), (theirs, other) = map(storage.load, paths)
        except InputError as error:
            if step != newest(out):  # an older one whose removal was interrupted
                continue
            return str(error)
        if info["files"] != other["files"]:
            import torch

            changed = [name for name in theirs if name not in mine or not torch.equal(mine[name].load(), theirs[name].load())]
            return f"checkpoint {step}: {', '.join(changed[:3]) or 'its files'}"
        if (info["data"], info.get("validation_loss")) != (other["data"], other.get("validation_loss")):
            return f"checkpoint {step}: its state of the data or its validation"
    return None


def differing_files(out: Path, reference: Path) -> str | None:
    """The first of the pictures and the finished model's files that is not the reference's, to the bit; None when all are."""
    for folder in ("samples", "model"):
        names = [sorted(p.relative_to(where) for p in (where / folder).rglob("*") if p.is_file()) for where in (out, reference)]
        if names[0] != names[1]:
            return f"{folder} has other files: {', '.join(map(str, sorted(set(names[0]) ^ set(names[1]))))}"
        for name in names[0]:
            if (out / name).read_bytes() != (reference / name).read_bytes():
                return str(name)
    return None


# The torture


@dataclass
class Torture:
    """Kills and comparisons of trainings under `folder`; `failed` says whether anything differed."""

    folder: Path
    draw: random.Random
    tell: Callable[[str], None] = print
    steps: int = STEPS
    failed: bool = False
    epochs: Counter = field(default_factory=Counter)

    @property
    def reference(self) -> Path:
        return self.folder / "reference"

    def prepare(self) -> None:
        """Writes the inputs and trains the reference, all of whose checkpoints are kept."""
        write_inputs(self.folder)
        options = settings(self.folder, self.reference, self.folder / "cache of the reference", self.steps, "output.keep=1000")
        began = time.monotonic()
        if code := Started(options, False, self.folder / "reference.log").finish():
            raise SystemExit(f"the reference ended with {code}; see {self.folder / 'reference.log'}")
        self.tell(f"the training left alone: {self.steps} steps, {time.monotonic() - began:.0f} s")

    def line(self, point: object, hit: str, lost: object, verdict: str | None) -> None:
        self.failed |= verdict is not None
        self.tell(f"{point!s:>9}  {hit:<52}  {lost!s:>5}  {verdict or 'exact'}")

    def kill_once(
        self, point: object, kind: str, out: Path, cache: Path, options: list[str], processes: int = 1, mode: str = "DDP"
    ) -> bool:
        """Starts or resumes a run and kills it at a moment of a kind; whether it was killed before its end."""
        before = version(out / "run.json")
        awaited = moment(kind, self.draw, out, cache, before)
        started = Started(options, newest(out) > 0, self.folder / f"{out.name}.log", processes, mode)
        alive = wait_for(awaited, started)
        started.kill()
        if not alive:
            self.line(point, f"nothing: the run ended before '{kind}' came", "", f"exit code {started.code()}, see {started.log}")
            return False
        hit, step = what_was_hit(out, cache, before, started.began), last_step(out)
        verdict = self.differing(out, 0.0 if processes == 1 else 1e-5)
        if step:
            self.epochs[step * BATCH // (PICTURES_ON_DISK - 4)] += 1
        self.line(point, hit, step - newest(out), verdict)
        return True

    def differing(self, out: Path, tolerance: float) -> str | None:
        """What a run under way has done otherwise than the reference; None when nothing."""
        return differing_rows(out, self.reference, tolerance) or (None if tolerance else differing_checkpoints(out, self.reference))

    def one_process(self, kinds: list[str]) -> None:
        """Kills one run at a moment of each kind, one after the other, and lets it end."""
        out, cache = self.folder / "killed", self.folder / "cache"
        options = settings(self.folder, out, cache, self.steps)
        for number, kind in enumerate(kinds, start=1):
            if not self.kill_once(number, kind, out, cache, options):
                break
        self.end(out, options)
        twice = sum(count > 1 for count in self.epochs.values())
        self.tell(f"epochs with two kills or more: {twice}")

    def end(self, out: Path, options: list[str], processes: int = 1, mode: str = "DDP", tolerance: float = 0.0) -> None:
        """Lets a run go on to its end and compares all of it."""
        log = self.folder / f"{out.name}.log"
        if not (out / "model").exists() and (code := Started(options, newest(out) > 0, log, processes, mode).finish()):
            verdict: str | None = f"ended with {code}; see {log}"
        else:
            verdict = self.differing(out, tolerance) or (None if tolerance else differing_files(out, self.reference))
        self.line("the end", f"{last_step(out)} steps", "", verdict)

    def chain(self, name: str) -> None:
        """One process killed, then two, then four, which share the training as CHAINS[name] says."""
        two, four = CHAINS[name]
        out, cache = self.folder / name, self.folder / f"cache of {name}"
        options = settings(self.folder, out, cache, STEPS_OF_A_CHAIN)
        self.kill_once("1", "step", out, cache, options)
        self.kill_once(f"2 {two}", self.draw.choice(("step", "save", "validation", "pictures")), out, cache, options, 2, two)
        self.end(out, options, 4, four, tolerance=1e-5)


def kinds_of(points: int, draw: random.Random) -> list[str]:
    """What to kill, `points` times: the cache first, then the others in a random order, each as often as the others to one."""
    caches = max(1, points // 7)
    rest = [KINDS[number % len(KINDS)] for number in range(points - caches)]
    draw.shuffle(rest)
    return ["cache"] * caches + rest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20, help="kills of the run of one process")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", action="store_true", help="also go from 1 to 2 to 4 processes")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    given = parser.parse_args()
    if given.points < 1:
        parser.error(f"--points {given.points}: at least 1")
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **quiet}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        draw = random.Random(given.seed)
        torture = Torture(folder, draw, lambda text: print(text, flush=True), max(STEPS, 6 * given.points))
        print(f"seed {given.seed}, {given.points} kills", flush=True)
        torture.prepare()
        torture.line("point", "what was hit", "lost", "verdict")
        torture.failed = False
        torture.one_process(kinds_of(given.points, draw))
        if given.processes:
            for name in CHAINS:
                print(f"{name}: 1 process, 2, 4", flush=True)
                torture.chain(name)
        print(f"{'FAILED' if torture.failed else 'all exact'}, {time.monotonic() - began:.0f} s", flush=True)
    return int(torture.failed)


if __name__ == "__main__":
    sys.exit(main())
