"""Real trainings on a GPU: one wait a step, pinned batches, resumed to the bit, stopped and saved, compiled, split by FSDP2."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentfm.errors import InputError
from latentfm.training.checkpoint import storage
from latentfm.training.stop import Stopped

ROOT = Path(__file__).resolve().parents[2]
MODES = {
    "float32": ["train.mixed_precision=no"],
    "autocast": ["train.mixed_precision=bf16"],
    "bfloat16": ["train.weights=bfloat16", "train.moments=bfloat16"],
    "masters": ["train.weights=bfloat16", "train.master_weights=true"],
    "checkpointed": ["train.mixed_precision=bf16", "train.gradient_checkpointing=0.5", "train.gradient_accumulation=2"],
    "LoRA": ["train.adapter={rank: 4}", "train.mixed_precision=bf16"],
    "LoRA on 4 bits": ["train.adapter={rank: 4, base: nf4}", "train.weights=bfloat16"],
    "8-bit moments": ["train.optimizer=adamw8bit", "train.mixed_precision=bf16"],
    "paged": ["train.optimizer=paged_adamw", "train.mixed_precision=bf16"],
    "averages on the CPU": ["train.ema_device=cpu", "train.mixed_precision=bf16"],
}


def column(out: Path, name: str, file: str = "metrics.jsonl") -> list:
    return [json.loads(line)[name] for line in (out / file).read_text().splitlines()]


def result(out: Path) -> dict[str, torch.Tensor]:
    folder = out / "lora" if (out / "lora").is_dir() else out / "model" / "transformer"
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def stop_after(trainer, step: int) -> None:
    """Has the process sent SIGTERM within step `step`."""
    update = trainer.weights.update

    def updating(now: int) -> None:
        update(now)
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.weights.update = updating


@pytest.fixture
def begun(start):
    """begun(out, *options, resume=False) -> a Trainer whose step methods `change` may change."""

    def build(out, *more, resume=False, change=lambda trainer: None):
        trainer = start(out, *more, resume=resume)
        change(trainer)
        return trainer

    return build


@pytest.mark.parametrize("mode", MODES)
def test_a_stopped_run_resumes_to_the_bit(mode, tmp_path, run, begun, device):
    if any(word in " ".join(MODES[mode]) for word in ("nf4", "8bit", "paged")):
        pytest.importorskip("bitsandbytes")
    common = [*MODES[mode], "train.deterministic=true", "validation.held_out=2", "validation.every=3", "sample.every=6"]
    common += ["output.checkpoint_every=2"]
    whole = run(tmp_path / "whole", *common)
    parted = tmp_path / "parted"
    with pytest.raises(Stopped):
        begun(parted, *common, change=lambda trainer: stop_after(trainer, 3)).train()
    assert storage.checkpoints(parted / "checkpoints")[-1].name == "step-00000003" and len(column(parted, "loss")) == 3
    run(parted, *common, resume=True)
    for name in ("loss", "gradient_norm", "loss_by_t"):
        assert column(whole, name) == column(parted, name), name
    first, second = result(whole), result(parted)
    assert first and first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    pages = [(out / "samples" / "step-00000006.png").read_bytes() for out in (whole, parted)]
    assert pages[0] == pages[1]
    losses = [column(out, "validation_loss", "validation.jsonl") for out in (whole, parted)]
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.parametrize("mode", ["autocast", "bfloat16", "checkpointed", "LoRA"])
def test_a_step_waits_for_the_device_once(mode, tmp_path, begun, waits, device):
    found: dict[int, list[str]] = {}

    def change(trainer):
        train_step = trainer.train_step
        number = trainer.config.train.gradient_accumulation

        def watched(batches):
            ready = [next(batches) for _ in range(number)]  # what its own process has read
            with waits(found.setdefault(trainer.step, [])):
                return train_step(iter(ready))

        trainer.train_step = watched

    begun(tmp_path / "out", *MODES[mode], "data.workers=1", change=change).train()
    assert [len(found[step]) for step in range(2, 6)] == [1] * 4, found


def test_batches_come_in_pinned_memory_and_arrive_as_they_were(tmp_path, start, device, gpu_only):
    trainer = start(tmp_path / "out", "data.workers=2")
    plain = [trainer.reader[request] for request, _ in zip(trainer.micro_batches().requests(), range(3))]
    for batch, expected in zip(trainer.micro_batches(), plain):
        assert batch.moments.is_pinned() and batch.eps.is_pinned() and all(value.is_pinned() for _, value in batch.parts.items())
        moved = batch.to(device)
        assert moved.moments.device.type == "cuda"
        for name in ("moments", "eps", "vae_noise", "u"):
            assert torch.equal(getattr(moved, name).cpu(), getattr(expected, name)), name


def test_a_loss_that_is_not_finite_stops_the_run_before_a_weight_moves(tmp_path, begun, device):
    weights = {}

    def change(trainer):
        train_step = trainer.train_step

        def poisoned(batches):
            if trainer.step == 4:
                with torch.no_grad():
                    trainer.models.network.proj_out.bias[0] = float("nan")
                weights["before"] = trainer.models.network.proj_out.weight.detach().clone()
            return train_step(batches)

        trainer.train_step = poisoned

    trainer = begun(tmp_path / "out", "output.checkpoint_every=2", change=change)
    with pytest.raises(InputError, match="the loss is not finite at step 5 for .*png"):
        trainer.train()
    assert torch.equal(weights["before"], trainer.models.network.proj_out.weight)
    tensors, _ = storage.load(storage.checkpoints(tmp_path / "out" / "checkpoints")[-1])
    assert all(torch.isfinite(stored.load().float()).all() for stored in tensors.values())


def test_a_run_is_the_cpus(tmp_path, run, device):
    """In float32 the draws are the same and the losses agree to its rounding."""
    out = run(tmp_path / "out", "train.mixed_precision=no")
    options = json.loads((out / "config.json").read_text())
    overrides = [
        f"data.folder={options['data']['folder']}", f"model.pipeline={options['model']['pipeline']}", f"data.cache={tmp_path / 'cache'}",
        f"output.folder={tmp_path / 'cpu'}", "train.mixed_precision=no", "data.workers=0", "sample.every=1000", "sample.steps=1",
        "sample.prompts=[a red apple]", "data.t5_lengths={8: 0.5, 12: 0.5}", "train.steps=6", "train.batch_size=4",
        "train.learning_rate=1e-3", "train.warmup_steps=2",
    ]  # fmt: skip
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-m", "latentfm", "train", *overrides], env=environment, check=True, cwd=ROOT)
    assert column(out, "count_by_t") == column(tmp_path / "cpu", "count_by_t")
    torch.testing.assert_close(torch.tensor(column(out, "loss")), torch.tensor(column(tmp_path / "cpu", "loss")), rtol=2e-3, atol=0)


def test_a_compiled_run_is_the_plain_one(tmp_path, run, make_pictures, device):
    pictures = make_pictures(tmp_path / "pictures", 6)
    for number, size in enumerate([(32, 48), (48, 32)]):
        make_pictures(tmp_path / "pictures" / str(number), 3, size)
    more = [f"data.folder={pictures}", "data.buckets=3", "train.mixed_precision=no", "train.steps=8"]
    plain, compiled = run(tmp_path / "plain", *more), run(tmp_path / "compiled", *more, "train.compile=true")
    torch.testing.assert_close(torch.tensor(column(compiled, "loss")), torch.tensor(column(plain, "loss")), rtol=2e-3, atol=0)


def test_fsdp2_in_one_process_is_a_plain_run(tmp_path, run, device):
    plain = run(tmp_path / "plain", "train.mixed_precision=no", "output.checkpoint_every=3")
    overrides = ["--config", str(plain / "config.json"), f"output.folder={tmp_path / 'split'}"]
    environment = os.environ | {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", "latentfm", "train"]
    done = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "FSDP2" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
    torch.testing.assert_close(torch.tensor(column(tmp_path / "split", "loss")), torch.tensor(column(plain, "loss")), rtol=1e-4, atol=0)
    first, second = result(plain), result(tmp_path / "split")
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


def test_the_encoders_leave_the_device_when_the_cache_is_full(tmp_path, start, device, gpu_only):
    trainer = start(tmp_path / "out")
    assert trainer.models._vae is None and trainer.models._encoder is None
    assert {parameter.device.type for parameter in trainer.models.network.parameters()} == {"cuda"}
