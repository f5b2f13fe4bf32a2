"""Options as people write them: texts taken whole, YAML that is bounded, names to any depth, and files that lie."""

import json
import os
import random
import re
import time
from pathlib import Path

import pytest

from latentfm.config import RunConfig, load_config
from latentfm.errors import InputError

NEEDED = ["data.folder=pictures", "output.folder=runs/a"]
NAMES = [
    "pics #2", "[set] cats", "{a}", "@home", "#1 set", "%a", "*star", "&amp", "!bang", "> gt", "| pipe", "'q'", '"q"', "null", "~", "~x",
    "a: b",
    " leading", "trailing ", "a=b=c", "- dash", "? what", "true", "2026-03-01", "007", "1e3", ".inf", "`tick`", "a\tb", "a\nb", "苹果 😀",
    ",", "[", "-",
]  # fmt: skip


def given(*overrides):
    return load_config(None, [*NEEDED, *overrides])


def written(folder, text, name="run.yaml"):
    path = folder / name
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_texts_value_is_its_text_at_any_depth(name):
    texts = [f"data.folder={name}", f"output.folder={name}", f"model.pipeline={name}", f"data.cache={name}", f"train.blocks={name}"]
    config = load_config(None, [*texts, f"train.attention={name}", f"sample.prompts.0={name}", "sample.prompts.1=b"])
    assert [config.data.folder, config.output.folder, config.model.pipeline, config.data.cache] == [name] * 4
    assert [config.train.blocks, config.train.attention] == [name] * 2 and config.sample.prompts == [name, "b"]
    config = load_config(None, ["output.folder=x", f"data.sources.0.path={name}", "data.sources.1.url=u", f"data.sources.1.name={name}"])
    assert [source.path for source in config.data.sources] == [name, None] and config.data.sources[1].name == name


