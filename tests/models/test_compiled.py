"""Blocks compiled once for all sizes, and kept on disk."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models.twins import inputs, twins

from latentfm.errors import InputError
from latentfm.models import compiled

FIRST = """
import sys
import torch
from torch._dynamo.utils import counters
from latentfm import MMDiT

torch.manual_seed(0)
network = MMDiT(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=40, caption_projection_dim=16, pooled_projection_dim=24, pos_embed_max_size=8, qk_norm="rms_norm",
).eval()
network.compile_repeated_blocks(fullgraph=True)
with torch.no_grad():
    for side, tokens in ((10, 9), (4, 12), (6, 5)):  # 25, 4 and 9 tokens of the picture
        latents, text = torch.randn(2, 4, side, side), torch.randn(2, tokens, 40)
        network(latents, text, torch.randn(2, 24), torch.full((2,), 500.0))
print(counters["inductor"]["fxgraph_cache_miss"], counters["stats"]["unique_graphs"])
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder of caches of its own, and what torch was told of one put back afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(compiled.FOLDER, "")  # so that what the network sets is taken back
    monkeypatch.delenv(compiled.FOLDER)
    return tmp_path


@pytest.mark.slow
def test_the_next_process_finds_what_was_compiled(home):
    def run() -> list[int]:
        done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=True, env=os.environ)
        return [int(word) for word in done.stdout.split()]

    assert run() == [2, 2]  # one for each kind of block, and none for a size
    assert any((home / "latentfm" / "compiled").iterdir())
    assert run() == [0, 2]


def test_the_folder_is_the_users_cache_unless_torch_is_told_of_one(home, monkeypatch):
    model = twins(num_layers=2)[0]
    model.compile_repeated_blocks(backend="eager")
    assert os.environ[compiled.FOLDER] == str(home / "latentfm" / "compiled")
    monkeypatch.setenv(compiled.FOLDER, str(home / "mine"))
    model.compile_repeated_blocks(backend="eager")
    assert os.environ[compiled.FOLDER] == str(home / "mine") and (home / "mine").is_dir()


def test_a_cache_that_cannot_be_written_leaves_torchs_own(home, monkeypatch):
    (home / "latentfm").write_text("in the way")
    twins(num_layers=2)[0].compile_repeated_blocks(backend="eager")
    assert str(home) not in os.environ.get(compiled.FOLDER, "")  # torch writes its own there, too


def test_a_missing_compiler_is_told_before_anything_is_compiled(home, monkeypatch):
    model = twins(num_layers=2)[0]
    monkeypatch.setenv("PATH", str(home))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler here: g\+\+"):
        model.compile_repeated_blocks()
    assert all(block._compiled_call_impl is None for block in model.transformer_blocks)
    model.compile_repeated_blocks(backend="eager")  # which needs none
    plain = copy.deepcopy(twins(num_layers=2)[0])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs(model)).sample, plain(**inputs(plain)).sample)
    torch.compiler.reset()
