"""What the buttons of the page do."""

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from latentfm.data.images import open_rgb
from latentfm.errors import InputError
from latentfm.pictures import read_settings
from latentfm.requests import own_settings
from latentfm.web import html
from latentfm.web.canvas import sent, to_paint_on
from latentfm.web.form import SEEDS
from latentfm.web.line import Job
from latentfm.web.reuse import again
from latentfm.web.studio import Studio

PAGE = 48  # pictures of the gallery that are shown at first, and more at a time
QUIET = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Seen:
    """The parts of the page that change. chosen: the name of the picture whose settings are shown. many: pictures of the gallery."""

    controls: dict[str, gr.components.Component]
    stage: gr.HTML
    gallery: gr.HTML
    details: gr.HTML
    part: gr.Column
    chosen: gr.State
    many: gr.State
    draw: gr.Button
    cancel: gr.Button
    folded: gr.Accordion


def connect(studio: Studio, seen: Seen, use: gr.Button, begin: gr.Button, dice: gr.Button, dropped: gr.File) -> None:
    """Has the page's parts do what they are for."""
    controls = seen.controls
    shown = [seen.stage, seen.gallery, seen.details, seen.part, seen.chosen, seen.draw, seen.cancel, controls["seed"]]
    # In the browser a part that was ever told of an event's progress is asked for its value at each step of every event: the canvas would
    # send its pictures in again and again. So none tells it, and what is on it is taken once, by the browser alone.
    canvas, taken = controls["canvas"], gr.JSON(visible=False)
    alone = QUIET | {"show_progress_on": seen.stage}
    first = seen.draw.click(None, canvas, taken, js="(canvas) => canvas", **QUIET)
    inputs = {*controls.values(), seen.many, taken} - {canvas}
    jobs = Jobs(studio, seen, taken)
    first.then(jobs.draw, inputs, shown, concurrency_limit=None, **QUIET)
    seen.cancel.click(jobs.cancel, None, None, queue=False, **QUIET)
    for place in (seen.stage, seen.gallery):

        def choose(event: gr.EventData) -> tuple:
            name = str(getattr(event, "name", ""))
            found = chosen(studio, name)
            return *found, html.alone(name) if found[-1] else gr.skip()

        place.choose(choose, None, [seen.details, seen.part, seen.chosen, seen.stage], **QUIET)
    seen.gallery.more(lambda many: (many + PAGE, studio.tiles(many + PAGE)), seen.many, [seen.many, seen.gallery], **QUIET)
    use.click(lambda name: used(studio, seen, name), seen.chosen, [*controls.values(), seen.stage], **alone)
    begin.click(lambda name: begun(studio, name), seen.chosen, [controls["canvas"], seen.folded], **alone)
    dice.click(lambda: (str(secrets.randbelow(SEEDS)), True), None, [controls["seed"], controls["keep"]], **QUIET)
    dropped.upload(lambda path: read_back(studio, seen, path), dropped, [*controls.values(), seen.stage, dropped], **alone)


class Jobs:
    """The jobs of those who have the page open, by their sessions."""

    def __init__(self, studio: Studio, seen: Seen, taken: gr.JSON):
        self.studio, self.seen, self.taken = studio, seen, taken
        self.of: dict[str, Job] = {}

    async def draw(self, given: dict, request: gr.Request) -> AsyncIterator[dict]:
        """The page's parts as they change while its job is drawn."""
        seen, session, many = self.seen, request.session_hash, given[self.seen.many]
        at_rest = {seen.draw: gr.update(visible=True), seen.cancel: gr.update(visible=False)}
        try:
            values = values_of({name: given[part] for name, part in seen.controls.items() if part in given})
            async for job in self.studio.drawn(values | {"canvas": given[self.taken]}):
                news: dict[Any, Any] = {seen.stage: html.stage(job, self.studio.line.before(job))}
                if session not in self.of:
                    news |= {seen.controls["seed"]: str(job.wish.seed)}
                    news |= {seen.draw: gr.update(visible=False), seen.cancel: gr.update(visible=True)}
                self.of[session] = job
                if not job.over:
                    yield news
                    continue
                news |= at_rest | {seen.gallery: self.studio.tiles(many)}
                if job.made:
                    news |= dict(zip((seen.details, seen.part, seen.chosen), chosen(self.studio, job.made[0][0].name), strict=True))
                yield news
        except InputError as error:
            yield at_rest | {seen.stage: html.problem(str(error))}
        finally:
            self.of.pop(session, None)

    def cancel(self, request: gr.Request) -> None:
        """Has the session's job stop after its step; `draw` tells the rest."""
        if (job := self.of.get(request.session_hash)) is not None:
            self.studio.line.leave(job)


def values_of(given: dict[str, Any]) -> dict[str, Any]:
    """The form's values as `form.checked` takes them: several steps in the place of one, no LoRA, a seed only where it is kept."""
    several = {name: given.pop(f"several_{name}") for name in ("steps", "guidance", "solvers")}
    keep, lora = given.pop("keep"), given.pop("lora")
    for name in ("steps", "guidance"):
        if (text := several[name] or "").strip():
            given[name] = text
    if several["solvers"]:
        given["solver"] = ",".join(several["solvers"])
    return given | {"lora": None if lora == "none" else lora, "seed": given["seed"].strip() or None if keep else None}


def chosen(studio: Studio, name: str) -> tuple:
    """What shows a chosen picture's settings: they, that they are seen, and its name."""
    try:
        return studio.details(name), gr.update(visible=True), name
    except InputError as error:
        return html.problem(str(error)), gr.update(visible=False), None


def filled(studio: Studio, seen: Seen, settings: dict[str, Any]) -> list:
    """The controls with a picture's settings, and what the stage says of it."""
    values, remarks = again(settings, studio)
    values["lora"] = values["lora"] or "none"
    return [*(gr.update(value=values[name]) for name in seen.controls), html.remarks(remarks) if remarks else gr.skip()]


def used(studio: Studio, seen: Seen, name: str | None) -> list:
    """The controls with the settings of a picture of the gallery."""
    try:
        return filled(studio, seen, studio.gallery.settings(name or ""))
    except InputError as error:
        return [*(gr.skip() for _ in seen.controls), html.problem(str(error))]


def read_back(studio: Studio, seen: Seen, path: str) -> list:
    """The controls with the settings of a PNG that was dropped."""
    try:
        sent("the picture", {"path": path})
        return [*filled(studio, seen, own_settings("the picture", read_settings(path))), None]
    except InputError as error:
        return [*(gr.skip() for _ in seen.controls), html.problem(str(error).replace(str(path), "the picture")), None]


def begun(studio: Studio, name: str | None) -> tuple:
    """A picture of the gallery on the canvas, which is unfolded."""
    try:
        return to_paint_on(open_rgb(name or "", studio.gallery.read(name or ""))), gr.update(open=True)
    except InputError:
        return gr.skip(), gr.skip()
