"""Muon beside AdamW: torch's own two, AdamW to the bit and Muon to bfloat16's rounding; its state goes on; without blocks it is refused."""

import copy

import pytest
import torch

from latentfm.config import TrainOptions
from latentfm.errors import InputError
from latentfm.models.mmdit import MMDiT
from latentfm.training.optimizers.factory import make_optimizer
from latentfm.training.optimizers.muon import alike, orthogonal

OPTIONS = TrainOptions(optimizer="muon", learning_rate=0.01, weight_decay=0.1, betas=(0.8, 0.9))


def step(network, optimizers, number):
    """One step on gradients that are a function of its number."""
    generator = torch.Generator().manual_seed(number)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


@pytest.fixture
def network(tiny_folder):
    return MMDiT.from_pretrained(tiny_folder, subfolder="transformer")


def same(network, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in network.state_dict().items())


def test_it_is_torchs_muon_on_the_blocks_matrices_and_torchs_adamw_on_the_rest(network):
    theirs = copy.deepcopy(network)
    named = dict(theirs.named_parameters())
    apart = {name for name, p in named.items() if name.startswith("transformer_blocks.") and p.ndim == 2}
    matrices = [named[name] for name in apart]
    others = [p for p in named.values() if all(p is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), fused=True)
    ours, start = make_optimizer(dict(network.named_parameters()), OPTIONS), copy.deepcopy(network)
    for number in range(3):
        for group in (*ours.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] = 0.01 / (1 + number)
        step(network, [ours], number)
        step(theirs, [muon, adamw], number)
    moved = {name: p - start.get_parameter(name) for name, p in network.named_parameters()}
    for name, move in moved.items():
        expected = named[name] - start.get_parameter(name)
        assert expected.any()
        if name in apart:
            assert (move - expected).norm() < 0.02 * expected.norm(), name
        else:
            assert torch.equal(move, expected), name


def test_its_one_state_dict_goes_on_to_the_bit(network):
    ours = make_optimizer(dict(network.named_parameters()), OPTIONS)
    step(network, [ours], 0)
    resumed = copy.deepcopy(network)
    other = make_optimizer(dict(resumed.named_parameters()), OPTIONS)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    for number in (1, 2):
        step(network, [ours], number)
        step(resumed, [other], number)
    assert same(network, resumed)
    assert {tuple(sorted(state)) for state in ours.state.values()} == {("momentum_buffer",), ("exp_avg", "exp_avg_sq", "step")}


def test_matrices_are_taken_together_by_shape_up_to_a_bound(monkeypatch):
    monkeypatch.setattr("latentfm.training.optimizers.muon.OPTIMIZER_CHUNK", 12)
    matrices = [torch.empty(shape) for shape in ((2, 3), (3, 2), (4, 4), (3, 2), (5, 5))]
    found = [[tuple(each.shape) for each in group] for group in alike(matrices)]
    assert found == [[(2, 3), (3, 2)], [(3, 2)], [(4, 4)], [(5, 5)]]


def test_what_moves_a_matrix_is_nearly_orthogonal():
    found = torch.linalg.svdvals(orthogonal(torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))).float())
    assert found.shape == (3, 20) and found.min() > 0.6 and found.max() < 1.25


def test_a_network_without_blocks_is_refused():
    with pytest.raises(InputError, match="none trains here; take adamw"):
        make_optimizer(dict(torch.nn.Linear(2, 2).named_parameters()), OPTIONS)
