"""What is asked for on the page: the values it takes, and the refusals, each with the limit and the value."""

import math

import pytest

from latentfm.errors import InputError
from latentfm.web.form import checked
from latentfm.web.limits import Limits

LIMITS = Limits(size=512, steps=50, batch=8, prompt=100)


def wish(**values):
    return checked(LIMITS, **{"prompt": "a cat", "model": "bundled"} | values)


def test_a_wish_is_the_command_lines_requests():
    found = wish(steps="4,8", guidance=2.5, solver="own, heun", count=2, seed="7", size="64x96", negative="a dog", schedule="karras")
    asked = found.requests(32, 32)
    assert [each.seed for each in asked] == [7, 8] * 4 and found.swept == ["steps", "solver"]
    assert wish(solver="heun,heun,own").sweeps["solver"] == ["heun", None]  # each once
    assert [each.swept for each in asked[::2]] == [(4, 2.5, None), (4, 2.5, "heun"), (8, 2.5, None), (8, 2.5, "heun")]
    settings = asked[0].settings
    assert (settings.width, settings.height, settings.negative, settings.sampler.schedule) == (64, 96, "a dog", "karras")


def test_the_models_own_size_and_a_new_seed_where_none_is_given():
    first, second = wish(), wish(seed="")
    assert first.requests(32, 48)[0].settings.height == 48
    assert first.seed != second.seed and 0 <= first.seed < 2**32


def test_what_sliders_and_programs_give_is_taken():
    assert wish(steps=8.0, count=2.0, seed=2**63 - 2).count == 2
    assert wish(steps="8", guidance="1..2:0.5", count="2").sweeps["guidance"] == [1.0, 1.5, 2.0]


@pytest.mark.parametrize(
    "values, said",
    [
        ({"prompt": "x" * 101}, "has 101 characters; the most that is taken here is 100"),
        ({"negative": "x" * 101}, "the negative prompt .* has 101 characters"),
        ({"prompt": 7}, "prompt 7 is not a text"),
        ({"prompt": None}, "prompt None is not a text"),
        ({"prompt": "half \ud83d"}, "not valid"),
        ({"steps": 51}, "steps 51 is more than 50"),
        ({"steps": "4,8,99"}, "steps 99 is more than 50"),
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"steps": 2.5}, "give whole numbers"),
        ({"steps": math.nan}, "steps nan is not a number"),
        ({"steps": [4]}, r"steps \[4\] is not a number"),
        ({"steps": "1" * 2000}, "has 2,000 characters"),
        ({"steps": "1..1e9"}, "give whole numbers"),
        ({"guidance": math.inf}, "guidance inf is not a number"),
        ({"guidance": "nan"}, "guidance nan is not a strength"),
        ({"guidance": -1}, "guidance -1.0 is not a strength"),
        ({"guidance": True}, "guidance True is not a number"),
        ({"count": 9}, "the number of pictures 9 is more than 8"),
        ({"count": 3, "steps": "1,2,3"}, "the number of pictures 9 is more than 8"),
        ({"count": 1e300}, "the number of pictures 1,0+.* is more than 8"),
        ({"count": math.nan}, "count nan is not a whole number"),
        ({"count": -1}, "count -1 is not a whole number of at least 1"),
        ({"count": {}}, "count {} is not a whole number"),
        ({"seed": -1}, "seed -1 is not a whole number of at least 0"),
        ({"seed": 2**63}, "out of range"),
        ({"seed": "0x10"}, "seed '0x10' is not a whole number"),
        ({"seed": 0.5}, "seed 0.5 is not a whole number"),
        ({"size": "513"}, "size 513 pixels is more than 512 pixels"),
        ({"size": "64x99999"}, "size 99,999 pixels is more than 512"),
        ({"size": "big"}, "size 'big' is no size"),
        ({"size": 64}, "size 64 is not a text"),
        ({"solver": "eulr"}, "solver 'eulr' does not exist.*euler"),
        ({"solver": 3}, "solver 3 is not a text"),
        ({"solver": "euler," * 200}, "solver 'euler,.* has 1,200 characters; the most is 1,000"),
        ({"size": "6" * 2000}, "size '6+.*' has 2,000 characters"),
        ({"model": "x" * 2000}, "model 'x+.*' has 2,000 characters"),
        ({"schedule": "none"}, "schedule 'none' does not exist"),
        ({"guidance_rule": "autoguidance"}, "guidance_rule 'autoguidance' does not exist"),
        ({"lora_strength": 11}, "lora_strength 11.0 is no strength"),
        ({"lora_strength": math.nan}, "lora_strength nan is not a number"),
        ({"model": None}, "model None is not a text"),
        ({"lora": 5}, "lora 5 is not a text"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(values, said):
    with pytest.raises(InputError, match=said):
        wish(**values)


def test_a_model_with_guidance_in_its_weights_is_drawn_at_1_unless_more_is_asked(saved, tmp_path):
    import json
    import shutil

    from latentfm.web.line import Line
    from latentfm.web.models import Models
    from latentfm.web.studio import Studio

    folder = tmp_path / "fast"
    shutil.copytree(saved, folder)
    (folder / "latentfm_manifest.txt").unlink()
    info = json.loads((folder / "latentfm.json").read_text())
    (folder / "latentfm.json").write_text(json.dumps(info | {"distilled_guidance": 3.0, "steps": 2}))
    models = Models([folder, saved], None, "cpu", "float32")
    assert [models.usual(name) for name in (*models.names()[:2], "nothing")] == [(2, 1.0), (28, 3.0), (28, 3.0)]
    studio = Studio(models, LIMITS, None, line := Line(models, LIMITS, tmp_path / "out"))
    asked = [studio.ask({"prompt": "a cat", "steps": steps, "guidance": guidance}) for steps, guidance in (("", ""), (1, 2))]
    assert [(job.wish.sweeps["steps"], job.wish.sweeps["guidance"]) for job in asked] == [([2], [1.0]), ([1], [2.0])]
    with line.lock:
        line.lock.wait_for(lambda: not line.jobs, timeout=1)  # which nobody tells
    while line.jobs:
        line.worker.join(0.1)
    assert [job.state for job in asked] == ["done", "done"]
    assert not asked[0].notes and "guidance 3 in its weights" in asked[1].notes[0]
