"""The queue before the one model: jobs are drawn as they came, by one thread; a cancelled one leaves, or stops between two steps."""

import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentfm.cli.checks import check_size
from latentfm.cli.terminal import say
from latentfm.errors import InputError
from latentfm.requests import Request
from latentfm.series import Listener, Series
from latentfm.web.form import Wish
from latentfm.web.limits import Limits
from latentfm.web.models import Models

if TYPE_CHECKING:
    from PIL import Image

EVERY = 0.2  # seconds between two looks


class Cancelled(Exception):
    """Raised between two steps of a cancelled job."""


@dataclass(eq=False)
class Job(Listener):
    """A wish on its way. state: waiting, drawing, done, failed or cancelled. made: the pictures that are saved, and what they say."""

    wish: Wish
    state: str = "waiting"
    error: str = ""
    notes: list[str] = field(default_factory=list)
    made: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    table: Path | None = None
    step: int = 0
    steps: int = 0  # in all, of all pictures
    previews: "list[Image.Image]" = field(default_factory=list)
    changed: int = 0  # counts up with whatever can be seen of it
    began: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    seen: float = float("-inf")

    def tell(self, **news: Any) -> None:
        """Notes what has changed."""
        for name, value in news.items():
            setattr(self, name, value)
        self.changed += 1

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def advance(self, pictures: int) -> None:
        if self.cancelled:
            raise Cancelled
        self.tell(step=self.step + pictures)

    def look(self, images: "list[Image.Image]") -> None:
        if time.monotonic() - self.seen >= EVERY:
            self.seen = time.monotonic()
            self.tell(previews=images)

    def drawn(self, part: list[Request], images: "list[Image.Image | InputError]") -> None:
        self.tell(previews=[])

    def kept(self, path: Path, settings: dict[str, Any]) -> None:
        self.made.append((path, settings))
        self.tell()

    def failed(self, request: Request, error: InputError) -> None:
        self.notes.append(f"seed {request.seed} was not drawn: {error}")
        self.tell()

    def sheet(self, path: Path) -> None:
        self.tell(table=path)


class Line:
    """Jobs, first come first drawn; the first of them may be at the model. `out` is the folder of the pictures."""

    def __init__(self, models: Models, limits: Limits, out: Path):
        self.models, self.limits, self.out = models, limits, out
        self.jobs: deque[Job] = deque()
        self.lock = threading.Condition()
        self.worker = threading.Thread(target=self.work, name="drawing", daemon=True)
        self.worker.start()

    def join(self, wish: Wish) -> Job:
        """A new job, last in the queue. Raises InputError for a model that is not offered, or where the queue is full."""
        self.models.check(wish.model, wish.lora)
        job = Job(wish)
        with self.lock:
            waiting = sum(each.state == "waiting" for each in self.jobs)
            if waiting >= self.limits.waiting:
                most = f"the most that is taken here is {self.limits.waiting:,}"
                raise InputError(f"{waiting:,} requests are waiting, {most}; try again later")
            self.jobs.append(job)
            self.lock.notify_all()
        return job

    def leave(self, job: Job) -> None:
        """Takes a job out of the queue, or stops it after its step; what it has made is kept. Nothing where it is over."""
        with self.lock:
            job.cancelled = True
            if job in self.jobs and job.state == "waiting":
                self.jobs.remove(job)
                job.tell(state="cancelled")

    def before(self, job: Job) -> int:
        """How many jobs are before this one."""
        with self.lock:
            return self.jobs.index(job) if job in self.jobs else 0

    def work(self) -> None:
        """Draws the jobs, for as long as the process lives."""
        while True:
            with self.lock:
                self.lock.wait_for(lambda: self.jobs)
                job = self.jobs[0]
                job.tell(state="drawing")
            try:
                self.draw(job)
                news = {"state": "done"}
            except Cancelled:
                news = {"state": "cancelled"}
            except InputError as error:
                news = {"state": "failed", "error": str(error)}
            except MemoryError:
                news = {"state": "failed", "error": "the memory did not suffice; ask for fewer or smaller pictures"}
            except Exception as error:  # whatever it is, the next one is drawn
                report(error)
                news = {"state": "failed", "error": "something went wrong here; the server's terminal says what"}
            with self.lock:
                self.jobs.remove(job)
                job.previews = []
                job.tell(**news)

    def draw(self, job: Job) -> None:
        """Draws one job. Raises InputError, and Cancelled between two steps."""
        wish = job.wish
        pipe, common = self.models.ready(wish.model, wish.lora, wish.lora_strength)
        asked = wish.requests(pipe.default_width, pipe.default_height)
        settings = asked[0].settings
        check_size(settings.width, settings.height, pipe.size_multiple, pipe.max_side, "size")
        job.notes += pipe.prompt_warnings(list(dict.fromkeys([wish.prompt, wish.base.negative or ""])))
        if wish.base.negative and max(wish.sweeps["guidance"]) <= 1:
            job.notes.append("the negative prompt does nothing without guidance; it needs more than 1")
        if pipe.distilled_guidance is not None and max(wish.sweeps["guidance"]) > 1:
            job.notes.append(f"this model has guidance {pipe.distilled_guidance:g} in its weights already: 1 is its own")
        job.tell(steps=sum(each.settings.sampler.num_inference_steps for each in asked))
        batch = 1 if "dormand_prince" in wish.sweeps["solver"] else self.limits.at_once
        Series(pipe, {}, common, self.out, bool(wish.swept), wish.swept, job).draw(asked, batch, wish.count)


def report(error: Exception) -> None:
    """Prints an error that nobody foresaw, for whoever runs the server."""
    for part in traceback.format_exception(error):
        for line in part.rstrip().splitlines():
            say(line)
