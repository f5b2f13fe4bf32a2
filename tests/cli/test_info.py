"""`latentfm info`: what is there is told, and what is missing with the command that brings it."""

import json

import torch

from latentfm import system


def test_what_is_there(run):
    result = run("info", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] == torch.__version__
    assert found["attention"]["cpu"][:2] == ["auto", "native"] and found["processor"]["cores"] >= 1
    assert len(found["devices"]) == torch.cuda.device_count()
    assert not found["missing"].keys() & found["versions"].keys()


def test_in_words(run):
    result = run("info")
    assert result.exit_code == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == "versions" and any(line.startswith("  torch ") for line in lines)


def test_what_is_missing_is_told_with_the_command(monkeypatch):
    real = system.version
    monkeypatch.setattr(system, "version", lambda name: None if name == "torchao" else real(name))
    assert system.describe()["missing"]["torchao"] == "quantised weights: pip install torchao"
