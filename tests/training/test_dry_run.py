"""The dry run: its numbers against what a run really has, its checks, each of which a wrong option must meet, and that it loads nothing."""

import json
import os
import re
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hollow import hollow_pipeline
from PIL import Image
from tiny import tiny_pipeline

from latentfm.config import load_config
from latentfm.data.stream import Stream
from latentfm.errors import InputError
from latentfm.interchange.weights import load_transformer
from latentfm.planning.cost import parameters
from latentfm.planning.devices import EFFICIENCY, GIB, GPUS, Device, known_gpu
from latentfm.planning.memory import training_phases
from latentfm.planning.run import Parallelism, changed, plan_run, with_precision
from latentfm.planning.summary import training_summary
from latentfm.planning.training import checkpoint_bytes, training_of
from latentfm.training import dry_run as room
from latentfm.training.adapters import choose_trainable
from latentfm.training.checks import check
from latentfm.training.dry_run import dry_run
from latentfm.training.trainer import train

SHAPES = ((32, 32), (64, 32), (32, 64), (90, 30))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures of four shapes, three of each, with two captions; one that is no picture, and one without a caption."""
    folder = tmp_path_factory.mktemp("dry") / "pictures"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", SHAPES[number % 4], (20 * number, 0, 0)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture {number}\npicture number {number}", "utf-8")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("broken", "utf-8")
    Image.new("RGB", (32, 32)).save(folder / "alone.png")
    return folder


@pytest.fixture(scope="module")
def hollow_folder(tmp_path_factory):
    return hollow_pipeline(tmp_path_factory.mktemp("hollow") / "sd3.5-medium", "sd3.5-medium")


def free_bytes(monkeypatch, free):
    """Has every disk say that so much is free."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage(10**15, 0, free))


@pytest.fixture
def hollow(hollow_folder, monkeypatch):
    """SD3.5 medium without its weights, and a disk with room for its checkpoints."""
    free_bytes(monkeypatch, 10**15)
    return hollow_folder


@pytest.fixture
def configure(folder, tiny_folder, tmp_path):
    """configure(*overrides) -> the options of a run of 30 steps of 4 on these pictures and the tiny pipeline."""

    def build(*overrides):
        return load_config(None, [
            f"data.folder={folder}", f"data.cache={tmp_path / 'cache'}", f"model.pipeline={tiny_folder}",
            f"output.folder={tmp_path / 'run'}", "train.steps=30", "train.batch_size=4", "data.t5_lengths={8: 0.5, 12: 0.5}", *overrides,
        ])  # fmt: skip

    return build


@pytest.fixture
def refused(configure):
    """refused(*overrides, parallelism, resume) -> the message with which the dry run refuses them."""

    def refuse(*overrides, parallelism=None, resume=False):
        with pytest.raises(InputError) as caught:
            dry_run(configure(*overrides), resume, parallelism or Parallelism())
        return str(caught.value)

    return refuse


# What it says


def test_it_counts_the_data_by_bucket_and_names_what_is_not_used(configure):
    found = dry_run(configure("data.size=32", "data.buckets=3", "validation.held_out=2"))
    data, rows = found["data"], found["buckets"]
    assert data["pictures"] == 10 and data["held out"] == 2 and data["captions"] == 20
    assert {problem["reason"]: problem["count"] for problem in data["not used"]} == {
        "picture without a caption": 1, "picture that cannot be read": 1,
    }  # fmt: skip
    assert "broken.png" in data["not used"][1]["first"][0]
    assert len(rows) == 3 and (32, 32) in {(row["width"], row["height"]) for row in rows}
    assert sum(row["pictures"] for row in rows) == 10
    assert sum(row["steps an epoch"] for row in rows) == pytest.approx(found["steps"]["an epoch"]) == 10 / 4
    assert found["steps"]["epochs"] == pytest.approx(30 * 4 / 10)
    assert found["steps"]["validations"] == 2 and found["steps"]["checkpoints"] == 1
    assert all(row["mean crop"] <= row["worst crop"] < 1 for row in rows)
    assert max(row["worst crop"] for row in rows) > 0.3  # 90 x 30 has lost its ends


