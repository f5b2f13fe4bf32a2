"""Seconds until a first picture, and for one more: latentfm beside stock diffusers on the same folder, as a table for README.

    python scripts/bench_pipeline.py                    # both tables, about five minutes on two quiet cores
    python scripts/bench_pipeline.py --parts warm --dtype float32
    python scripts/bench_pipeline.py --steps 1 --repeats 1   # a first look

Cold: whole processes taken in turns, `latentfm generate` and a script of ten lines with StableDiffusion3Pipeline at its own defaults, then
`latentfm train --dry-run` and `latentfm data check` on six pictures. A turn draws a first picture and a second one; files are in the
operating system's cache, which only root could empty. Wall seconds, processor seconds (user and system) and the highest resident memory.
Warm: LatentFMPipeline, the same with compiled blocks, and StableDiffusion3Pipeline in one process, the same prompt, seed and settings, in
turns: at stock's defaults (28 steps, guidance 7, 256 tokens of T5), and the same with the length that the model is meant for. All numbers
are medians of the repeats; ours read the prompt once. The first pictures of compiled blocks are not counted, their seconds told apart.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROMPT = "a slice of pizza"
STOCK = """
import sys
import torch
from diffusers import StableDiffusion3Pipeline

folder, steps, out = sys.argv[1:]
pipe = StableDiffusion3Pipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
image = pipe("a slice of pizza", num_inference_steps=int(steps), generator=torch.Generator().manual_seed(0)).images[0]
image.save(out)
"""


def whole_process(command: list[str], folder: Path) -> tuple[float, float, float]:
    """(wall seconds, processor seconds, MiB at most) of a command run in `folder`. Raises RuntimeError with what it says when it fails.

    Its memory counts from this process's own, which is small before torch is imported.
    """
    began = time.perf_counter()
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=folder)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {said.read()[-2000:]}")
    wall, scale = time.perf_counter() - began, 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return wall, used.ru_utime + used.ru_stime, used.ru_maxrss * scale / 2**20


def cold(options: argparse.Namespace, model: Path) -> None:
    """Prints the table of whole processes."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as made:
        folder, pictures = Path(made), Path(made) / "pictures"
        pictures.mkdir()
        for number in range(6):
            Image.new("RGB", (96, 96), (40 * number, 30, 200)).save(pictures / f"{number}.png")
            (pictures / f"{number}.txt").write_text(f"a plain square, number {number}", "utf-8")
        ours = [sys.executable, "-m", "latentfm"]
        drawing = [*ours, "generate", PROMPT, "--seed", "0", "--steps", str(options.steps), "--out", str(folder / "drawn")]
        stock = [sys.executable, "-c", STOCK, str(model), str(options.steps), str(folder / "stock.png")]
        run = [f"data.folder={pictures}", f"output.folder={folder / 'run'}", f"data.cache={folder / 'cache'}"]
        commands = {
            "stock, first picture": stock,
            "latentfm generate, first picture": drawing,
            "stock, second": stock,
            "latentfm generate, second": drawing,
            "latentfm train --dry-run": [*ours, "train", *run, "--dry-run"],
            "latentfm data check": [*ours, "data", "check", str(pictures)],
        }
        turns = [{name: whole_process(command, folder) for name, command in commands.items()} for _ in range(options.repeats)]
    found = {name: [statistics.median(turn[name][i] for turn in turns) for i in range(3)] for name in commands}
    print("| whole process | wall, s | processor, s | memory, MiB | of stock's wall |\n|---|---|---|---|---|")
    for name, (wall, used, memory) in found.items():
        peer = found[f"stock, {name.rsplit(', ', 1)[-1]}"][0] if ", " in name else None
        share = "" if peer is None or name.startswith("stock") else f"{wall / peer:.2f}"
        print(f"| {name} | {wall:.2f} | {used:.2f} | {memory:,.0f} | {share} |", flush=True)


def warm(options: argparse.Namespace, model: Path) -> None:
    """Prints the table of pictures drawn one after another by pipelines that are loaded."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    from latentfm import LatentFMPipeline
    from latentfm.models.folder import read_info, t5_length

    own = t5_length(read_info(model))
    head = ("picture", "dtype", "pictures", "stock, s", "latentfm, s", "times as fast", "compiled, s", "times as fast")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    compiling = []
    for kind in options.dtype:
        dtype = {"torch_dtype": getattr(torch, kind)}
        classes = {"stock": StableDiffusion3Pipeline, "latentfm": LatentFMPipeline, "compiled": LatentFMPipeline}
        pipes = {name: pipeline.from_pretrained(model, **dtype) for name, pipeline in classes.items()}
        for pipe in pipes.values():
            pipe.set_progress_bar_config(disable=True)
        pipes["compiled"].transformer.compile_repeated_blocks()
        for length, label in ((256, "stock's defaults"), (own, f"{own} tokens")):
            for count in options.pictures:
                shared = {"num_inference_steps": options.steps, "num_images_per_prompt": count, "max_sequence_length": length}

                def seconds(pipe: Callable, shared: dict = shared) -> float:
                    began = time.perf_counter()
                    pipe(PROMPT, generator=torch.Generator().manual_seed(0), **shared)
                    return time.perf_counter() - began

                first = {name: seconds(pipe) for name, pipe in pipes.items()}
                turns = [{name: seconds(pipe) for name, pipe in pipes.items()} for _ in range(options.repeats)]
                stock, *ours = (statistics.median(turn[name] for turn in turns) for name in pipes)
                compiling.append(f"{first['compiled'] - ours[1]:.1f}")
                told = " | ".join(f"{own:.3f} | {stock / own:.2f}" for own in ours)
                print(f"| {label} | {kind} | {count} | {stock:.3f} | {told} |", flush=True)
    print(f"\nseconds that the first compiled picture of each row took longer: {', '.join(compiling)}")


def main() -> None:
    from latentfm.bundled import bundled_model
    from latentfm.models.onednn import processor

    parts = {"cold": cold, "warm": warm}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=parts)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"), help="of the warm table")
    parser.add_argument("--pictures", nargs="+", type=int, default=[1, 4], help="at once, of the warm table")
    parser.add_argument("--steps", type=int, default=28)
    options = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores, median of {options.repeats}\n")
    for part in options.parts:
        parts[part](options, bundled_model())
        print()


if __name__ == "__main__":
    main()
