"""The training tricks' comparison, run small: every trick trains, all are judged alike, the table pairs by seed."""

import argparse
from pathlib import Path

import pytest
import torch

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
