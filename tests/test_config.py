"""The options of a run: what is accepted, what is refused and how, and that each of them is read."""

import ast
import sys
from pathlib import Path

import pytest
import yaml

import latentfm
from latentfm.config import RunConfig, load_config
from latentfm.errors import InputError

NEEDED = ["data.folder=pictures", "output.folder=runs/a"]
SOURCE = Path(latentfm.__file__).parent
ROOT = SOURCE.parent
OPTIONS = [(section, key) for section, field in RunConfig.model_fields.items() for key in field.annotation.model_fields]


def config(*overrides):
    return load_config(None, [*NEEDED, *overrides])


def written(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, "utf-8")
    return path


def test_a_file_gives_options_and_overrides_go_on_top(tmp_path):
    path = written(tmp_path, "data: {folder: a, size: [64, 32]}\ntrain:\n  steps: 7\n  learning_rate: 1.5e-3\noutput: {folder: b}\n")
    given = load_config(
        path, ["train.steps=9", "train.betas=[0.8, 0.9]", "data.t5_lengths={16: 0.9, 256: 0.1}", "sample.prompts=[a cat, b]"]
    )
    assert (given.data.folder, given.data.size, given.output.folder) == ("a", (64, 32), "b")
    assert (given.train.steps, given.train.learning_rate, given.train.betas) == (9, 1.5e-3, (0.8, 0.9))
    assert given.data.t5_lengths == {16: 0.9, 256: 0.1} and given.sample.prompts == ["a cat", "b"]
    assert given.train.batch_size == RunConfig.model_fields["train"].default_factory().batch_size
    assert load_config(path, []).train.steps == 7
    assert load_config(path, ["train.steps=9", "train.steps=10"]).train.steps == 10  # the last one counts


@pytest.mark.parametrize("text", ["1e-4", "0.0001", "1.0e-4"])
def test_numbers_may_be_written_as_people_write_them(text):
    assert config(f"train.learning_rate={text}").train.learning_rate == 1e-4


@pytest.mark.parametrize("text", ["no", "'no'", "No"])
def test_no_is_a_precision_though_yaml_calls_it_false(tmp_path, text):
    assert config(f"train.mixed_precision={text}").train.mixed_precision == "no"
    path = written(tmp_path, f"data: {{folder: a}}\noutput: {{folder: b}}\ntrain: {{mixed_precision: {text}}}")
    assert load_config(path).train.mixed_precision == "no"


@pytest.mark.parametrize("name", ["2026-03-01", "123", "007", "on", "1e3", "a=b", "with space", "runs/ä"])
def test_a_folder_may_have_any_name(name):
    given = load_config(None, [f"data.folder={name}", f"output.folder={name}", f"model.pipeline={name}"])
    assert given.data.folder == given.output.folder == given.model.pipeline == name


def test_nothing_leaves_a_text_unset_and_null_any_other_option():
    given = config("model.pipeline=", "data.size=null")
    assert given.model.pipeline is None and given.data.size is None
    with pytest.raises(InputError, match=r"^data\.cache: .*valid string"):
        config("data.cache=")


def test_the_cache_lies_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sys.platform != "linux" or config().data.cache == str(tmp_path / "latentfm")
    assert config("data.cache=~/mine").data.cache == "~/mine"


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.learning_rat=1", "unknown option 'train.learning_rat' (did you mean 'learning_rate'?)"),
        ("train.lrate=1", "unknown option 'train.lrate'"),
        ("trian.steps=1", "unknown section 'trian' (did you mean 'train'?)"),
        ("sample.step=1", "unknown option 'sample.step' (did you mean 'steps'?)"),
        ("train.steps", "override 'train.steps' should look like section.key=value"),
        ("steps=3", "override 'steps=3' should look like section.key=value"),
        ("train.=3", "override 'train.=3' should look like"),
        ("train.betas=[1,", "the value of 'train.betas=[1,' is not valid YAML"), ("train.betas=[1] 2", "is not valid YAML"),
        ("sample.prompts=[a, b", "the value of 'sample.prompts=[a, b' is not valid YAML"), ("sample.prompts=[a, [b]", "is not valid YAML"),
        ('sample.prompts=["a, b]', "is not valid YAML"), ("train.adapter.targets=[to_q", "is not valid YAML"),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest(override, message):
    with pytest.raises(InputError) as error:
        config(override)
    assert message in str(error.value) and "\n" not in str(error.value)


