"""GenEval's rules: what a prompts file may say, and when a picture shows what is asked."""

import pytest

from latentfm.errors import InputError
from latentfm.evaluation.detection import Detection
from latentfm.evaluation.geneval import TASKS, Asked, Thing, read_asked, relations, verdict

# lines of GenEval's own evaluation_metadata.jsonl, one of each tag
GENEVAL = """
{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
{"tag": "two_object", "include": [{"class": "bench", "count": 1}, {"class": "sports ball", "count": 1}], "prompt": "a photo of a bench and a sports ball"}
{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}], "prompt": "a photo of two clocks"}
{"tag": "colors", "include": [{"class": "fire hydrant", "count": 1, "color": "blue"}], "prompt": "a photo of a blue fire hydrant"}
{"tag": "position", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}], "prompt": "a photo of a dog right of a cat"}
{"tag": "color_attr", "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "bowl", "count": 1, "color": "green"}], "prompt": "a photo of a red cup and a green bowl"}
"""  # noqa: E501


def at(name: str, x: float, y: float, colour: str | None = None, score: float = 0.9, side: float = 20) -> Detection:
    return Detection(name, (x - side / 2, y - side / 2, x + side / 2, y + side / 2), score, colour)


@pytest.fixture
def asked(tmp_path) -> dict[str, Asked]:
    (tmp_path / "evaluation_metadata.jsonl").write_text(GENEVAL + '{"prompt": "a quiet evening"}\n')
    return {each.task: each for each in read_asked(tmp_path / "evaluation_metadata.jsonl")}


def test_genevals_own_file_is_read(asked):
    assert asked.keys() == {*TASKS, None} and asked[None] == Asked("a quiet evening")
    assert asked["counting"].exclude == (Thing("clock", 3),) and asked["position"].include[1].position == ("right of", 0)


@pytest.mark.parametrize(
    ("task", "found", "right"),
    [
        ("single_object", [at("bench", 50, 50)], True),
        ("single_object", [at("bench", 50, 50), at("dog", 10, 10)], True),
        ("single_object", [at("dog", 50, 50)], False),
        ("two_object", [at("bench", 50, 50), at("sports ball", 10, 10)], True),
        ("two_object", [at("bench", 50, 50), at("bench", 10, 10)], False),
        ("counting", [at("clock", 20, 50), at("clock", 70, 50)], True),
        ("counting", [at("clock", 20, 50)], False),
        ("counting", [at("clock", 20, 50), at("clock", 70, 50), at("clock", 70, 10)], False),
        ("colors", [at("fire hydrant", 50, 50, "blue")], True),
        ("colors", [at("fire hydrant", 50, 50, "red")], False),
        ("colors", [at("fire hydrant", 50, 50, "red", 0.9), at("fire hydrant", 20, 20, "blue", 0.5)], False),  # the surest counts
        ("position", [at("cat", 20, 50), at("dog", 80, 50)], True),
        ("position", [at("cat", 80, 50), at("dog", 20, 50)], False),
        ("position", [at("cat", 50, 20), at("dog", 50, 80)], False),
        ("position", [at("dog", 80, 50)], False),
        ("color_attr", [at("cup", 20, 50, "red"), at("bowl", 80, 50, "green")], True),
        ("color_attr", [at("cup", 20, 50, "green"), at("bowl", 80, 50, "red")], False),
    ],
)
def test_verdicts(asked, task, found, right):
    said, wrong = verdict(asked[task], found)
    assert said == right and bool(wrong) != right


def test_what_is_wrong_is_said(asked):
    assert verdict(asked["counting"], [at("clock", 20, 50)])[1] == "1 clock, not 2"
    assert verdict(asked["position"], [at("cat", 80, 50), at("dog", 20, 50)])[1] == "dog left of cat, not right of"
    assert verdict(asked["colors"], [at("fire hydrant", 50, 50, "red")])[1] == "fire hydrant red, not blue"


@pytest.mark.parametrize(
    ("x", "y", "holds"),
    [
        (80, 50, {"right of"}), (20, 50, {"left of"}), (50, 20, {"above"}), (50, 80, {"below"}), (80, 80, {"right of", "below"}),
        (80, 55, {"right of"}), (52, 53, set()), (50, 50, set()),
    ],
)  # fmt: skip
def test_relations(x, y, holds):
    assert relations(at("a", x, y).box, at("b", 50, 50).box) == holds


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "line 1: nonsense is no JSON object with a prompt"),
        ("[1]", "is no JSON object with a prompt"),
        ('{"tag": "counting"}', "no JSON object with a prompt"),
        ('{"prompt": "a", "tag": "countin", "include": []}', "did you mean 'counting'"),
        ('{"prompt": "a", "tag": ["counting"], "include": []}', "no tag ['counting']"),
        ('{"prompt": "a", "prompt": "b"}', "line 1 gives 'prompt' twice; leave one of them out"),
        ('{"prompt": "a\\u0000b"}', "holds a zero byte; leave it out"),
        ('{"prompt": "a", "tag": "counting"}', "tag and include need each other"),
        ('{"prompt": "a", "include": [{"class": "cat"}]}', "tag and include need each other"),
        ('{"prompt": "a", "tag": "counting", "include": {"class": "cat"}}', "are lists of things"),
        ('{"prompt": "a", "tag": "counting", "include": [{"class": "cat", "count": 0}]}', "is no thing"),
        ('{"prompt": "a", "tag": "counting", "include": [{"class": "cat", "colour": "red"}]}', "is no thing"),
        ('{"prompt": "a", "tag": "position", "include": [{"class": "cat", "position": ["near", 0]}]}', "is no thing"),
        ('{"prompt": "a", "tag": "position", "include": [{"class": "cat", "position": ["above", 7]}]}', "relates to none of the 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, line, said):
    (tmp_path / "prompts.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"--prompts .*prompts.jsonl, line 1") as error:
        read_asked(tmp_path / "prompts.jsonl")
    assert said in str(error.value)


def test_a_file_without_prompts_and_one_that_is_not_there(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="has no prompt in it"):
        read_asked(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="no.jsonl cannot be read"):
        read_asked(tmp_path / "no.jsonl")
