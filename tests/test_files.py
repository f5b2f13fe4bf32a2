"""Files and folders written whole or not at all."""

import pytest
from faults import files_no_larger_than
from safetensors.torch import save_file
from torch import zeros

from latentfm.errors import InputError
from latentfm.files import whole_or_nothing


def test_a_folder_takes_the_place_of_another_only_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with pytest.raises(InputError, match=r"could not write .*out: No space"), whole_or_nothing(target) as partial:
        partial.mkdir()
        (partial / "half").write_text("x")
        raise OSError(28, "No space left on device")
    assert not list(target.parent.iterdir())
    for text in ("first", "second"):
        with whole_or_nothing(target) as partial:
            partial.mkdir()
            (partial / text).write_text("x")
        assert [path.name for path in target.iterdir()] == [text] and list(target.parent.iterdir()) == [target]
    with pytest.raises(KeyError), whole_or_nothing(target) as partial:
        raise KeyError
    assert [path.name for path in target.iterdir()] == ["second"]
    with whole_or_nothing(tmp_path / "file") as partial:
        partial.write_text("x")
    assert (tmp_path / "file").read_text() == "x" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no"), OSError(28, "No space left on device")])
def test_a_failed_replacement_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "model"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)), whole_or_nothing(target) as partial:
        partial.mkdir()
        (partial / "a").write_text("new")
        raise error
    assert (target / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_fills_under_safetensors_is_said_in_one_line(tmp_path):
    full = files_no_larger_than(10_000)
    with full, pytest.raises(InputError, match="could not write .*free some space"), whole_or_nothing(tmp_path / "x") as partial:
        save_file({"a": zeros(100_000)}, partial)
    assert list(tmp_path.iterdir()) == []
