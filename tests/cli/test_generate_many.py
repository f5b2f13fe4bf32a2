"""`latentfm generate` with settings from elsewhere: sweeps, files with settings in each line, pictures to be like or to begin from."""

import base64
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentfm import LatentFMPipeline
from latentfm.cli.watch import Watch, iterm, kitty, protocol
from latentfm.errors import InputError
from latentfm.pictures import read_settings, save_png
from latentfm.requests import Prompt, read_prompts, values


@pytest.fixture
def draw(run, tiny_folder):
    """A function that runs `latentfm generate` on the tiny model on the CPU, and returns what it printed, a line each."""

    def lines(*args, code=0):
        result = run("generate", "--model", tiny_folder, "--device", "cpu", *args)
        assert result.exit_code == code, result.output
        return (result.stdout if code == 0 else result.stderr).splitlines()

    return lines


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("8", int, [8]), ("4,8,16", int, [4, 8, 16]), ("1..4", int, [1, 2, 3, 4]), ("1..2:0.5", float, [1.0, 1.5, 2.0]),
        ("2, 1..3", float, [2.0, 1.0, 3.0]), ("0.1..0.3:0.1", float, [0.1, 0.2, 0.30000000000000004]),
    ],
)  # fmt: skip
def test_values_of_an_option(text, kind, expected):
    assert values("--steps", text, kind) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "a", "1..", "4..1", "1..9999", "1..2:0", "1..2:-1", "2.5", "1e999", "nan..2"])
def test_values_that_are_none_are_refused(text):
    with pytest.raises(InputError, match=r"--steps .* has|--steps .*give whole numbers, as 8 or 4,8,16 or 1\.\.7"):
        values("--steps", text, int)


def test_a_sweep_is_one_table(draw):
    *pictures, grid = draw("a red apple", "--seed", 3, "--steps", "2,3", "--guidance", "1..3", "--out", "out")
    assert [Path(path).name for path in pictures] == [f"3-a-red-apple-steps-{s}-guidance-{g}.png" for s in (2, 3) for g in (1, 2, 3)]
    assert [(read_settings(path)["steps"], read_settings(path)["guidance"]) for path in pictures] == [
        (s, g) for s in (2, 3) for g in (1.0, 2.0, 3.0)
    ]
    sheet = Image.open(grid)
    assert sheet.width > 3 * 192 and 2 * 192 < sheet.height < 3 * 192 and len(read_settings(grid)["pictures"]) == 6
    alone = draw("a red apple", "--seed", 3, "--steps", 3, "--guidance", 2, "--out", "alone")
    assert (pixels(alone[0]) == pixels(pictures[4])).all()


def test_solvers_are_swept_too(draw):
    *pictures, _ = draw("a red apple", "--seed", 3, "--steps", 2, "--solver", "euler,heun", "--out", "out")
    assert [read_settings(path)["solver"] for path in pictures] == ["euler", "heun"]
    assert draw("a", "--solver", "euler,huen", code=2) == [
        "error: no solver 'huen' (did you mean 'heun'?); there are euler, midpoint, heun, rk4, adams_bashforth2, dormand_prince, "
        "euler_maruyama, stochastic_heun"
    ]


def test_json_tells_each_picture(draw):
    lines = [json.loads(line) for line in draw("a red apple", "the moon", "--seed", 3, "--steps", 2, "--json", "--out", "out")]
    assert [(line.get("prompt"), line.get("seed")) for line in lines] == [("a red apple", 3), ("the moon", 4), (None, None)]
    assert lines[2]["grid"] and all(Path(line["file"]).is_file() for line in lines)
    assert {"file": lines[0]["file"], **read_settings(lines[0]["file"])} == lines[0]


