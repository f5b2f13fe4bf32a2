"""from_pretrained and save_pretrained beside stock diffusers': each keyword is served, with stock's picture, or refused by name."""

import inspect
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)  # fmt: skip
from diffusers.loaders.single_file import FromSingleFileMixin
from diffusers.loaders.single_file_model import FromOriginalModelMixin
from drawn import NO_T5, draw, gap, stock_of

from latentfm import LatentFMPipeline
from latentfm.errors import InputError
from latentfm.interchange.components import load_component
from latentfm.interchange.loading import keywords, placing
from latentfm.interchange.loading.keywords import ALONE, FILE_KEYWORDS, FOLDER_KEYWORDS, NOT_HERE, SO_ANYWAY
from latentfm.interchange.weights import open_weights
from latentfm.interchange.writers import write_single
from latentfm.models import vae as vae_room
from latentfm.planning.model import read_model

ROUNDING = 1e-5


# The keywords


@pytest.mark.parametrize(
    ("theirs", "served"),
    [
        ((DiffusionPipeline.from_pretrained, DiffusionPipeline.download), FOLDER_KEYWORDS),
        ((FromSingleFileMixin.from_single_file, FromOriginalModelMixin.from_single_file), FILE_KEYWORDS),
    ],
    ids=["folder", "single file"],
)
def test_no_keyword_of_stock_diffusers_is_unknown_here(theirs, served):
    names = {name for call in theirs for name in re.findall(r"kwargs\.(?:pop|get)\(\"(\w+)\"", inspect.getsource(call))}
    assert len(names) > 10
    of_models = {"config_revision", "device", "pretrained_model_link_or_path"}  # which no pipeline's call has, or as its first argument
    assert names - of_models <= {*served, *SO_ANYWAY, *ALONE, *NOT_HERE}


def test_what_is_done_anyway_may_be_asked_for(tiny_folder, picture):
    asked = {name: True for name in SO_ANYWAY} | {"offload_folder": "somewhere"} | {name: taken for name, (taken, _) in ALONE.items()}
    download = {name: None for name in keywords.DOWNLOAD} | {"revision": "main", "cache_dir": "/nowhere", "local_files_only": True}
    assert gap(draw(LatentFMPipeline.from_pretrained(tiny_folder, **asked, **download)), picture) < ROUNDING
    nothing = dict.fromkeys([*SO_ANYWAY, *ALONE, *NOT_HERE, *FOLDER_KEYWORDS])
    assert gap(draw(LatentFMPipeline.from_pretrained(tiny_folder, **nothing)), picture) < ROUNDING


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"use_safetensors": False}, "does not serve use_safetensors=False: only safetensors are loaded"),
        ({"use_onnx": True}, "does not serve use_onnx=True: ONNX models are not read"),
        ({"custom_pipeline": "lpw"}, "does not serve custom_pipeline='lpw': another pipeline's code is not run"),
        ({"subfolder": "x"}, "does not serve subfolder='x': a pipeline is a whole folder"),
        ({"torch_dtyp": 1}, r"has no keyword torch_dtyp \(did you mean 'torch_dtype'\?\)"),
        ({"dtype": torch.float16, "torch_dtype": torch.float32}, "dtype is torch.float16 and torch_dtype torch.float32; give one"),
        ({"dtype": "half-ish"}, "dtype 'half-ish' is none that a model is loaded in"),
        ({"dtype": torch.int8}, "dtype torch.int8 is none"),
        ({"dtype": {"transformers": torch.float16}}, r"given for transformers, which is no component \(did you mean 'transformer'\?\)"),
        ({"vae": "a/folder"}, "vae='a/folder' is no vae; give one in memory"),
        ({"transformer": torch.nn.Linear(2, 2)}, "transformer=Linear.* is no transformer"),
        ({"image_encoder": torch.nn.Linear(2, 2)}, "image_encoder=Linear.* is no image_encoder"),
        ({"scheduler": FlowMatchEulerDiscreteScheduler}, "is no scheduler"),
        ({"tokenizer": 5}, "tokenizer=5 is no tokenizer"),
        ({"variant": "fp16"}, "has no weights of the variant fp16; there are the plain ones alone"),
        ({"max_memory": {0: "1GB"}}, 'max_memory is for device_map="balanced"'),
        ({"max_memory": {0: "lots"}, "device_map": "balanced"}, "max_memory {0: 'lots'} is no memory by device"),
        ({"device_map": {"transformr": 0}}, r"device_map has transformr, which is no component \(did you mean 'transformer'\?\)"),
        ({"device_map": {"transformer": "nowhere"}}, "device_map 'nowhere' is no device here"),
        ({"quantization_config": 4}, "quantization_config must be a PipelineQuantizationConfig"),
        ({"quantization_config": {"transformer": 4}}, "quantization_config: Provided config for module_name=transformer"),
    ],
    ids=str,
)
def test_a_keyword_that_cannot_be_served_is_refused_by_name(tiny_folder, given, says):
    with pytest.raises(InputError, match=says) as caught:
        LatentFMPipeline.from_pretrained(tiny_folder, **given)
    assert "\n" not in str(caught.value)


