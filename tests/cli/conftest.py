"""What the tests of the commands share."""

import importlib
import json

import pytest
from typer.testing import CliRunner

from latentfm.cli.main import app

generate = importlib.import_module("latentfm.cli.generate")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs the command line with its arguments, in an empty current folder; a command's own file may have another.

    generate's --dtype auto is float32 on every processor, for pictures that can be compared.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "chosen_dtype", lambda name, device: "float32" if name == "auto" else name)
    monkeypatch.delenv("LATENTFM_DEBUG", raising=False)
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def in_json(run):
    """A function that gives what the command of the file's own `run` prints with --json; it must succeed."""

    def answered(*words):
        answer = run(*words, "--json")
        assert answer.exit_code == 0, answer.output
        return json.loads(answer.stdout)

    return answered


@pytest.fixture(autouse=True)
def loud_libraries_afterwards():
    """The command silences the libraries of its process; here that is everybody's process."""
    import diffusers
    import transformers

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    yield
    for library, verbosity in zip(libraries, before, strict=True):
        library.set_verbosity(verbosity)
        library.enable_progress_bar()
