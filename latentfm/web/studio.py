"""What the page and its endpoint share: the models, the queue, the gallery and the limits, and one way to ask for pictures."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentfm.errors import InputError
from latentfm.web import html
from latentfm.web.canvas import sources
from latentfm.web.form import checked
from latentfm.web.gallery import Gallery
from latentfm.web.limits import Limits
from latentfm.web.line import Job, Line
from latentfm.web.models import Models

GLANCE = 0.1  # seconds between two looks at a job
PULSE = 2.0  # seconds after which a look is told though nothing changed: so it is noticed that nobody listens any more


@dataclass
class Studio:
    """One model at a time, a queue before it, and the folder of what was drawn."""

    models: Models
    limits: Limits
    gallery: Gallery
    line: Line

    @classmethod
    def of(cls, models: Models, limits: Limits, out: Path) -> "Studio":
        return cls(models, limits, Gallery(out), Line(models, limits, out))

    def ask(self, values: dict[str, Any]) -> Job:
        """The job of what `form.checked` takes, with `canvas` in the place of files. Raises InputError for what cannot be."""
        given = {"model": self.models.names()[0]} | {name: value for name, value in values.items() if name != "canvas"}
        if isinstance(given["model"], str):
            given |= self.models.usual(given["model"]).unless({name: None if value == "" else value for name, value in given.items()})
        checked(self.limits, **given)  # first, so that nothing is kept of what is refused
        return self.line.join(checked(self.limits, **given, **sources(values.get("canvas"), self.limits, self.gallery)))

    async def drawn(self, values: dict[str, Any]) -> AsyncIterator[Job]:
        """The job, again and again as it changes, until it is over; it is given up when nobody wants the next look."""
        job = await asyncio.to_thread(self.ask, values)
        try:
            before, told = None, float("-inf")
            while before is None or not job.over:
                now = (job.changed, self.line.before(job))
                if now != before or time.monotonic() - told > PULSE:
                    before, told = now, time.monotonic()
                    yield job
                await asyncio.sleep(GLANCE)
            yield job
        finally:
            self.line.leave(job)

    def tiles(self, most: int) -> str:
        """The newest pictures of the gallery as HTML."""
        names = self.gallery.names(most + 1)
        return html.tiles(names[:most], len(names) > most)

    def details(self, name: str) -> str:
        """What a picture of the gallery says of itself, as HTML. Raises InputError where there is no such picture."""
        try:
            settings, note = self.gallery.settings(name), ""
        except InputError as error:
            self.gallery.read(name)  # there, but it says nothing
            settings, note = {}, str(error)
        model, lora = self.models.name_of(settings.get("model")), None
        if isinstance(settings.get("lora"), list):
            lora = ", ".join(self.models.lora_of(path) or html.last_part(path) for path in settings["lora"])
        return html.details(name, settings, model, lora, note)
