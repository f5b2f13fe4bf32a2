"""A run's progress: a live bar in a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Shows caching and training with loss, pictures a second and time left; silent unless `active`."""

    def __init__(self, active: bool):
        self.active = active
        self.console = Console(stderr=True)
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=self.console, disable=not (active and self.console.is_terminal),
        )  # fmt: skip
        self.smoothed: float | None = None
        self.task: int | None = None  # the training's
        self.printed, self.waiting = 0.0, False

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        for now in [now for now in self.bar.tasks if now.finished and now.id != self.task]:
            self.remove_task(now.id)
        self.bar.stop()

    def add_task(self, description: str, total: int) -> int:
        self.described, self.printed, self.waiting = description, 0.0, False
        return self.bar.add_task(description, total=total)

    def advance(self, task: int, count: int) -> None:
        self.bar.advance(task, count)
        now = self.bar.tasks[self.bar.task_ids.index(task)]
        if self.due():
            print(f"{now.description}: {now.completed:,.0f} of {now.total:,.0f}", flush=True)

    def update(self, task: int, description: str) -> None:
        self.bar.update(task, description=description)
        if self.due(not self.waiting):
            self.waiting = True
            print(description, flush=True)

    def remove_task(self, task: int) -> None:
        """Ends a task; where lines were printed of it, the last says so."""
        now = self.bar.tasks[self.bar.task_ids.index(task)]
        if self.printed and self.due(now=True):
            print(f"{self.described}: {now.total:,.0f} of {now.total:,.0f}", flush=True)
        self.bar.remove_task(task)

    def start(self, step: int, steps: int) -> None:
        """Begins the training bar at `step` of `steps`."""
        self.steps, self.printed = steps, 0.0
        self.task = self.bar.add_task("training", total=steps, completed=step)

    def step(self, step: int, row: dict[str, float]) -> None:
        """Shows the log row of step `step`; the loss is smoothed over about 50 steps."""
        self.smoothed = row["loss"] if self.smoothed is None else 0.98 * self.smoothed + 0.02 * row["loss"]
        pace = row["images_per_second"]
        text = f"training  loss {self.smoothed:.4f}  {pace:.1f} images/s"
        self.bar.update(self.task, completed=step, description=text)
        if self.due(step == self.steps):
            print(f"step {step}/{self.steps}  {text}", flush=True)

    def due(self, now: bool = False) -> bool:
        """Whether a plain line should be printed: where there is no bar, the last is a while ago, or `now`."""
        if not self.active or self.console.is_terminal or not (now or time.monotonic() - self.printed > SECONDS_BETWEEN_LINES):
            return False
        self.printed = time.monotonic()
        return True
