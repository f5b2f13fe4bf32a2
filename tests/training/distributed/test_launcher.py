"""What started the processes of a run, and which of them is gone."""

import os
import time

import pytest

from latentfm.errors import InputError
from latentfm.training.distributed import launcher


@pytest.mark.parametrize(
    ("environment", "command", "asked"),
    [
        ({}, [], None), ({"WORLD_SIZE": "2"}, [], 2), ({"WORLD_SIZE": "x"}, [], None),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, ["python", "/bin/accelerate", "launch", "--cpu", "--num_processes", "4", "x.py"], 4),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, ["/bin/accelerate", "launch", "--num-processes=3"], 3),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, ["/bin/accelerate", "launch", "--num-processes"], None),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, ["/bin/bash", "--num_processes", "4"], None),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, ["accelerate", "launch", "--config_file", "configs/accelerate/cpu-2.yaml"], 2),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, ["accelerate", "launch", "--config_file", "nowhere.yaml"], None),
    ],
)  # fmt: skip
def test_fewer_processes_than_asked_are_said(monkeypatch, request, environment, command, asked):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setattr(launcher, "parent_command", lambda: command)
    said = launcher.fewer_than_asked(1, environment)
    if asked is None:
        assert said is None
    else:
        assert said.startswith(f"{asked} processes were asked for and 1 started") and f"torchrun --nproc_per_node {asked}" in said
        assert launcher.fewer_than_asked(asked, environment) is None


def test_a_process_that_is_gone_is_seen_and_named(monkeypatch):
    assert launcher.parent_command() and not launcher.is_gone(os.getpid())
    if not (pid := os.fork()):
        os._exit(0)
    deadline = time.monotonic() + 10
    while not launcher.is_gone(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    peers = launcher.Peers.__new__(launcher.Peers)
    peers.rank, peers.places = 0, [(os.uname().nodename, os.getpid()), (os.uname().nodename, pid), ("elsewhere", 1)]
    said = r"process 1 of 3 \(pid \d+ on .*\) is gone, .* \(Read error \[1\]: Connection reset by peer\); --resume goes on"
    with pytest.raises(InputError, match=said), peers.lost_ones_named():
        raise RuntimeError("[/a/b/pair.cc:545] Read error [1]: Connection reset by peer")
    os.waitpid(pid, 0)
    peers.places = [*peers.places[:1], *peers.places[2:]]
    with pytest.raises(InputError, match="a process of this run no longer answers on elsewhere"), peers.lost_ones_named():
        raise ConnectionError("Connection closed")
    for error in (RuntimeError("a kernel died"), InputError("gloo"), KeyError("x")):
        with pytest.raises(type(error)) as caught, peers.lost_ones_named():
            raise error
        assert caught.value is error
