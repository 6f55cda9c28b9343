"""Training: recipe in, checkpoints, metrics and an exported model out. `run` is all a caller needs."""

from swat_lm.train.events import DivergedError, Event, EventKind, RunResult
from swat_lm.train.loop import run

__all__ = ["DivergedError", "Event", "EventKind", "RunResult", "run"]
