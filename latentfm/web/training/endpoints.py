"""What programs call of the trainings: as the page's tab does, by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from latentfm.errors import InputError
from latentfm.web.training.runs import DEFAULTS, Runs, Wanted, command
from latentfm.words import shown

ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "trainings"}  # a dry run reads all pictures' headers


def add(known: Runs) -> None:
    """Adds the endpoints to the page; those that do something where trainings may be started."""

    def trainings() -> list[dict]:
        """The runs, the latest begun first: {"name", "running"} of each."""
        return [{"name": name, "running": bool(known.running(name))} for name in known.names()]

    def training(name: str) -> dict:
        """How a run stands: {"state", "notes", "curves", "validation", "log", "running", "resumable"}; its pictures are on the page."""
        with told():
            look = known.look(name)
        parts = {part: look.run[part] for part in ("state", "notes", "curves", "validation")}
        return parts | {"log": look.log, "running": look.running, "resumable": look.resumable}

    def check_training(
        pictures: str, name: str, configuration: str | None = None, steps: float | None = None, learning_rate: float | None = None,
        trains: str | None = None, rank: float | None = None,
    ) -> dict:  # fmt: skip
        """What a training would do and take: {"command", "text"}. Begins nothing.

        pictures: a folder of training_choices; name: of the run; configuration: one of training_choices, else the first; trains: "every
        weight" or "an adapter", of this rank, any other word is refused; what is not given is the configuration's.
        """
        with told():
            words, _, text = known.check(wanted(pictures, name, configuration, steps, learning_rate, trains, rank))
        return {"command": command(words), "text": text}

    def start_training(
        pictures: str, name: str, configuration: str | None = None, steps: float | None = None, learning_rate: float | None = None,
        trains: str | None = None, rank: float | None = None,
    ) -> dict:  # fmt: skip
        """Begins a training after checking it; as check_training."""
        asked = wanted(pictures, name, configuration, steps, learning_rate, trains, rank)
        with told():
            words, _, text = known.check(asked)
            known.start(asked)
        return {"command": command(words), "text": text}

    def stop_training(name: str) -> None:
        """Asks a training to save after the step under way and end."""
        with told():
            known.stop(name)

    def resume_training(name: str) -> None:
        """Goes on with a training that was stopped or died, from its newest checkpoint."""
        with told():
            known.resume(name)

    def training_choices() -> dict:
        """What may be chosen: folders of pictures, and configurations."""
        return {"pictures": list(known.pictures()), "configurations": list(known.configurations())}

    def wanted(pictures: str, name: str, configuration: str | None, *numbers: Any) -> Wanted:
        return Wanted(pictures, configuration or next(iter(known.configurations()), DEFAULTS), name, *numbers)

    acting = (check_training, start_training, stop_training, resume_training, training_choices) if known.data is not None else ()
    for each in (trainings, training, *acting):
        gr.api(each, api_name=each.__name__, **(ONE_AT_A_TIME if each in acting else {"concurrency_limit": None}))


@contextmanager
def told() -> Iterator[None]:
    """A context whose InputError is told to who calls, in its own words."""
    try:
        yield
    except (InputError, OSError) as error:
        raise gr.Error(shown(error, 2000), print_exception=False) from None
