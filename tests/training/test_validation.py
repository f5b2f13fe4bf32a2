"""The held-out loss: what is held out, the loss written out, and the same numbers from any number of processes."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.held_out import BUCKET_OF, SCALE, SHIFT, Pictures, make_network, validation

from latentfm.data.sources import Sample
from latentfm.data.sources.base import Share
from latentfm.errors import InputError
from latentfm.training.validation import EPOCH, evaluating, names, split_held_out


@pytest.fixture(scope="module")
def network():
    return make_network()


def of_many(task, network, world):
    """What `world` processes would say together."""
    tables = [task.table(network, rank, world) for rank in range(world)]
    results = [task.run(network, rank, world, lambda table: sum(tables)) for rank in range(world)]
    assert all(result == results[0] for result in results)
    return results[0]


# What is held out


def samples(count, **share):
    return [Sample(Path(f"{i}.png"), ("a",), f"{i}.png", share=Share(**share)) for i in range(count)]


def test_the_split_has_every_sample_on_one_side():
    train, held_out = split_held_out(samples(50), 7, 3)
    assert sorted(train + held_out) == list(range(50)) and len(held_out) == 7
    assert train == sorted(train) and held_out == sorted(held_out)
    assert split_held_out(samples(50), 7, 3) == (train, held_out) != split_held_out(samples(50), 7, 4)
    assert split_held_out(samples(50), 0, 3) == (list(range(50)), [])


def test_a_picture_that_comes_or_goes_moves_one_at_most():
    before = samples(200)
    ids = {before[i].id for i in split_held_out(before, 20, 0)[1]}
    assert {before[::-1][i].id for i in split_held_out(before[::-1], 20, 0)[1]} == ids  # the order is nothing
    for gone in range(0, 200, 10):
        after = before[:gone] + before[gone + 1 :]
        now = {after[i].id for i in split_held_out(after, 20, 0)[1]}
        assert len(ids - now) == (before[gone].id in ids)
    more = samples(210)
    assert len(ids - {more[i].id for i in split_held_out(more, 20, 0)[1]}) <= 10


def test_regularisation_sets_are_trained_on():
    mixed = samples(10) + [replace(sample, id=f"prior/{sample.id}") for sample in samples(90, regularisation=True)]
    train, held_out = split_held_out(mixed, 9, 0)
    assert max(held_out) < 10 and len(train) == 91
    with pytest.raises(InputError, match="held_out 10 of 10 pictures leaves none .* at most 9"):
        split_held_out(mixed, 10, 0)
    with pytest.raises(InputError, match="at most 0"):
        split_held_out(samples(5, regularisation=True), 1, 0)


# The loss


def test_the_times_are_the_middles_of_equal_shares_of_the_density():
    assert names(validation(times=8, t_density="uniform").grid()) == ["0.06", "0.19", "0.31", "0.44", "0.56", "0.69", "0.81", "0.94"]
    task = validation(times=4, t_shift=3.0)
    sigma = torch.sigmoid(torch.special.ndtri(torch.tensor([0.875, 0.625, 0.375, 0.125], dtype=torch.float64)))
    torch.testing.assert_close(task.grid(), (1 - 3 * sigma / (1 + 2 * sigma)).float())
    crowded = validation(times=500).grid()
    assert len(set(names(crowded))) == 500 and (crowded.diff() > 0).all()


def test_the_loss_written_out(network):
    task = validation(times=3, t_shift=2.0, loss_weighting="min_snr")  # a weighting that must not count
    result = of_many(task, network, 1)
    network.eval()
    table = torch.zeros(9, 3, dtype=torch.float64)
    with torch.no_grad():
        for index in range(9):
            row = Pictures().row(EPOCH, index, 0, 6)
            mean, logvar = row["moments"].chunk(2)
            z = (mean + (logvar / 2).exp() * row["vae_noise"] - SHIFT) * SCALE
            clip = torch.cat([row["clip_1"], row["clip_2"], torch.zeros(5, 8)], dim=-1)
            embeds, pooled = torch.cat([clip, row["t5"]]), torch.cat([row["pooled_1"], row["pooled_2"]])
            for number, u in enumerate((5 / 6, 1 / 2, 1 / 6)):
                sigma = torch.sigmoid(torch.special.ndtri(torch.tensor(u, dtype=torch.float64))).float()
                sigma = 2 * sigma / (1 + sigma)
                answer = network((1 - sigma) * z[None] + sigma * row["eps"][None], embeds[None], pooled[None], 1000 * sigma[None]).sample[0]
                error = (-answer - (z - row["eps"])).square() * row["mask"]
                table[index, number] = error.sum() / (4 * row["mask"].sum())
    network.train()
    assert result["validation_loss"] == pytest.approx(table.mean().item(), rel=1e-5)
    assert list(result["by_t"].values()) == pytest.approx(table.mean(dim=0).tolist(), rel=1e-5)
    assert result["stderr"] == pytest.approx((table.mean(dim=1).std() / 3).item(), rel=1e-4)


@pytest.mark.parametrize("indices", [range(9), [4], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_processes_and_batches_do_not_matter(network, indices, batch_size):
    alone = of_many(validation(indices, batch_size=1), network, 1)
    for world in (1, 2, 3, 5):
        task = validation(indices, batch_size=batch_size)
        plans = [task.passes(rank, world) for rank in range(world)]
        shapes = [[(BUCKET_OF[indices[places[0]]], len(places)) for places, _ in plan] for plan in plans]
        assert all(other == shapes[0] for other in shapes)  # else FSDP would wait for ever
        assert all(len(places) <= batch_size for plan in plans for places, _ in plan)
        counted = Counter(place for plan in plans for places, count in plan for place in places[:count])
        assert counted == Counter(range(len(indices)))
        repeated = sum(len(places) - count for plan in plans for places, count in plan)
        assert repeated < world * len(shapes[0])  # less than a row a pass
        many = of_many(task, network, world)
        assert many["by_t"] == pytest.approx(alone["by_t"], rel=1e-5)
        assert many["validation_loss"] == pytest.approx(alone["validation_loss"], rel=1e-5)
        assert ("stderr" in many) == (len(indices) > 1)


def test_the_same_numbers_each_time_and_every_module_as_it_was(network):
    network.train().pos_embed.eval()  # a frozen part that does not train
    modes = {name: module.training for name, module in network.named_modules()}
    task = validation()
    assert of_many(task, network, 1) == of_many(task, network, 1)
    assert {name: module.training for name, module in network.named_modules()} == modes
    with pytest.raises(KeyError), evaluating(network):
        assert not any(module.training for module in network.modules())
        raise KeyError
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert all(p.grad is None for p in network.parameters())
    network.train()


def test_a_loss_that_is_not_finite_is_told_by_name(network):
    with pytest.raises(InputError, match=r"not finite for 4\.png \(t = 0\.\d\d, 0\.\d\d, 0\.\d\d\), 6\.png .*checkpoint is untouched"):
        of_many(validation(reader=Pictures(broken=(4, 6))), network, 2)
    with pytest.raises(InputError, match="and 2 more"):
        of_many(validation(reader=Pictures(broken=tuple(range(7)))), network, 2)
    of_many(validation([0, 1], reader=Pictures(broken=(4, 6))), network, 2)  # those are not looked at
