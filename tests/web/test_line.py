"""The queue: first come first drawn, cancelled ones leave or stop, and nothing that goes wrong with one costs the next."""

import threading
import time

import pytest

from latentfm.errors import InputError
from latentfm.web.form import checked
from latentfm.web.limits import Limits
from latentfm.web.line import Line
from latentfm.web.models import Models

LIMITS = Limits(waiting=3, at_once=1, batch=50, steps=1000)


@pytest.fixture
def line(tiny_folder, tmp_path):
    return Line(Models([tiny_folder], None, "cpu", "float32"), LIMITS, tmp_path / "outputs")


def wish(line, prompt="a cat", **values):
    return checked(LIMITS, **{"prompt": prompt, "steps": 1, "guidance": 1, "seed": 1, "model": line.models.names()[0]} | values)


def over(*jobs, seconds=120):
    end = time.monotonic() + seconds
    while not all(job.over for job in jobs):
        assert time.monotonic() < end, [job.state for job in jobs]
        time.sleep(0.01)
    return jobs


@pytest.fixture
def held(line, monkeypatch):
    """What lets the model's first drawing go on: until then whoever comes waits."""
    gate, draw = threading.Event(), line.draw

    def waiting(job):
        gate.wait(60)
        draw(job)

    monkeypatch.setattr(line, "draw", waiting)
    return gate


def test_first_come_first_drawn_and_everyone_is_told_their_place(line, held):
    jobs = [line.join(wish(line, f"number {number}")) for number in range(3)]
    while jobs[0].state != "drawing":
        time.sleep(0.01)
    assert [line.before(job) for job in jobs] == [0, 1, 2] and [job.state for job in jobs[1:]] == ["waiting"] * 2
    held.set()
    over(*jobs)
    assert [job.state for job in jobs] == ["done"] * 3
    ages = [job.made[0][0].stat().st_mtime_ns for job in jobs]
    assert ages == sorted(ages)


def test_a_full_queue_says_so_and_one_who_leaves_makes_room(line, held):
    first = line.join(wish(line))
    while first.state != "drawing":
        time.sleep(0.01)
    waiting = [line.join(wish(line)) for _ in range(3)]
    with pytest.raises(InputError, match="3 requests are waiting, the most that is taken here is 3"):
        line.join(wish(line))
    line.leave(waiting[1])
    assert waiting[1].state == "cancelled" and line.before(waiting[2]) == 2
    last = line.join(wish(line))
    held.set()
    over(first, *waiting, last)
    assert [len(job.made) for job in (first, *waiting, last)] == [1, 1, 0, 1, 1]


def test_a_cancelled_drawing_stops_between_steps_and_keeps_what_is_finished(line):
    job = line.join(wish(line, count=40, steps=100))
    while len(job.made) < 2:
        assert not job.over
        time.sleep(0.005)
    line.leave(job)
    next_one = line.join(wish(line))
    over(job, next_one)
    assert job.state == "cancelled" and 2 <= len(job.made) < 40 and all(path.is_file() for path, _ in job.made)
    assert not list(line.out.glob(".*")) and next_one.state == "done"
    line.leave(job)  # once more does nothing


def test_whatever_goes_wrong_the_next_one_is_drawn(line, monkeypatch, capsys):
    for error, said in ((RuntimeError("a kernel died"), "went wrong"), (MemoryError(), "memory"), (InputError("no such thing"), "no such")):

        def fails(*args, error=error):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr("latentfm.web.line.Series.draw", fails)
            (bad,) = over(line.join(wish(line)))
        (good,) = over(line.join(wish(line)))
        assert bad.state == "failed" and said in bad.error and good.state == "done"
    assert "a kernel died" in capsys.readouterr().err


def test_previews_come_while_it_is_drawn(line):
    seen, job = 0, line.join(wish(line, steps=400, guidance=2))
    while not job.over:
        seen = max(seen, len(job.previews))
        time.sleep(0.002)
    assert seen == 1 and job.state == "done" and job.step == job.steps == 400 and not job.previews


def test_a_size_that_does_not_fit_and_a_model_that_is_not_offered(line):
    (job,) = over(line.join(wish(line, size="33")))
    assert job.state == "failed" and "size 33x33 does not fit this model" in job.error
    with pytest.raises(InputError, match="no model '/etc'"):
        line.join(wish(line, model="/etc"))