def test_a_picture_like_another(draw, run, tiny_folder):
    settings = ("--seed", 3, "--steps", 2, "--solver", "heun", "--negative", "the moon", "--size", "32x24")
    (first,) = draw("a red apple", *settings, "--out", "out")
    result = run("generate", "--like", first, "--device", "cpu", "--out", "again")  # the model too
    assert result.exit_code == 0, result.output
    again = result.stdout.strip()
    assert (pixels(again) == pixels(first)).all() and read_settings(again) == read_settings(first)
    (varied,) = draw("--like", first, "--seed", 4, "--out", "varied")
    assert read_settings(varied) == read_settings(first) | {"seed": 4} and (pixels(varied) != pixels(first)).any()
    (other,) = draw("the moon", "--like", first, "--out", "other")
    assert read_settings(other) == read_settings(first) | {"prompt": "the moon"}


def test_what_goes_with_an_option_of_the_picture_goes_with_it(draw):
    (first,) = draw("a red apple", "--seed", 3, "--steps", 2, "--schedule", "uniform", "--shift", 2, "--out", "out")
    (again,) = draw("--like", first, "--schedule", "model", "--out", "again")
    assert "shift" in read_settings(first) and "shift" not in read_settings(again)


def test_what_is_there_is_not_drawn_again(draw):
    arguments = ("a red apple", "the moon", "--seed", 3, "--steps", 2, "--no-grid", "--out", "out")
    first, second = draw(*arguments)
    Path(second).unlink()
    before = Path(first).stat().st_mtime_ns
    assert sorted(draw(*arguments, "--skip-existing")) == sorted((first, second)) and Path(second).is_file()
    assert Path(first).stat().st_mtime_ns == before and len(list(Path("out").iterdir())) == 2
    other = draw(*arguments[:-3], "--no-grid", "--guidance", 2, "--out", "out", "--skip-existing")
    assert not {first, second} & set(other) and len(list(Path("out").iterdir())) == 4
    lines = draw(*arguments[:-3], "--no-grid", "--guidance", 2, "--out", "out", "--skip-existing", "--json")  # under their second names
    assert sorted(json.loads(line)["file"] for line in lines) == sorted(other) and len(list(Path("out").iterdir())) == 4


@pytest.mark.slow
def test_two_processes_share_the_pictures(draw, tiny_folder, tmp_path):
    arguments = ["a red apple", "the moon", "a cat", "-n", "2", "--seed", "3", "--steps", "2", "--no-grid", "--dtype", "float32"]
    alone = draw(*arguments, "--out", tmp_path / "alone")
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "latentfm", "generate"]
    given = [*arguments, "--model", str(tiny_folder), "--out", str(tmp_path / "two")]
    found = subprocess.run([*launched, *given], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert sorted(Path(path).name for path in found.stdout.splitlines()) == sorted(Path(path).name for path in alone), found.stdout
    for path in alone:
        assert abs(pixels(path) - pixels(tmp_path / "two" / Path(path).name)).max() <= 1


def test_processes_need_a_seed_that_they_share(draw, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (line,) = draw("a cat", code=2)
    assert "--seed is needed where 2 processes share the pictures" in line


def test_a_picture_without_settings_is_nothing_to_be_like(draw, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (line,) = draw("--like", tmp_path / "plain.png", code=2)
    assert "carries no settings" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "many"), ("steps", True), ("seed", 1.5), ("guidance", [1]), ("lora", "x"), ("lora", [1]), ("without", {"t5": 1}),
        ("guidance_interval", [0.1]), ("width", "wide"), ("model", 3), ("prompt", ["a"]), ("compile", 1),
    ],
)  # fmt: skip
def test_settings_that_are_damaged_are_told(draw, tmp_path, name, value):
    settings = {"prompt": "a cat", "seed": 1, "steps": 2, "guidance": 3.0, "width": 32, "height": 32, name: value}
    path = save_png(Image.new("RGB", (8, 8)), tmp_path, "odd", settings)
    (line,) = draw("--like", path, code=2)
    assert line.startswith("error: the settings in") and f"damaged: {name} is" in line


