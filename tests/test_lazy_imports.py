"""What is imported when it is used: stand-ins seen by their importers alone, and everything as ever once it is wanted."""

import gc
import importlib.util
import os
import pickle
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

import latentfm
from latentfm import lazy_imports
from latentfm.lazy_imports import Lazy, LazyName, StandIn

ROOT = Path(latentfm.__file__).resolve().parent.parent


def fresh(program: str, *arguments: str) -> str:
    """What a program prints in a process of its own; fails with what it says when it fails."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# what no picture needs
HEAVY = [
    "torch._dynamo", "torch._inductor", "sympy", "triton", "torch.distributed.tensor", "torch.distributed.fsdp",
    "torch.distributed.checkpoint", "torch.nn.attention.flex_attention", "torch.onnx", "peft", "scipy.stats", "scipy.optimize",
    "torchvision", "bitsandbytes", "datasets", "pandas", "requests", "open_clip", "diffusers.models.transformers",
    "diffusers.loaders.single_file_utils", "diffusers.loaders.ip_adapter", "diffusers.pipelines.auto_pipeline",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3", "transformers.image_utils", "transformers.processing_utils",
]  # fmt: skip

DRAWN = """
import sys
import latentfm
from latentfm import LatentFMPipeline
from latentfm.lazy_imports import StandIn

pipe = LatentFMPipeline.from_pretrained(sys.argv[1])
assert len(pipe("a red apple", num_inference_steps=2, seed=0).images) == 1
assert not [name for name, module in sys.modules.items() if isinstance(module, StandIn)]
print(*[name for name in sys.argv[2:] if name in sys.modules])
"""


def test_a_picture_is_drawn_without_what_it_does_not_need(tiny_folder):
    assert fresh(DRAWN, tiny_folder, *HEAVY).split() == []


COMMAND = """
import sys
from latentfm.cli.main import main
sys.argv = ["latentfm", "generate", "a red apple", "--model", sys.argv[1], "--out", sys.argv[2], "--steps", "2", "--seed", "0"]
heavy = %r
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(*[name for name in heavy if name in sys.modules])
"""


def test_the_command_draws_without_it_too(tiny_folder, tmp_path):
    path, *found = fresh(COMMAND % HEAVY, tiny_folder, tmp_path).split()
    assert Path(path).is_file() and found == []


WANTED = """
import pickle, sys
import torch
from latentfm import LatentFMPipeline

folder = sys.argv[1]
pipe = LatentFMPipeline.from_pretrained(folder)
draw = lambda pipe: pipe("a red apple", num_inference_steps=2, seed=0, output_type="pt").images
before = draw(pipe)
assert pickle.loads(pickle.dumps(dict(pipe.config))) == dict(pipe.config)

from diffusers.loaders import lora_base
from diffusers.utils import torch_utils
from diffusers.models.attention import JointTransformerBlock
assert "torch._dynamo" not in sys.modules and "peft" not in sys.modules
assert not isinstance(pipe.transformer, lora_base.BaseTunerLayer)  # which needs no peft

# schedulers that need scipy
from diffusers import DPMSolverMultistepScheduler
solver = DPMSolverMultistepScheduler(use_beta_sigmas=True, prediction_type="flow_prediction", use_flow_sigmas=False)
solver.set_timesteps(4)
pipe.scheduler.__class__.from_config(pipe.scheduler.config, use_beta_sigmas=True).set_timesteps(4)

# adapters
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "a")
layers = [module for module in pipe.transformer.modules() if isinstance(module, BaseTunerLayer)]
assert layers and all(isinstance(layer, lora_base.BaseTunerLayer) for layer in layers)
scaled = pipe("a red apple", num_inference_steps=2, seed=0, output_type="pt", joint_attention_kwargs={"scale": 0.0}).images
assert torch.equal(scaled, before) and not torch.equal(draw(pipe), before)
pipe.unload_lora_weights()
assert torch.equal(draw(pipe), before)