OUT_OF_RANGE = [
    "train.steps=0", "train.steps=1.5", "train.steps=many", "train.batch_size=0", "train.gradient_accumulation=0",
    "train.learning_rate=0", "train.learning_rate=-1", "train.learning_rate=.inf", "train.learning_rate=.nan", "train.warmup_steps=-1",
    "train.decay=cosin", "train.weight_decay=-0.1", "train.weight_decay=.inf", "train.betas=[0.9]", "train.betas=[0.9, 1.0]",
    "train.betas=[-0.1, 0.9]", "train.max_grad_norm=0", "train.max_grad_norm=.nan", "train.mixed_precision=fp16",
    "train.mixed_precision=yes", "train.weights=fp8", "train.master_weights=perhaps", "train.moments=float16",
    "train.gradient_checkpointing=1.01", "train.gradient_checkpointing=-0.1", "train.token_routing=0.5", "train.token_routing={keep: 0}",
    "train.token_routing={keep: 1.1}", "train.token_routing={first: 1.5}", "train.compile=perhaps", "train.deterministic=perhaps",
    "train.one_step=perhaps", "data.pairs={prompts: a, count: 0}", "data.pairs={prompts: a, guidance: -1}",
    "train.ema_decay=1", "train.ema_decay=-0.1",
    "train.t_density=normal", "train.t_shift=0", "train.t_shift=.inf", "train.dropout=1.1", "train.dropout=-0.1", "train.dropout_each=2",
    "train.seed=-1", "data.size=big", "data.size=[1, 2, 3]", "data.flip=7", "data.t5_lengths={}", "data.t5_lengths={0: 1}",
    "data.t5_lengths={16: 0}", "data.t5_lengths={16: .nan}", "data.t5_lengths={16: .inf}", "data.t5_lengths=16",
    "data.t5_lengths={77: 1, 077: 2}", 'data.t5_lengths={"77": 1, "7_7": 2}', "data.workers=-1",
    "data.buckets=0", "data.max_aspect=0.5", "data.max_aspect=.inf", "data.max_crop=0", "data.max_crop=1.1", "data.cache_dtype=float16",
    "data.verify=perhaps", "data.online=perhaps", "model.text_encoders=float16",
    "train.optimizer=adam", "train.adapter={rank: 0}", "train.adapter={kind: full}", "train.adapter={dropout: 1}", "train.adapter=lora",
    "train.adapter={base: int4}", "train.adapter={alpha: 0}", "train.ema_device=gpu", "train.loss_weighting=snr",
    "train.t_density_options={scale: 1}", "train.t_density_options=[1]",
    "validation.held_out=-1", "validation.every=0", "validation.times=0", "output.trackers=[mlflow]", "output.trackers=mlflow",
    "data.folder=", "data.sources=[]", "data.sources=[{path: a, weight: 0}]", "data.prior_weight=-1",
    "sample.every=0", "sample.steps=0", "sample.guidance=.nan", "sample.prompts={one: 1}", "sample.seed=-1",
    "sample.solver=huen", "sample.schedule=linear", "sample.shift=0", "sample.guidance_rule=autoguidance", "sample.guidance_rescale=1.1",
    "sample.guidance_interval=[0.5]", "sample.guidance_interval=0.5", "sample.zero_init=-1", "sample.noise=2.1",
    "output.checkpoint_every=0", "output.keep=0", "output.dtype=float64",
]  # fmt: skip


