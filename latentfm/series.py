"""A series of requests drawn with one model: a batch after another, each picture saved at once. Whoever asked listens.

The command line and the page both draw by it, so that the same request gives the same picture, under the same name, with the same settings.
"""

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentfm.drawing import contact_sheet, draw, save, slug
from latentfm.errors import Failure, InputError
from latentfm.requests import Request, Settings, batches
from latentfm.words import count as count_of
from latentfm.words import shortened

if TYPE_CHECKING:
    from PIL import Image

    from latentfm.pipelines.text_to_image import LatentFMPipeline

ENOUGH = 16  # pictures that could not be drawn: no more are tried where none could be
MOST_IN_SHEET = 1000  # characters of a prompt in the settings of a contact sheet


class Listener:
    """Who is told of a series as it is drawn. This one wants to know nothing; what it raises ends the series, with what is saved kept."""

    look: "Callable[[list[Image.Image]], None] | None" = None  # is shown what the pictures of a batch will be, after each step

    def advance(self, pictures: int) -> None:
        """So many pictures are a step further."""

    def drawn(self, part: list[Request], images: "list[Image.Image | InputError]") -> None:
        """A batch is drawn."""

    def saving(self) -> AbstractContextManager:
        """A context in which a drawn batch is saved and told."""
        return nullcontext()

    def kept(self, path: Path, settings: dict[str, Any]) -> None:
        """A picture is saved, with these settings in it."""

    def failed(self, request: Request, error: InputError) -> None:
        """A picture could not be drawn."""

    def sheet(self, path: Path) -> None:
        """The contact sheet of all of them is saved."""


@dataclass
class Series:
    """Requests drawn a batch at a time, each picture saved at once in the folder `out` under its seed and prompt.

    shared: of the pipeline's calls. common: what every PNG says besides its own settings. swept: the options with several values.
    """

    pipe: "LatentFMPipeline"
    shared: dict[str, Any]
    common: dict[str, Any]
    out: Path
    with_grid: bool = False
    swept: list[str] = field(default_factory=list)
    listener: Listener = field(default_factory=Listener)

    def draw(self, asked: list[Request], batch: int, number: int) -> None:
        """Draws them all, and a contact sheet where there is one. Raises InputError, at the end, for those that could not be drawn."""
        from latentfm.pictures import cell

        made, thumbnails, failures = [], [], []
        for part in batches(asked, batch):
            images = self.images(part)
            self.listener.drawn(part, images)
            with self.listener.saving():
                for request, image in zip(part, images, strict=True):
                    if isinstance(image, InputError):
                        failures.append(image)
                        self.listener.failed(request, image)
                        continue
                    made.append((request, self.keep(request, image)))
                    if self.with_grid:
                        thumbnails.append(cell(image))
            if not made and len(failures) >= ENOUGH:
                break
        if self.with_grid and thumbnails:
            self.save_sheet(asked, made, thumbnails, number)
        if failures and len(asked) == 1:
            raise failures[0]
        if failures:
            count = f"{len(failures):,} of {count_of(len(asked), 'picture')}"
            raise Failure(f"{count} could not be drawn, {len(made):,} are saved; {failures[0]}")

    def images(self, part: list[Request]) -> "list[Image.Image | InputError]":
        """The pictures of one batch, whose settings are the same; in the place of one that cannot be drawn stands why."""
        try:
            arguments = self.arguments(part[0].settings)
        except InputError as error:  # the picture to begin from cannot be read, which costs these alone
            return [error] * len(part)
        return draw(self.pipe, [(each.prompt, each.seed) for each in part], arguments, self.listener.advance, self.listener.look)

    def arguments(self, settings: Settings) -> dict[str, Any]:
        """The pipeline's arguments for pictures with these settings, but for their prompts and seeds."""
        found = self.shared | {"negative_prompt": settings.negative or None, "height": settings.height, "width": settings.width}
        if settings.image is not None:
            from latentfm.data.images import open_rgb

            found |= {"image": open_rgb(settings.image), "strength": settings.strength}  # None is the pipeline's own
            if settings.mask is not None:
                found |= {"mask_image": open_rgb(settings.mask), "strength": settings.strength or 1.0}
        return found | asdict(settings.sampler)

    def keep(self, request: Request, image: "Image.Image") -> Path:
        """The path of a picture, saved and told."""
        settings = self.settings(request)
        path = save(image, self.out, self.stem(request), settings)
        self.listener.kept(path, settings)
        return path

    def stem(self, request: Request) -> str:
        """The name of a picture's file, but for a number where it is taken."""
        swept = "".join(f"-{name}-{value}" for name, value in self.values_of(request).items())
        return f"{request.seed}-{slug(request.prompt)}{swept}"

    def settings(self, request: Request) -> dict[str, Any]:
        """What a picture's PNG says."""
        return {"prompt": request.prompt, "seed": request.seed, **request.settings.recorded(), **self.common}

    def existing(self, request: Request) -> Path | None:
        """The path of the picture where it is there already, drawn with these settings on whatever device."""
        from latentfm.pictures import names_of, read_settings

        wanted, placed = json.loads(json.dumps(self.settings(request))), {"device": ""}
        for path in itertools.takewhile(Path.exists, names_of(self.out, self.stem(request))):
            with contextlib.suppress(InputError):  # no picture of ours
                if read_settings(path) | placed == wanted | placed:
                    return path
        return None

    def values_of(self, request: Request) -> dict[str, str]:
        """The values of the swept options that a request is drawn with, by the option's name."""
        names = ("steps", "guidance", "solver")
        found = {name: "own" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
                 for name, value in zip(names, request.swept, strict=False)}  # fmt: skip
        return {name: found[name] for name in self.swept}

    def save_sheet(self, asked: list[Request], made: list[tuple[Request, Path]], thumbnails: "list[Image.Image]", number: int) -> None:
        """Saves and tells the contact sheet: of a sweep a table, the last swept option's values beside each other."""
        from latentfm.pictures import table

        first = made[0][0]
        pictures = [{"file": path.name, "prompt": shortened(each.prompt, MOST_IN_SHEET), "seed": each.seed} for each, path in made]
        whole = False
        if self.swept and len(made) == len(asked):
            columns = list(dict.fromkeys(list(self.values_of(each).values())[-1] for each in asked))
            rows: dict[tuple, list] = {}
            times = Counter()  # that the same is asked for
            for (request, _), image in zip(made, thumbnails, strict=True):
                *above, column = self.values_of(request).items()
                row = (request.prompt, request.seed, *above)
                times[row, column] += 1
                rows.setdefault((times[row, column], *row), []).append(image)
            labels = [", ".join([shortened(text, 24), f"seed {seed}", *(f"{n} {v}" for n, v in above)]) for _, text, seed, *above in rows]
            whole = all(len(row) == len(columns) for row in rows.values())  # not where some of it was there before
        if whole:
            sheet = table(list(rows.values()), labels, [f"{self.swept[-1]} {value}" for value in columns])
        else:
            prompts = len(dict.fromkeys(each.prompt for each in asked))
            sheet = contact_sheet(thumbnails, [(each["prompt"], each["seed"]) for each in pictures], number, prompts)
        settings = first.settings.recorded() | self.common | {"seed": first.seed, "pictures": pictures}
        self.listener.sheet(save(sheet, self.out, f"grid-{first.seed}", settings))