def test_pictures_left_out_for_their_crop_are_named(configure):
    found = dry_run(configure("data.size=32", "data.max_crop=0.6"))
    assert found["data"]["pictures"] == 9
    reasons = {problem["reason"]: problem["first"] for problem in found["data"]["not used"]}
    assert sorted(name.split()[0] for name in reasons["more than data.max_crop 0.6 cropped away"]) == ["03.png", "07.png", "11.png"]


def test_it_says_how_a_batch_is_split_and_how_often_nothing_is_told(configure):
    config = configure("train.batch_size=24", "train.gradient_accumulation=3", "train.dropout=0.1", "train.dropout_each=0.5")
    found = dry_run(config, parallelism=Parallelism(4))
    assert found["batch"]["pictures a process at a time"] == 2 and found["batch"]["processes"] == 4
    assert found["P(no condition)"] == pytest.approx(0.1 + 0.9 * 0.5**3)
    assert found["tokens"] == {"image": [16], "text": 16 + 12, "mean text": 16 + 10, "routed": None}


def test_it_prints_every_option_and_marks_those_that_are_not_as_by_default(configure):
    options = dry_run(configure("train.seed=7", "train.optimizer=adamw"))["options"]
    changed = {name for name, option in options.items() if "default" in option}
    assert changed == {
        "model.pipeline", "data.folder", "data.t5_lengths", "data.cache", "train.steps", "train.batch_size", "train.seed", "output.folder",
        "train.mixed_precision",  # what the device has, in the place of auto
    }  # fmt: skip
    assert options["train.seed"] == {"value": 7, "default": 0} and options["train.optimizer"] == {"value": "adamw"}


@pytest.mark.parametrize(
    "override",
    [
        "train.seed=0", "train.blocks=-1-", "train.adapter={rank: 3}", "train.adapter={rank: 2, kind: dora, targets: all_linear}",
        "train.adapter={rank: 2, targets: [ff.net.2, norm1.linear]}",
    ],
)  # fmt: skip
def test_the_parameters_are_those_that_train(configure, tiny_folder, override):
    config = configure(override)
    network = load_transformer(tiny_folder)
    choose_trainable(network, config.train)
    wanted = [sum(p.numel() for p in block.parameters() if p.requires_grad) for block in network.transformer_blocks]
    whole = sum(p.numel() for p in network.parameters() if p.requires_grad)
    plan = check(config)
    assert plan.trained == (*wanted, whole - sum(wanted))
    counts = dry_run(config)["parameters"]
    assert counts["trained"] == whole
    base = sum(parameters(plan.model.network).values())
    assert counts["frozen"] == (base if config.train.adapter else base - whole)


def test_a_new_network_takes_its_widths_from_the_frozen_models(configure):
    plan = check(configure("model.preset=small", "data.size=32"))
    assert plan.model.network.layers == 12 and plan.model.network.text_dim == 48 and plan.model.network.pooled_dim == 40
    assert plan.model.network.in_channels == plan.model.network.out_channels == 4


def test_a_new_network_needs_no_network_in_the_pipeline_folder(configure, tiny_folder, tmp_path):
    whole = check(configure("model.preset=small", "data.size=32"))
    without = shutil.copytree(tiny_folder, tmp_path / "without", ignore=shutil.ignore_patterns("transformer"))
    plan = check(configure("model.preset=small", "data.size=32", f"model.pipeline={without}"))
    assert plan.model._replace(name="") == whole.model._replace(name="") and plan.trained == whole.trained
    with pytest.raises(InputError, match="transformer"):
        check(configure(f"model.pipeline={without}"))


def test_its_steps_are_the_streams(configure):
    config = configure("data.size=32", "data.buckets=3")
    found = dry_run(config)
    placed, _ = room.read_pictures(room.open_dataset(config.data), check(config), lambda done, of: None)
    stream = Stream(placed.mixture, 4, config.train.seed)
    assert found["steps"]["in the first epoch"] == stream.steps_in(0)
    assert np.mean([stream.steps_in(epoch) for epoch in range(40)]) == pytest.approx(found["steps"]["an epoch"], rel=0.03)