@pytest.mark.parametrize("override", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name(override):
    with pytest.raises(InputError) as error:
        config(override)
    assert override.split("=")[0] in str(error.value) and "\n" not in str(error.value)


TRUTHS = [
    "train.learning_rate=yes", "train.steps=on", "train.steps=true", "train.betas=[yes, 0.9]", "train.betas.1=true", "train.seed=false",
    "train.adapter.rank=true", "train.adapter={alpha: on}", "train.token_routing.keep=yes", "train.token_routing={first: true}",
    "train.t_density_options={mean: true}", "train.t_density_options.std=yes", "data.size=true", "data.size=[64, on]", "data.size=true,64",
    "data.t5_lengths={77: true}", 'data.t5_lengths={"77": true}', "data.t5_lengths.77=yes", "data.workers=no",
    "data.pairs={prompts: a, count: true}",
    "data.sources.0.weight=yes", "data.sources=[{path: a, repeats: true}]", "data.sources=[{path: a, caption_columns: {x: on}}]",
    "sample.guidance_interval=[false, true]", "sample.guidance=off", "output.keep=true", "validation.held_out=true",
]  # fmt: skip


@pytest.mark.parametrize("override", TRUTHS)
def test_a_truth_value_is_no_number(tmp_path, override):
    with pytest.raises(InputError, match=r"should be a number; .*\(got .*(True|False)") as error:
        config(override)
    assert override.split("=")[0].removesuffix(".1").removesuffix(".77").removesuffix(".std") in str(error.value)


@pytest.mark.parametrize(
    "text", ["train: {steps: yes}", "model: {widths: [true, 64]}", "loss: {l1: on}", '{"adversarial": {"start": true}}']
)  # fmt: skip
def test_a_truth_value_is_no_number_of_a_vae_or_in_a_file(tmp_path, text):
    from latentfm.training.vae.options import VAEConfig

    with pytest.raises(InputError, match="should be a number"):
        load_config(written(tmp_path, text), NEEDED, VAEConfig)


def test_every_option_with_a_range_is_tried_above():
    tried = {override.split("=")[0] for override in OUT_OF_RANGE}
    free = {"model.pipeline", "model.preset", "data.cache", "data.caption", "output.folder", "train.attention", "train.blocks"}  # any text
    assert tried | free == {f"{section}.{key}" for section, key in OPTIONS}


def test_the_ends_of_the_ranges_are_allowed():
    given = config(
        "train.steps=1", "train.batch_size=1", "train.warmup_steps=0", "train.weight_decay=0", "train.ema_decay=0", "train.dropout=1",
        "train.dropout_each=1", "data.workers=0", "data.t5_lengths={1: 0.001}", "train.betas=[0, 0.999]", "train.max_grad_norm=.inf",
    )  # fmt: skip
    assert given.train.dropout == 1 and given.train.max_grad_norm == float("inf")


def test_a_share_of_the_blocks_may_be_checkpointed():
    shares = [config(f"train.gradient_checkpointing={text}").train.gradient_checkpointing for text in ("false", "true", "0.25", "0", "1")]
    assert shares == [0, 1, 0.25, 0, 1]


def test_token_routing_has_options_of_its_own():
    assert config().train.token_routing is None and config("train.token_routing=null").train.token_routing is None
    routing = config("train.token_routing={keep: 0.25, last: -2}").train.token_routing
    assert (routing.keep, routing.first, routing.last) == (0.25, 2, -2)
    with pytest.raises(InputError, match=r"unknown option 'train\.token_routing\.kep' \(did you mean 'keep'\?\); there are keep, first"):
        config("train.token_routing={kep: 0.25}")


def sources(text):
    return load_config(None, ["output.folder=a", f"data.sources={text}"]).data.sources


def test_sources_are_a_list_with_options_of_their_own():
    first, second = sources("[{path: cats, caption_columns: {long: 2, short: 1}, repeats: 3}, {url: 's3://b/x.parquet', weight: 0.5}]")
    assert (first.path, first.caption_columns, first.repeats, first.weight) == ("cats", {"long": 2, "short": 1}, 3, 1)
    assert (second.url, second.weight, second.regularisation, second.kind) == ("s3://b/x.parquet", 0.5, False, None)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[{path: a, repeat: 3}]", r"unknown option 'data\.sources\.repeat' \(did you mean 'repeats'\?\); there are path, url"),
        ("[{path: a}, {path: b, captoin_columns: x}]", r"unknown option 'data\.sources\.captoin_columns' \(did you mean 'caption_columns'"),
        ("[{repeats: 2}]", r"data\.sources\.0: .*give exactly one of path, url and dataset"),
        ("[{dataset: a, kind: parquet}]", r"data\.sources\.0: .*a dataset is of the kind datasets, not parquet"),
        ("[{path: a, url: b}]", r"data\.sources\.0: .*give exactly one of path"),
        ("[{path: a}, {path: b, repeats: 0}]", r"data\.sources\.1\.repeats: .* \(got 0\)"),
        ("[{path: a, weight: .nan}]", r"data\.sources\.0\.weight"),
        ("[{path: a, kind: folders}]", r"data\.sources\.0\.kind: .*'folder'"),
        ("[{path: a, caption_columns: {}}]", "caption_columns names no column"),
        ("[{path: a, caption_columns: {x: 0}}]", r"caption_columns.*greater than 0"),
        ("cats", r"data\.sources: .*list"),
    ],
)  # fmt: skip
def test_a_source_that_is_wrong_is_refused_by_name(text, message):
    with pytest.raises(InputError, match=message) as error:
        sources(text)
    assert "\n" not in str(error.value)


