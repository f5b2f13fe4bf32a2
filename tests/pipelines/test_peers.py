"""Whatever is called on diffusers' SD3 pipelines is called on ours, and the answers are the same: see peers.py, which prints them all."""

import pytest
from pipelines.peers import ROWS, TOLERANCES, answers, difference, pairs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return pairs(tmp_path_factory.mktemp("peers"))


@pytest.mark.parametrize("name", ROWS)
def test_ours_answers_as_theirs(made, name):
    theirs, ours = answers(name, made)
    assert difference(theirs, ours) < TOLERANCES.get(name, 1e-5), (theirs, ours)
    assert not isinstance(theirs, str) or theirs == "refused"


def test_there_are_enough_rows():
    assert len(ROWS) >= 60