def test_names_reach_to_any_depth(tmp_path):
    path = written(tmp_path, "data: {sources: [{path: a}, {path: b}], t5_lengths: {16: 1}}\ntrain: {adapter: null}\noutput: {folder: o}")
    config = load_config(
        path, ["train.adapter.rank=4", "train.adapter.targets=attn.to_q", "data.sources.1.repeats=3", "data.sources.2.dataset=c/d",
               "data.sources.0.caption_columns.short=2", "data.t5_lengths.64=0.5", "train.t_density_options.mean=0.5", "train.betas.1=0.5"]
    )  # fmt: skip
    assert (config.train.adapter.rank, config.train.adapter.targets) == (4, "attn.to_q")
    assert [source.repeats for source in config.data.sources] == [1, 3, 1] and config.data.sources[2].dataset == "c/d"
    assert config.data.sources[0].caption_columns == {"short": 2} and config.data.t5_lengths == {16: 1, 64: 0.5}
    assert config.train.t_density_options == {"mean": 0.5} and config.train.betas == (0.9, 0.5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.adapter.rnk=4", r"unknown option 'train\.adapter\.rnk' \(did you mean 'rank'\?\)"),
        ("data.sources.0.pth=a", r"unknown option 'data\.sources\.pth' \(did you mean 'path'\?\)"),
        ("data.sources.1.path=a", "'1' is no place in a list of 0"), ("data.sources.x.path=a", "'x' is no place in a list"),
        ("data.t5_lengths.x=1", "'x' is no number"), ("train.steps.deep=1", r"train\.steps: .*valid integer"),
        ("trian.steps=1", r"unknown section 'trian' \(did you mean 'train'\?\)"), ("train..steps=1", "should look like section.key=value"),
        ("train.steps=010x", r"train\.steps: .*\(got '010x'\)"), ("train.steps=1:30", r"train\.steps: .*\(got '1:30'\)"),
        ("sample.prompts=[a, &x [*x]]", "to what that is part of"), ("train.adapter={rank: 2, rank: 3}", "gives 'rank' twice"),
        ("train.adapter=!!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("data.folder=a\0b", r"data\.folder .* holds a zero byte"),
        ("data.folder=a\udcff", r"data\.folder 'a.udcff' is not valid UTF-8"),
        ('sample.prompts=["\\ud800"]', "sample.prompts.0 .*not valid UTF-8"),
        ("output.folder=", r"output\.folder: .*valid string"),
        ('train.adapter={"rank": ' + "1" * 5000 + "}", "is not valid YAML: .*4300 digits"), ("train.steps=" + "1" * 5000, "read as int"),
        ("train.steps=!!timestamp x", "'x' in line 1 cannot be read as timestamp"), ("train.compile=!!bool x", "read as bool"),
        ("train.steps=!!timestamp 2026-99-99", "read as timestamp"), ('train.t_shift=!!float ""', "read as float"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_refused_in_one_line(override, message):
    with pytest.raises(InputError, match=message) as caught:
        given(override)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000


@pytest.mark.parametrize("override", ["data.sources.0=[1]", "train.betas.0=[0.1]", "train.betas=[0.1, 0.2]"])
def test_what_is_given_again_and_cannot_be_taken_is_refused_in_one_line(override):
    with pytest.raises(InputError, match=override.split("=")[0]) as caught:
        given(override, override)
    assert "\n" not in str(caught.value)


TAGS = ["int", "float", "bool", "null", "binary", "timestamp", "set", "omap", "pairs", "map", "seq", "str", "merge", "value", "python/none"]
WRITTEN = ["x", '""', "1", "-", "2026-03-01", "[]", "[a]", "[{a: 1}]", "{}", "{a: 1}", "0001-01-01T00:00:00+23:00", "9" * 5000]


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_that_is_written_makes_an_option_or_one_line(tmp_path, tag):
    for text in WRITTEN:
        overrides = [f"{name}=!!{tag} {text}" for name in ("train.steps", "train.compile", "train.t_shift", "data.size", "train.betas")]
        overrides += [f"train.adapter={{rank: !!{tag} {text}}}", f"data.t5_lengths={{!!{tag} {text}: 1}}"]
        files = [f"train: !!{tag} {text}", f"train: {{!!{tag} {text}: 1}}", f"model: {{preset: !!{tag} {text}}}", f"!!{tag} {text}"]
        files += [f"train: {{<<: !!{tag} {text}}}", f"train: {{<<: [!!{tag} {text}]}}"]
        for path, more in [*((None, [override]) for override in overrides), *((written(tmp_path, file), []) for file in files)]:
            try:
                load_config(path, [*NEEDED, *more])
            except InputError as error:
                assert "\n" not in str(error) and len(str(error)) < 2000


def test_numbers_are_those_that_people_mean():
    assert given("train.steps=010").train.steps == 10 and given("data.workers=0").data.workers == 0
    assert given("train.learning_rate=1e-3").train.learning_rate == 1e-3 and given("train.max_grad_norm=.inf").train.max_grad_norm > 1e300


def test_texts_in_yaml_are_texts_and_null_is_nothing(tmp_path):
    text = "data: {folder: 2026-03-01, cache: 007}\nmodel: {pipeline: null}\noutput: {folder: on}\nsample: {prompts: [1, yes, 2.50]}"
    config = load_config(written(tmp_path, text))
    assert (config.data.folder, config.data.cache, config.output.folder) == ("2026-03-01", "007", "on")
    assert config.model.pipeline is None and config.model.preset is None and config.sample.prompts == ["1", "yes", "2.50"]
    merged = "base: &b {steps: 5, seed: 3}\n"
    with pytest.raises(InputError, match="unknown section 'base'"):
        load_config(written(tmp_path, merged + "train: {<<: *b, seed: 4}"), NEEDED)
    config = load_config(written(tmp_path, "train: {<<: [{steps: 5}, {steps: 6, seed: 3}], seed: 4}"), NEEDED)
    assert (config.train.steps, config.train.seed) == (5, 4)
    config = load_config(None, [*NEEDED[1:], "data.sources=[&a {<<: {repeats: 2}, repeats: 3, path: b}, *a]"])
    assert [source.repeats for source in config.data.sources] == [3, 3]


BOMB = "output: {folder: x}\ndata: {folder: d}\ntrain:\n  a0: &a0 [lol]\n" + "".join(
    f"  a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "holds more than 50,000 values, aliases unfolded"), ("train: " + "[" * 5000, "is nested more than 40 deep"),
        ("train: " + "{a: " * 5000, "is nested more than 40 deep"), ("- " * 2000 + "a", "is nested more than 40 deep"),
        ("a: " + "1, " * 400_000, "the most that is read here"), ("train: &a {steps: *a}", "to what that is part of"),
        ("train: {steps: 1}\ntrain: {seed: 2}", "gives 'train' twice, again in line 2"),
        ("train:\n  steps: 1\n  steps: 2", "gives 'steps' twice"),
        ('{"train": {"steps": 1, "steps": 2}}', "gives 'steps' twice"), ("{" * 100_000, "nested"), ("[" * 3000 + '"\\u0061"', "nested"),
        ("a: b\n---\nc: d", "is not valid YAML"), ("? [a, b]\n: c", "no single word"), ("\x00", "is not valid YAML"),
        ("a: *nobody", "is not valid YAML"),
        ("train: {steps: " + "9" * 5000 + "}", "is not valid YAML|train.steps"),
        ("data: !!set {a, b}", "is not valid YAML of plain values"), ('{"train": {"steps": ' + "1" * 5000 + "}}", "4300 digits"),
        ("train: {<<: {? [a] : 5}}", "the name in line 1 is no single word"),
        ("train:\n  <<: 5", "what '<<' in line 2 merges is no mapping"),
        ("train: {<<: {steps: 1, steps: 2}}", "gives 'steps' twice"),
        ("train: {<<: [{seed: 1}, {<<: {a: 1, a: 2}}]}", "gives 'a' twice"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_a_file_says_is_bounded_before_it_is_believed(tmp_path, text, message):
    began = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        load_config(written(tmp_path, text), NEEDED)
    assert "\n" not in str(caught.value) and time.monotonic() - began < 10


@pytest.mark.parametrize("name", ["a\0b", "~a\0b", "a\ud800", "~\ud800"])
def test_a_name_that_no_file_can_have_is_no_configuration(name):
    with pytest.raises(InputError, match="cannot read the configuration .*No file can have such a name") as caught:
        load_config(name)
    assert "\n" not in str(caught.value)


def test_a_pipe_is_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(InputError, match=r"cannot read the configuration .*pipe\.yaml is a named pipe"):
        load_config(tmp_path / "pipe.yaml", NEEDED)


ABSURD = [
    "sample.steps=1000000000", "train.batch_size=1000000000000", "train.steps=10000000000", "train.gradient_accumulation=10000000000",
    "data.workers=1000000", "data.buckets=1000000000", "validation.times=1000000000", "data.t5_lengths={1000000000: 1}",
    "train.seed=1" + "0" * 30,
    "sample.seed=9223372036854775807", "train.adapter.rank=1000000000", "sample.guidance=1e30", "data.max_aspect=1e300",
    f"sample.prompts=[{','.join('a' * 2000)}]", "data.sources=[{path: a, repeats: 1000000000000}]",
    "data.sources=[{path: a, weight: 1e300}]",
]  # fmt: skip


@pytest.mark.parametrize("override", ABSURD, ids=lambda text: text[:30])
def test_numbers_that_would_fill_the_memory_are_refused_by_name(override):
    overrides = [override, *NEEDED[1:]] if "sources" in override else [*NEEDED, override]
    with pytest.raises(InputError) as caught:
        load_config(None, overrides)
    assert re.match(r"[\w.]+", override)[0] in str(caught.value) and len(str(caught.value)) < 1200


ROUND = [
    ("data.folder=苹果 #2: 😀", "output.folder=null", 'sample.prompts=["a: b #c", "line\\nbreak", "</script>", "\\u2028"]'),
    ("data.size=[64, 32]", "data.t5_lengths={16: 0.5, 64: 1.5}", "train.max_grad_norm=.inf", "train.mixed_precision=no"),
    ("data.folder=", "data.sources=[{path: 'a #1', caption_columns: {long: 2}, weight: 0.5}, {dataset: c/d, streaming: true}]"),
    ("train.adapter={rank: 4, targets: [attn.to_q]}", "train.token_routing=null", "train.betas=[0.8, 0.95]"),
]


@pytest.mark.parametrize("overrides", ROUND, ids=lambda value: value[0])
def test_what_is_written_down_is_read_back_as_it_was(tmp_path, overrides):
    config = given(*overrides)
    for ascii_only in (True, False):
        text = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=ascii_only)
        assert load_config(written(tmp_path, text, "config.json")) == config
    if config.data.t5_lengths:
        assert load_config(tmp_path / "config.json", ["data.t5_lengths.64=3"]).data.t5_lengths == {16: 0.5, 64: 3}


WORDS = [*"~:,[]{}&*!|#%@'\"-?\n\t1", "train", "data", "output", "steps", "folder", "sources", "adapter", "rank", "null", "0x1", "1e400"]


def mutated(text, rng):
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(text) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            text = text[:place] + text[place + rng.randint(1, 12) :]
        elif kind == 1:
            text = text[:place] + rng.choice(WORDS) + text[place:]
        elif kind == 2:
            text = text[:place] + chr(rng.choice([0, 7, 27, 0x85, 0x2028, 0xFEFF, 0x1F600, rng.randrange(32, 127)])) + text[place + 1 :]
        else:
            other = rng.randrange(len(text) + 1)
            text = text[:place] + text[min(place, other) : max(place, other)] + text[place:]
    return text


@pytest.mark.parametrize("name", ["configs/sd3-medium-lora.yaml", "configs/quickstart.yaml", "config.json"])
def test_files_changed_anywhere_are_options_or_one_line(tmp_path, name):
    rng, options = random.Random(name), given("train.adapter={rank: 4}").model_dump(mode="json")
    text = json.dumps(options, indent=1) if name == "config.json" else (Path(__file__).parents[1] / name).read_text()
    refused = 0
    for _ in range(150):
        path = tmp_path / "changed"
        path.write_bytes(mutated(text, rng).encode("utf-8", "surrogatepass"))
        try:
            assert isinstance(load_config(path, NEEDED), RunConfig)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and "\x1b" not in str(error)
    assert refused > 50
