"""What a command tells of pictures as they are drawn: a bar on stderr, each path or JSON object on stdout, failures as they come."""

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentfm.cli.terminal import say, show, uninterrupted
from latentfm.cli.watch import Watch
from latentfm.errors import InputError
from latentfm.requests import Request
from latentfm.series import ENOUGH, Listener
from latentfm.words import count as count_of
from latentfm.words import shortened

if TYPE_CHECKING:
    from PIL import Image
    from rich.progress import Progress, TaskID


class Teller(Listener):
    """A series of `count` pictures told on a terminal; with `watch` they are seen as they form."""

    def __init__(self, bar: "Progress", task: "TaskID", out: Path, count: int, as_json: bool, watch: Watch | None = None):
        self.bar, self.task, self.out, self.count, self.as_json, self.watch = bar, task, out, count, as_json, watch
        self.look = watch and watch.show
        self.done = self.saved = self.lost = 0

    def advance(self, pictures: int) -> None:
        self.bar.advance(self.task, pictures)

    def drawn(self, part: list[Request], images: "list[Image.Image | InputError]") -> None:
        if self.watch is not None:
            self.watch.show([image for image in images if not isinstance(image, InputError)], finished=True)
        self.done += len(part) * part[0].settings.sampler.num_inference_steps
        self.bar.update(self.task, completed=self.done)

    def saving(self) -> AbstractContextManager:
        return uninterrupted()  # what is drawn is saved, and told

    def kept(self, path: Path, settings: dict[str, Any]) -> None:
        self.saved += 1
        show(json.dumps({"file": str(path), **settings}) if self.as_json else path, self.bar)

    def failed(self, request: Request, error: InputError) -> None:
        self.lost += 1
        if self.count > 1 and self.lost <= ENOUGH:
            say(f"not drawn: seed {request.seed}, '{shortened(request.prompt)}': {error}", self.bar)

    def sheet(self, path: Path) -> None:
        show(json.dumps({"file": str(path), "grid": True}) if self.as_json else path, self.bar)

    def closed(self) -> None:
        """Says how many pictures are saved where nobody hears standard output any more."""
        if getattr(sys.stdout, "lost", False):
            say(f"note: standard output was closed; {count_of(self.saved, 'picture')} saved in {self.out}", self.bar)
