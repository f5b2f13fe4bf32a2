"""`latentfm app`: what is refused before anything is loaded, and whom it lets in."""

import socket

import pytest

pytest.importorskip("gradio", reason='the page needs Gradio: pip install "latentfm[app]"')


@pytest.fixture
def started(monkeypatch):
    """What the server would have been started with."""
    from latentfm.cli import app

    calls = []
    monkeypatch.delenv(app.PASSWORD, raising=False)
    monkeypatch.setattr(app, "run", lambda *given: calls.append(given))
    return calls


def test_it_is_on_this_machine_alone_unless_told_otherwise(run, started):
    assert run("app").exit_code == 0 and "127.0.0.1" in started[0] and started[0][6] is None and True not in started[0]
    open_to_all = run("app", "--host", "0.0.0.0")
    assert open_to_all.exit_code == 2 and "--password" in open_to_all.stderr and len(started) == 1
    assert run("app", "--host", "0.0.0.0", "--without-password").exit_code == 0 and len(started) == 2


def test_blocks_are_compiled_where_that_is_asked_for(run, started):
    assert run("app").exit_code == 0 and run("app", "--compile").exit_code == 0
    assert [one for one, other in zip(*started, strict=True) if one != other] == [False] and True in started[1]


def test_a_password_comes_from_the_environment_and_never_from_an_argument(run, started, monkeypatch):
    assert run("app", "--password").exit_code == 2  # there is no terminal to ask on
    monkeypatch.setenv("LATENTFM_PASSWORD", "secret")
    assert run("app", "--host", "0.0.0.0").exit_code == 0 and "secret" in started[0]
    assert run("app", "--password", "secret").exit_code == 2  # it takes no value


@pytest.mark.parametrize(
    "words, said",
    [
        (("--max-size", "0"), "--max-size 0 must be at least 1"),
        (("--batch", "-1"), "--batch -1 must be at least 1"),
        (("--model", "nothing"), "--model nothing does not exist"),
        (("--loras", "nothing"), "--loras nothing is no folder"),
        (("--data", "nothing"), "--data nothing"),
        (("--device", "gpu"), "--device 'gpu' does not exist"),
        (("--host", "0.0.0.0", "--without-password", "--runs", "."), "needs a password"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(run, started, words, said):
    answer = run("app", *words)
    assert answer.exit_code == 2 and said in answer.stderr and not started


def test_a_port_that_is_taken_is_said_and_without_one_the_next_is_taken():
    from latentfm.errors import InputError
    from latentfm.web.serve import listening

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(InputError, match="cannot listen on 127.0.0.1, port"):
            listening("127.0.0.1", other.getsockname()[1])
    with listening("127.0.0.1", None) as first, listening("127.0.0.1", None) as second:
        assert first.getsockname()[1] < second.getsockname()[1] <= 7869