def test_a_model_is_named_by_a_path_or_a_text():
    for wrong in (None, 5, ["a"]):
        with pytest.raises(InputError, match="a model is given by its folder, or its name on the hub"):
            LatentFMPipeline.from_pretrained(wrong)


def test_a_hubs_model_is_fetched_by_the_keywords_of_the_download(tiny_folder, monkeypatch):
    asked = {}

    def download(cls, name, **kwargs):
        asked.update(kwargs, name=name)
        return tiny_folder

    monkeypatch.setattr(LatentFMPipeline, "download", classmethod(download))
    given = {"revision": "v1", "cache_dir": "here", "force_download": True, "local_files_only": False, "token": "t", "variant": None}
    pipe = LatentFMPipeline.from_pretrained("some/model", **given, **NO_T5, low_cpu_mem_usage=True, torch_dtype=torch.bfloat16)
    assert asked == given | NO_T5 | {"use_safetensors": True, "name": "some/model"} and pipe.transformer.dtype == torch.bfloat16


def test_dtypes_by_component_are_stock_diffusers(tiny_folder):
    for dtype in ({"transformer": torch.bfloat16, "default": torch.float16}, {"text_encoder_3": torch.bfloat16}, torch.bfloat16):
        pipes = [kind.from_pretrained(tiny_folder, torch_dtype=dtype) for kind in (StableDiffusion3Pipeline, LatentFMPipeline)]
        theirs, ours = ({name: part.dtype for name, part in pipe.components.items() if hasattr(part, "dtype")} for pipe in pipes)
        assert ours == theirs and len(ours) == 5
    assert LatentFMPipeline.from_pretrained(tiny_folder, dtype="bfloat16").vae.dtype == torch.bfloat16


# Components left out, or replaced


def test_without_its_vae_a_pipeline_gives_stock_diffusers_latents(tiny_folder, picture):
    assert gap(draw(LatentFMPipeline.from_pretrained(tiny_folder, vae=None)), picture) < ROUNDING


