"""The presets: the published models exactly, the counts their comments state, and networks that MMDiT builds from them."""

import inspect
import re

import pytest
import torch

from latentfm.errors import InputError
from latentfm.models import presets
from latentfm.models.mmdit import MMDiT
from latentfm.models.presets import PRESETS
from latentfm.planning.cost import Network, parameters

SD3 = {
    "patch_size": 2, "in_channels": 16, "out_channels": 16, "sample_size": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
}  # fmt: skip
PUBLISHED = {  # layers, width, position table, qk-norm, dual layers
    "sd3-medium": (24, 1536, 192, None, ()),
    "sd3.5-medium": (24, 1536, 384, "rms_norm", tuple(range(13))),
    "sd3.5-large": (38, 2432, 192, "rms_norm", ()),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_exactly_theirs(name):
    config = PRESETS[name]
    found = [config[key] for key in ("num_layers", "caption_projection_dim", "pos_embed_max_size", "qk_norm")]
    assert (*found, config.get("dual_attention_layers", ())) == PUBLISHED[name]
    assert {key: config[key] for key in SD3} == SD3
    assert config["num_attention_heads"] * config["attention_head_dim"] == config["caption_projection_dim"]


def test_the_comments_state_the_counts():
    stated = dict(re.findall(r'^    "([^"]+)": size\(.*\),  # ([\d.]+[MB])', inspect.getsource(presets), re.MULTILINE))
    assert set(stated) == set(PRESETS) - {"emoji"}
    for name, text in stated.items():
        number, unit = float(text[:-1]), {"M": 1e6, "B": 1e9}[text[-1]]
        exact = sum(parameters(Network.of(PRESETS[name])).values())
        digits = len(text[:-1].partition(".")[2])
        assert round(exact / unit, digits) == number


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if name.startswith("depth")])
def test_the_papers_scaling_is_depth_heads_and_width_together(name):
    depth = int(name.removeprefix("depth"))
    assert (PRESETS[name]["num_layers"], PRESETS[name]["num_attention_heads"]) == (depth, depth)


def test_sizes_grow_down_the_list():
    counts = [sum(parameters(Network.of(config)).values()) for config in PRESETS.values()]
    assert counts == sorted(counts) and counts[0] < 2e7 and counts[-1] > 8e9


@pytest.mark.parametrize("name", PRESETS)
def test_a_network_of_every_preset_has_the_counted_parameters(name):
    with torch.device("meta"):
        network = MMDiT(**PRESETS[name])
    assert sum(p.numel() for p in network.parameters()) == sum(parameters(Network.of(network.config)).values())


def test_from_preset_starts_a_network_and_refuses_an_unknown_name():
    with torch.device("meta"):
        assert MMDiT.from_preset("sd3.5-medium").config.dual_attention_layers == tuple(range(13))
    with pytest.raises(InputError, match=r"no preset 'sd3.5-medum' \(did you mean 'sd3.5-medium'\?\)"):
        MMDiT.from_preset("sd3.5-medum")
