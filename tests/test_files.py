"""Files and folders written whole or not at all, and only regular ones read, within bounds."""

import errno
import os
import socket
import threading

import pytest
from faults import files_no_larger_than
from safetensors.torch import save_file
from torch import zeros

from latentfm.errors import Failure, InputError
from latentfm.files import SpecialFile, TooLarge, open_file, read_bytes, read_json, read_text, reading, whole_or_nothing


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


@pytest.mark.parametrize(("number", "kind", "way_out"), [
    (errno.ENOSPC, Failure, "free some space"), (errno.EDQUOT, Failure, "free some space"),
    (errno.EIO, Failure, "try again, or choose another disk"), (errno.EACCES, InputError, "choose a place that can be written"),
    (errno.EROFS, InputError, "choose a place that can be written"),
])  # fmt: skip
def test_a_write_that_fails_is_told_from_a_place_that_was_given_wrong(tmp_path, number, kind, way_out):
    with pytest.raises(InputError, match=f"could not write .*; {way_out}$") as caught, whole_or_nothing(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert type(caught.value) is kind


@pytest.mark.parametrize("place", ["file/out", "file/deep/out", "file"])
def test_a_file_in_the_way_of_a_folder_is_no_lack_of_space(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    told = pytest.raises(InputError, match="could not write .*; move away what stands in its place, or choose another$")
    with told as caught, whole_or_nothing(tmp_path / place) as partial:
        partial.mkdir()
    assert type(caught.value) is InputError and (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


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
    with full, pytest.raises(Failure, match="could not write .*free some space"), whole_or_nothing(tmp_path / "x") as partial:
        save_file({"a": zeros(100_000)}, partial)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def special(tmp_path):
    """A folder with one of each: pipe, socket, device, folder, links to them and to nothing."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "linked pipe").symlink_to("pipe")
    return tmp_path


@pytest.mark.parametrize("reader", [open_file, read_bytes, read_text, read_json])
@pytest.mark.parametrize(
    ("name", "kind"), [("pipe", "named pipe"), ("socket", "socket"), ("folder", "folder"), ("device", "device"), ("linked pipe", "pipe")]
)
def test_what_is_no_regular_file_is_refused_at_once(special, reader, name, kind):
    done = threading.Event()

    def read():
        with pytest.raises(SpecialFile, match=f"{name} is a .*{kind}, not a regular file"):
            reader(special / name)
        done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(10)


def test_a_file_is_read_through_links_and_up_to_its_bound(tmp_path):
    (tmp_path / "a").write_text("\ufeffgrün\n", "utf-8")
    (tmp_path / "link").symlink_to("a")
    assert read_text(tmp_path / "link") == "grün\n" and read_bytes(tmp_path / "a", 9) == "\ufeffgrün\n".encode()
    with open_file(tmp_path / "a") as file:
        assert file.read(3) == b"\xef\xbb\xbf"
    with pytest.raises(TooLarge, match="a is 9 bytes large, the most that is read here is 8"):
        read_text(tmp_path / "a", most=8)
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 2**40)
    with pytest.raises(TooLarge, match="1,099,511,627,776 bytes"):
        read_json(tmp_path / "sparse")
    with pytest.raises(InputError, match="gone cannot be read: No such file"):
        read_text(tmp_path / "gone")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "Expecting property name"), (b"[1]", r"should hold a JSON object, it holds \[1\]"), (b"", "Expecting value"),
        (b"[" * 100_000, "nested too deeply"), (b"\xff{}", "not UTF-8 text .byte 0."), (b'"\\u001b[31m"', r"it holds .*u001b\[31m"),
        (b'{"a": 1} x', "Extra data"), (b"\0" * 9, "Expecting value"), (b'{"a": 1e', "Expecting"),
    ],
)  # fmt: skip
def test_damaged_json_is_one_line_that_names_the_file(tmp_path, content, says):
    path = tmp_path / "x\x1b.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read_json(path)
    assert r"x\x1b.json" in str(caught.value) and "\x1b" not in str(caught.value) and "\n" not in str(caught.value)
    path.write_text("[1, 2]")
    assert read_json(path, kind=list) == [1, 2]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyError("shape"), "it has no 'shape'"), (TypeError("x"), "not laid out"), (ValueError("a\nb"), "a b"),
        (RecursionError(), "deeply"),
        (OSError(5, "Input/output error"), "Input/output error"), (ValueError(), "ValueError"), (OverflowError("too large"), "too large"),
    ],
)  # fmt: skip
def test_what_a_content_raises_becomes_one_line(error, says):
    with pytest.raises(InputError, match=f"^x.bin cannot be read: .*{says}.*; fetch it again$"), reading("x.bin", "fetch it again"):
        raise error


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), InputError("as it is")])
def test_a_lack_of_memory_and_an_explained_error_pass_through(error):
    with pytest.raises(type(error)) as caught, reading("x.bin"):
        raise error
    assert caught.value is error
