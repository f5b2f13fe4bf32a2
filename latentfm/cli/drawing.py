"""Pictures drawn one batch after another for a command: each is saved and told at once, those that cannot be drawn are told at the end."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentfm.cli.terminal import say, show, uninterrupted
from latentfm.cli.watch import Watch
from latentfm.drawing import contact_sheet, draw, save, slug
from latentfm.errors import Failure, InputError
from latentfm.requests import Request, Settings, batches
from latentfm.words import count as count_of
from latentfm.words import shortened

if TYPE_CHECKING:
    from PIL import Image
    from rich.progress import Progress, TaskID

    from latentfm.pipelines.text_to_image import LatentFMPipeline

ENOUGH = 16  # pictures that could not be drawn: so many are told, and no more are tried where none could be
MOST_IN_SHEET = 1000  # characters of a prompt in the settings of a contact sheet


@dataclass
class Drawing:
    """Requests drawn a batch at a time, each picture saved at once under its seed and prompt, and its path printed.

    shared: of the pipeline's calls. common: what every PNG says besides its own settings. swept: the options with several values.
    """

    pipe: "LatentFMPipeline"
    shared: dict[str, Any]
    common: dict[str, Any]
    out: Path
    with_grid: bool
    as_json: bool
    bar: "Progress"
    task: "TaskID"
    swept: list[str]
    watch: Watch | None = None

    def all(self, asked: list[Request], batch: int, number: int) -> None:
        """Draws them all, and a contact sheet where there is one. Raises InputError, at the end, for those that could not be drawn."""
        from latentfm.pictures import cell

        made, thumbnails, failures, done = [], [], Failures(len(asked)), 0
        for part in batches(asked, batch):
            settings = part[0].settings
            look = self.watch and self.watch.show
            images = draw(self.pipe, [(each.prompt, each.seed) for each in part], self.arguments(settings), self.advance, look)
            if self.watch is not None:
                self.watch.show([image for image in images if not isinstance(image, InputError)], finished=True)
            done += len(part) * settings.sampler.num_inference_steps
            self.bar.update(self.task, completed=done)
            with uninterrupted():  # what is drawn is saved, and told
                for request, image in zip(part, images, strict=True):
                    if isinstance(image, InputError):
                        failures.tell(request.prompt, request.seed, image, self.bar)
                        continue
                    made.append((request, self.keep(request, image)))
                    if self.with_grid:
                        thumbnails.append(cell(image))
            if not made and failures.number >= ENOUGH:
                break
        if self.with_grid and thumbnails:
            self.sheet(asked, made, thumbnails, number)
        if getattr(sys.stdout, "lost", False):
            say(f"note: standard output was closed; {count_of(len(made), 'picture')} saved in {self.out}", self.bar)
        failures.raise_any(len(made))

    def arguments(self, settings: Settings) -> dict[str, Any]:
        """The pipeline's arguments for pictures with these settings, but for their prompts and seeds."""
        found = self.shared | {"negative_prompt": settings.negative or None, "height": settings.height, "width": settings.width}
        if settings.image is not None:
            from latentfm.data.images import open_rgb

            found |= {"image": open_rgb(settings.image), "strength": settings.strength}  # None is the pipeline's own
            if settings.mask is not None:
                found |= {"mask_image": open_rgb(settings.mask), "strength": settings.strength or 1.0}
        return found | asdict(settings.sampler)

    def advance(self, pictures: int) -> None:
        """Tells the bar that so many pictures are a step further."""
        self.bar.advance(self.task, pictures)

    def keep(self, request: Request, image: "Image.Image") -> Path:
        """The path of a picture, saved; it is printed, or all that is known of the picture."""
        settings = self.settings(request)
        path = save(image, self.out, self.stem(request), settings)
        show(json.dumps({"file": str(path), **settings}) if self.as_json else path, self.bar)
        return path

    def stem(self, request: Request) -> str:
        """The name of a picture's file, but for a number where it is taken."""
        swept = "".join(f"-{name}-{value}" for name, value in self.values_of(request).items())
        return f"{request.seed}-{slug(request.prompt)}{swept}"

    def settings(self, request: Request) -> dict[str, Any]:
        """What a picture's PNG says."""
        return {"prompt": request.prompt, "seed": request.seed, **request.settings.recorded(), **self.common}

    def is_there(self, request: Request) -> bool:
        """Whether the picture is there already, drawn with these settings on whatever device; its path is printed then."""
        from latentfm.pictures import read_settings

        path, placed = self.out / f"{self.stem(request)}.png", {"device": ""}
        try:
            found = read_settings(path) | placed == json.loads(json.dumps(self.settings(request))) | placed
        except InputError:
            return False
        if found:
            show(path, self.bar)
        return found

    def values_of(self, request: Request) -> dict[str, str]:
        """The values of the swept options that a request is drawn with, by the option's name."""
        names = ("steps", "guidance", "solver")
        found = {name: "own" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
                 for name, value in zip(names, request.swept, strict=True)}  # fmt: skip
        return {name: found[name] for name in self.swept}

    def sheet(self, asked: list[Request], made: list[tuple[Request, Path]], thumbnails: "list[Image.Image]", number: int) -> None:
        """Saves and shows the contact sheet: of a sweep a table, the last swept option's values beside each other."""
        from latentfm.pictures import table

        first = made[0][0]
        pictures = [{"file": path.name, "prompt": shortened(each.prompt, MOST_IN_SHEET), "seed": each.seed} for each, path in made]
        if self.swept and len(made) == len(asked):
            columns = list(dict.fromkeys(list(self.values_of(each).values())[-1] for each in asked))
            rows: dict[tuple, list] = {}
            for (request, _), image in zip(made, thumbnails, strict=True):
                *above, _ = self.values_of(request).items()
                rows.setdefault((request.prompt, request.seed, *above), []).append(image)
            labels = [", ".join([shortened(text, 24), f"seed {seed}", *(f"{n} {v}" for n, v in above)]) for text, seed, *above in rows]
            sheet = table(list(rows.values()), labels, [f"{self.swept[-1]} {value}" for value in columns])
        else:
            prompts = len(dict.fromkeys(each.prompt for each in asked))
            sheet = contact_sheet(thumbnails, [(each["prompt"], each["seed"]) for each in pictures], number, prompts)
        settings = first.settings.recorded() | self.common | {"seed": first.seed, "pictures": pictures}
        path = save(sheet, self.out, f"grid-{first.seed}", settings)
        show(json.dumps({"file": str(path), "grid": True}) if self.as_json else path, self.bar)


class Failures:
    """The pictures that could not be drawn: each is told at once, all of them in the error at the end."""

    def __init__(self, count: int):
        self.count, self.number = count, 0
        self.first: InputError | None = None

    def tell(self, text: str, seed: int, error: InputError, bar: "Progress") -> None:
        self.number, self.first = self.number + 1, self.first or error
        if self.count > 1 and self.number <= ENOUGH:
            say(f"not drawn: seed {seed}, '{shortened(text)}': {error}", bar)

    def raise_any(self, saved: int) -> None:
        """Raises the one error there was, or a Failure that counts them."""
        if self.first is not None and self.count == 1:
            raise self.first
        if self.first is not None:
            raise Failure(f"{self.number:,} of {count_of(self.count, 'picture')} could not be drawn, {saved:,} are saved; {self.first}")