def test_memory_falls_with_every_option_that_should_lower_it(hollow, configure):
    def total(*overrides, parallelism=None, at="backward pass"):
        config = configure(f"model.pipeline={hollow}", "data.size=512", "sample.prompts=[a]", "train.batch_size=32", *overrides)
        return dry_run(config, parallelism=parallelism or Parallelism(), device=Device.of(GPUS["h100"]))["memory"]["at"][at]

    plain = total()
    lower = [
        ("train.gradient_checkpointing=0.5",), ("train.ema_device=cpu",), ("train.optimizer=adamw8bit",), ("train.optimizer=lion",),
        ("train.optimizer=adafactor",), ("train.weights=bfloat16",), ("train.blocks=-4-",), ("train.adapter={rank: 8}",),
        ("train.gradient_accumulation=4",),
    ]  # fmt: skip
    for overrides in lower:
        assert total(*overrides) < plain, overrides
    assert total(parallelism=Parallelism(8, 1, 8)) < total(parallelism=Parallelism(8)) < plain
    assert total(parallelism=Parallelism(8, 1, 8, offload=True)) < total(parallelism=Parallelism(8, 1, 8))
    assert total("train.optimizer=prodigy", "train.learning_rate=1") > plain
    adapters = (f"train.adapter={{rank: 8, base: {base}}}" for base in ("as_weights", "int8", "nf4"))
    base = [total("train.weights=bfloat16", adapter, at="optimizer step") for adapter in adapters]
    whole = sum(parameters(check(configure(f"model.pipeline={hollow}")).model.network).values())
    assert base[0] - base[1] == pytest.approx(0.97 * whole, rel=0.03)  # all but the embeddings go from two bytes to one
    assert base[1] - base[2] == pytest.approx(0.48 * whole, rel=0.05)  # and to about half a byte
    assert total("model.text_encoders=bfloat16", at="filling the cache") < total(at="filling the cache") - 10 * GIB


