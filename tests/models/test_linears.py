"""The blocks and linears that a training's options name, on a network itself."""

import pytest
import torch
from models.twins import twins

from latentfm.errors import InputError
from latentfm.models.linears import LORA_TARGETS, TARGETS, adapted_linears, parse_blocks

# three blocks, two with SD3.5's second attention
DUAL = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}


def adapted(network, targets, blocks):
    linears = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    return adapted_linears([name for name in linears if name.startswith("transformer_blocks.")], targets, blocks)


@pytest.mark.parametrize(
    "text, blocks",
    [
        ("3", [3]), ("-1", [7]), ("0-2", [0, 1, 2]), ("6-", [6, 7]), ("-4-", [4, 5, 6, 7]), ("0--2", [0, 1, 2, 3, 4, 5, 6]),
        ("-3--2", [5, 6]), ("0-1, 6-", [0, 1, 6, 7]), ("5,2-3,2", [2, 3, 5]), ("0-7", list(range(8))),
    ],
)  # fmt: skip
def test_blocks_by_number(text, blocks):
    assert parse_blocks(text, 8) == blocks


@pytest.mark.parametrize(
    "text, says",
    [
        ("8", "'8' does not fit this network of 8 blocks: they are 0 to 7"), ("-9-", "'-9-' does not fit"),
        ("0-3,5-9", "'5-9' does not fit"), ("5-2", "the smaller first"), ("", "'' does not"), ("0-3,", "'' does not"),
        ("all", "should look like 3, 0-5, 20- or -4-"),
        ("1-2-3", "'1-2-3' does not"), ("0:3", "'0:3' does not"),
    ],
)  # fmt: skip
def test_blocks_that_are_none_are_refused(text, says):
    with pytest.raises(InputError, match=says):
        parse_blocks(text, 8)


def test_the_presets_are_the_linears_of_the_blocks():
    network, _ = twins(**DUAL)
    every = adapted(network, "all_linear", range(3))
    linears = {n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("transformer_blocks.")}
    assert set(every) == linears
    parts = {preset: set(adapted(network, preset, range(3))) for preset in TARGETS if preset != "all_linear"}
    second = {name for name in linears if ".attn2." in name}
    assert set.union(*parts.values()) | second == linears and sum(map(len, parts.values())) + len(second) == len(linears)
    assert TARGETS["attention"] == LORA_TARGETS
    assert parts["attention"] == {n for n in linears if n.endswith(tuple(f".{t}" for t in LORA_TARGETS))}
    assert "transformer_blocks.2.ff.net.0.proj" in parts["feed_forward"] and "transformer_blocks.1.norm1.linear" in parts["modulation"]


def test_endings_of_names_and_blocks_choose_modules():
    network, _ = twins(**DUAL)
    assert adapted(network, ["attn.to_q"], [0, 2]) == [f"transformer_blocks.{i}.attn.to_q" for i in (0, 2)]
    assert adapted(network, "to_q", [1]) == adapted(network, ["to_q"], [1])
    assert adapted(network, ["to_q"], [1]) == ["transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn2.to_q"]
    assert adapted(network, ["transformer_blocks.1.ff.net.2"], range(3)) == ["transformer_blocks.1.ff.net.2"]
    assert len(adapted(network, ["to_out.0", "ff.net.0.proj"], range(3))) == 5 + 3


@pytest.mark.parametrize(
    "targets, blocks, says",
    [
        ("atention", range(3), r"'atention' is no preset .*\(did you mean 'attention'\?\); there are attention, feed_forward, modulation"),
        ("attn.to_qq", range(3), r"no linear's name \(did you mean 'attn.to_q'\?\).*or a list of them"), ("", range(3), "no linear's name"),
        ("attn2.to_q", [2], "'attn2.to_q' is no preset"), ([], range(3), "names no module"),
        (["attn.to_qq"], range(3), r"called 'attn.to_qq' \(did you mean 'attn.to_q'\?\); a block has .*attn.to_out.0"),
        (["to_q", "norm_q"], range(3), "called 'norm_q'"), (["attn2.to_q"], [2], "called 'attn2.to_q'"), ([""], range(3), "called ''"),
        (["q"], range(3), "called 'q'"),
    ],
)  # fmt: skip
def test_modules_that_are_not_there_are_refused(targets, blocks, says):
    network, _ = twins(**DUAL)
    with pytest.raises(InputError, match=says):
        adapted(network, targets, blocks)