# the compiler: told of what was decorated for it before it was there
import torch._dynamo
from torch._dynamo import trace_rules
assert torch_utils.maybe_allow_in_graph is not None and trace_rules.is_callable_allowed(JointTransformerBlock)
compiled = torch.compile(pipe.transformer, backend="eager")
assert torch_utils.is_compiled_module(compiled) and not torch_utils.is_compiled_module(pipe.transformer)
plain, pipe.transformer = pipe.transformer, compiled
assert torch.allclose(draw(pipe), before, atol=1e-4)
pipe.transformer = plain

# layerwise casting, caching of blocks, gradient checkpointing
pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
draw(pipe)
pipe = LatentFMPipeline.from_pretrained(folder)
from diffusers import FirstBlockCacheConfig
pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
draw(pipe)
pipe.transformer.disable_cache()
pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level")
assert torch.allclose(draw(pipe), before, atol=1e-5)
network = LatentFMPipeline.from_pretrained(folder).transformer.train()
network.enable_gradient_checkpointing()
config = network.config
text, pooled = torch.randn(1, 5, config.joint_attention_dim), torch.randn(1, config.pooled_projection_dim)
network(torch.randn(1, config.in_channels, 8, 8), text, pooled, torch.tensor([500.0])).sample.sum().backward()

# the rest of diffusers and transformers
from diffusers import AutoPipelineForImage2Image, PipelineQuantizationConfig, SD3Transformer2DModel, StableDiffusion3Pipeline
assert type(AutoPipelineForImage2Image.from_pipe(LatentFMPipeline.from_pretrained(folder))).__name__ == "LatentFMImg2ImgPipeline"
stock = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
assert isinstance(stock.transformer, SD3Transformer2DModel)
assert LatentFMPipeline.from_pipe(stock).transformer is stock.transformer
from diffusers import AutoencoderRAE, UNet2DConditionModel
from diffusers.models.autoencoders import AutoencoderRAE as same
assert isinstance(same.__init__, object) and issubclass(AutoencoderRAE, torch.nn.Module)
tiny = dict(down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), block_out_channels=(32,), norm_num_groups=8)
unet = UNet2DConditionModel(sample_size=8, layers_per_block=1, cross_attention_dim=8, attention_head_dim=8, **tiny)
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets import unet_2d_blocks
assert any(type(module) is Transformer2DModel for module in unet.modules()) and unet_2d_blocks.Transformer2DModel is Transformer2DModel
from transformers import CLIPImageProcessor, CLIPVisionConfig
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES as again
assert "colwise" in ALL_PARALLEL_STYLES and len(ALL_PARALLEL_STYLES) == len(list(again)) > 4
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.processing_utils import ProcessorMixin, Unpack
import typing
assert Unpack is typing.Unpack
print("well")
"""


def test_what_is_wanted_is_there_after_a_lazy_start(tiny_folder):
    assert fresh(WANTED, tiny_folder).endswith("well\n")


ORDERS = """
import sys
first, folder = sys.argv[1:]
if first == "user":
    import peft, diffusers, transformers, scipy.stats, torch._dynamo
    from diffusers.loaders import lora_base
    from peft.tuners.tuners_utils import BaseTunerLayer
    assert lora_base.BaseTunerLayer is BaseTunerLayer
import latentfm
pipe = latentfm.LatentFMPipeline.from_pretrained(folder)
import peft, scipy.stats, torch._dynamo, torchvision
from diffusers.loaders import lora_base
from peft.tuners.tuners_utils import BaseTunerLayer
assert scipy.stats.norm.cdf(0) == 0.5 and sys.modules["peft"] is peft and type(peft).__name__ == "module"
assert isinstance(lora_base.BaseTunerLayer, type) == (first == "user")
assert issubclass(BaseTunerLayer, lora_base.BaseTunerLayer)
import importlib
assert importlib.reload(lora_base).BaseTunerLayer is BaseTunerLayer  # peft is there now
print(float(pipe("a red apple", num_inference_steps=2, seed=0, output_type="np").images.sum()))
"""


def test_it_does_not_matter_who_imports_first(tiny_folder):
    assert fresh(ORDERS, "user", tiny_folder) == fresh(ORDERS, "latentfm", tiny_folder)


BITSANDBYTES = """
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