def test_from_a_picture_and_in_a_part_of_it(draw, tmp_path):
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(image)
    half = Image.new("L", (32, 32))
    half.paste(255, (16, 0, 32, 32))
    half.save(mask)
    common = ("a red apple", "--seed", 3, "--steps", 4)
    (near,) = draw(*common, "--image", image, "--strength", 0.25, "--out", "near")
    (far,) = draw(*common, "--image", image, "--strength", 0.9, "--out", "far")
    (filled,) = draw(*common, "--image", image, "--mask", mask, "--out", "filled")
    (noise,) = draw(*common, "--out", "noise")
    settings = read_settings(filled)
    assert settings["image"] == str(image) and settings["mask"] == str(mask) and read_settings(near)["strength"] == 0.25
    assert len({pixels(path).tobytes() for path in (near, far, filled, noise)}) == 4
    (again,) = draw("--like", filled, "--out", "again")
    assert (pixels(again) == pixels(filled)).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--mask", "m.png"), "mask m.png needs an image"), (("--strength", 0.5), "strength 0.5 needs an image"),
        (("--image", "gone.png"), "there is no picture gone.png"), (("--like", "gone.png"), "there is no picture gone.png"),
        (("--steps", "1..5000"), "give whole numbers"), (("--steps", "2,0"), "--steps"), (("--guidance", "1,-1"), "--guidance -1.0 is not"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(draw, arguments, says):
    (line,) = draw("a cat", *arguments, code=2)
    assert line.startswith("error: ") and says in line


def test_lines_with_settings_of_their_own(draw, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a cat", "seed": 8, "steps": 2}\n\n{"prompt": "the moon", "guidance": 1, "solver": "heun", "width": 24}\n')
    *pictures, _ = draw("--prompts-file", file, "--seed", 20, "--steps", 3, "--out", "out")
    found = [read_settings(path) for path in pictures]
    assert [(each["prompt"], each["seed"], each["steps"], each["guidance"], each.get("solver"), each["width"]) for each in found] == [
        ("a cat", 8, 2, 3.0, None, 32), ("the moon", 21, 3, 1.0, "heun", 24),
    ]  # fmt: skip


def test_lines_of_a_table_and_of_standard_input(tmp_path, monkeypatch):
    table = tmp_path / "prompts.csv"
    table.write_text('prompt,seed,negative\n"a cat, asleep",4,\nthe moon,,a cat\n')
    assert read_prompts(table) == ["a cat, asleep", "the moon"]
    assert [prompt.own for prompt in read_prompts(table)] == [{"seed": 4}, {"negative": "a cat"}]

    def typed(text: str) -> list[Prompt]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return read_prompts(Path("-"))

    assert typed("a cat\nthe moon\n") == ["a cat", "the moon"]
    (prompt,) = typed('{"prompt": "a cat", "steps": 4.0}\n')
    assert prompt == "a cat" and prompt.own == {"steps": 4}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt": "a", "stepz": 3}', r"line 1: no setting 'stepz' \(did you mean 'steps'\?\)"), ("{", "line 1: { is no JSON object"),
        ('{"seed": 3}', "line 1 has no prompt, which is a text: it has seed"), ('{"prompt": 5}', "has no prompt, .*: its prompt is 5"),
        ('{"prompt": "a"}\n{"prompt": "b", "steps": 2.5}', "line 2: steps 2.5 is not a whole number"),
        ('{"prompt": "a", "guidance": "x"}', "guidance 'x' is not a number"), ('{"prompt": "a", "seed": [1]}', "seed .* is not a whole"),
        ('{"prompt": "a", "seed": -5}', "line 1: seed -5 is out of range"),
        ('{"prompt": "a", "seed": 9223372036854775808}', "line 1: seed 9223372036854775808 is out of range"),
        ("\n", "has no prompt in it"), ('{"prompt": "\\ud800"}', "is not valid UTF-8"), ("[" * 99999, "is no JSON object"),
        ('{"prompt": "a\\u0000b"}', "line 1 'a.x00b' holds a zero byte"),
        ('{"prompt": "a", "seed": 1, "seed": 2}', "line 1 gives 'seed' twice"),
    ],
)  # fmt: skip
def test_a_line_that_is_wrong_is_named(tmp_path, text, says):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(InputError, match=says):
        read_prompts(file)


def test_a_seed_is_taken_to_the_last_digit(tmp_path):
    for name, text in (("p.jsonl", '{"prompt": "a", "seed": 9007199254740993}'), ("p.csv", "prompt,seed\na,9007199254740993")):
        (tmp_path / name).write_text(text)
        (prompt,) = read_prompts(tmp_path / name)
        assert prompt.own == {"seed": 9007199254740993}


def test_tables_and_lists_of_other_kinds(tmp_path):
    (tmp_path / "p.tsv").write_text("prompt\tseed\na cat, asleep\t3\n")
    (tmp_path / "p.json").write_text('["a cat", {"prompt": "a dog", "seed": 3}]')
    assert [(str(each), each.own) for each in read_prompts(tmp_path / "p.tsv")] == [("a cat, asleep", {"seed": 3})]
    assert [(str(each), each.own) for each in read_prompts(tmp_path / "p.json")] == [("a cat", {}), ("a dog", {"seed": 3})]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.csv", 'prompt,seed\n"a cat,3\nb dog,4\n', "is a quote not closed"),
        ("p.csv", "prompt\na red apple, on a table\n", "line 2 has more"),
        ("p.csv", "prompt,seed\n\na,1\n\nb,x\n", "line 5: seed 'x'"), ("p.json", '{"prompt": "a"}', "no JSON list of prompts"),
        ("p.json", '["a", {"prompt": "b", "stepz": 3}]', "prompt 2: no setting 'stepz'"),
        ("p.json", '[{"prompt": "a", "seed": 1, "seed": 2}]', "p.json gives 'seed' twice"),
        ("p.csv", "prompt,prompt\na,b\n", "has 2 columns called 'prompt'"),
        ("p.json", "[3]", "no JSON list of prompts"), ("p.json", "[" * 99999, "no JSON list of prompts"),
    ],
)  # fmt: skip
def test_a_table_or_list_that_is_wrong_is_told(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=says):
        read_prompts(tmp_path / name)