def test_without_its_network_a_pipeline_encodes_as_stock_diffusers(tiny_folder):
    pipes = [kind.from_pretrained(tiny_folder, transformer=None, vae=None) for kind in (StableDiffusion3Pipeline, LatentFMPipeline)]
    theirs, ours = (pipe.encode_prompt("a red apple", None, None, max_sequence_length=16) for pipe in pipes)
    assert all(gap(a, b) < ROUNDING for a, b in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("absent", [["vae"], ["transformer", "vae"], ["text_encoder_3", "tokenizer_3"]], ids=str)
def test_a_pipeline_that_is_saved_without_a_component_loads_without_it(tiny_folder, tmp_path, absent):
    LatentFMPipeline.from_pretrained(tiny_folder, **dict.fromkeys(absent)).save_pretrained(tmp_path / "part")
    pipe = LatentFMPipeline.from_pretrained(tmp_path / "part")
    assert {name for name, part in pipe.components.items() if part is None} == {*absent, "image_encoder", "feature_extractor"}


def test_t5s_folders_may_be_gone_where_it_is_left_out(model, tiny_folder):
    for name in NO_T5:
        shutil.rmtree(model / name)
    way_out = "draw without: text_encoder_3=None, tokenizer_3=None when it is loaded, --without of latentfm generate"
    with pytest.raises(InputError, match=f"lacks the folder text_encoder_3, tokenizer_3, .*{way_out}"):
        LatentFMPipeline.from_pretrained(model)
    expected = draw(stock_of(tiny_folder, **NO_T5))
    assert gap(draw(LatentFMPipeline.from_pretrained(model, text_encoder_3=None)), expected) < ROUNDING
    index = json.loads((model / "model_index.json").read_text()) | dict.fromkeys(NO_T5, [None, None])
    (model / "model_index.json").write_text(json.dumps(index))
    assert gap(draw(LatentFMPipeline.from_pretrained(model)), expected) < ROUNDING


def test_a_variant_is_that_of_the_components_that_have_it(model, picture):
    stock_of(model).to(torch.bfloat16).vae.save_pretrained(model / "vae", variant="bf16")
    pipe = LatentFMPipeline.from_pretrained(model, variant="bf16")
    stock = stock_of(model, variant="bf16")
    assert all(torch.equal(value, stock.vae.state_dict()[key]) for key, value in pipe.vae.state_dict().items())
    assert gap(draw(pipe), picture) < ROUNDING
    with pytest.raises(InputError, match="has no weights of the variant fp16; there are bf16"):
        LatentFMPipeline.from_pretrained(model, variant="fp16")


@pytest.mark.parametrize("how", [{"variant": "bf16"}, {"max_shard_size": "30KB"}], ids=str)
def test_what_is_saved_as_stock_diffusers_can_save_it_loads_again(tiny_folder, tmp_path, picture, how):
    LatentFMPipeline.from_pretrained(tiny_folder).save_pretrained(tmp_path / "saved", **how)
    names = [path.name for path in (tmp_path / "saved").glob("*/*.safetensors")]
    assert all(".bf16." in name for name in names) if "variant" in how else any("-of-" in name for name in names)
    variant = {"variant": how["variant"]} if "variant" in how else {}
    for load, given in ((LatentFMPipeline.from_pretrained, {}), (LatentFMPipeline.from_pretrained, variant), (stock_of, variant)):
        assert gap(draw(load(tmp_path / "saved", **given)), picture) < ROUNDING


def test_what_cannot_be_saved_is_refused_by_name(tiny_folder, tmp_path):
    pipe = LatentFMPipeline.from_pretrained(tiny_folder)
    for given, says in (
        ({"safe_serialization": False}, "save_pretrained does not serve safe_serialization=False: only safetensors are written"),
        ({"use_flashpack": True}, "save_pretrained does not serve use_flashpack=True"),
        ({"repo_id": "some/model"}, "save_pretrained has no keyword repo_id"),
    ):
        with pytest.raises(InputError, match=says):
            pipe.save_pretrained(tmp_path / "saved", **given)
    assert not (tmp_path / "saved").exists()


def test_what_goes_to_the_hub_is_the_stock_folder(tiny_folder, tmp_path, monkeypatch):
    import diffusers.utils.hub_utils as hub

    sent = {}

    def upload(pipe, folder, repo_id, **more):
        sent.update(repo_id=repo_id, index=json.loads((Path(folder) / "model_index.json").read_text()))

    monkeypatch.setattr(hub, "create_repo", lambda repo_id, **more: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub, "load_or_create_model_card", lambda *given, **more: None)
    monkeypatch.setattr(hub, "populate_model_card", lambda card: SimpleNamespace(save=lambda path: None))
    monkeypatch.setattr(LatentFMPipeline, "_upload_folder", upload)
    LatentFMPipeline.from_pretrained(tiny_folder).save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    assert sent["repo_id"] == "mine" and sent["index"]["_class_name"] == "StableDiffusion3Pipeline"


# VAEs


@pytest.fixture(scope="module")
def tiny_vae():
    torch.manual_seed(3)
    widths = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    return AutoencoderTiny(latent_channels=4, **widths, **blocks).eval()


def test_a_tiny_autoencoder_draws_stock_diffusers_pixels(tiny_folder, tiny_vae, tmp_path):
    theirs = stock_of(tiny_folder, vae=tiny_vae)
    expected = draw(theirs, output_type="pt")
    assert gap(draw(LatentFMPipeline.from_pretrained(tiny_folder, vae=tiny_vae), output_type="pt"), expected) < ROUNDING
    theirs.save_pretrained(tmp_path / "stock")
    pipe = LatentFMPipeline.from_pretrained(tmp_path / "stock")
    assert isinstance(pipe.vae, AutoencoderTiny) and gap(draw(pipe, output_type="pt"), expected) < ROUNDING
    pipe.save_pretrained(tmp_path / "ours")
    assert gap(draw(stock_of(tmp_path / "ours"), output_type="pt"), expected) < ROUNDING
    with pytest.raises(InputError, match="has an AutoencoderTiny as its VAE, which has no names in SD3's single files"):
        write_single(tmp_path / "one.safetensors", open_weights(tmp_path / "ours"), "original", None)
    with pytest.raises(InputError, match="has an AutoencoderTiny as its VAE, which draws; to plan and train give"):
        read_model(tmp_path / "ours")


def test_a_tiny_autoencoders_latents_are_no_draw(tiny_vae):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    moments = vae_room.encode_moments(tiny_vae, images)
    assert moments.isfinite().all()
    with torch.no_grad():
        assert torch.equal(vae_room.sample_latents(moments, torch.randn(2, 4, 4, 4), 0.0, 1.0), tiny_vae.encode(images).latents)


def test_a_vae_of_another_class_than_the_index_says_is_refused(model):
    index = json.loads((model / "model_index.json").read_text()) | {"vae": ["diffusers", "AutoencoderTiny"]}
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="has a AutoencoderTiny as its vae, and its config.json is of another class"):
        LatentFMPipeline.from_pretrained(model)


