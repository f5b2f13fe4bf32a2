"""bitsandbytes, which asks the hub for code where it is imported, is imported when something is quantised by it and not before."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import latentfm
from latentfm import quantised

ROOT = Path(latentfm.__file__).resolve().parent.parent
pytest.importorskip("bitsandbytes")

PROGRAM = """
import sys
from pathlib import Path
import torch
from latentfm import LatentFMPipeline
import diffusers, peft, transformers
import latentfm.training.trainer
from peft import LoraConfig

def imported():
    return "bitsandbytes" in sys.modules

folder = Path(sys.argv[1])
pipe = LatentFMPipeline.from_pretrained(folder)
pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True))
pipe.transformer.fuse_lora()
pipe.transformer.unfuse_lora()
assert not imported(), "by drawing and adapting"

from diffusers.quantizers.bitsandbytes import utils
from peft import helpers
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
assert not is_bnb_available() and not imported()
assert utils.bnb.nn.Linear4bit is helpers.bnb.nn.Linear4bit and imported(), "by using it"
assert is_bnb_available() and is_bnb_4bit_available()
from latentfm.config import TrainOptions
from latentfm.training.adapters import choose_trainable
network = LatentFMPipeline.from_pretrained(folder).transformer
choose_trainable(network, TrainOptions(adapter={"rank": 2, "base": "nf4"}))
layer = network.transformer_blocks[0].attn.to_q
assert type(layer).__module__ == "peft.tuners.lora.bnb" and type(layer).__name__ == "Linear4bit", type(layer)
print("well")
"""


def test_it_is_imported_by_use_alone_and_quantised_bases_work_as_ever(tiny_folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, tiny_folder], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.endswith("well\n"), done.stderr[-2000:]


@pytest.fixture
def absent(monkeypatch):
    """As in a process that has not imported it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)


def test_the_stand_in_is_there_only_while_a_module_that_imports_it_runs(absent, monkeypatch):
    seen = []

    def execute(module):
        seen.append(sys.modules["bitsandbytes"])
        assert not quantised.is_imported()
        raise KeyError

    with pytest.raises(KeyError):
        quantised.with_stand_in(execute)(types.ModuleType("x"))
    assert isinstance(seen[0], quantised.StandIn) and "bitsandbytes" not in sys.modules
    assert not hasattr(seen[0], "__wrapped__")  # what looks at modules in passing does not import it
    real = types.ModuleType("bitsandbytes")
    real.nn = "its modules"
    monkeypatch.setitem(sys.modules, "bitsandbytes", real)
    assert seen[0].nn == "its modules" and quantised.is_imported()
    quantised.with_stand_in(lambda module: seen.append(sys.modules["bitsandbytes"]))(types.ModuleType("x"))
    assert seen[1] is real


def test_without_the_library_nothing_stands_in_for_it(absent, monkeypatch):
    monkeypatch.setattr(quantised, "LIBRARY", "no_such_library")
    quantised.with_stand_in(lambda module: module.__dict__.update(there="no_such_library" in sys.modules))(module := types.ModuleType("x"))
    assert module.there is False


def test_the_finder_is_installed_once():
    quantised.install()
    assert sum(isinstance(finder, quantised.Finder) for finder in sys.meta_path) == 1