def test_a_pipe_is_pointed_to_standard_input(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a named pipe, not a regular file; from a pipe .* --prompts-file -"):
        read_prompts(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("line", "arguments", "says"),
    [
        ({"guidance": 5}, ("--guidance", "1,2"), "line 1 has guidance 5.0 of its own, and several are asked for"),
        ({"seed": 2**63 - 1}, ("--number", 2), "line 1: seed 9223372036854775807 is out of range: 2 pictures need one from 0 to"),
        ({"steps": 0}, (), "line 1: steps 0 must be at least 1"), ({"strength": 0.5}, (), "line 1: strength 0.5 needs an image"),
        ({"width": 17}, (), "line 1: size 17x32 does not fit"), ({"image": "gone.png"}, (), "line 1: there is no picture gone.png"),
        ({"guidance_rule": "autoguidance"}, (), "line 1: --guidance-rule autoguidance and --reference"),
    ],
)  # fmt: skip
def test_a_line_whose_settings_cannot_be_is_named(draw, tmp_path, line, arguments, says):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a cat", **line}))
    (told,) = draw("--prompts-file", file, *arguments, "--seed", 3, code=2)
    assert says in told


def test_a_picture_to_begin_from_that_cannot_be_read_costs_its_own_alone(draw, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a cat", "seed": 1}, {"prompt": "a dog", "seed": 2, "image": "text.png"}, {"prompt": "the moon", "seed": 3}]
    file.write_text("\n".join(map(json.dumps, lines)))
    *_, told, last = draw("--prompts-file", file, "--steps", 2, "--out", "out", code=1)
    assert told.startswith("not drawn: seed 2, 'a dog': cannot read text.png") and "1 of 3 pictures could not be drawn, 2 are" in last
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"1-a-cat.png", "3-the-moon.png", "grid-1.png"}


def test_a_sweep_of_the_same_twice(draw, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a cat", "seed": 3}\n' * 2)
    *pictures, grid = draw("--prompts-file", file, "--steps", "1,2", "--out", "out")
    assert len(pictures) == 4 and len(read_settings(grid)["pictures"]) == 4
    assert len(draw("a cat", "--solver", "euler, euler", "--seed", 3, "--steps", 1, "--out", "one")) == 1


def test_pictures_are_watched_in_a_file(draw, run, tiny_folder, monkeypatch):
    looks = []
    monkeypatch.setattr("latentfm.cli.watch.EVERY", 0.0)
    replace = os.replace

    def seen(source, target):
        replace(source, target)
        if str(target).endswith("watch.png"):
            looks.append(pixels(target))

    monkeypatch.setattr("latentfm.cli.watch.os.replace", seen)
    result = run("generate", "a red apple", "--model", tiny_folder, "--seed", 3, "--steps", 4, "--watch", "--out", "out")
    assert result.exit_code == 0 and f"the pictures form in {Path('out/watch.png')}" in result.stderr
    assert len(looks) == 5 and all((a != b).any() for a, b in itertools.pairwise(looks))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"TERM": "xterm-kitty"}, kitty), ({"TERM_PROGRAM": "iTerm.app"}, iterm), ({"TERM": "xterm-256color"}, None), ({}, None)],
)
def test_the_terminals_protocol(environment, expected):
    assert protocol(environment) is expected


