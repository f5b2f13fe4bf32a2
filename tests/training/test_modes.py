"""Whole runs in every way to train: adapters, some blocks, other optimizers and weightings, online, buckets, held-out pictures."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latentfm import flow
from latentfm.errors import InputError
from latentfm.training.checkpoint import storage
from latentfm.training.step import cfm_losses, weights_of
from latentfm.training.validation import Validation

LORA = "train.adapter={rank: 4, alpha: 8, targets: attention}"


def column(out, name):
    return [json.loads(line)[name] for line in (out / "metrics.jsonl").read_text().splitlines()]


def state_of(out):
    tensors, _ = storage.load(storage.checkpoints(out / "checkpoints")[-1])
    return {name: stored.load() for name, stored in tensors.items()}


def network_weights(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def stopped_and_resumed(run, start, monkeypatch, out, *more):
    """A run that dies after step 3 of 5, its newest checkpoint that of step 2, and goes on."""
    trainer = start(out, "train.steps=5", "output.checkpoint_every=2", *more)
    log = trainer.log

    def log_then_die(row):
        log(row)
        if trainer.step == 3:
            raise RuntimeError("power cut")

    monkeypatch.setattr(trainer, "log", log_then_die)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.train()
    return run(out, "train.steps=5", "output.checkpoint_every=2", *more, resume=True)


MODES = {
    "LoRA": [LORA, "train.learning_rate=1e-2"], "DoRA": ["train.adapter={kind: dora, rank: 2, dropout: 0.2}"],
    "master weights": ["train.weights=bfloat16", "train.master_weights=true"],
    "bfloat16 moments": ["train.weights=bfloat16", "train.moments=bfloat16"],
    "LoRA on bfloat16": [LORA, "train.weights=bfloat16", "train.mixed_precision=bf16"], "one block": ["train.blocks=-1"],
    "adafactor": ["train.optimizer=adafactor"], "muon": ["train.optimizer=muon"],
    "lion": ["train.optimizer=lion", "train.learning_rate=1e-4"],
    "prodigy": ["train.optimizer=prodigy", "train.learning_rate=1"], "averages on the CPU": ["train.ema_device=cpu"],
    "weighted": ["train.loss_weighting=min_snr", "train.t_density_options={mean: 0.5, std: 0.7}"],
    "online": ["data.online=true", "data.flip=true"],
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_goes_on_to_the_bit(tmp_path, run, start, monkeypatch, mode):
    for word, package in (("lion", "lion_pytorch"), ("prodigy", "prodigyopt"), ("nf4", "bitsandbytes"), ("8", "bitsandbytes")):
        if word in mode:
            pytest.importorskip(package)
    whole = run(tmp_path / "whole", "train.steps=5", "output.checkpoint_every=2", *MODES[mode])
    cut = stopped_and_resumed(run, start, monkeypatch, tmp_path / "cut", *MODES[mode])
    assert column(cut, "loss") == column(whole, "loss") and column(cut, "gradient_norm") == column(whole, "gradient_norm")
    expected, found = state_of(whole), state_of(cut)
    assert expected.keys() == found.keys() and all(torch.equal(value, found[name]) for name, value in expected.items())


def test_an_adapter_trains_alone_and_is_saved_by_itself_and_merged(tmp_path, run, tiny_folder):
    out = run(tmp_path / "out", LORA, "train.steps=4", "train.learning_rate=1e-2", "output.checkpoint_every=2")
    state = state_of(out)
    assert state and all("lora_" in name for name in state if not name.startswith("optimizer.group"))
    newest = storage.checkpoints(out / "checkpoints")[-1]
    assert sorted(p.name for p in newest.iterdir()) == ["lora", "state.json", "state.safetensors"]
    base, merged = network_weights(tiny_folder), network_weights(out / "model")
    adapted = {name for name in base if not torch.equal(base[name], merged[name])}
    asked = {f"{name.removeprefix('ema.').partition('.lora_A')[0]}.weight" for name in state if "ema." in name and ".lora_A" in name}
    assert adapted == asked - {"transformer_blocks.1.attn.add_q_proj.weight"}  # the last block's text queries reach nothing
    name = "transformer_blocks.0.attn.to_q"
    a, b = (state[f"ema.{name}.lora_{letter}.default.weight"] for letter in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 8 / 4 * b @ a, rtol=0, atol=1e-6)
    assert torch.equal(load_file(out / "lora" / "pytorch_lora_weights.safetensors")[f"transformer.{name}.lora_A.weight"], a)


def test_an_adapter_does_not_go_on_upon_another_base(tmp_path, run, tiny_folder):
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    more = [LORA, f"model.pipeline={base}", "train.steps=4", "output.checkpoint_every=2"]
    out = run(tmp_path / "out", *more)
    shutil.rmtree(storage.checkpoints(out / "checkpoints")[-1])
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="frozen weights of this run are not those"):
        run(tmp_path / "out", *more, resume=True)


def test_only_the_chosen_blocks_move(tmp_path, run, tiny_folder):
    out = run(tmp_path / "out", "train.blocks=1", "train.steps=2")
    base, trained = network_weights(tiny_folder), network_weights(out / "model")
    moved = {name for name in base if not torch.equal(base[name], trained[name])}
    assert moved and all(name.startswith("transformer_blocks.1.") for name in moved)
    assert {name.split(".")[2] for name in state_of(out) if name.startswith("ema.")} == {"1"}


def test_online_is_the_cached_training_up_to_what_the_cache_rounds(tmp_path, run):
    more = ["data.cache_dtype=float32", "data.flip=true", "train.steps=4"]
    cached, online = run(tmp_path / "cached", *more), run(tmp_path / "online", *more, "data.online=true")
    assert column(online, "count_by_t") == column(cached, "count_by_t")
    assert column(online, "loss") == pytest.approx(column(cached, "loss"), rel=1e-4)
    rounded = run(tmp_path / "rounded", "data.flip=true", "train.steps=4")
    assert column(rounded, "loss") != column(cached, "loss") and column(rounded, "loss") == pytest.approx(column(cached, "loss"), rel=1e-2)


def test_the_weighting_and_the_density_are_flows(tmp_path, start, run):
    options = ["train.loss_weighting=beta_squared", "train.t_density=mode", "train.t_density_options={scale: -0.8}", "train.t_shift=3"]
    trainer = start(tmp_path / "out", *options)
    batch = next(iter(trainer.micro_batches()))
    with torch.no_grad():
        losses, t = cfm_losses(trainer.models.network, batch, trainer.models.null, trainer.objective)
    assert torch.equal(t, flow.draw_t(batch.u, flow.Mode(-0.8), 3.0))
    weights = weights_of(t, None, trainer.objective, 1.0)
    torch.testing.assert_close(weights, (1 - t) ** 2)
    out = run(tmp_path / "run", *options, "train.steps=1")
    assert column(out, "loss")[0] == pytest.approx((weights * losses).mean().item(), rel=1e-5)
    with pytest.raises(InputError, match=r"t_density_options of mode: scale must lie in"):
        start(tmp_path / "bad", "train.t_density=mode", "train.t_density_options={scale: 9}")


def test_buckets_keep_every_picture_and_a_batch_has_one_shape(tmp_path, run, start, make_pictures):
    data = make_pictures(tmp_path / "pictures", 9)
    rng = np.random.default_rng(0)
    for index, size in enumerate([(32, 32), (60, 30), (30, 60), (64, 32), (33, 31), (20, 44), (90, 40), (32, 32), (31, 62)]):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(data / f"{index:02d}.png")
    more = [f"data.folder={data}", "data.buckets=3", "train.steps=9", "train.batch_size=2"]
    more += ["train.token_routing={keep: 0.5, first: 0, last: 0}"]
    trainer = start(tmp_path / "out", *more)
    assert len(trainer.data.inventory.buckets.shapes) == 3 and len(set(trainer.data.bucket_of.tolist())) == 3
    seen = []
    for batch in trainer.micro_batches():
        places = [[s.id for s in trainer.data.samples].index(id) for id in batch.ids]
        shapes = {trainer.data.inventory.buckets.shapes[trainer.data.bucket_of[place]] for place in places}
        assert len(shapes) == 1
        (width, height), = shapes
        assert batch.eps.shape[2:] == (height // 4, width // 4)
        seen += batch.ids
    assert len(seen) == 18 and set(seen) == {s.id for s in trainer.data.samples}  # two epochs of nine
    out = run(tmp_path / "run", *more, "validation.held_out=2", "validation.every=3")
    assert len(column(out, "loss")) == 9


def test_pictures_that_would_lose_too_much_are_left_out_by_name(tmp_path, run, make_pictures, capsys):
    data = make_pictures(tmp_path / "pictures", 4)
    Image.new("RGB", (128, 32), "red").save(data / "02.png")
    out = run(tmp_path / "out", f"data.folder={data}", "data.max_crop=0.5", "train.steps=1")
    said = capsys.readouterr().out
    assert "02.png" in said and "1 of 4 pictures would lose too much" in said and len(column(out, "loss")) == 1


def test_held_out_pictures_are_never_drawn_and_the_best_checkpoint_stays(tmp_path, run, start, monkeypatch):
    more = ["validation.held_out=3", "validation.every=2", "output.checkpoint_every=2", "output.keep=1"]
    more += ["train.steps=8", "train.batch_size=7"]
    trainer = start(tmp_path / "out", *more)
    held = {trainer.data.samples[index].id for index in trainer.validation.indices}
    drawn = {id for batch in trainer.micro_batches() for id in batch.ids}
    assert len(held) == 3 and len(drawn) == 7 and not held & drawn
    run_validation, offsets = Validation.run, iter([0.0, 3.0, 1.0, 2.0, 4.0])

    def as_if(self, *arguments):  # the second checkpoint is the best
        found = run_validation(self, *arguments)
        return found | {"validation_loss": found["validation_loss"] + next(offsets)}

    monkeypatch.setattr(Validation, "run", as_if)
    out = run(tmp_path / "run", *more)
    rows = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8] and len(rows[0]["by_t"]) == 8
    assert [p.name for p in storage.checkpoints(out / "checkpoints")] == ["step-00000004", "step-00000008"]


def test_wandb_gets_the_numbers(tmp_path, run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = run(tmp_path / "out", "train.steps=2", "output.trackers=[tensorboard, wandb]")
    assert list(out.glob("wandb/offline-run-*/*.wandb")) and list(out.rglob("events.out.tfevents.*"))
