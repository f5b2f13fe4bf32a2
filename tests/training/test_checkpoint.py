"""Checkpoints: whole or absent, the newest kept, and an optimizer that goes on as if it had never stopped."""

from functools import partial

import pytest
import torch
from faults import files_no_larger_than
from torch import nn

from latentfm.errors import InputError
from latentfm.training import checkpoint
from latentfm.training.optim import AdamW


def everything_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    tensors = {
        "a": torch.randn(3, 4), "half": torch.randn(5).to(torch.bfloat16), "count": torch.tensor(7.0), "turned": torch.randn(3, 4).T,
        "empty": torch.zeros(0),
    }  # fmt: skip
    path = checkpoint.save(tmp_path, 12, tensors, {"config": {"a": [1, 2]}})
    assert path == tmp_path / "step-00000012"
    loaded, info = checkpoint.load(path)
    assert info == {"step": 12, "config": {"a": [1, 2]}}
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


def test_the_newest_are_kept(tmp_path):
    for step in (2, 10, 100, 9):  # 9: a run that goes on from an older one
        checkpoint.save(tmp_path, step, {"a": torch.tensor([float(step)])}, {}, keep=3)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000009", "step-00000010", "step-00000100"]
    checkpoint.save(tmp_path, 101, {"a": torch.zeros(1)}, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000101"]


def test_what_is_not_a_whole_checkpoint_is_ignored(tmp_path):
    assert checkpoint.checkpoints(tmp_path / "missing") == []
    whole = checkpoint.save(tmp_path, 5, {"a": torch.zeros(1)}, {})
    for name in ("step-00000009.partial", "step-00000009", "step-9", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009.partial" / "state.json").write_text("{}")
    (tmp_path / "other" / "state.json").write_text("{}")
    assert checkpoint.checkpoints(tmp_path) == [whole]


def test_what_a_killed_save_left_is_cleared_by_the_next(tmp_path):
    (tmp_path / "step-00000003.partial").mkdir()
    (tmp_path / "step-00000003.partial" / "state.safetensors").write_bytes(b"half")
    checkpoint.save(tmp_path, 4, {"a": torch.zeros(1)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 8 + b[8:]])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, file, damage):
    path = checkpoint.save(tmp_path, 1, {"a": torch.randn(64)}, {"config": {}})
    (path / file).write_bytes(damage((path / file).read_bytes()))
    with pytest.raises(InputError, match="step-00000001 cannot be read.*move it away"):
        checkpoint.load(path)


def test_a_missing_file_is_named(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"a": torch.randn(64)}, {})
    (path / "state.safetensors").unlink()
    with pytest.raises(InputError, match="step-00000001 cannot be read"):
        checkpoint.load(path)


def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": torch.ones(100)}, {"config": {}})
    before = everything_in(tmp_path)
    with files_no_larger_than(100_000), pytest.raises(InputError, match="step-00000002.*nothing saved earlier was touched"):
        checkpoint.save(tmp_path, 2, {"a": torch.zeros(100_000)}, {"config": {}})
    assert everything_in(tmp_path) == before
    assert torch.equal(checkpoint.load(checkpoint.checkpoints(tmp_path)[-1])[0]["a"], torch.ones(100))


def test_a_full_disk_at_the_description_leaves_nothing_either(tmp_path):
    with files_no_larger_than(10_000), pytest.raises(InputError, match="step-00000002"):
        checkpoint.save(tmp_path, 2, {"a": torch.zeros(1)}, {"samples": ["x" * 100] * 1000})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "make, dtype",
    [
        (partial(torch.optim.AdamW, fused=True), torch.float32), (partial(torch.optim.AdamW, fused=False), torch.float32),
        (AdamW, torch.bfloat16), (partial(AdamW, master_weights=True), torch.bfloat16),
        (partial(AdamW, moments=torch.bfloat16), torch.bfloat16),
    ],
    ids=["fused", "one by one", "stochastic rounding", "master weights", "bfloat16 moments"],
)  # fmt: skip
def test_a_restored_optimizer_takes_the_same_steps(tmp_path, make, dtype):
    def fresh():
        torch.manual_seed(1)
        module = nn.Linear(4, 3).to(dtype)
        groups = [{"params": [module.weight], "weight_decay": 0.1}, {"params": [module.bias], "weight_decay": 0.0}]
        return module, make(groups, lr=0.1)

    def step(module, optimizer, seed):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()

    module, optimizer = fresh()
    for seed in range(3):
        step(module, optimizer, seed)
    names = {id(p): name for name, p in module.named_parameters()}
    checkpoint.save(tmp_path, 3, checkpoint.optimizer_tensors(optimizer, names), {})
    weights = {name: value.clone() for name, value in module.state_dict().items()}

    again, other = fresh()
    again.load_state_dict(weights)
    saved, _ = checkpoint.load(tmp_path / "step-00000003")
    checkpoint.restore_optimizer(other, saved, {id(p): name for name, p in again.named_parameters()})
    for seed in range(3, 6):
        step(module, optimizer, seed)
        step(again, other, seed)
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    expected, found = (
        checkpoint.optimizer_tensors(o, {id(p): name for name, p in m.named_parameters()}) for o, m in ((optimizer, module), (other, again))
    )
    assert expected.keys() == found.keys()
    assert all(value.dtype == found[name].dtype and torch.equal(value, found[name]) for name, value in expected.items())

    with pytest.raises(InputError, match="nothing_like_it"):
        checkpoint.restore_optimizer(other, {"exp_avg/nothing_like_it": torch.zeros(1)}, {id(p): n for n, p in again.named_parameters()})
