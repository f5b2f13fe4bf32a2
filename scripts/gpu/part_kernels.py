"""Where the time of one step goes on a GPU: a guided step of sampling and a training step, as tables of kernels.

    bash scripts/gpu/kit.sh kernels

SD3 medium at 1024 px in bfloat16, ours and diffusers'. Each row has the kernels by time with their share and count, the same by kind, the
time the device was idle in between, and how often the host waited for it.
"""

import time
from collections import defaultdict

import torch
from cells import DEVICE, SHRUNK, Cells, network_settings, quiet
from part_training import WORK, Case, make_folder, options, theirs
from torch.profiler import ProfilerActivity, profile

from bench_mmdit import kind_of  # isort: skip

SHOWN = 40
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def table(recorded: profile, wall: float) -> dict:
    """{"wall_ms", "busy_ms", "waits", "kinds", "kernels"} of what was recorded in `wall` seconds."""
    field = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    events, kinds, waits = [], defaultdict(float), 0
    for event in recorded.key_averages():
        waits += event.count if event.key.startswith(WAITS) and "Async" not in event.key else 0
        milliseconds = getattr(event, field, 0.0) / 1e3
        on_device = DEVICE == "cpu" or event.device_type == torch.autograd.DeviceType.CUDA
        if milliseconds > 0 and on_device:
            events.append((milliseconds, event.count, event.key[:160]))
            kinds[kind_of(event.key)] += milliseconds
    busy = sum(milliseconds for milliseconds, _, _ in events)
    rows = [{"ms": round(ms, 3), "share": round(ms / busy, 4), "count": n, "name": name} for ms, n, name in sorted(events, reverse=True)]
    return {
        "wall_ms": round(wall * 1e3, 2), "busy_ms": round(busy, 2), "waits": waits, "launches": sum(n for _, n, _ in events),
        "kinds": {kind: round(ms, 3) for kind, ms in sorted(kinds.items(), key=lambda pair: -pair[1])}, "kernels": rows[:SHOWN],
    }  # fmt: skip


def recorded(call) -> dict:
    """The table of one call, after two unrecorded ones."""
    for _ in range(2):
        call()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    with profile(activities=activities) as found:
        began = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter() - began
    return table(found, wall)


def sampling_step(name: str) -> dict:
    """Two guided steps of the pipeline called `name`; figures are of both together."""
    from part_sampling import pipelines, sampler

    settings = network_settings("sd3-medium")
    return recorded(sampler(pipelines(settings)[name], settings, 1, steps=2))


def training_step(mode: str) -> dict:
    """One step of the Trainer."""
    from accelerate.state import AcceleratorState, GradientState

    from latentfm.config import load_config
    from latentfm.training.trainer import Trainer

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    case = Case(mode, 64 if SHRUNK else 1024)
    trainer = Trainer(load_config(None, options(case, WORK / f"profiled {time.time():.0f} {mode}")))
    with trainer.resources:  # the run ends unsaved
        batches = iter(trainer.micro_batches())
        return recorded(lambda: trainer.train_step(batches))


def their_training_step() -> dict:
    """One step of diffusers' network in a plain loop: what `theirs` of training.py repeats, recorded whole and divided."""
    import part_training

    part_training.STEPS, part_training.WARM = 3, 1
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    with profile(activities=activities) as found:
        began = time.perf_counter()
        theirs(Case("bf16", 64 if SHRUNK else 1024))
        wall = time.perf_counter() - began
    return table(found, wall) | {"steps": 3, "note": "three steps together, loading included in wall_ms"}


def main() -> None:
    quiet()
    cells = Cells("kernels")
    for name in ("latentfm", "diffusers"):
        cells.run(f"sampling, two steps, {name}", lambda name=name: sampling_step(name), 40)
    cells.run("a pipeline of SD3 medium's shapes", lambda: {"made": bool(make_folder())}, 120)
    for mode in ("bf16", "lora"):
        cells.run(f"training, one step, {mode}, latentfm", lambda mode=mode: training_step(mode), 60)
    cells.run("training, three steps, bf16, diffusers", their_training_step, 60)


if __name__ == "__main__":
    WORK.mkdir(parents=True, exist_ok=True)
    main()