def test_layers_without_end_in_a_tiny_autoencoder_are_refused_at_once(model):
    change = {"_class_name": "AutoencoderTiny", "num_encoder_blocks": [10**9]}
    (model / "vae" / "config.json").write_text(json.dumps(change))
    with pytest.raises(InputError, match="num_encoder_blocks .* which is no list of whole numbers"):
        load_component(model, "vae", "AutoencoderTiny", torch.float32)


def test_a_vae_without_a_shift_shifts_by_nothing(model):
    config = json.loads((model / "vae" / "config.json").read_text())
    pictures = []
    for shift in (None, 0.0):  # stock diffusers itself adds None, an error
        (model / "vae" / "config.json").write_text(json.dumps(config | {"shift_factor": shift}))
        pictures.append(draw(LatentFMPipeline.from_pretrained(model), output_type="pt"))
    assert torch.equal(*pictures) and gap(pictures[0], draw(stock_of(model), output_type="pt")) < ROUNDING


# Places


def test_a_device_map_puts_components_where_it_says(tiny_folder, picture):
    for where in ("cpu", torch.device("cpu"), "balanced", {"transformer": "cpu", "text_encoder_3": "cpu"}):
        pipe = LatentFMPipeline.from_pretrained(tiny_folder, device_map=where)
        assert gap(draw(pipe), picture) < ROUNDING
        assert pipe.hf_device_map == (None if where == "balanced" and not torch.cuda.is_available() else pipe.hf_device_map)
    assert hasattr(pipe.transformer, "_hf_hook") and not hasattr(pipe.vae, "_hf_hook")
    pipe.reset_device_map()
    assert pipe.hf_device_map is None and not hasattr(pipe.transformer, "_hf_hook") and gap(draw(pipe), picture) < ROUNDING


def test_components_are_balanced_as_stock_diffusers_does_but_none_is_lost():
    from diffusers.pipelines.pipeline_loading_utils import _assign_components_to_devices

    sizes = {"transformer": 40, "text_encoder_3": 90, "text_encoder_2": 14, "text_encoder": 3, "vae": 2}
    for room in ({0: 100, 1: 100}, {0: 60, 1: 100}, {0: 50, 1: 100, 2: 100}, {0: 200}):
        order = dict(sorted(room.items(), key=lambda item: -item[1]))
        theirs = _assign_components_to_devices(dict(sorted(sizes.items(), key=lambda item: -item[1])), order)
        ours = placing.balanced(sizes, room)
        assert ours == {name: device for device, names in theirs.items() for name in names}
    fitting = dict.fromkeys(("text_encoder_2", "text_encoder", "vae"), 0)
    assert placing.balanced(sizes, {0: 20}) == {"text_encoder_3": "cpu", "transformer": "cpu"} | fitting


def test_what_is_weighed_is_what_will_be_loaded(tiny_folder, monkeypatch):
    weighed = {}
    monkeypatch.setattr(placing, "get_max_memory", lambda most: {0: 10**9, "cpu": 10**9})
    monkeypatch.setattr(placing, "balanced", lambda sizes, room: weighed.update(sizes) or {})
    pipe = LatentFMPipeline.from_pretrained(tiny_folder, device_map="balanced", torch_dtype={"transformer": torch.bfloat16}, vae=None)
    for name, size in weighed.items():
        assert size == pytest.approx(placing.bytes_of(getattr(pipe, name)), rel=1e-3), name
    assert weighed.keys() == {"transformer", "text_encoder", "text_encoder_2", "text_encoder_3"}
