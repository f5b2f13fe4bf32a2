"""Every command line that README and the commands' --help show: all are read by the commands' own parsers, and those in RUN are run.

They are run in a folder that has what they name, small: a tiny pipeline in the place of SD3's, three pictures, a finished run.
"""

import re
import shlex
import shutil
import tarfile
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from PIL import Image
from tiny import full_vocabulary
from typer.testing import CliRunner

import latentfm
from latentfm.cli.main import app

ROOT = Path(latentfm.__file__).resolve().parent.parent
RUN = ("generate", "train", "cache", "convert", "plan", "verify", "data", "info")  # others are only read: app serves on and on
LAUNCHERS = re.compile(r"(accelerate launch( --config_file (?P<config>\S+))?|torchrun( --nproc_per_node \d+)?) -m ")

SMALL = """
model: {pipeline: an/sd3/folder}
data: {folder: my_pictures, cache: cache, t5_lengths: {16: 1}, workers: 0}
train: {steps: 2, batch_size: 8, warmup_steps: 0, mixed_precision: "no"}
sample: {steps: 1}
output: {folder: runs/quickstart}
"""
SMALLER = {("--size", "1024"): "64", ("--buckets", "7"): "3"}  # what the tiny pipeline can do


def commands(command=None, name=()):
    """Every command of the command line, by the words of its name."""
    command = command or typer.main.get_command(app)
    yield name, command
    for each, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*name, each))


def in_readme():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    return [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def in_help():
    lines = [line for _, command in commands() for line in (command.epilog or "").split("\n")]
    return [re.sub(r"^.*:  |\s{2,}\(.*\)$", "", line) for line in lines if "latentfm " in line]


def words_of(line):
    """The arguments of `latentfm` in a line; None where it starts something else."""
    line = LAUNCHERS.sub("", line)
    return shlex.split(line)[1:] if line.startswith("latentfm ") else None


EXAMPLES = {line: words for line in [*in_readme(), *in_help()] if (words := words_of(line)) is not None}


def test_there_are_examples_of_every_command():
    shown = {words[0] for words in EXAMPLES.values()}
    assert set(RUN) <= shown and len(EXAMPLES) > 40
    assert {name[0] for name, command in commands() if len(name) == 1} <= shown


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_is_read(line):
    """By the parser of its command, which does nothing else; what it is started by, and configures it, is there."""
    config = (LAUNCHERS.match(line) or {"config": None})["config"]
    assert config is None or (ROOT / config).is_file()
    words = [word for word in EXAMPLES[line] if word != ">"]
    command, context = typer.main.get_command(app), None
    while words and hasattr(command, "commands"):
        context = command.make_context(command.name, words[:1], parent=context)
        _, command, _ = command.resolve_command(context, words[:1])
        words = words[1:]
    with suppress(typer.Exit) if "--help" in words else nullcontext():
        command.make_context(command.name, words, parent=context)  # raises for what it does not know
    for path in re.findall(r"configs/\S+\.yaml", line):
        assert (ROOT / path).is_file()


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """A folder with what the examples name; read it, never write into it."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for place in ("path/to/sd3-medium", "path/to/sd3", "an/sd3/folder", "runs/fast/round-1/model"):
            shutil.copytree(tiny_folder, place)
        full_vocabulary(tmp_path_factory.mktemp("full"), with_t5=False).rename("sd3_medium_incl_clips.safetensors")
        for place in ("my_pictures", "pictures"):
            Path(place).mkdir()
            for number, caption in enumerate(("a red apple", "a blue car", "two green trees")):
                Image.new("RGB", (32, 32), (80 * number, 90, 0)).save(f"{place}/{number}.png")
                Path(f"{place}/{number}.txt").write_text(caption)
        Path("shards").mkdir()
        with tarfile.open("shards/part-000.tar", "w") as shard:
            for path in sorted(Path("pictures").iterdir()):
                shard.add(path, path.name)
        for name in ("pizza.png", "mask.png"):
            Image.new("RGB", (64, 64), "white").save(name)
        Path("prompts.txt").write_text("a red apple\na blue car\n")
        Path("prompts.jsonl").write_text('{"prompt": "a red apple", "steps": 3}\n{"prompt": "a blue car", "seed": 5}\n')
        for path in ("run.yaml", "my.yaml", *(f"configs/{each.name}" for each in (ROOT / "configs").glob("*.yaml"))):
            Path(path).parent.mkdir(exist_ok=True)
            Path(path).write_text(SMALL)
        for words in (
            "train --config run.yaml output.folder=runs/mine train.adapter.rank=2", "cache --config run.yaml",
            'generate "a violin" --seed 7 --steps 2 --model an/sd3/folder',
            "convert an/sd3/folder sd3.5_medium.safetensors --with transformer",
            "convert an/sd3/folder sd3.5_large.safetensors --with transformer",
        ):  # fmt: skip
            succeeds(shlex.split(words))
        shutil.copy("runs/mine/lora/pytorch_lora_weights.safetensors", ".")
        Path("runs/mine/lora").rename("lora")
        shutil.rmtree("runs/mine")
        succeeds(shlex.split("train --config configs/quickstart.yaml data.folder=my_pictures output.folder=runs/mine"))
        Path("lora").rename("runs/mine/lora")
    return folder


def succeeds(words):
    """What the command prints on stdout; it must end well."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, (words, answer.output, answer.exception)
    return answer.stdout


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line, words in EXAMPLES.items() if words[0] in RUN])
def test_an_example_runs(line, made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    words = [SMALLER.get(pair, pair[1]) for pair in pairwise(["", *EXAMPLES[line]])]
    words = words[: words.index(">")] if ">" in words else words
    if words[0] == "train" and "--resume" not in words:
        shutil.rmtree("runs/mine")
    assert succeeds(words)