def test_the_data_are_given_once():
    with pytest.raises(InputError, match=r"^data\.folder and data\.sources are both given; make the folder one of the sources"):
        config("data.sources=[{path: cats}]")
    with pytest.raises(InputError, match=r"^missing data\.folder; set it .*, or list data\.sources$"):
        load_config(None, ["output.folder=a", "data.flip=true"])


@pytest.mark.parametrize("option", ["train.master_weights=true", "train.moments=bfloat16"])
def test_what_goes_with_bfloat16_weights_alone_says_so(option):
    with pytest.raises(InputError, match=rf"^{option} goes with train\.weights=bfloat16; set that too, or leave it out$"):
        config(option)
    assert config(option, "train.weights=bfloat16").train.weights == "bfloat16"


def test_a_batch_divides_by_the_accumulation():
    with pytest.raises(InputError, match=r"^train\.batch_size 10 is not divisible by train\.gradient_accumulation 4$"):
        config("train.batch_size=10", "train.gradient_accumulation=4")
    assert config("train.batch_size=12", "train.gradient_accumulation=4").train.batch_size == 12


def test_what_is_missing_is_named_with_the_way_to_set_it():
    with pytest.raises(InputError, match=r"^missing data\.folder; set it .*data\.folder=VALUE"):
        load_config(None, ["output.folder=a", "data.flip=true"])
    with pytest.raises(InputError, match=r"^missing data\.folder, output\.folder;"):
        load_config(None, [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.size=[32]", r"^data\.size: .*integer \(got \[32\]\); data\.size\.1: Field required \(got \[32\]\)$"),
        ("data.size=[32, 32, 32]", r"^data\.size: .*; data\.size: .*at most 2 items"),
        ("train.betas=[0.9]", r"^train\.betas\.1: Field required \(got \[0\.9\]\)$"),
        ("data.sources=[{path: a, caption_columns: {x: -1}}]", r"^data\.sources\.0\.caption_columns: .*\.0\.caption_columns\.x: "),
    ],
)
def test_an_option_of_several_types_is_named_as_it_is_given(override, message):
    with pytest.raises(InputError, match=message):
        load_config(None, ["data.folder=p", "output.folder=a", override])


