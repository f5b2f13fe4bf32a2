"""A run's claim on its folder: one run at a time, whatever becomes of the lock's file."""

import errno
import fcntl
import os
import shutil
import time

import pytest

from latentfm.errors import InputError
from latentfm.training.checkpoint import claim as claim_room
from latentfm.training.checkpoint.claim import NAME, FolderInUse, claimed
from latentfm.training.records.json_lines import rows_of
from latentfm.training.records.run_log import RunLog


def test_a_link_is_not_followed_and_what_is_not_ours_is_not_emptied(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    ways = (lambda p: p.symlink_to(victim), lambda p: os.link(victim, p), lambda p: shutil.copy(victim, p), os.mkfifo, os.mkdir)
    for number, make in enumerate(ways):
        folder = tmp_path / f"run {number}"
        folder.mkdir()
        make(folder / NAME)
        with pytest.raises(InputError, match=rf"run {number}/{NAME} .*(remove it|move it away)"), claimed(folder):
            pass
        assert victim.read_text() == "precious" and os.path.lexists(folder / NAME)


def test_removing_the_lock_hides_no_error(tmp_path):
    with pytest.raises(KeyError, match="the real one"), claimed(tmp_path):
        (tmp_path / NAME).unlink()
        (tmp_path / NAME).mkdir()
        raise KeyError("the real one")
    assert (tmp_path / NAME).is_dir()  # it was not ours


def other_process(act):
    """What `act` answers in another process: locks of one process do not hold against itself."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        try:
            os.write(write, act().encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as answer:
        return answer.read()


def attempt(folder):
    try:
        with claimed(folder):
            return "admitted"
    except FolderInUse as error:
        return str(error)


def test_of_two_that_meet_at_a_removal_one_is_admitted(tmp_path, monkeypatch):
    """The first leaves between the second's opening of the file and its lock: the file is no longer under the name."""
    first = claim_room.Claim(tmp_path)
    first.take()
    real, third = claim_room.Claim.lock, []

    def lock(self, descriptor):
        if not third:
            first.release()
            third.append(True)
        real(self, descriptor)

    monkeypatch.setattr(claim_room.Claim, "lock", lock)
    second = claim_room.Claim(tmp_path)
    second.take()
    assert os.path.samestat(os.fstat(second.descriptor), (tmp_path / NAME).stat())
    assert "a run is writing to" in other_process(lambda: attempt(tmp_path))
    second.release()
    assert not (tmp_path / NAME).exists() and other_process(lambda: attempt(tmp_path)) == "admitted"


def test_a_claim_whose_file_went_is_taken_again(tmp_path, capsys):
    records = RunLog(tmp_path / "run", True)
    with claimed(tmp_path / "run") as claim:
        records.claim = claim
        records.open(0, {}, {}, [])
        shutil.rmtree(tmp_path / "run")
        records.metrics({"step": 1})
        assert "a run is writing to" in other_process(lambda: attempt(tmp_path / "run"))
        assert "is gone; it is made again" in capsys.readouterr().out
        (tmp_path / "run" / NAME).unlink()
        read, write = os.pipe()
        if not (pid := os.fork()):
            with claimed(tmp_path / "run"):
                os.write(write, b"x")
                time.sleep(60)
        assert os.read(read, 1) == b"x"
        try:
            with pytest.raises(FolderInUse, match="a run is writing to .*run .process"):
                records.metrics({"step": 2})
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
    assert [row["step"] for row in rows_of(tmp_path / "run" / "metrics.jsonl")] == [1]


def test_a_file_system_without_locks_is_told_once(tmp_path, monkeypatch, capsys):
    def lockf(*given):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with claimed(tmp_path):
        assert "cannot be locked (No locks available)" in capsys.readouterr().out
