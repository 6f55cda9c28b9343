"""Live progress of runs: bars with loss, tokens per second and time left on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from swat_lm.cli.console import messages

if TYPE_CHECKING:
    from swat_lm.train.events import Event

__all__ = ["RunProgress", "clock", "counting"]

# lines in a log file: often enough to see that it lives, seldom enough to read
SECONDS_BETWEEN_LINES = 10.0
# on a narrower terminal the numbers take the bar's place
WIDTH_WITH_BAR = 110


def clock(seconds: float | None) -> str:
    """Seconds as 1:23 or 2:03:04; dashes if unknown."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def new_bars(console: Console, *, transient: bool) -> Progress:
    """Bars that show a text of numbers and the time left; numbers that find no room wrap and are never cut off."""
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=False, overflow="fold")),
        *((BarColumn(bar_width=20),) if console.width >= WIDTH_WITH_BAR else ()),
        TextColumn("{task.fields[numbers]}", markup=False, table_column=Column(no_wrap=False, overflow="fold")),
        TextColumn("{task.fields[left]} left", markup=False, table_column=Column(no_wrap=True)),
    )
    return Progress(*columns, console=console, transient=transient)


class RunProgress:
    """Draws training runs, by name and maybe several side by side; a context manager.

    Losses are those of metrics.jsonl: of the step itself, and of the last evaluation, with its step where that is past.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or messages()
        self._live = self._console.is_terminal and not self._console.quiet
        self._bars = new_bars(self._console, transient=False)
        self._tasks: dict[str, TaskID] = {}
        self._losses: dict[str, float] = {}
        self._held_out: dict[str, tuple[int, float]] = {}
        self._last_line: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # on a terminal that cannot be drawn on, Rich ends also what never began by an empty line
        if self._tasks:
            self._bars.stop()

    def event(self, name: str, event: "Event") -> None:
        """Take one event of the run."""
        if event.preparing is not None:
            self.count(f"{name}: preparing text", event.preparing.bytes_read, event.preparing.bytes_total)
            return
        if event.loss is not None:
            self._losses[name] = event.loss
        if event.held_out_loss is not None:
            self._held_out[name] = (event.step, event.held_out_loss)
        if event.kind == "start" and event.path is not None:
            self.say(f"{name}: continues from {event.path}")
        if event.kind == "interrupt":
            self.say(f"{name}: stopped at step {event.step:,} and saved; the same command continues it")
        important = event.kind == "evaluate" or (event.kind == "step" and event.step == event.steps)
        if event.kind in ("step", "evaluate"):
            numbers = f"step {event.step:,}/{event.steps:,}  {self._numbers(name, event)}"
            self._show(name, event.step, event.steps, numbers, event.seconds_left, important)

    def count(
        self, name: str, done: int, total: int, numbers: str | None = None, seconds_left: float | None = None
    ) -> None:
        """So much of other work is done: with its own numbers, the last of which are always shown, or in percent."""
        if numbers is None:
            self._show(name, done, total, f"{100 * done / max(total, 1):.0f} %", seconds_left, False)
        else:
            self._show(name, done, total, numbers, seconds_left, done == total)

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._console.print(text, markup=False)

    def _numbers(self, name: str, event: "Event") -> str:
        parts = [f"loss {self._losses[name]:.3f}"] if name in self._losses else []
        if name in self._held_out:
            step, loss = self._held_out[name]
            parts.append(f"held out {loss:.3f}" + ("" if step == event.step else f" at step {step:,}"))
        if event.tokens_per_second is not None:
            parts.append(f"{event.tokens_per_second:,.0f} tokens/s")
        return "  ".join(parts)

    def _show(self, name: str, done: int, total: int, numbers: str, left: float | None, important: bool) -> None:
        if self._live:
            self._bars.start()
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total, numbers="", left=clock(None))
            self._bars.update(self._tasks[name], completed=done, total=total, numbers=numbers, left=clock(left))
            return
        now = time.monotonic()
        if important or now - self._last_line.get(name, 0.0) >= SECONDS_BETWEEN_LINES:
            self._last_line[name] = now
            rest = "" if left is None else f"  {clock(left)} left"
            self.say(f"{name}: {numbers}{rest}")


@contextmanager
def counting(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over a known amount of work, with the rate in its unit; silent where there is no terminal.

    Gives a function that is told how much of the whole is done.
    """
    console = messages()
    if console.quiet or not console.is_terminal:
        yield lambda done, total: None
        return
    began = time.monotonic()

    def show(done: int, total: int) -> None:
        seconds = max(time.monotonic() - began, 1e-6)
        numbers = f"{100 * done / max(total, 1):.0f} %  {done / seconds:,.0f} {unit}/s"
        left = seconds / done * (total - done) if done else None
        bars.update(task, completed=done, total=total, numbers=numbers, left=clock(left))

    with new_bars(console, transient=True) as bars:
        task = bars.add_task(name, total=None, numbers="", left=clock(None))
        yield show
