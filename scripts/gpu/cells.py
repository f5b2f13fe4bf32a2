"""What the parts of the GPU kit share: measurements that outlive the process, a clock that ends in time, the machine and its ceilings.

Every measurement is a cell with a name. Its row is written to RESULTS/PART.json before it begins and when it is done, so a part that ran
out of time, or whose process a GPU's fault has killed, goes on with the next cell when it is started again (scripts/gpu/kit.sh does).
"""

import gc
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ceilings import ceilings, seconds  # noqa: E402, isort: skip

OUT_OF_TIME, LOST_DEVICE = 75, 76  # exit codes: to be started again, later or at once
SHRUNK = os.environ.get("KIT_SCALE", "full") == "shrunk"  # the whole kit in miniature, on a CPU too
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16
TINY = {  # SD3's networks shrunk
    "sample_size": 16, "num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128, "joint_attention_dim": 64,
    "pooled_projection_dim": 64, "pos_embed_max_size": 16,
}  # fmt: skip


def network_settings(preset: str) -> dict[str, Any]:
    """The arguments of a network of latentfm's presets, shrunk if the kit is."""
    from latentfm.models.presets import PRESETS

    settings = PRESETS[preset]
    if not SHRUNK:
        return settings
    dual = settings.get("dual_attention_layers")
    return settings | TINY | ({"dual_attention_layers": (0,)} if dual else {})


class Cells:
    """The rows of one part, by name, in RESULTS/PART.json."""

    def __init__(self, part: str):
        if DEVICE == "cpu" and not SHRUNK:
            raise SystemExit("torch sees no GPU here; KIT_SCALE=shrunk tries the kit out in miniature, on a CPU too")
        folder = Path(os.environ.get("RESULTS", "build/gpu/results"))
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.call = folder / f"{part}.json", os.environ.get("KIT_CALL", str(os.getpid()))
        self.deadline = float(os.environ.get("KIT_DEADLINE", time.time() + 540))
        saved = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}
        if saved.get("machine", {}).get("device", name_of_device()) != name_of_device():
            raise SystemExit(f"{self.path} is of {saved['machine']['device']}, this is {name_of_device()}: move it away, or set RESULTS")
        self.rows: dict[str, dict[str, Any]] = saved.get("rows", {})
        for row in self.rows.values():
            if row["state"] == "started":
                row |= {"state": "failed", "error": "its process ended: see the log", "call": self.call}
        again = os.environ.get("KIT_AGAIN")
        self.rows = {name: row for name, row in self.rows.items() if not (again and again in name)}
        self.saved = {"part": part, "scale": "shrunk" if SHRUNK else "full", "machine": saved.get("machine") or machine()}
        self.write()

    def write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.saved | {"rows": self.rows}, indent=1) + "\n", "utf-8")
        partial.replace(self.path)

    def run(self, name: str, measure: Callable[[], dict[str, Any]], about: float = 60.0) -> dict[str, Any] | None:
        """The values of the cell `name`: those it has, or what `measure` returns; None where it failed in this call.

        about: the seconds it may take; where fewer are left the process ends, with OUT_OF_TIME. What failed in an earlier call is tried
        again: somebody may have mended it.
        """
        row = self.rows.get(name)
        if row is not None and (row["state"] == "done" or row.get("call") == self.call):
            return row if row["state"] == "done" else None
        if time.time() + (0 if SHRUNK else about) > self.deadline:
            print(f"no time left for '{name}' (about {about:.0f} s): start the part again, it goes on here", flush=True)
            raise SystemExit(OUT_OF_TIME)
        self.rows[name] = {"state": "started"}
        self.write()
        began = time.perf_counter()
        try:
            values = measure()
            self.rows[name] = {"state": "done", "took": round(time.perf_counter() - began, 1), **values}
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split())[:500] or type(error).__name__
            kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
            self.rows[name] = {"state": "failed", "error": f"{kind}: {text}", "call": self.call}
        self.write()
        print(f"{name}: {json.dumps(self.rows[name])}", flush=True)
        clear()
        return self.rows[name] if self.rows[name]["state"] == "done" else None

    def ceilings(self) -> dict[str, float]:
        """{"tflops", "gb_per_second"}: what this device multiplies and copies, measured in this run of the kit."""
        return self.run("ceilings", lambda: ceilings(DEVICE, DTYPE, SHRUNK), 20) or {"tflops": float("nan"), "gb_per_second": float("nan")}


def quiet() -> None:
    """Leaves the libraries' own remarks out of the log; in miniature nothing is compiled, which would take minutes."""
    from latentfm.cli.terminal import quiet_libraries
    from latentfm.models.mmdit import MMDiT

    quiet_libraries()
    if SHRUNK:
        MMDiT.compile_repeated_blocks = lambda network, **_: compile_blocks(network)


def machine() -> dict[str, Any]:
    """What the figures are of."""
    versions = {}
    for name in ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "xformers", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    found = {"device": name_of_device(), "python": platform.python_version(), "cores": os.cpu_count(), "versions": versions}
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
        found |= {"cudnn": torch.backends.cudnn.version()}
    return found


def name_of_device() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def clear() -> None:
    """Gives memory back, and ends the process where the device does not answer any more."""
    gc.collect()
    if DEVICE == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception:
            print("the device is lost to this process: it ends, the next goes on", flush=True)
            os._exit(LOST_DEVICE)
        torch.cuda.empty_cache()


# Time and memory


def timed(calls: dict[str, Callable[[], object]], repeats: int = 5, warm: int = 2) -> dict[str, dict[str, float]]:
    """By name {"seconds": median, "spread": (longest - shortest) / median, "memory_gib": peak} of calls that are taken in turn."""
    repeats, warm = (1, 1) if SHRUNK else (repeats, warm)
    memory = {}
    for name, call in calls.items():
        for _ in range(warm):
            call()
        forget_peak()
        call()
        memory[name] = peak_memory()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(seconds(call, DEVICE))
    return {
        name: {
            "seconds": (middle := statistics.median(values)), "spread": round((max(values) - min(values)) / middle, 4),
            "memory_gib": memory[name],
        }
        for name, values in taken.items()
    }  # fmt: skip


def forget_peak() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float | None:
    """The most GiB that tensors took on the device since `forget_peak`; None on a CPU."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 3) if DEVICE == "cuda" else None


def compile_blocks(network: torch.nn.Module) -> None:
    """torch.compile on each block: MMDiT's own way, and as its users would for diffusers'; in miniature without the compiler."""
    if not SHRUNK and hasattr(network, "blocks_are_compiled"):
        network.compile_repeated_blocks()
        return
    torch._dynamo.config.recompile_limit = 64
    for block in network.transformer_blocks:
        block.compile(**({"backend": "aot_eager"} if SHRUNK else {}))


def rate(work: float, taken: float, peak: float) -> dict[str, float]:
    """{"tflops", "share"}: `work` operations in `taken` seconds, and what that is of `peak` TFLOP/s."""
    return {"tflops": round(work / taken / 1e12, 2), "share": round(work / taken / 1e12 / peak, 4)}
