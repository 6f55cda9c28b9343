"""What a run tells whoever watches it, and what it returns. Plain data; the command line draws it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from swat_lm.data import Progress

__all__ = ["DivergedError", "Event", "EventKind", "RunResult"]

EventKind = Literal["prepare", "start", "step", "evaluate", "save", "export", "interrupt", "finish"]


class DivergedError(RuntimeError):
    """The loss or the gradient is no longer a finite number; nothing was saved after the last good checkpoint."""


@dataclass(frozen=True)
class Event:
    """Something that happened in a run; sent by the main process only.

    Order: `prepare`*, `start`, then per step `step` and now and then `evaluate` and `save`; `export`; and at the end
    `finish` or `interrupt`.
    """

    kind: EventKind
    step: int
    """Optimizer steps done so far, of `steps`."""
    steps: int
    tokens: int
    """Target tokens trained on so far."""
    loss: float | None = None
    """Training loss of this step in nats per target token; `step` events only."""
    held_out_loss: float | None = None
    """The same on the held-out documents; `evaluate` events only."""
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    """Over the steps since this process began, evaluation and saving included."""
    seconds_left: float | None = None
    path: Path | None = None
    """The folder written (`save`, `export`) or continued from (`start`)."""
    preparing: Progress | None = None
    """How far tokenising is; `prepare` events only, which come before `start`, and only if there is work to do."""


@dataclass(frozen=True)
class RunResult:
    """Where a run ended."""

    out: Path
    last_step: int
    """Optimizer steps done over the whole run, earlier parts included."""
    last_loss: float | None
    """Training loss of the last step, nats per target token; None if this call had no step left to do."""
    held_out_loss: float | None
    """Of the last evaluation in this call, if there was one."""
    checkpoint: Path | None
    """The newest checkpoint."""
    export: Path | None
    """The `save_pretrained` folder, if the recipe asks for it."""
    interrupted: bool
    """Whether SIGINT, SIGTERM or SIGHUP ended the run early; the same call again continues it."""
