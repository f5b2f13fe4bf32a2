"""The memory a training step takes, as planning/memory.py says and as the process shows it, for MMDiT and diffusers' network beside it.

    python scripts/bench_memory.py                # ten minutes on two cores, 4 GB
    python scripts/bench_memory.py --only wide    # the cases whose name has this in it

Each measurement is a process of its own: two whole steps (forward, backward, clipping, AdamW, averages), the highest resident memory
of the second, less what was resident before the network was made. The last rows are one forward pass without gradients.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

DEEP = {"layers": 6, "heads": 6, "image": 1024, "text": 77, "batch": 4}  # activations are most of it
WIDE = {"layers": 5, "heads": 14, "image": 256, "text": 154, "batch": 4}  # weights are
CASES = {
    "deep float32": DEEP | {"precision": "float32"},
    "deep float32, qk-norm, dual": DEEP | {"precision": "float32", "qk_norm": True, "dual": 3},
    "deep float32, half checkpointed": DEEP | {"precision": "float32", "checkpointing": 0.5},
    "deep float32, checkpointed": DEEP | {"precision": "float32", "checkpointing": 1.0, "layers": 12},
    "deep autocast": DEEP | {"precision": "autocast", "batch": 8},
    "deep bfloat16, qk-norm": DEEP | {"precision": "bfloat16", "batch": 8, "qk_norm": True},
    "deep LoRA, autocast": DEEP | {"precision": "autocast", "batch": 8, "rank": 16},
    "deep LoRA, bfloat16": DEEP | {"precision": "bfloat16", "batch": 8, "rank": 16},
    "wide float32": WIDE | {"precision": "float32"},
    "wide autocast": WIDE | {"precision": "autocast"},
    "wide bfloat16, checkpointed": WIDE | {"precision": "bfloat16", "checkpointing": 1.0},
    "drawing float32": DEEP | {"precision": "float32", "batch": 16, "draw": True},
    "drawing bfloat16": DEEP | {"precision": "bfloat16", "batch": 16, "draw": True},
}


def configuration(case: dict) -> dict:
    """The arguments of the network of a case."""
    from latentfm.models.presets import size

    dual = tuple(range(case.get("dual", 0)))
    qk_norm = "rms_norm" if case.get("qk_norm") else None
    more = {"pos_embed_max_size": 32, "joint_attention_dim": 768, "dual_attention_layers": dual, "qk_norm": qk_norm}
    return size(case["layers"], case["heads"], **more)


def predicted(case: dict) -> tuple[str, int]:
    """(the phase, its bytes) that planning/memory.py expects to be the fullest."""
    from latentfm.planning.cost import Network, parameters, position_table
    from latentfm.planning.memory import Training, forward_memory, fullest, training_phases

    net, known = Network.of(configuration(case)), {"image", "text", "batch", "precision", "rank", "checkpointing"}
    run = Training(**{name: value for name, value in case.items() if name in known}, cpu=True)
    if case.get("draw"):
        stored = sum(parameters(net).values()) + position_table(net)
        return "forward pass", run.width * stored + forward_memory(net, run.image, run.text, run.batch, run.width, cpu=True)
    phase = fullest(training_phases(net, run))
    return phase.name, phase.total


def memory(field: str) -> int:
    """Bytes of this process in /proc/self/status: VmRSS now, VmHWM the most since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(case: dict, peer: bool) -> int:
    """Bytes that the steps of a case take in this process at their most."""
    import torch

    networks, dtype = {}, torch.bfloat16 if case["precision"] == "bfloat16" else torch.float32

    def work(case: dict) -> int:
        before = memory("VmRSS")
        networks["it"] = network = make_network(case, peer).to(dtype)
        if case.get("draw"):
            network.eval()
            Path("/proc/self/clear_refs").write_text("5")
            with torch.no_grad():
                network(**inputs(case, dtype), return_dict=False)
        else:
            train(case, network, dtype)
        return memory("VmHWM") - before

    work(case | {"layers": 1, "heads": 1, "image": 16, "text": 5, "batch": 1})  # the libraries' own first time
    networks.clear()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return work(case)


def make_network(case: dict, peer: bool):
    """The network of a case: ours, or diffusers' of the same configuration; with a LoRA where the case has one."""
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig

    from latentfm.models.linears import LORA_TARGETS
    from latentfm.models.mmdit import MMDiT

    network = (SD3Transformer2DModel if peer else MMDiT)(**configuration(case))
    if case.get("rank"):
        network.requires_grad_(False)
        network.add_adapter(LoraConfig(r=case["rank"], target_modules=list(LORA_TARGETS)))
    if case.get("checkpointing"):
        network.enable_gradient_checkpointing() if peer else network.set_gradient_checkpointing(case["checkpointing"])
    return network


def inputs(case: dict, dtype) -> dict:
    import torch

    side, batch = 2 * int(case["image"] ** 0.5), case["batch"]
    return {
        "hidden_states": torch.randn(batch, 16, side, side, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, case["text"], 768, dtype=dtype),
        "pooled_projections": torch.randn(batch, 2048, dtype=dtype),
        "timestep": torch.rand(batch) * 1000,
    }


def train(case: dict, network, dtype) -> None:
    """Two steps; the highest memory is that of the second, since the first makes the optimizer's state."""
    import torch

    from latentfm.config import TrainOptions
    from latentfm.training.optimizers.adamw import clip_gradient
    from latentfm.training.optimizers.ema import EMA
    from latentfm.training.optimizers.factory import make_optimizer

    network.train()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    ema = EMA(trained)
    optimizer = make_optimizer(trained, TrainOptions(weights="bfloat16" if dtype == torch.bfloat16 else "float32"))
    for step in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16) if case["precision"] == "autocast" else nullcontext():
            out = network(**inputs(case, dtype), return_dict=False)[0]
        (out.float() - 1).square().mean().backward()
        clip_gradient(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(trained, step + 1)
        if step == 0:
            Path("/proc/self/clear_refs").write_text("5")


def measured(case: dict, peer: bool = False) -> int:
    """`measure` in a process of its own, whose allocator gives back what it does not use."""
    returning = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--case", json.dumps(case), *(["--peer"] if peer else [])]
    done = subprocess.run(command, env=os.environ | returning, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a part of the cases' names")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(measure(arguments.case, arguments.peer))
        return
    print(f"{'MB':34s}{'predicted':>10s}{'measured':>10s}{'off':>7s}{'diffusers':>11s}{'of it':>7s}   highest at")
    for name, case in CASES.items():
        if arguments.only not in name:
            continue
        moment, expected = predicted(case)
        ours = measured(case)
        half = 0 < case.get("checkpointing", 0) < 1  # diffusers has all or none
        theirs = None if half else measured(case, peer=True)
        beside = f"{'':18s}" if theirs is None else f"{theirs / 1e6:11.0f}{ours / theirs:7.0%}"
        print(f"{name:34s}{expected / 1e6:10.0f}{ours / 1e6:10.0f}{expected / ours - 1:7.1%}{beside}   {moment}", flush=True)


if __name__ == "__main__":
    main()
