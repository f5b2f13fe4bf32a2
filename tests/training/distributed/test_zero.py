"""What DeepSpeed is asked for and given, and what it is not asked for; trainings with it are in test_processes.py."""

import json

import pytest

from latentfm.config import TrainOptions
from latentfm.errors import InputError
from latentfm.models.memory import ZERO_BUCKET
from latentfm.training.checks import Launch
from latentfm.training.distributed.zero import check_zero, configuration

pytest.importorskip("deepspeed")


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """asked(stage=..., ...) sets the environment as accelerate launch does; asked(file={...}) for a deepspeed_config_file."""

    def told(file=None, **settings):
        given = {"USE_DEEPSPEED": "true"} | {f"DEEPSPEED_{name.upper()}": str(value) for name, value in settings.items()}
        if file is not None:
            (tmp_path / "deepspeed.json").write_text(json.dumps(file))
            given["DEEPSPEED_CONFIG_FILE"] = str(tmp_path / "deepspeed.json")
        for name, value in given.items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)
        for name, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4"), ("LOCAL_RANK", "0")):
            monkeypatch.setenv(name, value)

    return told


def test_the_launcher_says_which_stage(asked):
    asked(zero_stage=2)
    assert Launch.here() == Launch(4, 1, 1, 2) and Launch.here().way == "zero2"
    asked(zero_stage=3, offload_optimizer_device="cpu")
    assert Launch.here() == Launch(4, 1, 4, 3, offload=True) and Launch.here().way == "zero3"


def test_a_file_of_deepspeeds_says_it_too(asked):
    asked(file={"zero_optimization": {"stage": 3, "overlap_comm": True}, "gradient_clipping": 7, "train_micro_batch_size_per_gpu": "auto"})
    assert Launch.here() == Launch(4, 1, 4, 3)
    given = configuration(TrainOptions(max_grad_norm=0.5, gradient_accumulation=2, mixed_precision="bf16"), 8, 4)
    assert given["zero_optimization"] | {} == given["zero_optimization"] and given["zero_optimization"]["overlap_comm"] is True
    assert given["zero_optimization"]["reduce_bucket_size"] == ZERO_BUCKET
    assert (given["gradient_clipping"], given["gradient_accumulation_steps"], given["train_batch_size"]) == (0.5, 2, 64)
    assert given["bf16"]["enabled"] and given["data_types"]["grad_accum_dtype"] == given["communication_data_type"] == "fp32"
    assert configuration(TrainOptions(max_grad_norm=float("inf"), mixed_precision="no"), 8, 4)["gradient_clipping"] == 0


def test_what_deepspeed_would_do_by_itself_is_refused(asked, monkeypatch):
    refused = {
        "ZeRO stage 1 is not supported": {"zero_optimization": {"stage": 1}},
        "has an optimizer or scheduler": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}},
        "offloading to nvme": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
        "DeepSpeed's configuration": {"gradient_clipping": 1},
    }
    for said, file in refused.items():
        asked(file=file)
        with pytest.raises(InputError, match=said):
            Launch.here()
    asked(file={"zero_optimization": {"stage": 2}})
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(InputError, match="needs a launcher"):
        Launch.here()


def test_options_that_do_not_go_with_it_are_refused():
    check_zero(TrainOptions(compile=True), 2)
    check_zero(TrainOptions(optimizer="lion"), 3)
    refused = {
        "train.optimizer=adafactor looks at whole": ({"optimizer": "adafactor"}, 2),
        "train.optimizer=paged_adamw": ({"optimizer": "paged_adamw"}, 3),
        "train.weights=bfloat16": ({"weights": "bfloat16"}, 2),
        "train.adapter.base=nf4": ({"adapter": {"base": "nf4"}}, 2),
        "train.compile does not go with ZeRO 3": ({"compile": True}, 3),
    }
    for said, (options, stage) in refused.items():
        with pytest.raises(InputError, match=said):
            check_zero(TrainOptions(**options), stage)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("latentfm.training.distributed.zero.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'latentfm\[deepspeed\]'"):
        check_zero(TrainOptions(), 2)
