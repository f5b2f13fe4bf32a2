"""Eight people at once, twenty-five pictures each: none fails, none is passed over, and the memory stays what it was."""

import statistics
import sys
import threading
import time
from pathlib import Path

import pytest
from gradio_client import Client

pytestmark = pytest.mark.slow
PEOPLE, EACH = 8, 25


def memory() -> float:
    """What this process has in memory, in MiB."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_eight_people_at_once_neither_fail_nor_starve(serving, monkeypatch, capsys):
    site = serving(steps=4)
    line, jobs = site.studio.line, []
    join = line.join

    def noting(wish):
        job = join(wish)
        jobs.append(job)
        return job

    monkeypatch.setattr(line, "join", noting)
    clients = [Client(site.url, verbose=False) for _ in range(PEOPLE)]
    clients[0].predict("warm", steps="1", guidance="1", api_name="/generate")
    jobs.clear()
    seconds, wrong, levels = [], [], []

    def person(number: int) -> None:
        for turn in range(EACH):
            began = time.monotonic()
            try:
                pictures = clients[number].predict(f"{number} {turn}", steps="1", guidance="1", seed=turn, api_name="/generate")
                assert [each["settings"]["prompt"] for each in pictures] == [f"{number} {turn}"]
            except Exception as error:
                wrong.append((number, turn, repr(error)))
            seconds.append(time.monotonic() - began)
            levels.append(memory())

    people = [threading.Thread(target=person, args=(number,)) for number in range(PEOPLE)]
    for each in people:
        each.start()
    for each in people:
        each.join(600)
    assert not wrong and len(jobs) == PEOPLE * EACH and all(job.state == "done" for job in jobs)
    drawn = [job.made[0][0].stat().st_mtime_ns for job in jobs]
    assert drawn == sorted(drawn)  # in the order they came
    prompts = [job.wish.prompt.split() for job in jobs]
    for number in range(PEOPLE):  # while everybody asks, nobody is served twice before all the others were once
        turns = [place for place, (who, _) in enumerate(prompts) if int(who) == number][: EACH - 5]
        assert max(after - before for before, after in zip(turns, turns[1:])) <= 2 * PEOPLE
    quarter = len(levels) // 4
    early, late = statistics.median(levels[quarter : 2 * quarter]), statistics.median(levels[-quarter:])
    with capsys.disabled():
        ordered = sorted(seconds)
        told = ", ".join(f"{share:.0%} {ordered[min(len(ordered) - 1, int(share * len(ordered)))]:.2f} s" for share in (0.5, 0.9, 0.99))
        print(f"\n{PEOPLE} people, {len(seconds)} requests: {told}; memory {early:.0f} MiB early, {late:.0f} late")
    assert late - early < 40
