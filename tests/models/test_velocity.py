"""The adapter between the flow's time and SD3's, with a network that only writes down what it is asked."""

import pytest
import torch
from torch import nn

from latentfm.models.mmdit import MMDiT
from latentfm.models.text import Condition
from latentfm.models.velocity import velocity


class Recorder(nn.Module):
    """Answers `prediction` and keeps the arguments of its last call."""

    def __init__(self, prediction: torch.Tensor, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.prediction = prediction
        self.asked = {}

    def forward(self, **asked):
        self.asked = asked
        assert asked["return_dict"] is False
        return (self.prediction.to(self.weight.dtype),)


def condition(batch: int) -> Condition:
    return Condition(embeds=torch.randn(batch, 5, 8), pooled=torch.randn(batch, 6))


def test_the_sign_is_turned():
    torch.manual_seed(0)
    z, eps = torch.randn(2, 3, 4, 4, 4)
    network = Recorder(eps - z)
    asked = condition(3)
    x = torch.randn(3, 4, 4, 4)
    assert torch.equal(velocity(network, x, torch.rand(3), asked), z - eps)
    assert torch.equal(network.asked["hidden_states"], x)
    assert torch.equal(network.asked["encoder_hidden_states"], asked.embeds)
    assert torch.equal(network.asked["pooled_projections"], asked.pooled)


def test_the_time_is_turned():
    network = Recorder(torch.zeros(4, 4, 4, 4))
    velocity(network, torch.zeros(4, 4, 4, 4), torch.tensor([0.0, 0.25, 0.75, 1.0]), condition(4))
    assert network.asked["timestep"].tolist() == [1000.0, 750.0, 250.0, 0.0]


@pytest.mark.parametrize("t", [torch.tensor(0.125), torch.tensor([0.125])])
def test_one_time_serves_the_whole_batch(t):
    network = Recorder(torch.zeros(4, 4, 4, 4))
    velocity(network, torch.zeros(4, 4, 4, 4), t, condition(4))
    assert network.asked["timestep"].tolist() == [875.0] * 4


def test_times_stay_float32_for_a_bf16_network():
    network = Recorder(torch.full((1000, 1, 2, 2), 0.5), torch.bfloat16)
    t = torch.arange(1000) / 1000
    answer = velocity(network, torch.zeros(1000, 1, 2, 2), t, condition(1000))
    timestep = network.asked["timestep"]
    assert timestep.dtype == torch.float32 and len(timestep.unique()) == 1000
    assert len(timestep.bfloat16().unique()) < 600  # what it would be in bf16
    torch.testing.assert_close(timestep, 1000 - torch.arange(1000.0), rtol=0, atol=1e-4)
    assert {network.asked[k].dtype for k in ("hidden_states", "encoder_hidden_states", "pooled_projections")} == {torch.bfloat16}
    assert answer.dtype == torch.float32 and (answer == -0.5).all()


def test_a_bf16_mmdit_answers_in_float32_and_gradients_reach_x():
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "pos_embed_max_size": 4}
    network = MMDiT(sample_size=4, in_channels=4, out_channels=4, joint_attention_dim=8, pooled_projection_dim=6, **sizes).bfloat16()
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    given = condition(2)
    answer = velocity(network, x, torch.tensor([0.3, 0.6]), given)
    timestep = 1000 * (1 - torch.tensor([0.3, 0.6]))
    direct = network(x.bfloat16(), given.embeds.bfloat16(), given.pooled.bfloat16(), timestep).sample
    assert answer.dtype == torch.float32 and torch.equal(answer, -direct.float())
    answer.sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.abs().max() > 0