def test_frozen_blocks_before_the_first_that_trains_keep_nothing(configure, tiny_folder):
    """As autograd has it: no more is kept than the closed form says, and less than without them frozen."""
    kept = {}
    for blocks in ("0-", "-1-"):
        config = configure(f"train.blocks={blocks}", "train.mixed_precision=no", "train.ema_device=cpu")
        network = load_transformer(tiny_folder).train()
        choose_trainable(network, config.train)
        own, stored = {p.untyped_storage()._cdata for p in (*network.parameters(), *network.buffers())}, {}

        def pack(tensor, own=own, stored=stored):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                stored[storage._cdata] = (tensor, storage.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(torch.randn(4, 4, 8, 8), torch.randn(4, 28, 48), torch.randn(4, 40), torch.rand(4))
        parts = dry_run(config, device=Device("CPU", 10**10, None, cpu=True))["memory"]
        phases = training_phases(check(config).model.network, training_of(check(config), cpu=True, pictures=12))
        forward = next(phase for phase in phases if phase.name == "end of the forward pass")
        kept[blocks] = (sum(size for _, size in stored.values()), forward.parts["activations"])
        assert parts["total"] > 0
    assert kept["-1-"][0] < 0.7 * kept["0-"][0] and kept["-1-"][1] < 0.7 * kept["0-"][1]
    for real, said in kept.values():
        assert 0.85 * said < real <= 1.02 * said


def test_the_time_is_operations_over_a_share_of_the_peak(hollow, configure):
    config = configure(f"model.pipeline={hollow}", "data.size=512", "sample.prompts=[a]")
    h100, wide = Device.of(GPUS["h100"]), changed(config, "train.batch_size", 8)
    one, eight = (dry_run(wide, parallelism=Parallelism(n), device=h100)["time"] for n in (1, 8))
    assert one["images a second"] == pytest.approx(GPUS["h100"].tflops * 1e12 * EFFICIENCY / one["FLOP a picture"])
    assert eight["images a second"] == pytest.approx(8 * one["images a second"])
    assert one["hours"] == pytest.approx(30 * 8 / one["images a second"] / 3600)
    assert dry_run(config, device=Device("CPU", 10**11, None, cpu=True))["time"]["hours"] is None

    def flops(*more):
        changed = configure(f"model.pipeline={hollow}", "data.size=512", *more)
        return dry_run(changed, device=Device.of(GPUS["h100"]))["time"]["FLOP a picture"]

    plain = flops()
    assert flops("train.token_routing={keep: 0.5, first: 2, last: -3}") < 0.85 * plain
    assert flops("train.gradient_checkpointing=true") == pytest.approx(4 / 3 * plain, rel=0.04)
    assert flops("train.blocks=-4-") < 0.55 * plain and flops("train.adapter={rank: 8}") < 0.8 * plain


def test_the_cache_is_as_large_as_said(configure, folder, tiny_folder):
    config = configure("data.size=32", "data.buckets=3", "data.flip=true")
    need = next(need for need in dry_run(config)["disk"] if need["what"] == "cache")
    latents = sum(2 * 4 * (row["width"] // 4) * (row["height"] // 4) * row["pictures"] for row in dry_run(config)["buckets"])
    prompt = sum(16 * (16 + 24) + 16 + 24 + length * 48 for length in (8, 12))
    assert need["bytes"] == 2 * 2 * latents + 2 * 24 * prompt
    assert not any(need["what"] == "cache" for need in dry_run(configure("data.online=true"))["disk"])


def test_a_run_begins_only_where_a_checkpoint_fits(configure, monkeypatch):
    config = configure()
    needed = checkpoint_bytes(check(config))
    free_bytes(monkeypatch, needed)
    check(config)
    free_bytes(monkeypatch, needed - 1)
    with pytest.raises(InputError, match=r"a checkpoint takes [1-9]\S+ MB, and [1-9]\S+ MB are free at output.folder .*free some space"):
        check(config)


@pytest.mark.parametrize("disk", ["the base's", "another"])
def test_what_a_run_saves_is_as_large_as_said(configure, tiny_folder, tmp_path, disk):
    """The frozen models are linked into a checkpoint on their own disk, copied onto another, and always copied at the end."""
    other = Path("/dev/shm")
    if disk == "another" and (not other.is_dir() or other.stat().st_dev == tiny_folder.stat().st_dev):
        pytest.skip("there is one disk")
    with tempfile.TemporaryDirectory(dir=other if disk == "another" else tmp_path) as place:
        config = configure("train.steps=2", "train.warmup_steps=0", "data.size=32", "output.trackers=[]", "train.mixed_precision=no",
                           f"output.folder={place}/run")
        needs = {need["what"]: need["bytes"] for need in dry_run(config)["disk"]}
        train(config)
        checkpoint, model = (room.stored(Path(place, "run", what)) for what in ("checkpoints", "model"))
    assert needs["checkpoints"] == pytest.approx(2 * checkpoint, rel=0.1)  # one more while it is written; files' headers are not counted
    assert needs["model"] == pytest.approx(model, rel=0.1)


def test_a_plan_without_data_says_the_same_of_the_run(configure):
    config, device = configure("data.size=32", "train.adapter.rank=4"), Device.of(GPUS["h100"])
    found, planned = dry_run(config, device=device), training_summary(plan_run(with_precision(config, bfloat16=True)), device, pictures=12)
    assert planned == {section: found[section] for section in planned}


def test_a_gpu_is_known_by_its_drivers_name():
    assert known_gpu("NVIDIA H100 80GB HBM3") == GPUS["h100"] and known_gpu("NVIDIA A100-SXM4-80GB") == GPUS["a100"]
    assert known_gpu("NVIDIA GeForce RTX 4090") == GPUS["4090"]
    assert known_gpu("NVIDIA H100 PCIe") is None and known_gpu("Tesla T4") is None


def test_the_launcher_says_how_many_processes_there_are():
    assert Parallelism.here({}) == Parallelism(1, 1, 1)
    ddp = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    assert Parallelism.here(ddp) == Parallelism(16, 2, 1)
    assert Parallelism.here(ddp | {"ACCELERATE_USE_FSDP": "true"}) == Parallelism(16, 2, 16)
    hybrid = ddp | {"ACCELERATE_USE_FSDP": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"}
    assert Parallelism.here(hybrid) == Parallelism(16, 2, 8)
    assert Parallelism.here(hybrid | {"FSDP_OFFLOAD_PARAMS": "true"}) == Parallelism(16, 2, 8, offload=True)
    assert Parallelism.here(ddp | {"FSDP_OFFLOAD_PARAMS": "true"}) == Parallelism(16, 2, 1)


def test_nothing_is_written_and_no_weight_is_read(configure, hollow, tmp_path, monkeypatch):
    """A pipeline of 16 GiB of holes: reading them would show, in time and memory, and through torch's and safetensors' own functions."""

    def never(*arguments, **named):
        raise AssertionError("a weight was read")

    for name in ("safetensors.torch.load_file", "safetensors.torch.load", "torch.load", "torch.from_file"):
        monkeypatch.setattr(name, never)
    dry_run(configure(f"model.pipeline={hollow}", "data.size=512"))
    assert not any((tmp_path / name).exists() for name in ("run", "cache"))


def test_what_it_finds_is_plain_json(configure):
    found = dry_run(configure("train.token_routing={keep: 0.5, first: 0, last: 1}"))
    assert json.loads(json.dumps(found)) == found


# What it refuses


def test_wrong_options_are_refused_with_the_way_out(refused, configure, tmp_path):
    assert "there is no folder" in refused(f"data.folder={tmp_path / 'nowhere'}")
    assert "there is no folder" in refused("data.folder=", f"data.sources=[{{path: {tmp_path / 'nowhere'}}}]")
    with pytest.raises(InputError, match="data.sources.0.path: there is no file .*nowhere.parquet"):
        check(configure("data.folder=", f"data.sources=[{{path: {tmp_path / 'nowhere.parquet'}}}]"))
    assert "the nearest are 32 and 40" in refused("data.size=33")
    assert "larger than this network's 64" in refused("data.size=128")
    assert "no 40 shapes" in refused("data.buckets=40")
    assert "does not fit this network of 2 blocks" in refused("train.blocks=0-7")
    assert "called 'attn.to_qq' (did you mean 'attn.to_q'?)" in refused("train.adapter={targets: [attn.to_qq]}")
    assert "no preset 'smal' (did you mean 'small'?)" in refused("model.preset=smal")
    assert "no attention backend 'flesh'" in refused("train.attention=flesh")
    assert "token_routing from block 1 to 5" in refused("train.token_routing={keep: 0.5, first: 1, last: 5}")
    assert "token_routing.keep 0.01" in refused("train.token_routing={keep: 0.01, first: 0, last: 1}")
    assert "scale" in refused("train.t_density=mode", "train.t_density_options={scale: 9}")
    assert "leaves none to train on" in refused("validation.held_out=12")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    (tmp_path / "broken" / "a.txt").write_text("a")
    assert "none of the 1 pictures" in refused(f"data.folder={tmp_path / 'broken'}")


def test_a_batch_that_does_not_split_is_refused_with_sizes_that_do(refused):
    message = refused("train.batch_size=20", "train.gradient_accumulation=2", parallelism=Parallelism(8))
    assert "20 does not divide by 8 processes times gradient_accumulation 2; 16 or 32 does" in message


def test_ways_to_work_together_that_are_not_supported_are_refused(refused):
    assert "adafactor looks at whole parameters" in refused("train.optimizer=adafactor", parallelism=Parallelism(2, 1, 2))


def test_a_package_that_is_missing_is_named(refused, monkeypatch):
    from importlib import util

    real = util.find_spec
    for module in ("latentfm.training.checks.find_spec", "importlib.util.find_spec"):
        monkeypatch.setattr(module, lambda name, *more: None if name in ("wandb", "bitsandbytes", "prodigyopt") else real(name, *more))
    message = refused("train.optimizer=prodigy", "train.learning_rate=1", "output.trackers=[wandb]", "train.adapter={base: nf4}")
    assert "prodigyopt" in message and "train.adapter.base=nf4 needs bitsandbytes" in message
    assert "train.optimizer=adamw8bit needs bitsandbytes" in refused("train.optimizer=adamw8bit")
    assert "pip install wandb" in refused("output.trackers=[wandb]")


def test_all_that_is_wrong_is_said_at_once(refused, configure, tmp_path):
    wrong = ("data.size=33", f"data.folder={tmp_path / 'nowhere'}", "train.blocks=9")
    with pytest.raises(InputError) as caught:
        check(configure(*wrong), parallelism=Parallelism(3))
    assert str(caught.value).count("there is no folder") == 1 and "4 things are wrong" in str(caught.value)
    message = refused(*wrong, parallelism=Parallelism(3))
    assert message.startswith("4 things are wrong: (1) train.batch_size 4 does not divide") and "(4) " in message
    for part in ("there is no folder", "data.size 33", "train.blocks '9'"):
        assert message.count(part) == 1


def test_an_output_folder_that_holds_a_run_is_refused_but_to_resume(refused, configure, tmp_path):
    assert "nothing to resume" in refused(resume=True)
    step = tmp_path / "run" / "checkpoints" / "step-00000010"
    step.mkdir(parents=True)
    (step / "state.json").write_text("{}")
    assert "already holds a run" in refused()
    assert dry_run(configure(), resume=True)["data"]["pictures"] == 12
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(f"output.folder={tmp_path / 'file'}")
    assert f"{tmp_path / 'file'} is a file" in refused(f"data.cache={tmp_path / 'file' / 'deeper'}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused(refused, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "no permission" in refused(f"output.folder={tmp_path / 'locked' / 'run'}")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "vae"), "has no vae/config.json"),
        (lambda folder: shutil.rmtree(folder / "tokenizer_2"), "lacks the folder tokenizer_2"),
        (lambda folder: shutil.rmtree(folder / "text_encoder_3"), "lacks the folder text_encoder_3"),
        (lambda folder: (folder / "model_index.json").unlink(), "no model_index.json"),
        (lambda folder: cut(next((folder / "text_encoder").glob("*.safetensors"))), "bytes"),
        (lambda folder: cut(next((folder / "transformer").glob("*.safetensors"))), "bytes"),
        (lambda folder: [file.rename(file.with_suffix(".bin")) for file in (folder / "vae").glob("*.safetensors")], "is a pickle"),
        (lambda folder: (folder / "transformer" / "config.json").write_text("{"), "cannot be read"),
    ],
)  # fmt: skip
def test_a_pipeline_folder_that_is_not_whole_is_refused(refused, tmp_path, break_it, message):
    tiny_pipeline(tmp_path / "tiny")
    break_it(tmp_path / "tiny")
    assert message in refused(f"model.pipeline={tmp_path / 'tiny'}")


def cut(file):
    """Takes the last byte off a file."""
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(refused, configure, monkeypatch, tmp_path):
    wanted = sum(need["bytes"] for need in dry_run(configure())["disk"])
    for free, enough in ((wanted, True), (wanted - 1, False)):
        free_bytes(monkeypatch, free)
        if enough:
            dry_run(configure())
        else:
            message = refused()
            assert re.search(r"[1-9]\S+ MB are needed and [1-9]\S+ MB free", message)
            assert "checkpoints" in message and str(tmp_path / "cache") in message


def test_memory_that_does_not_suffice_is_said_and_is_no_error(configure):
    small = Device("a small one", GIB, None)
    assert dry_run(configure(), device=small)["memory"]["fits"] is False
    assert dry_run(configure(), device=Device.of(GPUS["h100"]))["memory"]["fits"] is True