def test_what_asks_the_hub_is_imported_by_use_alone_and_quantised_bases_work_as_ever(tiny_folder):
    pytest.importorskip("bitsandbytes")
    assert fresh(BITSANDBYTES, tiny_folder).endswith("well\n")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A library that tells when it is imported, modules that import it lazily, and a neighbour that does not."""
    texts = {
        "heavylib/__init__.py": "import told\ntold.times.append('heavylib')\nclass Kind: pass\ndef twice(x): return 2 * x\nCONSTANT = 7\n",
        "heavylib/part.py": "VALUE = 'part'\n",
        "told.py": "times = []\n",
        "lazyfolk/__init__.py": "",
        "lazyfolk/names.py": "import neighbour\nfrom heavylib import Kind, twice\n"
        "def is_kind(x: Kind | None): return isinstance(x, Kind)\n",
        "lazyfolk/whole.py": "import heavylib\nimport heavylib as other\n",
        "lazyfolk/constant.py": "from heavylib import CONSTANT, twice\n",
        "lazyfolk/below.py": "import heavylib.part\nfrom heavylib import twice\n",
        "lazyfolk/base.py": "from heavylib import Kind\nclass Mine(Kind): pass\n",
        "lazyfolk/broken.py": "import heavylib\nraise KeyError('broken')\n",
        "neighbour.py": "import sys\nseen = 'heavylib' in sys.modules\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(lazy_imports, "LAZY", (Lazy("heavylib", ("lazyfolk",), ("Kind", "twice")),))
    monkeypatch.setattr(lazy_imports, "IMPORTERS", {"lazyfolk"})
    roots = {name.split("/")[0].removesuffix(".py") for name in texts}
    yield importlib.import_module("told").times
    for name in [name for name in sys.modules if name.split(".")[0] in roots]:
        del sys.modules[name]


def test_names_wait_for_their_library(packages):
    names = importlib.import_module("lazyfolk.names")
    assert packages == [] and "heavylib" not in sys.modules and isinstance(names.twice, LazyName)
    assert not names.is_kind(3) and packages == []  # nothing is of a class that nobody has imported
    assert "heavylib" in repr(names.Kind) and not hasattr(names.twice, "__wrapped__") and packages == []
    twice = names.twice
    assert names.twice(3) == 6 and packages == ["heavylib"]
    import heavylib

    assert type(heavylib) is types.ModuleType and names.twice is heavylib.twice and twice(4) == 8  # now in the importer too
    assert names.is_kind(heavylib.Kind()) and not names.is_kind(3)


def test_a_neighbour_does_not_see_a_stand_in(packages):
    importlib.import_module("lazyfolk.names")
    assert sys.modules["neighbour"].seen is False and lazy_imports.STANDING == []


def test_a_whole_library_is_imported_by_looking_into_it(packages):
    whole = importlib.import_module("lazyfolk.whole")
    assert packages == [] and isinstance(whole.heavylib, StandIn) and not hasattr(whole.other, "__wrapped__")
    assert whole.other.CONSTANT == 7 and packages == ["heavylib"]


def test_anything_else_than_names_that_may_wait_imports_it_at_once(packages):
    constant = importlib.import_module("lazyfolk.constant")
    assert constant.CONSTANT == 7 and packages == ["heavylib"] and type(sys.modules["heavylib"]) is types.ModuleType


def test_a_part_of_it_is_the_part(packages):
    below = importlib.import_module("lazyfolk.below")
    assert sys.modules["heavylib.part"].VALUE == "part" and packages == ["heavylib"] and below.twice(1) == 2
    assert sys.modules["heavylib"].part is sys.modules["heavylib.part"] and type(sys.modules["heavylib"]) is types.ModuleType


def test_a_class_can_be_derived_from_and_its_objects_pickled(packages):
    base = importlib.import_module("lazyfolk.base")
    assert issubclass(base.Mine, sys.modules["heavylib"].Kind)
    assert isinstance(pickle.loads(pickle.dumps(base.Mine())), base.Mine)


def test_nothing_is_left_behind_by_a_module_that_fails(packages):
    with pytest.raises(KeyError, match="broken"):
        importlib.import_module("lazyfolk.broken")
    assert "heavylib" not in sys.modules and "lazyfolk.broken" not in sys.modules and lazy_imports.STANDING == []


def test_a_library_that_is_there_is_not_stood_in_for(packages):
    import heavylib

    assert importlib.import_module("lazyfolk.names").Kind is heavylib.Kind


def test_one_that_is_not_installed_is_missing_as_ever(packages, monkeypatch):
    monkeypatch.setattr(lazy_imports, "LAZY", (Lazy("no_such_library", ("lazyfolk",), None),))
    with lazy_imports.with_stand_ins("lazyfolk.names"):
        assert "no_such_library" not in sys.modules


def test_another_thread_gets_the_library(packages):
    found = []
    with lazy_imports.with_stand_ins("lazyfolk.names"):
        stand_in = sys.modules["heavylib"]
        thread = threading.Thread(target=lambda: found.append(stand_in.twice))
        thread.start()
        thread.join()
        assert isinstance(found[0], types.FunctionType) and type(sys.modules["heavylib"]) is types.ModuleType
    assert sys.modules["heavylib"].twice is found[0]


def test_looking_for_a_part_imports_nothing(packages):
    """Python looks under its one lock of all imports: to import there is to wait for a thread that waits for this one."""
    with lazy_imports.with_stand_ins("lazyfolk.names"):
        spec = next(finder for finder in sys.meta_path if isinstance(finder, lazy_imports.Finder)).find_spec("heavylib.part", [])
        assert packages == [] and isinstance(sys.modules["heavylib"], lazy_imports.StandIn)
        part = importlib.util.module_from_spec(spec)
        assert packages == ["heavylib"] and part is sys.modules["heavylib.part"] and part.VALUE == "part"


def test_threads_may_import_at_once(packages):
    modules = ["names", "whole", "constant", "below", "base"]
    errors = []

    def load(name):
        try:
            importlib.import_module(f"lazyfolk.{name}")
            importlib.import_module("heavylib.part")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=load, args=(name,), daemon=True) for name in modules * 3]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert not any(each.is_alive() for each in threads) and not errors
    assert packages == ["heavylib"] and type(sys.modules["heavylib"]) is types.ModuleType and lazy_imports.STANDING == []


def test_garbage_is_looked_for_again_afterwards(packages):
    assert gc.isenabled()
    importlib.import_module("lazyfolk.names")
    assert gc.isenabled()


def test_a_table_is_filled_when_it_is_looked_into():
    times = []

    def fill(table):
        times.append(1)
        table.update(a=1)

    mapped = lambda table: {**table}  # noqa: E731
    for look in (dict, list, len, mapped, lambda table: table["a"], lambda table: "a" in table, lambda table: table.get("a")):
        table = lazy_imports.Filled(fill)
        assert not times
        assert look(table) and look(table) and times == [1]
        times.clear()


def test_every_row_names_what_there_is():
    """An importer that a library has dropped, or a name that a library has, is a row to look at again."""
    for row in lazy_imports.LAZY:
        assert importlib.util.find_spec(row.module) is not None or row.module == "bitsandbytes", row.module
        assert all(importlib.util.find_spec(name) is not None for name in row.importers if name != "bitsandbytes"), row.importers


def test_the_finder_is_installed_once():
    lazy_imports.install()
    assert sum(isinstance(finder, lazy_imports.Finder) for finder in sys.meta_path) == 1
