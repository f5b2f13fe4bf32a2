"""The training tricks' comparison, run small: every trick trains, all are judged alike, the table pairs by seed."""

import argparse
import copy
from pathlib import Path

import pytest
import torch

from latentfm.config import TrainOptions
from latentfm.models.mmdit import MMDiT
from latentfm.training.optimizers.factory import make_optimizer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def tricks(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import tricks

    for name, settings in tricks.SIZES.items():
        monkeypatch.setitem(tricks.PRESETS, name, settings | {"num_layers": 3})
    monkeypatch.setattr(tricks, "FEATURES", {})
    return tricks


@pytest.fixture
def trick_options(tricks, tiny_folder, make_pictures, tmp_path):
    data = make_pictures(tmp_path / "pictures", 8)
    return argparse.Namespace(model=tiny_folder, data=data, out=tmp_path, pixels=32, batch_size=4, held_out=3, seconds=0.01)


def vision_tower(folder):
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    return folder


def test_every_trick_trains_and_is_judged_on_the_same_pictures(tricks, trick_options, tmp_path, monkeypatch):
    monkeypatch.setattr(tricks.Aligned, "encoder", vision_tower(tmp_path / "encoder"), raising=False)
    judged = []
    validate = tricks.Plain.validation_figures

    def noted(trainer):
        judged.append((trainer.held_out, trainer.validation.reader.draws.seed))
        return validate(trainer)

    monkeypatch.setattr(tricks.Plain, "validation_figures", noted)
    rows = {name: tricks.cell(trick_options, name, tricks.SMALL, seed, 1e-3) for seed, name in enumerate(tricks.TRICKS)}
    assert all(row["steps"] >= 1 and row["seconds"] >= 0.01 and 0 < row["loss"] < 10 for row in rows.values())
    assert [name for name in rows if "undone" in rows[name]] == ["contrastive"]
    assert len(judged) == len(rows) + 1 and all(seen == judged[0] for seen in judged)


def test_muon_is_torchs_on_the_blocks_matrices_and_torchs_adamw_on_the_rest(tricks, tiny_folder):
    options = TrainOptions(learning_rate=0.01, weight_decay=0.1, betas=(0.8, 0.9))
    ours, theirs = (MMDiT.from_pretrained(tiny_folder, subfolder="transformer") for _ in range(2))
    named, start = dict(ours.named_parameters()), copy.deepcopy(ours)
    together = tricks.MuonAdamW(named, make_optimizer(named, options))
    inside = [p for name, p in theirs.named_parameters() if name.startswith("transformer_blocks.") and p.ndim == 2]
    others = [p for p in theirs.parameters() if all(p is not matrix for matrix in inside)]
    groups = [{"params": [p for p in others if p.ndim > 1], "weight_decay": 0.1}, {"params": [p for p in others if p.ndim == 1]}]
    muon = torch.optim.Muon(inside, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), weight_decay=0.0, fused=True)
    for number in range(3):
        source = torch.Generator().manual_seed(number)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=source)
            other.grad = mine.grad.clone()
        for optimizer in (together, muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + number)
            optimizer.step()
    for name, value in theirs.state_dict().items():
        assert torch.equal(named.get(name, value), value), name
    assert not torch.equal(named["proj_out.weight"], start.proj_out.weight)


def test_the_table_pairs_by_seed(tricks, tmp_path):
    cells = tricks.Cells(argparse.Namespace(out=tmp_path))
    row = {"size": tricks.SMALL, "rate": 1e-3, "steps": 10, "seconds": 1.0, "parameters": 2e6}
    for seed, (plain, muon) in enumerate([(1.0, 0.9), (2.0, 1.8), (3.0, 2.7)]):
        cells.rows += [row | {"trick": "plain", "seed": seed, "loss": plain}, row | {"trick": "muon", "seed": seed, "loss": muon}]
    cells.rows.append(row | {"trick": "muon", "seed": tricks.RATES_SEED, "loss": 0.0})  # of the search for a rate
    lines = tricks.table(cells).splitlines()
    assert lines[2:] == [
        "| plain | 2.0M | 2.0000 | 0 | 3 | 10 | 1 |",
        "| muon | 2.0M | 1.8000 | -0.2000 +- 0.2484 | 3 | 10 | 1 |",  # 4.303 x 0.1 / sqrt(3)
    ]
