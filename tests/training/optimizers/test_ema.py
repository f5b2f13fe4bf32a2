"""The moving average of weights, against its recursion written out."""

import copy

import pytest
import torch
from torch import nn

from latentfm.training.optimizers.ema import EMA


def network():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module[1].bias.requires_grad_(False)
    return module


def trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def move(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.9])
def test_it_is_the_recursion_with_the_warm_up(decay):
    module = network()
    ema = EMA(trained(module), decay)
    expected = {name: p.detach().double() for name, p in module.named_parameters() if p.requires_grad}
    for step in range(1, 31):
        move(module, step)
        ema.update(trained(module), step)
        d = min(decay, (1 + step) / (10 + step))
        for name, parameter in module.named_parameters():
            if name in expected:
                expected[name] = d * expected[name] + (1 - d) * parameter.detach().double()
    assert set(ema.shadow) == set(expected) == {"0.weight", "0.bias", "1.weight"}
    for name, value in ema.shadow.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_half_precision_weights_are_averaged_in_float32():
    module = network().to(torch.bfloat16)
    ema = EMA(trained(module), 0.999)
    start = ema.shadow["0.weight"].clone()
    with torch.no_grad():
        module[0].weight.add_(1.0)
    for step in range(100_000, 100_010):  # past the warm-up: each moves a thousandth, which bfloat16 could not hold
        ema.update(trained(module), step)
    moved = (ema.shadow["0.weight"] - start) / (module[0].weight.detach().float() - start)
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.999**10), rtol=1e-3, atol=0)


def test_masters_stand_for_the_weights_that_are_their_rounding():
    module = network().to(torch.bfloat16)
    ema = EMA(trained(module), 0.0)
    masters = {"0.weight": torch.full((4, 3), 1 / 3)}
    ema.update(trained(module), 1, masters)
    assert torch.equal(ema.shadow["0.weight"], masters["0.weight"])
    assert torch.equal(ema.shadow["0.bias"], module[0].bias.detach().float())


def test_groups_change_nothing(monkeypatch):
    first, second, module = EMA(trained(network()), 0.9), EMA(trained(network()), 0.9), network()
    move(module, 1)
    first.update(trained(module), 5)
    monkeypatch.setattr("latentfm.training.optimizers.ema.EMA_CHUNK", 10)  # a weight of 12, the rest of 4 + 8
    assert list(second.groups()) == [["0.weight"], ["0.bias"], ["1.weight"]]
    second.update(trained(module), 5)
    assert all(torch.equal(first.shadow[name], second.shadow[name]) for name in first.shadow)


def test_applied_to_lends_the_averages_and_gives_the_weights_back_also_after_an_error():
    module = network()
    ema = EMA(trained(module), 0.5)
    move(module, 1)
    own = copy.deepcopy(module.state_dict())
    assert not torch.equal(own["0.weight"], ema.shadow["0.weight"])
    with pytest.raises(RuntimeError, match="inside"), ema.applied_to(trained(module)):
        for name, value in ema.shadow.items():
            assert torch.equal(module.state_dict()[name], value)
        raise RuntimeError("inside")
    for name, value in own.items():
        assert torch.equal(module.state_dict()[name], value)


def test_the_averages_are_copies_of_what_they_start_from():
    module = network()
    ema = EMA(trained(module), 0.9)
    before = {name: value.clone() for name, value in ema.shadow.items()}
    move(module, 3)
    assert all(torch.equal(ema.shadow[name], value) for name, value in before.items())


def test_averages_on_a_device_of_their_own_move_as_the_others_do():
    first, second, module = EMA(trained(network()), 0.9), EMA(trained(network()), 0.9, torch.device("cpu")), network()
    move(module, 1)
    first.update(trained(module), 2)
    second.update(trained(module), 2)
    assert all(value.device.type == "cpu" and torch.equal(value, first.shadow[name]) for name, value in second.shadow.items())


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(trained(network()), decay)