def test_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the configuration .*nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="cannot read the configuration .*directory"):
        load_config(tmp_path)
    with pytest.raises(InputError, match=r"run\.yaml is not valid YAML: .*line 2") as error:
        load_config(written(tmp_path, "data:\n  folder: [a\ntrain: {"))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="should hold sections .* it holds list"):
        load_config(written(tmp_path, "- data\n- train\n"))
    with pytest.raises(InputError, match="section 'train' should hold options .* it holds 5"):
        load_config(written(tmp_path, "train: 5\n"), NEEDED)
    with pytest.raises(InputError, match=r"unknown option 'train\.batchsize' \(did you mean 'batch_size'\?\)"):
        load_config(written(tmp_path, "train: {batchsize: 5}\n"), NEEDED)
    (tmp_path / "latin.yaml").write_bytes("data: {folder: b\xfccher}".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_yaml_cannot_make_objects(tmp_path):
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(written(tmp_path, "data: !!python/object/apply:os.getcwd []"))


def test_an_empty_file_is_no_options(tmp_path):
    assert load_config(written(tmp_path, "# nothing yet\n"), NEEDED) == config()


def test_options_do_not_change_after_they_are_read():
    with pytest.raises(ValueError, match="frozen"):
        config().train.steps = 5


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_configurations_that_come_along_are_valid(path):
    from latentfm.training.vae.options import VAEConfig

    given = load_config(path, kind=VAEConfig if path.stem == "vae" else RunConfig)
    assert given.model_dump(exclude_unset=True, mode="json") == {
        section: {k: v if k != "t5_lengths" else {str(n): share for n, share in v.items()} for k, v in options.items()}
        for section, options in yaml.safe_load(path.read_text()).items()
        for options in [{k: float(v) if k == "learning_rate" else v for k, v in options.items()}]
    }


def test_the_options_of_densities_are_those_of_flow():
    from dataclasses import fields

    from latentfm import flow
    from latentfm.config import DENSITY_OPTIONS

    assert {name: tuple(field.name for field in fields(density)) for name, density in flow.DENSITIES.items()} == DENSITY_OPTIONS


def test_what_does_not_go_with_an_adapter_is_refused():
    lora = "train.adapter={rank: 2}"
    for other, message in (("model.preset=emoji", "model.preset makes new ones"), ("train.token_routing={first: 0}", "for a new network")):
        with pytest.raises(InputError, match=message):
            config(lora, other)
    with pytest.raises(InputError, match="train.weights=bfloat16 needs train.optimizer=adamw"):
        config("train.weights=bfloat16", "train.optimizer=lion")
    assert config(lora, "train.weights=bfloat16", "train.optimizer=lion").train.adapter.rank == 2


def test_every_option_is_read_somewhere():
    """Each option's name appears as an attribute of something other than a definition: an option that nobody reads is a lie."""
    read = set()
    for path in SOURCE.rglob("*.py"):
        if path == SOURCE / "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                read.add((owner, node.attr))
    owners = {  # what a section is called where it is passed on: Trainer's `config = self.config.train`, `options: DataOptions`, ...
        "model": {"model", "options"}, "data": {"data", "options"}, "train": {"train", "options", "config"},
        "validation": {"validation", "options"}, "sample": {"sample", "options"}, "output": {"output"},
    }  # fmt: skip
    unread = [f"{section}.{key}" for section, key in OPTIONS if not any((owner, key) in read for owner in owners[section])]
    assert unread == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.optimizer=AdamW", "adamw"), ("train.decay=Cosine", "cosine"), ("train.mixed_precision=BF16", "bf16"),
        ("train.steps=1e3", 1000), ("train.steps=2.5E2", 250), ("data.size=[1e2, 64]", (100, 64)),
        ("sample.prompts=a cat, asleep", ["a cat, asleep"]),
        ("output.trackers=WandB", ["wandb"]), ("output.trackers=wandb,tensorboard", ["wandb", "tensorboard"]), ("output.trackers=[]", []),
        ("sample.prompts=[red] car", ["[red] car"]), ("sample.prompts=[a] or [b]", ["[a] or [b]"]), ("sample.prompts=[a, b]", ["a", "b"]),
        ("sample.prompts={red} car", ["{red} car"]), ("sample.prompts=[[a], [b]] c", ["[[a], [b]] c"]),
        ("train.betas=0.9,0.95", (0.9, 0.95)), ("data.size=64,48", (64, 48)),
    ],
)  # fmt: skip
def test_values_as_people_write_them(override, expected):
    section, name = override.split("=")[0].split(".")
    config = load_config(None, ["data.folder=a", "output.folder=b", override])
    assert getattr(getattr(config, section), name) == expected


def test_a_list_is_given_by_repeating_its_option(tmp_path):
    config = load_config(None, ["data.folder=a", "output.folder=b", "sample.prompts=a cat", "sample.prompts=the moon, full"])
    assert config.sample.prompts == ["a cat", "the moon, full"]
    config = load_config(None, ["data.folder=a", "output.folder=b", "output.trackers=wandb", "output.trackers=tensorboard"])
    assert config.output.trackers == ["wandb", "tensorboard"]
    file = tmp_path / "run.yaml"
    file.write_text("data: {folder: a}\noutput: {folder: b}\nsample: {prompts: [a dog]}\ntrain: {optimizer: LION, steps: 1e2}\n")
    config = load_config(file, ["sample.prompts=a cat"])  # the first one stands for what the file says
    assert config.sample.prompts == ["a cat"] and (config.train.optimizer, config.train.steps) == ("lion", 100)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.optimizer=adamv", r"\(did you mean 'adamw'\?\)"), ("train.steps=1.5e0", "train.steps"),
        ("train.epochs=3", "counted in train.steps"),
        ("train.num_train_epochs=3", "counted in train.steps"), ("data.repeats=3", r"data\.sources\.0\.repeats=10"),
        ("train.lr=1e-4", "train.learning_rate"), ("train.lr_scheduler=cosine", "train.decay"),
        ("train.network_dim=8", "train.adapter.rank"),
        ("data.resolution=64", "data.size"),
    ],
)  # fmt: skip
def test_what_people_look_for_first_is_answered(override, says):
    with pytest.raises(InputError, match=says) as caught:
        load_config(None, ["data.folder=a", "output.folder=b", override])
    assert "\n" not in str(caught.value)