def test_a_png_in_a_terminals_codes_is_whole():
    png = np.random.default_rng(0).bytes(10_000)
    pieces = re.findall("\x1b_G([^;]*);([^\x1b]*)\x1b\\\\", kitty(png))
    assert base64.b64decode("".join(text for _, text in pieces)) == png and len(pieces) == 4
    assert [head[-3:] for head, _ in pieces] == ["m=1", "m=1", "m=1", "m=0"] and "a=T" in pieces[0][0]
    assert base64.b64decode(iterm(png).split(":", 1)[1].rstrip("\x07")) == png


def test_a_terminal_is_drawn_into():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    watch = Watch(Path("nowhere.png"), terminal)
    watch.protocol = kitty
    watch.show([Image.new("RGB", (8, 8))])
    watch.show([Image.new("RGB", (8, 8))])  # a moment later: not again
    watch.show([Image.new("RGB", (8, 8))], finished=True)
    assert terminal.getvalue().count("a=T") == 2 and not Path("nowhere.png").exists()


def test_a_text_encoder_is_left_out(draw):
    (whole,) = draw("a red apple", "--seed", 3, "--steps", 2, "--out", "whole")
    (bare,) = draw("a red apple", "--seed", 3, "--steps", 2, "--without", "t5,clip_g", "--out", "bare")
    assert (pixels(bare) != pixels(whole)).any() and read_settings(bare)["without"] == ["t5", "clip_g"]
    (again,) = draw("--like", bare, "--out", "again")
    assert (pixels(again) == pixels(bare)).all()
    (line,) = draw("a", "--without", "t6", code=2)
    assert "--without" in line and "t6" in line and "clip_l, clip_g, t5" in line


def test_a_variant_of_the_files(run, tiny_folder, tmp_path):
    pipe = LatentFMPipeline.from_pretrained(tiny_folder)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    given = ("a red apple", "--seed", 3, "--steps", 2, "--device", "cpu")
    result = run("generate", *given, "--model", tmp_path / "half", "--variant", "fp16", "--out", "half")
    assert result.exit_code == 0, result.output
    plain = run("generate", *given, "--model", tiny_folder, "--out", "plain")
    assert (pixels(result.stdout.strip()) == pixels(plain.stdout.strip())).all()
